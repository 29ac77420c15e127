"""Batched autoregressive sampling that returns the log-probability of every sampled token.

Trajectories are sampled turn by turn, with tool calls in between. A ``LocalSession`` keeps their
keys and values from one turn to the next, so of a later turn only what is new is computed: the
observation, and what the trigger writes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from regrpo.cached_rows import CachedRows
from regrpo.decoding import DECODE, Continuations, decodes
from regrpo.images import Image, ImageReader
from regrpo.merged_adapter import merged_adapter
from regrpo.modeling import CausalLM, attention, base_model
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
        cache_gib: keys and values that a session keeps from one turn to the next, in GiB, at most;
            batches beyond that compute their whole prompts again, and sample the same.
        reader: of a vision-language model's images.
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
        cache_gib: float = 8.0,
        reader: ImageReader | None = None,
    ):
        self.model = model
        self.chat = ChatFormat(tokenizer, reader)
        self.pad_id: int = tokenizer.pad_token_id
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.stop_ids = tuple(stop_ids)
        self.max_length = max_length
        self.cache_gib = cache_gib
        self.generator = torch.Generator(base_model(model).device)
        self.renew(seed)

    def renew(self, seed: int) -> None:
        """See `regrpo.rollout.LearningPolicy`."""
        self.generator.manual_seed(seed)

    def session(self) -> "LocalSession":
        """Of trajectories that begin now; the model must stay as it is meanwhile."""
        return LocalSession(
            self.model,
            stop_ids=(self.chat.end_id, *self.stop_ids),
            pad_id=self.pad_id,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            generator=self.generator,
            cache_bytes=round(self.cache_gib * 2**30),
            images=None if self.chat.reader is None else self.chat.reader.known,
        )


@dataclass
class _Batch:
    """Trajectories that are decoded together, by their numbers, with what each had before."""

    numbers: list[int]
    rows: Continuations | CachedRows | None = None
    places: dict[int, int] = field(default_factory=dict)  # numbers in ``rows``
    tokens: dict[int, list[int]] = field(default_factory=dict)


class LocalSession:
    """Trajectories of one rollout; see `regrpo.rollout.Session`.

    Args:
        stop_ids: what ends a turn; the first is part of it.
        max_new_tokens: limit of one turn.
        max_length: limit of prompt and turn together; None for none.
        generator: draws are reproducible given its state, the prompts and the model.
        max_batch: trajectories decoded together; those with prompts of similar length at first.
        cache_bytes: keys and values kept between turns, at most.
        images: by their keys, all that prompts show (`regrpo.images`).
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        temperature: float,
        max_new_tokens: int,
        max_length: int | None = None,
        generator: torch.Generator | None = None,
        max_batch: int = 512,
        cache_bytes: int = 2**33,
        images: Mapping[int, Image] | None = None,
    ):
        self._model = model
        self._images = images
        self._stop_ids = tuple(stop_ids)
        self._pad_id = pad_id
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._max_length = max_length
        self._generator = generator
        self._max_batch = max_batch
        self._cache_bytes = cache_bytes
        self._batches: list[_Batch] | None = None

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Sample]:
        """One turn of every trajectory; see `regrpo.rollout.Session.generate`."""
        given = {number: list(p) for number, p in zip(numbers, prompts, strict=True)}
        if self._batches is None:
            order = sorted(given, key=lambda number: len(given[number]))
            size = self._max_batch
            self._batches = [_Batch(order[i : i + size]) for i in range(0, len(order), size)]
        limit = self._max_new_tokens
        if self._max_length is not None:
            limit = min(limit, self._max_length - max(map(len, prompts)))
        was_training = self._model.training
        self._model.eval()
        results: dict[int, Sample] = {}
        kept = 0
        with merged_adapter(self._model):
            for batch in self._batches:
                going = [number for number in batch.numbers if number in given]
                # Shortest first, whether or not keys are kept: the same rows get the same draws.
                batch.numbers = sorted(going, key=lambda number: len(given[number]))
                if batch.numbers:
                    results |= self._turn(batch, given, limit)
                    kept += batch.rows.nbytes if batch.rows is not None else 0
                if not batch.numbers or kept > self._cache_bytes:
                    kept -= batch.rows.nbytes if batch.rows is not None else 0
                    batch.rows = None
        self._model.train(was_training)
        return [results[number] for number in numbers]

    def _turn(self, batch: _Batch, given: dict[int, list[int]], limit: int) -> dict[int, Sample]:
        prompts = [given[number] for number in batch.numbers]
        if batch.rows is not None:
            before = [batch.tokens[number] for number in batch.numbers]
            for number, prompt, tokens in zip(batch.numbers, prompts, before, strict=True):
                if prompt[: len(tokens)] != tokens or len(prompt) == len(tokens):
                    raise ValueError(
                        f"prompt of trajectory {number}: expected its former prompt and turn "
                        "with tokens behind them"
                    )
            places = [batch.places[number] for number in batch.numbers]
            batch.rows.resume(places, prompts, [len(tokens) for tokens in before])
        else:
            if decodes(base_model(self._model)):
                batch.rows = Continuations(self._model, prompts, self._images)
            else:
                batch.rows = CachedRows(self._model, prompts, self._pad_id)
            batch.places = {number: i for i, number in enumerate(batch.numbers)}
        ours = isinstance(batch.rows, Continuations)
        with attention(self._model, DECODE) if ours else contextlib.nullcontext():
            samples = decode(
                batch.rows, len(prompts), self._stop_ids, self._temperature, limit, self._generator
            )
        batch.tokens = {
            number: prompt + sample.ids
            for number, prompt, sample in zip(batch.numbers, prompts, samples, strict=True)
        }
        return dict(zip(batch.numbers, samples, strict=True))


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
    """Continues every prompt until ``stop_id`` or ``max_new_tokens``: a session of one turn.

    Args:
        temperature: 0 is greedy; log-probs are then those of temperature 1.
        generator: draws are reproducible given its state, the prompts and the model.
        max_batch: rows decoded together; prompts of similar length go together.
        stop_ids: other tokens that end a turn; it ends before them, as at its limit.
    """
    session = LocalSession(
        model,
        stop_ids=(stop_id, *stop_ids),
        pad_id=pad_id,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        generator=generator,
        max_batch=max_batch,
        cache_bytes=0,
    )
    return session.generate(prompts, range(len(prompts)))


def decode(
    rows: Continuations | CachedRows,
    count: int,
    stop_ids: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> list[Sample]:
    """One turn of ``count`` rows."""
    device = rows.logits.device
    stops = torch.tensor(stop_ids, device=device)
    alive = torch.arange(count, device=device)
    sampled: list[list[int]] = [[] for _ in range(count)]
    log_probs: list[list[float]] = [[] for _ in range(count)]
    for length in range(1, max_new_tokens + 1):
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
        if length == max_new_tokens or not going.any():
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
