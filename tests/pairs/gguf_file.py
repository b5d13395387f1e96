"""Writes a tiny model as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL, NORMAL = TokenType.CONTROL, TokenType.NORMAL
BYTES = [(character, NORMAL) for character in bytes_to_unicode().values()]
TOKENS = [
    *BYTES,
    ("he", NORMAL),
    ("ll", NORMAL),
    ("</s>", NORMAL),  # a word here, not the end of anything
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("<|im_end|>", CONTROL),
    ("[PAD262]", TokenType.UNUSED),
]
IDS = {token: i for i, (token, _) in enumerate(TOKENS)}
CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.o_proj": "attn_output",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.": "ffn_",
    "_proj": "",
}


def write_gguf(path: Path, model: PreTrainedModel, *, leave_out: str | None = None, **metadata: Any) -> Path:
    """The model in float32 with a byte-level tokenizer; ``metadata`` overrides or adds string fields."""
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    _add_tokenizer(writer)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        if leave_out is None or leave_out not in name:
            writer.add_tensor(_gguf_name(name), _gguf_weight(name, weight.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in TOKENS])
    writer.add_token_types([kind for _, kind in TOKENS])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(IDS["<|endoftext|>"])
    writer.add_pad_token_id(IDS["<|endoftext|>"])
    writer.add_eos_token_id(IDS["<|im_end|>"])
    writer.add_chat_template(CHAT)


def _gguf_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("attn.", "attn_")


def _gguf_weight(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions in Llama models, so their queries and keys are reordered."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = next((part for part in heads if part in name), None)
    if config.model_type != "llama" or part is None:
        return weight
    halves = weight.reshape(heads[part], 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
