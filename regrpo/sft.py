"""Supervised fine-tuning on records: clean trajectories and Reflection-of-Thought repairs.

Deviations from the official release: the reflection is trained with the failure it reflects on in
its context, end-of-turn tokens are trained, sequences are packed and never see each other.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from regrpo.config import SFTConfig, SourceConfig
from regrpo.data_engine.recorded import failed_turns
from regrpo.distributed import ALONE, Ranks
from regrpo.images import ImageReader
from regrpo.losses import policy_loss
from regrpo.modeling import load_image_reader, load_tokenizer, logit_softcap
from regrpo.packed_model import PackedModel, load_packed
from regrpo.packing import PackedBatch, best_fit_decreasing, collate
from regrpo.progress import live_line
from regrpo.provenance import provenance
from regrpo.record_images import ImageError, record_images
from regrpo.records import Record, read_records
from regrpo.segments import TokenizedTrajectory, tokenize_conversation
from regrpo.tool_calls import reflection_span
from regrpo.trainer import Run
from regrpo.trajectory import Message
from regrpo_kernels import Objective

NLL = Objective(policy="nll")


def reflection_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant turns that hold a reflection block."""
    return [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and reflection_span(m["content"]) is not None
    ]


def trained_turns(record: Record, mask: str) -> list[int]:
    """Indices of the turns that a mask trains (``SourceConfig.mask``)."""
    messages = record["conversations"]
    assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if mask == "clean":
        return assistant
    reflections = reflection_turns(messages)
    if mask == "rot":
        return reflections
    # The assistant turn before a reflection is the one that failed; so is what a harness refused.
    failed = {max((i for i in assistant if i < r), default=-1) for r in reflections}
    failed.update(failed_turns(messages))
    return [i for i in assistant if i not in failed]


def strip_reflections(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with every reflection block left out: failure, then retry."""
    stripped = [dict(m) for m in messages]
    for i in reflection_turns(messages):
        content = messages[i]["content"]
        start, stop = reflection_span(content) or (0, 0)
        stripped[i]["content"] = content[:start] + content[stop:]
    return stripped


def load_trajectories(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[SourceConfig],
    max_length: int,
    reader: ImageReader | None = None,
) -> tuple[list[TokenizedTrajectory], Counter[str]]:
    """Reads and tokenises data files; also returns how many were left out, by reason.

    A record with an image that is missing or unreadable is left out.

    Raises:
        ValueError: no record is left, or one has images and the model (``reader``) sees none.
    """
    trajectories: list[TokenizedTrajectory] = []
    skipped: Counter[str] = Counter()
    for source in sources:
        for record in read_records(source.path):
            origin = provenance(record)
            if source.provenance is not None and origin not in source.provenance:
                skipped[f"provenance {origin or 'unknown'}"] += 1
                continue
            turns = trained_turns(record, source.mask)
            messages = record["conversations"]
            if source.reflections == "strip":
                messages = strip_reflections(messages)
            if not turns:
                skipped[f"no turn to train under mask {source.mask!r}"] += 1
                continue
            try:
                folder = source.images or Path(source.path).parent
                images = record_images(record, Path(folder), reader)
            except ImageError as error:
                skipped[str(error)] += 1
                continue
            trajectory = tokenize_conversation(
                tokenizer, messages, trained_turns=turns, reader=reader, images=images
            )
            if len(trajectory) > max_length:
                skipped[f"longer than max_length={max_length}"] += 1
                continue
            trajectories.append(trajectory)
    if not trajectories:
        paths = ", ".join(source.path for source in sources)
        raise ValueError(f"no record to train on in {paths}; left out: {dict(skipped)}")
    return trajectories, skipped


def batches(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, in a new random order every epoch, cut at ``batch_tokens``.

    Batches are drawn, not optimised: best-fit packs hold sequences of one length, hence of one kind
    of task, and training on them is worse by far (docs/log.md).
    """
    epoch = 0
    while True:
        rng = random.Random(f"{seed}-{epoch}")
        batch: list[int] = []
        room = batch_tokens
        for index in rng.sample(range(len(lengths)), len(lengths)):
            if lengths[index] > room:
                yield batch
                batch, room = [], batch_tokens
            batch.append(index)
            room -= lengths[index]
        if batch:
            yield batch
        epoch += 1


def share(
    batch: Sequence[int],
    trajectories: Sequence[TokenizedTrajectory],
    micro_batch_tokens: int | None,
    ranks: Ranks,
) -> list[PackedBatch]:
    """This process's part of a batch, in packs of one pass each; none if it has no part."""
    own = [trajectories[i] for i in batch[ranks.rank :: ranks.size]]
    if micro_batch_tokens is None:
        return [collate(own)] if own else []
    packs = best_fit_decreasing([len(t) for t in own], micro_batch_tokens)
    return [collate([own[i] for i in pack]) for pack in packs]


def backward(
    packed: PackedModel, packs: Sequence[PackedBatch], objective: Objective, normalizer: float
) -> float:
    """Accumulates the gradient of packs of a step; returns their part of its loss."""
    total = 0.0
    for pack in packs:
        loss = policy_loss(packed(pack), *packed.head(), pack, objective, normalizer).loss
        loss.backward()
        total += loss.item()
    return total


def run_sft(config: SFTConfig, progress: Progress | None = None, ranks: Ranks = ALONE) -> str:
    """Trains, resuming a former run of the same configuration; returns the model's folder.

    Args:
        ranks: the processes that train together; each takes its part of every batch.
    """
    tokenizer = load_tokenizer(config.model)
    reader = load_image_reader(config.model, tokenizer)
    trajectories, skipped = load_trajectories(tokenizer, config.data, config.max_length, reader)
    torch.manual_seed(config.seed)  # a new adapter is drawn, and dropout
    packed = load_packed(config, ranks)
    model = packed.model
    if not ranks.main:
        torch.manual_seed(ranks.seed(config.seed))  # dropout of its own
    for reason, count in skipped.items() if ranks.main else ():
        print(f"left out {count} records: {reason}")
    model.train()
    objective = replace(NLL, softcap=logit_softcap(model))
    files = [source.path for source in config.data]
    with Run(
        config.out, config, model, tokenizer, config.optim, config.steps, files, ranks, reader
    ) as run:
        task = (
            progress.add_task("sft", total=config.steps, completed=run.step) if progress else None
        )
        order = batches([len(t) for t in trajectories], config.batch_tokens, config.seed)
        for _ in range(run.step):  # resumed: the data position is a function of the step
            next(order)
        while run.step < config.steps:
            began = time.perf_counter()
            batch = next(order)
            own = share(batch, trajectories, config.micro_batch_tokens, ranks)
            packs = packed.equal_passes([pack.to(run.device) for pack in own], ranks)
            trained = ranks.sum(sum(int(pack.loss_mask.sum()) for pack in packs))
            loss = ranks.sum(backward(packed, packs, objective, float(trained)))
            norm = run.update()
            tokens = sum(len(trajectories[i]) for i in batch)
            metrics = {
                "loss": loss,
                "grad_norm": norm,
                "lr": run.lr,
                "tokens": tokens,
                "trained_tokens": trained,
                "time/tokens_per_s": tokens / (time.perf_counter() - began),
            }
            run.log(metrics)
            run.finish_step(config.save_every)
            if progress and task is not None:
                line = live_line("sft", metrics, ("loss", "grad_norm"))
                progress.update(task, advance=1, description=line)
        run.save_model()
        return str(run.model_path)
