"""The small base model: tokenizer from the tasks' own text, weights from in-context copying."""

import random

import torch
from rich.progress import Progress
from transformers import Qwen2Tokenizer

from regrpo.config import PretrainConfig
from regrpo.copying import WORDS, Copying
from regrpo.data_engine.build import build
from regrpo.environment import Environment
from regrpo.losses import policy_loss
from regrpo.modeling import head, hidden_states, place
from regrpo.packing import collate
from regrpo.prompts import REFLECTION_OPENER
from regrpo.sft import NLL
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tasks import MAX_HOPS, generate_tasks
from regrpo.trainer import Run

SEQUENCES = 28


def task_tokenizer(config: PretrainConfig, environment: Environment) -> Qwen2Tokenizer:
    """The tokenizer, from executed demonstrations of generated tasks."""
    tasks = list(generate_tasks(config.tokenizer_tasks, seed=config.seed, hops=(1, MAX_HOPS)))
    corpus = build(environment, tasks, seed=config.seed, long_share=0.5)
    texts = [render_template(r["conversations"]) for r in [*corpus.success, *corpus.rot]]
    return build_tokenizer(texts, [*WORDS, REFLECTION_OPENER, "Thought:"])


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
    copying = Copying(tokenizer)
    embeddings, _ = head(model)  # tied
    # Tokens that are never predicted would all be pushed away in one direction. That marks them, so
    # copying would work behind those marks only, and they would look alike to what is learned next.
    learned = torch.zeros(len(tokenizer), 1)
    learned[copying.symbols] = 1.0
    embeddings.register_hook(lambda gradient: gradient * learned.to(gradient.device))
    with Run(config.out, config, model, tokenizer, config.optim, config.steps) as run:
        bar = (
            progress.add_task("pretrain", total=config.steps, completed=run.step)
            if progress
            else None
        )
        while run.step < config.steps:
            rng = random.Random(f"{config.seed}-{run.step}")
            batch = collate([copying.sequence(rng) for _ in range(SEQUENCES)]).to(run.device)
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
