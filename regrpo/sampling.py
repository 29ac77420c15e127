"""Batched autoregressive sampling that returns the log-probability of every sampled token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from regrpo.cached_rows import CachedRows
from regrpo.decoding import Continuations, decodes
from regrpo.modeling import CausalLM, base_model
from regrpo.segments import ChatFormat
from regrpo_kernels import token_log_probs

BLOCK = 256


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


def draw(scores: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index [R] a row, with the probabilities of softmax(scores [R, V]).

    By inverting the distribution function with one uniform number a row: first the block of
    ``BLOCK`` indices, then the index in it. An exponential race draws a number an index, which
    costs more than everything else here. Sums are in float64; what has probability 0 is not drawn.
    """
    rows, size = scores.shape
    blocks = F.pad(scores.softmax(-1), (0, -size % BLOCK)).view(rows, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    uniform = torch.rand(rows, 1, generator=generator, dtype=torch.float64, device=scores.device)
    block, rest = _invert(sums, uniform * sums[:, -1:])
    inside = blocks[torch.arange(rows, device=scores.device), block[:, 0]].double().cumsum(-1)
    index, _ = _invert(inside, rest)
    return (block * BLOCK + index)[:, 0].clamp(max=size - 1)


def _invert(sums: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index [R, 1] whose running sum passes the value, and what the value is above the
    sum before it."""
    # Rounding may leave the value at the last sum, which nothing passes.
    value = value.minimum(sums[:, -1:].nextafter(sums.new_zeros(())))
    # NaN passes nothing either; what is drawn then does not matter, the update will say so.
    index = torch.searchsorted(sums, value, right=True).clamp(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, index)
    return index, value - before


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
        chosen = order[start : start + max_batch]
        chunk = _decode(
            model,
            [prompts[i] for i in chosen],
            (stop_id, *stop_ids),
            pad_id,
            temperature,
            max_new_tokens,
            generator,
        )
        for i, result in zip(chosen, chunk, strict=True):
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
    rows: Continuations | CachedRows
    if decodes(base_model(model)):
        rows = Continuations(model, prompts)
    else:
        rows = CachedRows(model, prompts, pad_id)
    device = rows.logits.device
    stops = torch.tensor(stop_ids, device=device)
    alive = torch.arange(len(prompts), device=device)
    sampled: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    for count in range(1, max_new_tokens + 1):
        logits = rows.logits
        if temperature > 0:
            drawn = draw(logits.float() / temperature, generator)
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
            rows.keep(keep)
            alive, drawn = alive[keep], drawn[keep]
        rows.append(drawn)
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
