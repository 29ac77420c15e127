"""The small base model: tokenizer from the tasks' own text, weights pretrained on copying.

A training sequence is a random string of symbols and its repetitions. Predicting a repetition takes
looking up what followed the symbol before (induction), which is all that is taught here: no task
text, no tool, no format.
"""

import random

import torch
from rich.progress import Progress
from transformers import Qwen2Tokenizer

from regrpo.config import PretrainConfig
from regrpo.data_engine.build import build
from regrpo.environment import Environment
from regrpo.losses import policy_loss
from regrpo.modeling import head, hidden_states, place
from regrpo.names import NAMES
from regrpo.packing import PackedBatch, collate
from regrpo.prompts import REFLECTION_OPENER
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tasks import generate_tasks
from regrpo.trainer import Run
from regrpo_kernels import Segment

SEQUENCES = 32
LENGTH = 60


def copying_batch(
    rng: random.Random, symbols: list[int], separators: list[int], separated_share: float
) -> PackedBatch:
    """Strings of different symbols and their repetitions, a share of them with separators.

    Plain strings are repeated whole; of separated ones stretches come back, from anywhere. Only
    what the first occurrence determines is trained.
    """
    return collate(
        [
            _separated(rng, symbols, rng.choice(separators))
            if rng.random() < separated_share
            else _plain(rng, symbols)
            for _ in range(SEQUENCES)
        ]
    )


def _plain(rng: random.Random, symbols: list[int]) -> TokenizedTrajectory:
    string = rng.sample(symbols, rng.randint(3, 16))
    copies = string * (LENGTH // len(string) + 1)
    trajectory = TokenizedTrajectory()
    trajectory.extend([*string, string[0]], Segment.CONTEXT)
    trajectory.extend(copies[1 : LENGTH - len(string)], Segment.ACTION)
    return trajectory


def _separated(rng: random.Random, symbols: list[int], separator: int) -> TokenizedTrajectory:
    string = rng.sample(symbols, rng.randint(3, 10))
    trajectory = TokenizedTrajectory()
    for symbol in string:
        trajectory.extend([symbol, separator], Segment.CONTEXT)
    while len(trajectory) < LENGTH:
        start = rng.randrange(len(string) - 1)
        trajectory.extend([string[start], separator], Segment.CONTEXT)
        for symbol in string[start + 1 : start + 1 + rng.randint(1, 4)]:
            trajectory.extend([symbol], Segment.ACTION)
            trajectory.extend([separator], Segment.CONTEXT)
    return trajectory


def task_tokenizer(config: PretrainConfig, environment: Environment) -> Qwen2Tokenizer:
    """The tokenizer, from executed demonstrations of generated tasks."""
    tasks = list(generate_tasks(config.tokenizer_tasks, seed=config.seed, hops=(1, 4)))
    corpus = build(environment, tasks, seed=config.seed)
    texts = [render_template(r["conversations"]) for r in [*corpus.success, *corpus.rot]]
    return build_tokenizer(texts, [*NAMES, REFLECTION_OPENER, "Thought:"])


def run_pretrain(
    config: PretrainConfig, environment: Environment, progress: Progress | None = None
) -> str:
    """Builds and pretrains the small base model; returns its folder."""
    tokenizer = task_tokenizer(config, environment)
    model = build_model(
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        seed=config.seed,
    )
    place(model)
    vocabulary_ids = tokenizer.get_vocab()
    symbols = [vocabulary_ids[name] for name in NAMES]
    separators = sorted(set(vocabulary_ids.values()) - set(symbols))
    embeddings, _ = head(model)  # tied
    # Tokens that are never predicted would all be pushed away in one direction. That marks them, so
    # copying would work behind those marks only, and they would look alike to what is learned next.
    learned = torch.zeros(len(tokenizer), 1)
    learned[symbols] = 1.0
    embeddings.register_hook(lambda gradient: gradient * learned.to(gradient.device))
    with Run(config.out, config, model, tokenizer, config.optim, config.steps) as run:
        bar = (
            progress.add_task("pretrain", total=config.steps, completed=run.step)
            if progress
            else None
        )
        while run.step < config.steps:
            rng = random.Random(f"{config.seed}-{run.step}")
            # Separators come once plain copying is under way; from the start they only delay it.
            share = 0.6 if run.step > 0.35 * config.steps else 0.0
            batch = copying_batch(rng, symbols, separators, share).to(run.device)
            count = batch.loss_mask.sum()
            loss = policy_loss(hidden_states(model, batch), *head(model), batch, NLL, count).loss
            loss.backward()
            norm = run.update()
            run.log({"loss": loss.item(), "grad_norm": norm, "lr": run.lr})
            run.finish_step(config.save_every)
            if progress and bar is not None:
                progress.update(bar, advance=1, description=f"pretrain loss {loss.item():.3f}")
        run.save_model()
        return str(run.model_path)
