"""Batched autoregressive sampling that returns the log-probability of every sampled token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from regrpo.modeling import CausalLM, base_model
from regrpo.segments import ChatFormat
from regrpo_kernels import token_log_probs


@dataclass(frozen=True)
class Sample:
    """A sampled turn: token ids, up to and with the stop token if it came, and their log-probs."""

    ids: list[int]
    log_probs: list[float]


class LocalPolicy:
    """A model in this process as a policy of ``regrpo.rollout``.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        stop_ids: what ends a turn beside the chat format's own token; it is not part of it.
        max_length: limit of prompt and turn together; None for none.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        max_length: int | None = None,
    ):
        self.model = model
        self.chat = ChatFormat(tokenizer)
        self.pad_id: int = tokenizer.pad_token_id
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.stop_ids = tuple(stop_ids)
        self.max_length = max_length
        self.generator = torch.Generator(base_model(model).device).manual_seed(seed)

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        limit = self.max_new_tokens
        if self.max_length is not None:
            limit = min(limit, self.max_length - max(map(len, prompts)))
        return sample(
            self.model,
            prompts,
            stop_id=self.chat.end_id,
            pad_id=self.pad_id,
            temperature=self.temperature,
            max_new_tokens=limit,
            generator=self.generator,
            stop_ids=self.stop_ids,
        )


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room ahead: a new token does not copy all that came before."""

    ROOM = 64
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            self._buffers = (
                self._with_room(key_states, self.keys, start),
                self._with_room(value_states, self.values, start),
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers
        keys[..., start:stop, :] = key_states
        values[..., start:stop, :] = value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def _with_room(self, new: torch.Tensor, old: torch.Tensor | None, start: int) -> torch.Tensor:
        length = start + new.shape[-2] + self.ROOM
        buffer = new.new_empty(*new.shape[:2], length, new.shape[-1])
        if start and old is not None:
            buffer[..., :start, :] = old
        return buffer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def roomy_cache(model: CausalLM) -> DynamicCache:
    """An empty cache for ``model``; layers that keep a window only stay as they are."""
    cache = DynamicCache(config=base_model(model).config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    stop_id: int,
    pad_id: int,
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    stop_ids: Sequence[int] = (),
) -> list[Sample]:
    """Continues every prompt until ``stop_id`` or ``max_new_tokens``.

    Args:
        temperature: 0 is greedy; log-probs are then those of temperature 1.
        generator: draws are reproducible given its state, the prompts and the model.
        max_batch: rows decoded together; prompts of similar length go together.
        stop_ids: other tokens that end a turn; it ends before them, as at its limit.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Sample | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), max_batch):
        rows = order[start : start + max_batch]
        chunk = _decode(
            model,
            [prompts[i] for i in rows],
            (stop_id, *stop_ids),
            pad_id,
            temperature,
            max_new_tokens,
            generator,
        )
        for i, result in zip(rows, chunk, strict=True):
            results[i] = result
    model.train(was_training)
    return [r for r in results if r is not None]


def _decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> list[Sample]:
    device = base_model(model).device
    # A group's trajectories share their prompt, and often their first turn: prefill it once.
    distinct = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    longest = max(map(len, distinct))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in distinct], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = roomy_cache(model)

    def next_logits(ids: torch.Tensor) -> torch.Tensor:
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    logits = next_logits(ids)
    if len(distinct) < len(prompts):
        rows = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)
        cache.batch_select_indices(rows)
        logits, mask, positions = logits[rows], mask[rows], positions[rows]
    stops = torch.tensor(stop_ids, device=device)
    alive = torch.arange(len(prompts), device=device)
    sampled: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    for count in range(1, max_new_tokens + 1):
        if temperature > 0:
            # The exponential race: argmax p / E draws from p, with no normalisation and no sync.
            noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
            drawn = (logits.float() / temperature - noise.log()).argmax(-1)
        else:
            drawn = logits.argmax(-1)
        drawn_log_probs = token_log_probs(logits, drawn, temperature=temperature or 1.0).log_probs
        for row, token, value in zip(
            alive.tolist(), drawn.tolist(), drawn_log_probs.tolist(), strict=True
        ):
            sampled[row].append(token)
            log_probs[row].append(value)
        going = ~torch.isin(drawn, stops)
        if count == max_new_tokens or not going.any():
            break
        if going.sum() <= 0.75 * len(going):  # finished rows leave the batch
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            alive, mask, positions, drawn = (x[keep] for x in (alive, mask, positions, drawn))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        logits = next_logits(drawn[:, None])
    ends = [_end(ids, stop_ids) for ids in sampled]
    return [
        Sample(ids[:end], values[:end])
        for ids, values, end in zip(sampled, log_probs, ends, strict=True)
    ]


def _end(ids: Sequence[int], stop_ids: Sequence[int]) -> int:
    """Rows that had finished but stayed in the batch went on; where they really end."""
    for index, token in enumerate(ids):
        if token in stop_ids:
            return index + (token == stop_ids[0])
    return len(ids)
