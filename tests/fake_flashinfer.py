"""FlashInfer's two paged wrappers as it documents them, request by request in PyTorch."""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
from torch import Tensor


def install(monkeypatch) -> ModuleType:
    """Let ``import flashinfer`` give the stand-in, and count what it plans in ``plans``."""
    package = ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper = Decode
    package.BatchPrefillWithPagedKVCacheWrapper = Prefill
    package.plans = []
    monkeypatch.setitem(__import__("sys").modules, "flashinfer", package)
    for wrapper in (Decode, Prefill):
        monkeypatch.setattr(wrapper, "plans", package.plans, raising=False)
    monkeypatch.setattr("specattn.kernels.flashinfer_attention.available", lambda: True)
    return package


class _Paged:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8

    def _plan(self, indptr, indices, last, query_heads, kv_heads, head_dim, page_size, scaling) -> None:
        assert indptr.device.type == "cpu" and indices.dtype == indptr.dtype == last.dtype == torch.int32
        assert len(indptr) == len(last) + 1 and int(indptr[-1]) == len(indices)
        assert ((last >= 1) & (last <= page_size)).all()
        self.pages = [indices[a:b].long() for a, b in itertools.pairwise(indptr.tolist())]
        self.held = [(len(p) - 1) * page_size + n for p, n in zip(self.pages, last.tolist(), strict=True)]
        self.group, self.scaling = query_heads // kv_heads, scaling
        self.shape = (page_size, kv_heads, head_dim)
        self.plans.append(type(self).__name__)

    def _attend(self, request: int, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """The last rows ``[rows, heads, head_dim]`` of a request, causally."""
        assert all(part.shape[1:] == self.shape for part in cache)
        held, rows = self.held[request], len(query)
        keys, values = (
            part[self.pages[request]].flatten(0, 1)[:held].float().repeat_interleave(self.group, 1)
            for part in cache
        )
        logits = torch.einsum("rhd,nhd->rhn", query.float(), keys) * self.scaling
        seen = torch.arange(held) <= torch.arange(held - rows, held)[:, None]
        weights = logits.masked_fill(~seen[:, None].to(logits.device), -torch.inf).softmax(-1)
        return torch.einsum("rhn,nhd->rhd", weights, values).to(query.dtype)


class Decode(_Paged):
    """One query row a request."""

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
    ) -> None:
        heads = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self.dtype = q_data_type
        self._plan(indptr, indices, last_page_len, *heads, sm_scale)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert len(q) == len(self.pages) and q.dtype == self.dtype
        return torch.cat([self._attend(i, q[i : i + 1], paged_kv_cache) for i in range(len(q))])


class Prefill(_Paged):
    """Several query rows a request, which are its last tokens."""

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        assert causal and qo_indptr.device.type == "cpu" and qo_indptr.dtype == torch.int32
        self.spans, self.dtype = list(itertools.pairwise(qo_indptr.tolist())), q_data_type
        heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *heads, sm_scale)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert len(q) == self.spans[-1][1] and q.dtype == self.dtype
        return torch.cat([self._attend(i, q[a:b], paged_kv_cache) for i, (a, b) in enumerate(self.spans)])
