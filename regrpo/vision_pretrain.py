"""The small vision-language base model: the whole of it, its tower included, learns to look."""

import random

from rich.progress import Progress
from transformers import Qwen2Tokenizer

from regrpo.config import VisionPretrainConfig
from regrpo.data_engine.build import build
from regrpo.environment import Environment
from regrpo.images import ImageReader
from regrpo.looking import look, tokenized
from regrpo.losses import policy_loss
from regrpo.modeling import head, hidden_states, place
from regrpo.packing import collate
from regrpo.prompts import REFLECTION_OPENER
from regrpo.sft import NLL
from regrpo.small_model import build_tokenizer, render_template
from regrpo.small_vision_model import (
    MARKUP,
    add_image_markup,
    build_vision_model,
    image_processor,
)
from regrpo.tasks import VISION_FAMILIES, generate_tasks
from regrpo.trainer import Run
from regrpo.vision_tasks import GRID, ROWS, WORDS


def vision_tokenizer(config: VisionPretrainConfig, environment: Environment) -> Qwen2Tokenizer:
    """The tokenizer, from executed demonstrations and from conversations about pages.

    Numbers on pages are left out of the text, so that they stay digits, which are read one by one.
    """
    tasks = generate_tasks(config.tokenizer_tasks, seed=config.seed, families=VISION_FAMILIES)
    corpus = build(environment, tasks, seed=config.seed, near_miss_share=1.0)
    texts = [
        render_template(record["conversations"]).replace(record["answer"], "")
        for record in (*corpus.success, *corpus.rot)
    ]
    rng = random.Random(config.seed)
    for messages, _ in (told for _ in range(8) for told in look(rng)):
        texts.append(render_template([m for m in messages if m["role"] == "user"]))
    coordinates = [str(n) for n in range(0, (ROWS + 1) * GRID, GRID // 2) if n > 9]
    symbols = [*WORDS, *coordinates, REFLECTION_OPENER, "Thought:"]
    tokenizer = build_tokenizer(texts, symbols)
    add_image_markup(tokenizer)
    return tokenizer


def run_vision_pretrain(
    config: VisionPretrainConfig, environment: Environment, progress: Progress | None = None
) -> str:
    """Builds and pretrains the small vision-language model; returns its folder."""
    tokenizer = vision_tokenizer(config, environment)
    model = build_vision_model(tokenizer, seed=config.seed)
    place(model)
    reader = ImageReader(image_processor(), *MARKUP, model.config.image_token_id)
    with Run(
        config.out, config, model, tokenizer, config.optim, config.steps, reader=reader
    ) as run:
        bar = (
            progress.add_task("pretrain", total=config.steps, completed=run.step)
            if progress
            else None
        )
        while run.step < config.steps:
            rng = random.Random(f"{config.seed}-{run.step}")
            looks = [told for _ in range(config.pages) for told in look(rng)]
            batch = collate(tokenized(looks, tokenizer, reader), share=True).to(run.device)
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
