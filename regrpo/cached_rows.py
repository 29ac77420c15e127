"""Decoding with transformers' own attention: for models whose attention is not in our hands."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from regrpo.modeling import CausalLM, base_model
from regrpo.ragged import FAR, Ragged, join, resumed


class CachedRows:
    """What `regrpo.decoding.Continuations` is, for any causal language model; prompts are padded on
    the left and each row keeps its own copy of the prompt's keys.

    The tokens of a row are always side by side, since transformers takes the columns between two
    tokens for their distance (sliding windows).
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], pad_id: int):
        self._model = model
        self._pad_id = pad_id
        self._device = base_model(model).device
        distinct = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._numbers = list(range(len(distinct)))
        self._waiting: list[tuple[list[int], Ragged]] = []
        self._cache: DynamicCache | None = None  # the keys and values of the state
        self._state = Ragged(torch.empty(len(distinct), 0, dtype=torch.int64, device=self._device))
        self.lengths = torch.zeros(len(distinct), dtype=torch.int64, device=self._device)
        self._feed([list(p) for p in distinct])
        rows = torch.tensor([distinct[tuple(p)] for p in prompts], device=self._device)
        self._select(rows)
        self._numbers = list(range(len(prompts)))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those of waiting rows included."""
        return self._state.nbytes + sum(state.nbytes for _, state in self._waiting)

    def _forward(self, ids: torch.Tensor, held: torch.Tensor, last: torch.Tensor) -> None:
        """Feeds tokens [R, n]; ``held`` is their positions, ``FAR`` of padding, ``last`` [R] the
        column whose logits count."""
        if self._cache is None:
            self._cache = DynamicCache()
            for index, (keys, values) in self._state.layers.items():
                self._cache.update(keys, values, index)
        positions = torch.cat([self._state.positions, held], dim=1)
        columns, where = last.unique(return_inverse=True)
        logits = self._model(
            input_ids=ids,
            attention_mask=(positions != FAR).long(),
            position_ids=torch.where(held == FAR, 0, held),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=columns,
        ).logits
        self.logits: torch.Tensor = logits[torch.arange(len(ids), device=self._device), where]
        layers = {}
        for index, layer in enumerate(self._cache.layers):
            # An attention layer: models that keep a recurrent state are refused when they load.
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            layers[index] = (layer.keys, layer.values)
        self._state = Ragged(positions, layers)

    def append(self, tokens: torch.Tensor) -> None:
        """Feeds one token [R] to every row; ``logits`` are then those behind it."""
        self._forward(tokens[:, None], self.lengths[:, None], torch.zeros_like(tokens))
        self.lengths = self.lengths + 1

    def _feed(self, tokens: Sequence[list[int]]) -> None:
        """Feeds some tokens to every row, padded behind them; the padding is then taken away."""
        longest = max(map(len, tokens))
        padded = [[*t, *[self._pad_id] * (longest - len(t))] for t in tokens]
        counts = torch.tensor([len(t) for t in tokens], device=self._device)
        steps = torch.arange(longest, device=self._device)
        held = (self.lengths[:, None] + steps).masked_fill(steps >= counts[:, None], FAR)
        self._forward(torch.tensor(padded, device=self._device), held, counts - 1)
        self._state, self._cache = join([self._state]), None
        self.lengths = self.lengths + counts

    def keep(self, rows: torch.Tensor) -> None:
        """See `Continuations.keep`."""
        going = rows.tolist()
        others = sorted(set(range(len(self._numbers))) - set(going))
        waiting = self._state.rows(torch.tensor(others, dtype=torch.int64, device=self._device))
        self._waiting.append(([self._numbers[i] for i in others], waiting))
        self._numbers = [self._numbers[i] for i in going]
        self._select(rows)

    def _select(self, rows: torch.Tensor) -> None:
        self._state, self._cache = self._state.rows(rows), None
        self.lengths, self.logits = self.lengths[rows], self.logits[rows]

    def resume(
        self, numbers: Sequence[int], prompts: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> None:
        """See `Continuations.resume`."""
        limits = {n: min(k, len(p) - 1) for n, k, p in zip(numbers, kept, prompts, strict=True)}
        self._state = resumed([*self._waiting, (self._numbers, self._state)], limits)
        self._numbers, self._waiting, self._cache = list(numbers), [], None
        self.lengths = (self._state.positions != FAR).sum(1)
        self._feed([list(p[n:]) for p, n in zip(prompts, self.lengths.tolist(), strict=True)])
