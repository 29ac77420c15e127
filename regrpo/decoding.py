"""Keys and values of many continuations of few prompts, and attention over them.

K trajectories of a state share their whole prompt. Its keys and values are computed once and kept
once, ``[prompts, heads, length, D]``; what each row adds (its turns, and the observations between
them) lies in a branch of its own. New tokens' queries meet their prompt's keys together with those
of their siblings, as one matrix product a prompt (the bandwidth of K reads of the prompt becomes
that of one), and their branch's keys by themselves; the two parts are joined by their log-sum-exps,
as in split-K decoding (Dao et al. 2023, "Flash-Decoding"). Nothing of the model is patched: this is
an attention implementation of transformers' interface.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from regrpo.images import Image, image_rows, rotary_positions
from regrpo.modeling import (
    CausalLM,
    attention,
    base_model,
    decoder,
    head,
    logit_softcap,
    why_not_packed,
)
from regrpo.partial_attention import bias_of, causal_attention, partial_attention, spans
from regrpo.ragged import FAR, Ragged, join, resumed
from regrpo.vision import row_inputs

DECODE = "regrpo_decode"
ROOM = 32  # new tokens that fit before branches are copied into larger buffers


def decodes(model: PreTrainedModel) -> bool:
    """Whether ``Continuations`` can run a model: all attention through the interface."""
    return why_not_packed(model) is None


def _padded(rows: Iterable[Sequence[int]], width: int) -> np.ndarray:
    """Token ids [R, width], padded behind them with 0."""
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=np.int64)


@dataclass
class _Rows:
    """Rows: their numbers in the batch, the prompts they continue, and their branches."""

    numbers: list[int]
    prompts: list[int]
    branch: Ragged

    def select(self, index: Sequence[int]) -> "_Rows":
        where = torch.tensor(index, dtype=torch.int64, device=self.branch.positions.device)
        return _Rows(
            [self.numbers[i] for i in index],
            [self.prompts[i] for i in index],
            self.branch.rows(where),
        )


@dataclass
class _Prompts:
    """Prompts by their numbers, padded behind their ends."""

    numbers: list[int]
    kept: Ragged

    def select(self, numbers: Sequence[int]) -> "_Prompts":
        place = {number: i for i, number in enumerate(self.numbers)}
        where = torch.tensor([place[n] for n in numbers], device=self.kept.positions.device)
        return _Prompts(list(numbers), self.kept.rows(where))


class Continuations:
    """The rows of a batch that is decoded, turn by turn.

    A turn is decoded by ``append``. Rows that have finished it are left out by ``keep`` and wait;
    ``resume`` begins the next turn of those that go on, from the keys and values they have.

    Args:
        prompts: one a row; equal ones share their keys and values.
        images: by the keys that stand for their tokens (`regrpo.images`).

    Attributes:
        logits: [R, V] of the last token of every row in the turn.
        lengths: int64 [R], tokens of these rows so far.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        images: Mapping[int, Image] | None = None,
    ):
        self._model = model
        self._images = {} if images is None else images
        self._device = base_model(model).device
        index: dict[tuple[int, ...], int] = {}
        group = [index.setdefault(tuple(p), len(index)) for p in prompts]
        self._sizes = torch.tensor([len(p) for p in index], device=self._device)
        longest = max(map(len, index))
        ids = _padded(index, longest)
        positions = torch.arange(longest, device=self._device).expand(len(index), -1)
        rotary, ahead = self._rotary([(p, 0) for p in index], longest)
        held = positions < self._sizes[:, None]
        self._prompts = _Prompts(list(range(len(index))), Ragged(positions.masked_fill(~held, FAR)))
        self._resting: list[_Prompts] = []  # prompts of waiting rows only
        self._waiting: list[_Rows] = []
        self._used = 0  # columns of the branches that are not room
        empty = self._sizes.new_empty(len(prompts), 0)
        self._rows = _Rows(list(range(len(prompts))), group, Ragged(empty))
        hidden = self._forward(ids, positions, rotary)
        last = hidden[torch.arange(len(index), device=self._device), self._sizes - 1]
        self._arrange()
        self.lengths = self._sizes[self._group]
        self._ahead = ahead[self._group]
        self.logits = self._head(last)[self._group]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those of waiting rows included."""
        kept = [p.kept for p in (self._prompts, *self._resting)]
        return sum(x.nbytes for x in (*kept, *(r.branch for r in (self._rows, *self._waiting))))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = few_row_linear(hidden, *head(self._model))
        cap = logit_softcap(self._model)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _forward(
        self, ids: np.ndarray | torch.Tensor, positions: torch.Tensor, rotary: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of tokens [R, n]: where they stand, [R, n], says what they see, and
        ``rotary``, [R, n] or [3, R, n], how they are turned."""
        self._queries = positions
        self._biases: dict[tuple[object, ...], torch.Tensor] = {}
        seen = None
        if isinstance(ids, np.ndarray):
            shown, seen = image_rows(ids, self._images)
            ids = torch.from_numpy(shown).to(self._device)
        inner = base_model(self._model)
        inputs = row_inputs(inner, ids, None if seen is None else seen.to(self._device))
        with attention(self._model, DECODE):
            output = decoder(self._model)(
                position_ids=rotary, use_cache=False, continuations=self, **inputs
            )
        return output.last_hidden_state

    def _rotary(
        self, tokens: Sequence[tuple[Sequence[int], int]], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary positions [R, width], or [3, R, width] with images, of tokens of rows from an
        index on, and how far each row's next token [R] is turned ahead of where it stands.

        An image takes fewer positions than tokens, so this is at most 0.
        """
        starts = torch.tensor([start for _, start in tokens], device=self._device)
        plain = starts[:, None] + torch.arange(width, device=self._device)
        if not self._images or not any(min(row) < 0 for row, _ in tokens):
            return plain, torch.zeros_like(starts)
        turned, ahead = plain.expand(3, -1, -1).clone(), []
        for index, (row, start) in enumerate(tokens):
            whole = rotary_positions(row, self._images)
            turned[:, index, : len(row) - start] = torch.from_numpy(whole[:, start:])
            ahead.append(int(whole.max()) + 1 - len(row))
        return turned, torch.tensor(ahead, device=self._device)

    def _arrange(self) -> None:
        """Where each row's query stands beside its siblings': a slot of [prompts, siblings]."""
        place = {number: i for i, number in enumerate(self._prompts.numbers)}
        seen = [0] * len(place)
        group, rank = [], []
        for number in self._rows.prompts:
            group.append(place[number])
            rank.append(seen[group[-1]])
            seen[group[-1]] += 1
        self._siblings = max(seen)
        slots = [g * self._siblings + r for g, r in zip(group, rank, strict=True)]
        self._group = torch.tensor(group, device=self._device)
        self._slots = torch.tensor(slots, device=self._device)

    def append(self, tokens: torch.Tensor) -> None:
        """Feeds one token [R] to every row; ``logits`` are then those behind it."""
        positions = self.lengths[:, None]
        rotary = positions + self._ahead[:, None]
        hidden = self._extend(tokens[:, None], positions, positions, rotary)
        self.logits = self._head(hidden[:, 0])
        self.lengths = self.lengths + 1

    def _extend(
        self,
        ids: np.ndarray | torch.Tensor,
        positions: torch.Tensor,
        held: torch.Tensor,
        rotary: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [R, n, H] of new tokens; ``held`` are positions, ``FAR`` of padding."""
        branch, needed = self._rows.branch, self._used + ids.shape[1]
        room = branch.positions.shape[1]
        if room < needed:
            more = max(2 * room, needed + ROOM) - room
            branch.positions = F.pad(branch.positions, (0, more), value=FAR)
            branch.layers = {
                i: (F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)))
                for i, (k, v) in branch.layers.items()
            }
        branch.positions[:, self._used : needed] = held
        self._used = needed
        return self._forward(ids, positions, rotary)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows [R'] only; the others wait for their next turn."""
        going = rows.tolist()
        others = sorted(set(range(len(self._rows.numbers))) - set(going))
        waiting = self._rows.select(others)
        used = waiting.branch.columns(self._used)
        waiting.branch = join([used])  # no more than what is used
        self._waiting.append(waiting)
        self._rows = self._rows.select(going)
        self.lengths, self.logits = self.lengths[rows], self.logits[rows]
        self._ahead = self._ahead[rows]
        needed = dict.fromkeys(self._rows.prompts)
        unneeded = [n for n in self._prompts.numbers if n not in needed]
        if unneeded:
            self._resting.append(self._prompts.select(unneeded))
            self._prompts = self._prompts.select(list(needed))
        self._arrange()

    def resume(
        self, numbers: Sequence[int], prompts: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> None:
        """Begins the next turn of some rows, which are then the rows of the turn, in this order.

        What all other rows had is dropped.

        Args:
            numbers: of the rows, by their order at the very beginning.
            prompts: all tokens of each.
            kept: how many of them are known to be those the row had before; a token of each at
                least is fed again.
        """
        parts = [*self._waiting, self._rows]
        self._rows.branch = self._rows.branch.columns(self._used)
        limits = {n: min(k, len(p) - 1) for n, k, p in zip(numbers, kept, prompts, strict=True)}
        prompt_of = {
            n: p for part in parts for n, p in zip(part.numbers, part.prompts, strict=True)
        }
        branch = resumed([(part.numbers, part.branch) for part in parts], limits)
        self._rows = _Rows(list(numbers), [prompt_of[number] for number in numbers], branch)
        self._used = branch.positions.shape[1]
        self._waiting = []
        needed = list(dict.fromkeys(self._rows.prompts))
        if self._resting or len(needed) < len(self._prompts.numbers):
            stored = [self._prompts, *self._resting]
            self._prompts = _Prompts(
                [number for part in stored for number in part.numbers],
                _stack([part.kept for part in stored]),
            ).select(needed)
            self._resting = []
        self._arrange()
        held = (self._rows.branch.positions != FAR).sum(1)
        self.lengths = self._sizes[torch.tensor(self._rows.prompts, device=self._device)] + held
        self._feed(prompts)

    def _feed(self, prompts: Sequence[Sequence[int]]) -> None:
        """Feeds what every row lacks of its prompt, padded behind it."""
        known = self.lengths.tolist()
        tokens = [p[n:] for p, n in zip(prompts, known, strict=True)]
        longest = max(map(len, tokens))
        ids = _padded(tokens, longest)
        rotary, self._ahead = self._rotary(list(zip(prompts, known, strict=True)), longest)
        counts = torch.tensor([len(t) for t in tokens], device=self._device)
        steps = torch.arange(longest, device=self._device)
        positions = self.lengths[:, None] + steps
        held = positions.masked_fill(steps >= counts[:, None], FAR)
        # Padding looks from where the last token does: it sees something, so it stays finite.
        last = (self.lengths + counts - 1)[:, None]
        hidden = self._extend(ids, positions.minimum(last), held, rotary)
        rows = torch.arange(len(tokens), device=self._device)
        self.logits = self._head(hidden[rows, counts - 1])
        self.lengths = self.lengths + counts

    def attend(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of one layer; [rows, heads, n, D] -> [rows, n, heads, D].

        The first call of a layer brings the prompts, padded behind their ends; every other one new
        tokens of every row.
        """
        if index not in self._prompts.kept.layers:
            self._prompts.kept.layers[index] = (key, value)
            return causal_attention(query, key, value, scaling, window, softcap).transpose(1, 2)
        keys, values = self._written(index, key, value)
        rows, heads, count, _ = query.shape
        columns = keys.shape[2] + self._prompts.kept.positions.shape[1]
        pieces = []
        for span in spans(count, rows * heads * columns):
            part, bias = query[:, :, span], self._branch_bias(window, span)
            ours = partial_attention(part, keys, values, scaling, bias, softcap)
            theirs = self._prompt_part(index, part, scaling, window, softcap, span)
            # Both parts end with a lse; softmax over the two weighs them as one softmax would.
            weights = torch.stack([ours[1], theirs[1]]).softmax(0)
            pieces.append(weights[0, ..., None] * ours[0] + weights[1, ..., None] * theirs[0])
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return out.to(query.dtype).transpose(1, 2)

    def _written(
        self, index: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches with the new tokens behind them."""
        branch, (rows, heads, count, width) = self._rows.branch, key.shape
        if index not in branch.layers:
            room = branch.positions.shape[1]
            branch.layers[index] = (
                key.new_empty(rows, heads, room, width),
                value.new_empty(rows, heads, room, value.shape[3]),
            )
        keys, values = branch.layers[index]
        keys[:, :, self._used - count : self._used] = key
        values[:, :, self._used - count : self._used] = value
        return keys[:, :, : self._used], values[:, :, : self._used]

    def _branch_bias(self, window: int | None, span: slice) -> torch.Tensor:
        """Of the branches' columns [R, n, M]: those a query sees."""
        key = ("branch", window, span.start)
        if key not in self._biases:
            positions = self._rows.branch.positions[:, : self._used]
            self._biases[key] = bias_of(positions, self._queries[:, span], window)
        return self._biases[key]

    def _prompt_bias(self, window: int | None, span: slice) -> torch.Tensor:
        """Of the prompts' columns [G, 1 or siblings * n, P], as `_prompt_part` lays queries out."""
        key = ("prompt", window, span.start)
        if key not in self._biases:
            positions = self._prompts.kept.positions
            queries = self._queries[:, span]
            if window is None:  # every query is behind its whole prompt
                beside = positions.new_full((len(positions), 1), FAR - 1)
            else:
                beside = queries.new_zeros(len(positions) * self._siblings, queries.shape[1])
                beside = beside.index_copy(0, self._slots, queries).view(len(positions), -1)
            self._biases[key] = bias_of(positions, beside, window)
        return self._biases[key]

    def _prompt_part(
        self,
        index: int,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        span: slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every row to its prompt, siblings together."""
        keys, values = self._prompts.kept.layers[index]
        groups, (_, heads, count, width) = len(keys), query.shape
        beside = query.new_zeros(groups * self._siblings, heads, count, width)
        beside = beside.index_copy(0, self._slots, query)
        beside = beside.view(groups, self._siblings, heads, count, width).transpose(1, 2)
        bias = self._prompt_bias(window, span)
        out, lse = partial_attention(beside.flatten(2, 3), keys, values, scaling, bias, softcap)
        out = out.view(groups, heads, self._siblings, count, -1).transpose(1, 2).flatten(0, 1)
        lse = lse.view(groups, heads, self._siblings, count).transpose(1, 2).flatten(0, 1)
        return out[self._slots], lse[self._slots]


def few_row_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``F.linear`` of hidden states [R, H], weight [V, H], bias [V].

    On a CPU the time of few rows is that of reading the weight, and where they are the right factor
    the matmul reads it once, without a packed copy: half the time at 8 x 512 x 151936.
    """
    few = hidden.device.type == "cpu" and len(hidden) <= 32 and weight.numel() > 2**22
    if not few:
        return F.linear(hidden, weight, bias)
    scores = (weight @ hidden.t()).t().contiguous()
    return scores if bias is None else scores + bias


def _stack(parts: Sequence[Ragged]) -> Ragged:
    """Prompts in one; all have the same columns."""
    layers = {}
    for index in parts[0].layers:
        keys, values = zip(*(part.layers[index] for part in parts), strict=True)
        layers[index] = (torch.cat(keys), torch.cat(values))
    return Ragged(torch.cat([part.positions for part in parts]), layers)


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
    if s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention sinks; expected none")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = module.layer_idx
    assert isinstance(index, int)
    out = continuations.attend(index, query, key, value, scale, sliding_window, softcap)
    return out, None


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(DECODE, _decode_attention)
AttentionMaskInterface.register(DECODE, _no_mask)
