"""Turning a GGUF file into an ordinary model folder: dequantised safetensors, config, tokenizer.

transformers reads GGUF files, but takes a minute, and leaves out things that matter here: the tokens that end
a turn, in some versions the special tokens of the tokenizer, and RoPE scaling.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from specattn.errors import UsageError
from specattn.pairs.checks import check_config
from specattn.pairs.weights import read_weights

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
        UsageError: not a GGUF file, one that would lose something on the way, a library is missing.
    """
    from transformers import GenerationConfig

    reader = open_gguf(file)
    config, tokenizer = _read_header(file)
    restore_special_tokens(tokenizer, reader)
    model = _dequantise(file, config, dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def open_gguf(file: Path) -> GGUFReader:
    """The file's header, once it is certain that nothing in it is lost in conversion.

    Raises:
        UsageError: not a GGUF file, one with RoPE scaling or with a tokenizer that cannot be read.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{file.name} cannot be read without {' and '.join(missing)}. {_install(*missing)}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise UsageError(f"{file} is not a readable GGUF file ({error}). Download it again.") from error
    if scaling := _rope_scaling(reader):
        raise UsageError(
            f"{file.name} scales its position encoding ({', '.join(scaling)}), which a conversion would lose."
            " Use the original model, by its hub id or folder."
        )
    split = _field(reader, "tokenizer.ggml.pre")
    if Version(version("transformers")) < Version("5.18") and split not in ("qwen2", "smollm"):
        raise UsageError(
            f"transformers {version('transformers')} misreads the tokenizer of {file.name} ({split})."
            f" {_install('transformers>=5.18')}"
        )
    return reader


def _install(*packages: str) -> str:
    return "Install it with: pip install " + " ".join(f'"{package}"' for package in packages)


def _rope_scaling(reader: GGUFReader) -> list[str]:
    """What the file says of RoPE scaling: transformers drops it, which would quietly spoil long contexts."""
    keys = [key for key in reader.fields if ".rope.scaling." in key and _field(reader, key) != "none"]
    return keys + [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]


def _read_header(file: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        check_config(config, file.name)
        return config, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except UsageError:
        raise
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{file.name} cannot be converted: {str(error).rstrip('.')}."
            " Use the original model, by its hub id or folder."
        ) from error


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
    tokenizer.clean_up_tokenization_spaces = False  # else some versions drop spaces when they decode
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = _field(reader, f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, f"{role}_token", None if token_id is None else tokens[token_id])


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: a GGUF file names one, chat models stop at any usual one that they have."""
    # Only special tokens: "</s>" may also be a word of the vocabulary.
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {special[token] for token in _END_OF_TURN if token in special}
    return sorted(ids | ({tokenizer.eos_token_id} - {None}))


def _dequantise(file: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import GgufConfig

    # Recent versions of transformers would keep the weights packed, which is slow in bfloat16.
    unpack = GgufConfig(gguf_file=file.name, dequantize=True)
    return read_weights(
        file.name, file.parent, gguf_file=file.name, config=config, dtype=dtype, quantization_config=unpack
    )


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
