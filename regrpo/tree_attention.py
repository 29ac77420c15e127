"""Causal attention over a prefix tree, without a mask over all pairs of tokens.

A row sees itself, the rows before it in its node, and its ancestors. So attention falls into dense
parts: causal inside each node, and the descendants of a node, which are one range of rows, against
all of its keys. A part's softmax is normalised over its own keys; the log-sum-exps put the parts
together. Backward runs over the same parts, each with the output and the log-sum-exp of the whole,
which makes every part's gradient exact (as in ring attention, Liu et al. 2023, arXiv 2310.01889).

The parts are computed by torch's own flash attention: on a CPU a call for each, on a GPU a call for
each depth of the tree (variable lengths). What that cannot do (a window that is shorter than a
branch, softcapped scores, dropout, fp32 on a GPU) is computed node by node over the keys of its
whole branch.

Sequences that share nothing are a forest of single nodes: causal parts only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from regrpo.prefix_tree import Node

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda_forward = torch.ops.aten._flash_attention_forward.default
_cuda_backward = torch.ops.aten._flash_attention_backward.default

Index = slice | Tensor


class Part(Protocol):
    """Attention of rows ``queries`` to rows ``keys``; ``causal`` parts have equal ones.

    Queries, keys, values, output and its gradient are [rows, heads, D], log-sum-exps [rows, heads].
    """

    @property
    def queries(self) -> Index: ...

    @property
    def keys(self) -> Index: ...

    @property
    def causal(self) -> bool: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class AttentionPlan:
    """The parts of a tree's attention, made once for all layers."""

    def __init__(self, nodes: Sequence[Node], device: torch.device):
        self.nodes = nodes
        self.device = device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return max(map(len, self.paths), default=0)

    @cached_property
    def paths(self) -> list[Tensor]:
        """For each node the rows from the root through it; a row's place there is its position."""
        paths: list[Tensor] = []
        for node in self.nodes:
            own = torch.arange(node.start, node.stop, device=self.device)
            paths.append(own if node.parent < 0 else torch.cat([paths[node.parent], own]))
        return paths

    @cached_property
    def cpu_parts(self) -> list[Part]:
        """Nodes of similar length side by side; each node with descendants before them."""
        parts: list[Part] = [CausalPart(bucket) for bucket in _buckets(self.nodes)]
        parts += [DensePart(slice(n.stop, n.end), slice(n.start, n.stop)) for n in self._inner()]
        return parts

    @cached_property
    def cuda_parts(self) -> list[Part]:
        """All nodes; then, a depth at a time, all nodes that have descendants before those."""
        whole = slice(0, self.nodes[-1].stop if self.nodes else 0)
        spans = [(n.start, n.stop) for n in self.nodes]
        parts: list[Part] = [VarlenPart(whole, whole, True, spans, spans, self.device)]
        for depth in sorted({node.depth for node in self._inner()}):
            level = [node for node in self._inner() if node.depth == depth]
            behind, own = [(n.stop, n.end) for n in level], [(n.start, n.stop) for n in level]
            parts.append(
                VarlenPart(
                    _ranges(behind, self.device),
                    _ranges(own, self.device),
                    False,
                    behind,
                    own,
                    self.device,
                )
            )
        return parts

    def _inner(self) -> list[Node]:
        return [node for node in self.nodes if node.end > node.stop]


def _ranges(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device)


