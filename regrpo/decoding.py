"""Keys and values of many continuations of few prompts, and attention over them.

K trajectories of a state share their whole prompt. Its keys and values are computed once and kept
once, ``[prompts, heads, length, D]``; what each row adds lies in a branch of its own. A new token's
query meets its prompt's keys together with those of its siblings, as one matrix product a prompt
(the bandwidth of K reads of the prompt becomes that of one), and its branch's keys by itself; the
two parts are joined by their log-sum-exps, as in split-K decoding (Dao et al. 2023,
"Flash-Decoding"). Nothing of the model is patched: this is an attention implementation of
transformers' interface.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from regrpo.modeling import (
    CausalLM,
    attention,
    base_model,
    head,
    logit_softcap,
    why_not_packed,
)

DECODE = "regrpo_decode"
LOWEST = torch.finfo(torch.float32).min
ROOM = 32  # new tokens that fit before branches are copied into larger buffers


def decodes(model: PreTrainedModel) -> bool:
    """Whether ``Continuations`` can run a model: attention through the interface, no softcaps."""
    softcap = logit_softcap(model) or getattr(model.config, "attn_logit_softcapping", None)
    return why_not_packed(model) is None and not softcap


@dataclass
class _Layer:
    """One layer: prompts' keys and values [G, heads, P, D], branches' [R, heads, M, D]."""

    prompt: tuple[torch.Tensor, torch.Tensor]
    branch: tuple[torch.Tensor, torch.Tensor] | None = None


class Continuations:
    """The rows of a batch that is decoded, and where each of them is.

    Args:
        prompts: one a row; equal ones share their keys and values.

    Attributes:
        logits: [R, V] of the last token of every row.
        lengths: int64 [R], tokens of every row so far.
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]]):
        self._model = model
        self._layers: dict[int, _Layer] = {}
        device = base_model(model).device
        index: dict[tuple[int, ...], int] = {}
        group = [index.setdefault(tuple(p), len(index)) for p in prompts]
        self._group = torch.tensor(group, device=device)
        self._prompt_lengths = torch.tensor([len(p) for p in index], device=device)
        self._used = 0  # columns of the branches
        longest = max(map(len, index))
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in index], device=device)
        positions = torch.arange(longest, device=device).expand(len(index), -1)
        hidden = self._forward(ids, positions)
        last = hidden[torch.arange(len(index), device=device), self._prompt_lengths - 1]
        self.lengths = self._prompt_lengths[self._group]
        self._arrange()
        self.logits = self._head(last)[self._group]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, *head(self._model))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with attention(self._model, DECODE):
            output = base_model(self._model).base_model(
                input_ids=ids, position_ids=positions, use_cache=False, continuations=self
            )
        return output.last_hidden_state

    def _arrange(self) -> None:
        """Where each row's query stands beside its siblings': a slot of [G, siblings]."""
        count = torch.bincount(self._group, minlength=len(self._prompt_lengths))
        self._siblings = int(count.max())
        order = self._group.argsort(stable=True)
        first = count.cumsum(0) - count
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[self._group[order]]
        self._slots = self._group * self._siblings + rank

    def append(self, tokens: torch.Tensor) -> None:
        """Feeds one token [R] to every row; ``logits`` are then those behind it."""
        self._used += 1
        hidden = self._forward(tokens[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1
        self.logits = self._head(hidden[:, 0])

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only; prompts that no row continues any more go too."""
        groups, self._group = self._group[rows].unique(return_inverse=True)
        self._prompt_lengths = self._prompt_lengths[groups]
        fewer = len(groups) < len(next(iter(self._layers.values())).prompt[0])
        for layer in self._layers.values():
            if fewer:
                keys, values = layer.prompt
                layer.prompt = keys[groups], values[groups]
            if layer.branch is not None:
                keys, values = layer.branch
                layer.branch = keys[rows], values[rows]
        self.lengths, self.logits = self.lengths[rows], self.logits[rows]
        self._arrange()

    def attend(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of one layer; [rows, heads, n, D] -> [rows, n, heads, D].

        The first call of a layer brings the prompts, padded behind their ends; every other one new
        token a row.
        """
        layer = self._layers.get(index)
        if layer is None:
            self._layers[index] = _Layer((key, value))
            return _prefill(query, key, value, scaling, window)
        keys, values = self._extend(layer, key, value)
        ours = _part(query, keys, values, scaling, self._branch_bias(window))
        theirs = self._prompt_part(layer, query, scaling, window)
        # Both parts end with a lse; softmax over the two weighs them as one softmax would have.
        weights = torch.stack([ours[1], theirs[1]]).softmax(0)
        out = weights[0, ..., None] * ours[0] + weights[1, ..., None] * theirs[0]
        return out.to(query.dtype).transpose(1, 2)

    def _extend(
        self, layer: _Layer, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches with the new token behind them."""
        if layer.branch is None or layer.branch[0].shape[2] < self._used:
            layer.branch = _roomy(layer.branch, key), _roomy(layer.branch, value, second=True)
        keys, values = layer.branch
        keys[:, :, self._used - 1] = key[:, :, 0]
        values[:, :, self._used - 1] = value[:, :, 0]
        return keys[:, :, : self._used], values[:, :, : self._used]

    def _branch_bias(self, window: int | None) -> torch.Tensor | None:
        """Of the branches' columns [1, 1, 1, M]: those in the window."""
        if window is None or self._used <= window:
            return None
        outside = torch.arange(self._used, device=self.lengths.device) < self._used - window
        return torch.zeros(self._used, device=outside.device).masked_fill(outside, -math.inf)

    def _prompt_part(
        self, layer: _Layer, query: torch.Tensor, scaling: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every row to its prompt, siblings together."""
        keys, values = layer.prompt
        groups, (_, heads, _, width) = len(keys), query.shape
        beside = query.new_zeros(groups * self._siblings, heads, width)
        beside = beside.index_copy(0, self._slots, query[:, :, 0])
        beside = beside.view(groups, self._siblings, heads, width).transpose(1, 2)
        column = torch.arange(keys.shape[2], device=keys.device)
        hidden = column >= self._prompt_lengths[:, None]
        if window is not None:  # every row has the same number of tokens behind its prompt
            hidden = hidden | (column + window < self._prompt_lengths[:, None] + self._used)
        bias = torch.zeros(hidden.shape, device=keys.device).masked_fill(hidden, -math.inf)
        out, lse = _part(beside, keys, values, scaling, bias[:, None, None])
        return (
            out.transpose(1, 2).flatten(0, 1)[self._slots][:, :, None],
            lse.transpose(1, 2).flatten(0, 1)[self._slots][:, :, None],
        )


def _roomy(
    old: tuple[torch.Tensor, torch.Tensor] | None, new: torch.Tensor, second: bool = False
) -> torch.Tensor:
    rows, heads, _, width = new.shape
    before = None if old is None else old[int(second)]
    length = ROOM if before is None else 2 * before.shape[2]
    buffer = new.new_empty(rows, heads, length, width)
    if before is not None:
        buffer[:, :, : before.shape[2]] = before
    return buffer


def _part(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, n, D] over some of the keys, with the lse [B, heads, n], in float32.

    Query heads of a key head are laid side by side (grouped-query attention), so keys are read
    once. Where every key is biased away the lse is -inf and the output 0.
    """
    batch, heads, count, width = query.shape
    shared = keys.shape[1]
    side = query.reshape(batch, shared, heads // shared * count, width)
    scores = (side @ keys.transpose(2, 3)).float().mul_(scaling)
    if bias is not None:
        scores.add_(bias)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.clamp(min=LOWEST)[..., None]).exp_()
    out = (weights.to(values.dtype) @ values).float()
    return out.view(batch, heads, count, width), lse.view(batch, heads, count)


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    mask = None
    length = query.shape[2]
    if window is not None and length > window:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = ((distance >= 0) & (distance < window)).to(query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    continuations: Continuations,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: softcap={softcap} or attention sinks; expected neither"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = module.layer_idx
    assert isinstance(index, int)
    return continuations.attend(index, query, key, value, scale, sliding_window), None


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(DECODE, _decode_attention)
AttentionMaskInterface.register(DECODE, _no_mask)
