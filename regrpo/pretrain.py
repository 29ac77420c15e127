"""The small base model: tokenizer from the tasks' own text, weights pretrained on copying.

A training sequence is a short random string of symbols, repeated. Predicting a repetition takes
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
from regrpo.modeling import head, hidden_states
from regrpo.names import NAMES
from regrpo.packing import PackedBatch, collate
from regrpo.prompts import REFLECTION_OPENER
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tasks import generate_tasks
from regrpo.trainer import Run
from regrpo_kernels import Segment

SEQUENCES = 36
LENGTH = 56


def copying_batch(rng: random.Random, symbols: list[int]) -> PackedBatch:
    """Strings of 3 to 20 different symbols, repeated; their first occurrence is not trained."""
    trajectories = []
    for _ in range(SEQUENCES):
        string = rng.sample(symbols, rng.randint(3, 20))
        copies = string * (LENGTH // len(string) + 1)
        trajectory = TokenizedTrajectory()
        # The first symbol of the first copy cannot be known: it is given as well.
        trajectory.extend([*string, string[0]], Segment.CONTEXT)
        trajectory.extend(copies[1 : LENGTH - len(string)], Segment.ACTION)
        trajectories.append(trajectory)
    return collate(trajectories)


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
    vocabulary_ids = tokenizer.get_vocab()
    symbols = [vocabulary_ids[name] for name in NAMES]
    embeddings, _ = head(model)  # tied
    initial = embeddings.detach().clone()
    with Run(config.out, config, model, tokenizer, config.optim, config.steps) as run:
        bar = (
            progress.add_task("pretrain", total=config.steps, completed=run.step)
            if progress
            else None
        )
        while run.step < config.steps:
            rng = random.Random(f"{config.seed}-{run.step}")
            batch = copying_batch(rng, symbols).to(run.device)
            count = batch.loss_mask.sum()
            loss = policy_loss(hidden_states(model, batch), *head(model), batch, NLL, count).loss
            loss.backward()
            norm = run.update()
            run.log({"loss": loss.item(), "grad_norm": norm, "lr": run.lr})
            run.finish_step(config.save_every)
            if progress and bar is not None:
                progress.update(bar, advance=1, description=f"pretrain loss {loss.item():.3f}")
        # Tokens that never occurred have only been pushed away, all in one direction, which would
        # make them look alike to whatever is learned next.
        with torch.no_grad():
            initial[symbols] = embeddings[symbols]
            embeddings.copy_(initial)
        run.save_model()
        return str(run.model_path)