def _buckets(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes in buckets whose lengths differ by a quarter at most."""
    buckets: list[list[Node]] = []
    for node in sorted(nodes, key=len):
        if not buckets or len(node) > 1.25 * len(buckets[-1][0]) + 8:
            buckets.append([])
        buckets[-1].append(node)
    return buckets


class CausalPart:
    """Each node by itself, on a CPU; nodes of similar length are laid out as [count, length]."""

    causal = True

    def __init__(self, nodes: Sequence[Node]):
        self.count, self.length = len(nodes), len(nodes[-1])
        self.queries: Index = slice(nodes[0].start, nodes[0].stop)
        self._slots: Tensor | None = None
        if self.count > 1:
            device = torch.device("cpu")
            self.queries = _ranges([(n.start, n.stop) for n in nodes], device)
            starts = [row * self.length for row in range(self.count)]
            slots = [(a, a + len(node)) for a, node in zip(starts, nodes, strict=True)]
            self._slots = _ranges(slots, device)
        self.keys = self.queries

    def _spread(self, x: Tensor) -> Tensor:
        """[rows, heads, ...] -> [count, heads, length, ...], zeros behind the ends."""
        if self._slots is not None:
            padded = x.new_zeros(self.count * self.length, *x.shape[1:])
            x = padded.index_copy_(0, self._slots, x)
        return x.view(self.count, self.length, *x.shape[1:]).transpose(1, 2)

    def _gather(self, x: Tensor) -> Tensor:
        """[count, heads, length, ...] -> [rows, heads, ...]."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if self._slots is None else flat.index_select(0, self._slots)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _cpu_forward(*map(self._spread, (q, k, v)), 0.0, True, scale=scale)
        return self._gather(out), self._gather(lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        spread = map(self._spread, (dout, q, k, v, out, lse))
        dq, dk, dv = map(self._gather, _cpu_backward(*spread, 0.0, True, scale=scale))
        return dq, dk, dv


@dataclass
class DensePart:
    """The descendants of a node against its keys, on a CPU."""

    queries: Index
    keys: Index
    causal: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _cpu_forward(*map(_as_batch, (q, k, v)), 0.0, False, scale=scale)
        return _as_rows(out), _as_rows(lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = map(_as_batch, (dout, q, k, v, out, lse))
        dq, dk, dv = map(_as_rows, _cpu_backward(*batch, 0.0, False, scale=scale))
        return dq, dk, dv


def _as_batch(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _as_rows(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


class VarlenPart:
    """Ranges of queries against ranges of keys, pair by pair, on a GPU. Unmeasured."""

    def __init__(
        self,
        queries: Index,
        keys: Index,
        causal: bool,
        query_spans: Sequence[tuple[int, int]],
        key_spans: Sequence[tuple[int, int]],
        device: torch.device,
    ):
        self.queries, self.keys, self.causal = queries, keys, causal
        self._bounds: list[Any] = []
        for spans in (query_spans, key_spans):
            lengths = torch.tensor([0, *(stop - start for start, stop in spans)])
            self._bounds.append(lengths.cumsum(0).to(device, torch.int32))
        for spans in (query_spans, key_spans):
            self._bounds.append(max((stop - start for start, stop in spans), default=0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _cuda_forward(q, k, v, *self._bounds, 0.0, self.causal, False, scale=scale)
        return out, lse.T

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(0, device=q.device)  # a generator's state: there is no dropout
        return _cuda_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.T.contiguous(),
            *self._bounds,
            0.0,
            self.causal,
            unused,
            unused,
            scale=scale,
        )


def _take(x: Tensor, index: Index) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _put(x: Tensor, index: Index, value: Tensor) -> None:
    if isinstance(index, slice):
        x[index] = value
    else:
        x.index_copy_(0, index, value.to(x.dtype))


def _add(x: Tensor, index: Index, value: Tensor) -> None:
    if isinstance(index, slice):
        x[index].add_(value)
    else:
        x.index_add_(0, index, value.to(x.dtype))


class PartsAttention(torch.autograd.Function):
    """Attention from its parts; query [S, heads, D], key and value [S, key heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], scale: float
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        merges = any(not part.causal for part in parts)
        total = torch.empty_like(q, dtype=wide if merges else q.dtype)
        lse = q.new_empty(q.shape[:2], dtype=wide)
        keys, values = _repeated(k, q), _repeated(v, q)
        for part in parts:  # causal ones first: each row is in one of them
            rows = part.queries
            out, part_lse = part.forward(
                _take(q, rows), _take(keys, part.keys), _take(values, part.keys), scale
            )
            if not part.causal:
                before = _take(lse, rows)
                both = torch.logaddexp(before, part_lse)
                out = out.to(wide).mul_((part_lse - both).exp_().unsqueeze(-1))
                out.addcmul_(_take(total, rows), (before - both).exp_().unsqueeze(-1))
                part_lse = both
            _put(total, rows, out)
            _put(lse, rows, part_lse)
        total = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, total, lse)
        ctx.parts, ctx.scale = parts, scale
        return total

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        keys, values = _repeated(k, q), _repeated(v, q)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.empty_like(x, dtype=wide) for x in (q, keys, values))
        for part in ctx.parts:
            rows, others = part.queries, part.keys
            gradients = part.backward(
                *(_take(x, rows) for x in (dout, q)),
                *(_take(x, others) for x in (keys, values)),
                *(_take(x, rows) for x in (out, lse)),
                ctx.scale,
            )
            store = _put if part.causal else _add
            for total, index, gradient in zip(
                (dq, dk, dv), (rows, others, others), gradients, strict=True
            ):
                store(total, index, gradient)
        dk, dv = (x.view(*k.shape[:2], -1, k.shape[2]).sum(2) for x in (dk, dv))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for every head of the queries; a GPU's attention takes them as they are."""
    return x if q.is_cuda else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Each node against all keys of its branch, in plain torch: [rows of it, keys] scores."""
    outs = []
    for node, path in zip(plan.nodes, plan.paths, strict=True):
        places = torch.arange(len(path), device=q.device)
        distance = places[-len(node) :, None] - places
        seen = (distance >= 0) & (distance < window)
        query = _as_batch(q[node.start : node.stop])
        groups = q.shape[1] // k.shape[1]
        key, value = (
            _as_batch(x.index_select(0, path).repeat_interleave(groups, dim=1)) for x in (k, v)
        )
        if softcap is None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, dropout_p=dropout, scale=scale
            )
        else:
            scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
            wide = torch.promote_types(q.dtype, torch.float32)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide)
            out = F.dropout(weights.to(q.dtype), dropout) @ value
        outs.append(_as_rows(out))
    return torch.cat(outs)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention [S, heads, D] over the rows of a tree.

    Args:
        query: [S, heads, D]. key, value: [S, key heads, D].
        scale: of the scores; D ** -0.5 unless given.
        window: keys that a row sees on its branch, itself among them; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        dropout: of the attention weights.
    """
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    windowed = window is not None and window < plan.longest
    plain = softcap is not None or windowed or dropout > 0
    if query.device.type == "cpu" and not plain:
        return PartsAttention.apply(query, key, value, plan.cpu_parts, scale)
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if flash and not plain and width <= 256 and width % 8 == 0:
        return PartsAttention.apply(query, key, value, plan.cuda_parts, scale)
    limit = plan.longest if window is None else window
    return _branch_attention(query, key, value, plan, scale, limit, softcap, dropout)
