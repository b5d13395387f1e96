"""The mapping artifact: what calibration found out about a pair, as one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.files import write_file
from specattn.mapping.identity import config_hash, describe
from specattn.mapping.samples import Geometry, normalised

__all__ = ["VERSION", "Mapping", "MappingMetadata", "config_hash"]

VERSION = 2
"""The version of the file format. Version 1 lacks the weights of the two signals, and is read too."""

_KEY = "specattn-mapping"  # the only one of the file's header: several would be written in random order
_READABLE = (1, VERSION)
_MIXTURES = ("heads_kv", "heads_query", "global_kv", "global_query")


@dataclass(frozen=True)
class MappingMetadata:
    """Where a mapping comes from and how well it fits.

    Attributes:
        target, draft: the models' names, for messages.
        target_hash, draft_hash: their :func:`~specattn.mapping.identity.config_hash`.
        geometry: their heads.
        text_hash: SHA-256 of the calibration text.
        metric: the similarity that the layer map maximises.
        tokens, rounds: how much text was read, and how many rounds of it were sampled.
        specattn: the version of specattn that made it.
        kl_layer_map, kl_heads, kl_global: mean ``KL(target || mapped draft)`` of the KV heads' attention, in
            nats, on the calibration rounds.
        version: of the file format.
    """

    target: str
    target_hash: str
    draft: str
    draft_hash: str
    geometry: Geometry
    text_hash: str
    metric: str
    tokens: int
    rounds: int
    specattn: str
    kl_layer_map: float
    kl_heads: float
    kl_global: float
    version: int = VERSION


@dataclass(frozen=True, eq=False)
class Mapping:
    """Which draft attention predicts which target attention.

    Attributes:
        layer_map: int64 ``[target_layers]``, the draft layer of each target layer.
        similarity: float32 ``[target_layers, draft_layers]``.
        heads_kv: float32 ``[target_layers, kv_heads, draft_layers * draft_heads]``, mixture weights.
        heads_query: float32 ``[target_layers, query_heads, draft_layers * draft_heads]``.
        global_heads: int64 ``[n]``, ascending draft head numbers (layer * heads + head).
        global_kv: float32 ``[target_layers, kv_heads, n]``, mixture weights over ``global_heads``.
        global_query: float32 ``[target_layers, query_heads, n]``.
        metadata: where it comes from.
        signal_weight, signal_half_life: float32 ``[target_layers]``: what the target's earlier scores are worth beside
            the draft's, and after how many tokens half of it (:mod:`specattn.mapping.signals`); both or neither.

    Raises:
        UsageError: if a tensor's shape does not agree with the geometry.
    """

    layer_map: Tensor
    similarity: Tensor
    heads_kv: Tensor
    heads_query: Tensor
    global_heads: Tensor
    global_kv: Tensor
    global_query: Tensor
    metadata: MappingMetadata
    signal_weight: Tensor | None = None
    signal_half_life: Tensor | None = None

    def __post_init__(self) -> None:
        g, chosen = self.metadata.geometry, self.global_heads.numel()
        expected = {
            "layer_map": (g.target_layers,),
            "similarity": (g.target_layers, g.draft_layers),
            "heads_kv": (g.target_layers, g.kv_heads, g.draft_rows),
            "heads_query": (g.target_layers, g.query_heads, g.draft_rows),
            "global_heads": (chosen,),
            "global_kv": (g.target_layers, g.kv_heads, chosen),
            "global_query": (g.target_layers, g.query_heads, chosen),
        }
        if self.signal_weight is not None or self.signal_half_life is not None:
            expected |= dict.fromkeys(("signal_weight", "signal_half_life"), (g.target_layers,))
        for name, shape in expected.items():
            tensor = getattr(self, name)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise UsageError(f"a mapping's {name} must have shape {shape}, not {found}: calibrate again")

    def save(self, path: str | Path) -> None:
        """Write the file, all of it or nothing. Mixture weights are rounded to half precision.

        That halves the file and moves a divergence by about 1e-6 nats; rows are scaled to sum to one again
        when they are read.

        Raises:
            UsageError: if the file cannot be written.
        """
        from safetensors.torch import save

        tensors = {
            name: (tensor.half() if name in _MIXTURES else tensor).cpu().contiguous()
            for name, tensor in self._tensors().items()
        }
        write_file(
            Path(path), save(tensors, {_KEY: json.dumps(dataclasses.asdict(self.metadata))}), "the mapping"
        )

    @classmethod
    def load(cls, path: str | Path) -> Mapping:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            UsageError: if the file is missing or unreadable, holds no mapping, or one of another version.
        """
        tensors, header = _read(Path(path))
        metadata = _parse(path, header)
        mixtures = {name: normalised(tensors[name]) for name in _MIXTURES if name in tensors}
        try:
            return cls(**{**tensors, **mixtures}, metadata=metadata)
        except TypeError:  # a tensor is missing, or there is one too many
            raise _not_a_mapping(path) from None

    def check(self, target_config: Any, draft_config: Any) -> None:
        """Make sure that the mapping was calibrated for these models (transformers configurations).

        Raises:
            UsageError: if it was calibrated for another pair.
        """
        known = (self.metadata.target_hash, self.metadata.draft_hash)
        if (config_hash(target_config), config_hash(draft_config)) != known:
            target, draft = describe(target_config), describe(draft_config)
            raise UsageError(
                f"this mapping was calibrated for target {self.metadata.target} with draft "
                f"{self.metadata.draft}, not for target {target} with draft {draft}; make one for this pair "
                "with `specattn calibrate --text FILE --out mapping.safetensors`"
            )

    def to(self, device: torch.device | str) -> Mapping:
        """The same mapping with its tensors on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return Mapping(**moved, metadata=self.metadata)

    def _tensors(self) -> dict[str, Tensor]:
        names = [field.name for field in dataclasses.fields(self) if field.name != "metadata"]
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"cannot read the mapping {path}: {reason}; make one with `specattn calibrate`"
        ) from error
    except SafetensorError:
        raise _not_a_mapping(path) from None


def _parse(path: str | Path, header: dict[str, str]) -> MappingMetadata:
    try:
        fields = json.loads(header[_KEY])
        version = fields["version"]
        if version in _READABLE:
            return MappingMetadata(**{**fields, "geometry": Geometry(**fields["geometry"])})
    except (KeyError, TypeError, ValueError):
        raise _not_a_mapping(path) from None
    raise UsageError(
        f"{path} is a mapping of version {version}; this specattn reads versions {' and '.join(map(str, _READABLE))}: "
        "calibrate again"
    )


def _not_a_mapping(path: str | Path) -> UsageError:
    return UsageError(f"{path} is not a mapping file or is damaged; make one with `specattn calibrate`")
