"""Decoding with transformers' own cache: for models whose attention is not in our hands."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from regrpo.modeling import CausalLM, base_model


class CachedRows:
    """What `regrpo.decoding.Continuations` is, for any causal language model; prompts are padded on
    the left and each row keeps its own copy of the prompt's keys."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], pad_id: int):
        self._model = model
        device = base_model(model).device
        distinct = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        longest = max(map(len, distinct))
        ids = [[pad_id] * (longest - len(p)) + list(p) for p in distinct]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in distinct]
        self._mask = torch.tensor(mask, device=device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=base_model(model).config)
        self._forward(torch.tensor(ids, device=device))
        if len(distinct) < len(prompts):
            self.keep(torch.tensor([distinct[tuple(p)] for p in prompts], device=device))

    def _forward(self, ids: torch.Tensor) -> None:
        self.logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Feeds one token [R] to every row; ``logits`` are then those behind it."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._forward(tokens[:, None])

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        self._cache.batch_select_indices(rows)
        self.logits, self._mask = self.logits[rows], self._mask[rows]
        self._positions = self._positions[rows]
