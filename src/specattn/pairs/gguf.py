"""Turning a GGUF file into an ordinary model folder: dequantised safetensors, config, tokenizer.

transformers reads GGUF files, but takes a minute and may keep the weights packed, which is slow in bfloat16. And it
leaves things out that matter here: end-of-turn tokens, special tokens of the tokenizer (in some versions), RoPE scaling.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from specattn.errors import SpecAttnError, UsageError
from specattn.pairs.checks import check_config

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF format
_END_OF_TURN = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write ``file`` to ``folder`` as a model that ``from_pretrained`` loads in a moment.

    Raises:
        UsageError: not a GGUF file, an architecture or a feature that is not supported, a library is missing.
        SpecAttnError: the file lacks weights that its architecture needs.
    """
    reader = open_gguf(file)
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    check_config(config, file.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    restore_special_tokens(tokenizer, reader)
    model = _dequantise(source, config, dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def open_gguf(file: Path) -> GGUFReader:
    """The file's header, once it is certain that the file can be converted without losing anything."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"reading {file.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise UsageError(
            f"{file} is not a GGUF file that can be read ({error}). Download it again."
        ) from error
    # transformers drops RoPE scaling, which would quietly spoil long contexts.
    scaling = [
        key for key in reader.fields if ".rope.scaling." in key and _field(reader, key) not in ("none", None)
    ]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]
    if scaling:
        raise UsageError(
            f"{file.name} scales its position encoding ({', '.join(scaling)}), which is lost when a GGUF file is"
            " converted. Use the original model: a hub id or a folder."
        )
    return reader


def restore_special_tokens(tokenizer: PreTrainedTokenizerBase, reader: GGUFReader) -> None:
    """Mark the tokens that the file calls control or user-defined, and name its BOS, EOS, PAD and UNK."""
    from tokenizers import AddedToken

    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type") or []
    known = tokenizer.get_vocab()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        marked = [token for token, its in zip(tokens, kinds, strict=False) if its == kind and token in known]
        added = [AddedToken(token, normalized=False, special=special) for token in marked]
        tokenizer.add_tokens(added, special_tokens=special)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = _field(reader, f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, f"{role}_token", None if token_id is None else tokens[token_id])


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: a GGUF file names one, chat models stop at any usual one that they have."""
    # Only special tokens: "</s>" may also be a word of the vocabulary.
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {special[token] for token in _END_OF_TURN if token in special}
    return sorted(ids | ({tokenizer.eos_token_id} - {None}))


def _dequantise(source: dict[str, Any], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        **source,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(gguf_file=source["gguf_file"], dequantize=True),
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise SpecAttnError(
            f"{source['gguf_file']} lacks {len(info['missing_keys'])} weights of a {config.model_type} model, such as"
            f" {min(info['missing_keys'])}. Use the original model: a hub id or a folder."
        )
    return model


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
