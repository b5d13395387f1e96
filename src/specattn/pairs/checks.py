"""What two models must have in common, and what each must be, before their weights are worth loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specattn.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUPPORTED = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe")
"""``model_type`` of the architectures whose attention is implemented."""


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse an architecture, or a feature of its attention, that is not implemented.

    Raises:
        UsageError: names the model, what it is and what is supported.
    """
    if config.model_type not in SUPPORTED:
        hint = ""
        if f"{config.model_type}_text" in SUPPORTED:
            hint = " This is a multimodal checkpoint: use a text-only one of the same family."
        raise UsageError(
            f"{name} has model type {config.model_type!r}, which is not supported."
            f" Supported: {', '.join(SUPPORTED)}.{hint}"
        )
    feature = _unsupported_feature(config)
    if feature:
        raise UsageError(f"{name} uses {feature}, which is not supported. Use another model.")


def _unsupported_feature(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"attention logit soft-capping (attn_logit_softcapping={config.attn_logit_softcapping})"
    if getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention (use_bidirectional_attention)"
    if getattr(config, "is_causal", True) is False:
        return "attention that is not causal (is_causal=False)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"layers of type {', '.join(sorted(kinds))}" if kinds else None


def check_modules(model: PreTrainedModel, name: str) -> None:
    """Refuse what only a loaded model shows: attention sinks, layers that are not causal.

    Raises:
        UsageError: names the model and the layer.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "layer_idx"):
            continue
        sinks = any(getattr(module, sink, None) is not None for sink in ("sinks", "s_aux"))
        if sinks or getattr(module, "is_causal", True) is False:
            what = "attention sinks" if sinks else "attention that is not causal"
            raise UsageError(f"{name}: {path} has {what}, which is not supported. Use another model.")


def check_tokenizers(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Refuse a draft that writes tokens with other ids than its target.

    Raises:
        UsageError: names a token that they disagree on.
    """
    ours, theirs = _tokens(target), _tokens(draft)
    different = {token for token, _ in ours.items() ^ theirs.items()}
    if not different:
        return
    token = min(different, key=lambda token: (ours.get(token, len(ours)), token))
    raise UsageError(
        f"target and draft have different tokenizers: {len(different):,} tokens differ, such as {token!r}"
        f" (id {ours.get(token)} in the target, {theirs.get(token)} in the draft)."
        " Use a draft of the target's family."
    )


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token to id, without the ``[PAD123]`` that GGUF files name their padding rows."""
    return {token: i for token, i in tokenizer.get_vocab().items() if token != f"[PAD{i}]"}


def check_rows(target: PreTrainedConfig, draft: PreTrainedConfig, tokens: int) -> None:
    """Refuse a draft whose embedding is too short for tokens that the target can produce.

    Models of one family may pad their embeddings to different sizes; only real tokens count.

    Raises:
        UsageError: names both sizes.
    """
    known = min(target.vocab_size, tokens)
    if draft.vocab_size < known:
        raise UsageError(
            f"the draft knows {draft.vocab_size:,} token ids, the target {known:,}: they cannot share a"
            " tokenizer. Use a draft of the target's family."
        )


def check_smaller(target: int, draft: int) -> None:
    """Refuse a draft with more parameters than its target: the two were most likely swapped.

    As many are allowed: a quantised or otherwise cheaper copy of the target, or the target itself, whose attention is
    the best that a draft could predict.

    Raises:
        UsageError: names both parameter counts.
    """
    if draft > target:
        raise UsageError(
            f"the draft has {draft:,} parameters and the target {target:,}: the draft must not be larger."
            " Swap them, or choose a smaller draft."
        )
