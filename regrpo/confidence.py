"""The policy's confidence in the steps before a start, which it did not take itself.

The trigger compares a step's first call with the policy's earlier ones. In an episode those were
sampled; behind a prefix taken from data, the policy is asked how probable it finds them.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import torch
from transformers import PreTrainedTokenizerBase

from regrpo.images import ImageReader, read_images
from regrpo.losses import packed_log_probs
from regrpo.modeling import CausalLM, base_model, head, hidden_states
from regrpo.packing import TRAINED, best_fit_decreasing, collate
from regrpo.prompts import step_of
from regrpo.segments import tokenize_conversation
from regrpo.trajectory import Message, Start
from regrpo.trigger import confidence
from regrpo_kernels import Segment


def first_calls(messages: Sequence[Message], before: int) -> list[int]:
    """Indices of the assistant turns that are first calls of the steps before step ``before``."""
    found: dict[int, int] = {}
    for index, (message, following) in enumerate(pairwise(messages)):
        if message["role"] == "assistant" and (step := step_of(following["content"])) < before:
            found.setdefault(step, index)
    return list(found.values())


@torch.no_grad()
def with_confidences(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Start],
    *,
    temperature: float,
    batch_tokens: int,
    reader: ImageReader | None = None,
) -> list[Start]:
    """The starts with their ``confidences``, at the temperature of sampling.

    Raises:
        ValueError: a prefix is longer than ``batch_tokens``.
    """
    scored = list(starts)
    # A forced failure has fired the trigger already.
    asked = [i for i, s in enumerate(starts) if s.step > 0 and not s.failed and not s.confidences]
    prefixes = [
        tokenize_conversation(
            tokenizer,
            starts[i].messages,
            trained_turns=first_calls(starts[i].messages, starts[i].step),
            reader=reader,
            images=read_images(reader, starts[i].images),
        )
        for i in asked
    ]
    for pack in best_fit_decreasing([len(p) for p in prefixes], batch_tokens):
        batch = collate([prefixes[i] for i in pack]).to(base_model(model).device)
        hidden = hidden_states(model, batch)
        values = packed_log_probs(hidden, *head(model), batch, temperature).tolist()
        kinds, ends = batch.segment_ids.tolist(), batch.cu_seqlens.tolist()
        for index, (start, stop) in zip(pack, pairwise(ends), strict=True):
            told = _of_turns(kinds[start:stop], values[start:stop])
            scored[asked[index]] = replace(starts[asked[index]], confidences=told)
    return scored


def _of_turns(kinds: Sequence[int], log_probs: Sequence[float]) -> tuple[float, ...]:
    """The confidence in each run of trained tokens, which is one turn."""
    tokens = zip(kinds, log_probs, strict=True)
    turns = [list(run) for trained, run in groupby(tokens, lambda t: t[0] in TRAINED) if trained]
    found = (confidence([value for kind, value in t if kind == Segment.ACTION]) for t in turns)
    return tuple(value for value in found if value is not None)
