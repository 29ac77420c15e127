"""The small vision-language model: its parts, its pretraining, the stages of its demo."""

import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import metrics_of
from transformers import AutoModelForImageTextToText

from regrpo.config import VisionDemoConfig, VisionPretrainConfig
from regrpo.images import read_images
from regrpo.looking import look, tokenized
from regrpo.modeling import load_image_reader, load_model, load_tokenizer
from regrpo.tasks import VISION_FAMILIES, generate_tasks
from regrpo.tools.page import read_region
from regrpo.vision_pretrain import run_vision_pretrain
from regrpo.vision_recipe import SHOWN, stages
from regrpo.vision_tasks import GRID, WORDS, box_at
from regrpo.workspace import read_image


@pytest.fixture(scope="module")
def base(environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("vision-base")
    config = VisionPretrainConfig(str(out), tokenizer_tasks=40, pages=2, steps=6, save_every=3)
    return config, run_vision_pretrain(config, environment)


def test_it_loads_and_learns(base):
    config, folder = base
    losses = [line["loss"] for line in metrics_of(Path(config.out))]
    assert losses[-1] < losses[0]
    model = load_model(folder)
    assert isinstance(model, type(AutoModelForImageTextToText.from_pretrained(folder)))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "visual" in n)


def test_pretraining_moves_the_tower(base, environment, tmp_path):
    again = VisionPretrainConfig(str(tmp_path), tokenizer_tasks=40, pages=2, steps=1)
    early = load_model(run_vision_pretrain(again, environment)).state_dict()
    late = load_model(base[1]).state_dict()
    moved = [
        name for name in early if "visual" in name and not torch.equal(early[name], late[name])
    ]
    assert any("patch_embed" in name for name in moved)
    assert any("pos_embed" in name for name in moved)


def test_numbers_on_pages_are_digits_and_coordinates_are_tokens(base):
    tokenizer = load_tokenizer(base[1])
    encoded = tokenizer("ash 482 in [28, 70, 56, 84]", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([i]) for i in encoded]
    assert [p for p in pieces if p.strip().isdigit()] == ["4", "8", "2", "28", "70", "56", "84"]
    assert pieces[0].strip() == "ash"
    assert set(WORDS) <= set(tokenizer.get_vocab())


def test_the_processor_keeps_every_pixel(base):
    reader = load_image_reader(base[1], load_tokenizer(base[1]))
    (task,) = generate_tasks(1, seed=0, families=VISION_FAMILIES)
    data = read_image(task.workspace, "page.png")
    image = reader.read(data, "page")
    with Image.open(io.BytesIO(data)) as page:
        width, height = page.size
        ink = sum(value < 128 for value in page.convert("L").tobytes())
    assert image.grid == (1, height // 7, width // 7)
    assert len(image) == width * height // GRID**2
    dark = (image.pixel_values.view(len(image.pixel_values), 3, -1)[:, 0] < 0).sum()
    assert int(dark) == ink


def test_what_is_asked_in_pretraining_is_on_the_page(base, tmp_path):
    tokenizer = load_tokenizer(base[1])
    reader = load_image_reader(base[1], tokenizer)
    rng = random.Random(1)
    for _ in range(5):
        looks = look(rng)
        (whole, files), *_ = looks
        (tmp_path / "page.png").write_bytes(files[0])
        for line in whole[1]["content"].splitlines():
            text, _, *box = line.replace("[", "").replace("]", "").replace(",", "").split()
            box = tuple(map(int, box))
            assert text in WORDS or text.isdigit()
            assert read_region(tmp_path, "page.png", *box).text == text
            assert box == box_at(box[1] // GRID)
        for trajectory, (messages, files) in zip(
            tokenized(looks, tokenizer, reader), looks, strict=True
        ):
            assert len(trajectory.images) == len(read_images(reader, files))
            assert 1 in trajectory.segment_ids, messages


def test_the_stages_of_the_demo_use_seeds_of_their_own(tmp_path):
    jobs = stages(VisionDemoConfig(out=str(tmp_path), seed=4))
    seeds = [
        jobs[name].config.tasks.seed for name in ("data", "regrpo", *(f"eval {n}" for n in SHOWN))
    ]
    assert seeds == [41, 42, 43, 43, 43]
    assert jobs["regrpo"].config.model == jobs["rot-sft"].config.out + "/model"
    assert all(jobs[name].config.tasks.families == VISION_FAMILIES for name in ("data", "regrpo"))
