"""Tasks on page images, their demonstrations, records and states."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from runs import metrics_of
from vision_models import image_processor, vision_model, with_markup

from regrpo.agent import ReGRPOAgent
from regrpo.cli import main
from regrpo.config import (
    DataConfig,
    LoraSettings,
    OptimConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from regrpo.data_engine.build import build, demonstrate, local_starts, write_corpora
from regrpo.data_engine.contrast import contrastive_groups
from regrpo.data_engine.verify import check_record
from regrpo.images import read_images
from regrpo.modeling import load_image_reader, load_model, load_tokenizer
from regrpo.plan.model import build_on_meta
from regrpo.prompts import REFLECTION_OPENER
from regrpo.records import read_records
from regrpo.rl import run_rl
from regrpo.rollout import task_start
from regrpo.segments import tokenize_conversation
from regrpo.sft import run_sft
from regrpo.small_model import build_tokenizer, render_template
from regrpo.tasks import FAMILIES, VISION_FAMILIES, generate_tasks
from regrpo.tools import Status
from regrpo.tools.page import read_region
from regrpo.workspace import read_image

CONFIG_FILES = Path(__file__).parents[2] / "configs"
TASKS = generate_tasks(40, seed=3, families=VISION_FAMILIES)


def page_of(task):
    return read_image(task.workspace, "page.png")


@pytest.fixture(scope="module")
def shown(environment):
    return demonstrate(environment, TASKS, seed=0)[0]


def test_text_tasks_are_not_among_them():
    assert not set(VISION_FAMILIES) & set(FAMILIES)
    assert TaskConfig().families == tuple(FAMILIES)
    assert all(task.images is None for task in generate_tasks(16, seed=0))


def test_the_answer_is_what_the_page_says_at_the_box(tmp_path, shown):
    for demo in shown:
        (tmp_path / "page.png").write_bytes(page_of(demo.task))
        step = demo.task.steps[0]
        assert read_region(tmp_path, *step.call.args).text == demo.task.answer
        assert demo.observations[0].status is Status.OK
        told = [f"[{', '.join(map(str, call.args[1:]))}]" for call in (step.trap or step.call,)]
        assert told[0] in demo.task.question


def test_drifted_boxes_really_fail(shown):
    trapped = [demo for demo in shown if demo.task.trapped]
    assert 15 < len(trapped) < 35
    kinds = Counter(demo.failures[0].observation.status for demo in trapped)
    assert set(kinds) == {Status.EMPTY, Status.ERROR}
    for demo in trapped:
        (failure,) = demo.failures
        assert failure.observation.image is not None
        assert failure.reflection.evidence == failure.observation.text
        box = list(demo.task.steps[0].call.args[1:])
        assert failure.reflection.fix_plan == f"use {box}"
        assert str(box) not in failure.observation.text


def test_records_name_their_images(environment, tmp_path):
    config = DataConfig(str(tmp_path), count=24, tasks=TaskConfig(seed=3, families=VISION_FAMILIES))
    write_corpora(config, environment)
    corpus = build(environment, config.tasks.generate(24), seed=3, near_miss_share=0.35)
    for name in ("success", "clean", "rot"):
        records = read_records(tmp_path / f"{name}.jsonl")
        assert records == getattr(corpus, name)
        for record in records:
            assert check_record(record) == []
            for placeholder, path in record["image"].items():
                assert (tmp_path / path).read_bytes() == corpus.images[path]
                turns = [
                    m["content"] for m in record["conversations"] if placeholder in m["content"]
                ]
                assert len(turns) == 1
    assert any(len(record["image"]) == 2 for record in corpus.rot)


def test_a_build_that_was_stopped_goes_on_with_its_pictures(environment, tmp_path):
    tasks = TaskConfig(seed=3, families=VISION_FAMILIES)
    write_corpora(DataConfig(str(tmp_path / "whole"), count=80, tasks=tasks), environment)

    class Stopping:
        def __init__(self):
            self.batches = 0

        def execute(self, requests):
            self.batches += 1
            if self.batches == 2:
                raise KeyboardInterrupt
            return environment.execute(requests)

    config = DataConfig(str(tmp_path / "half"), count=80, tasks=tasks)
    with pytest.raises(KeyboardInterrupt):
        write_corpora(config, Stopping())
    write_corpora(config, environment)
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*")]
    assert any(path.suffix == ".png" for path in files)
    for path in files:
        if path.name != "config.json":
            ours, theirs = (Path(tmp_path / name / path).read_bytes() for name in ("half", "whole"))
            assert ours == theirs


def test_states_show_the_page_and_what_was_seen(shown):
    starts = local_starts(shown, random.Random(0), forced_share=0.6)
    assert {len(s.images) for s in starts} >= {0, 1, 2}
    for start in starts:
        text = "\n".join(m["content"] for m in start.messages)
        pictures = ("(no ink in", "CutError", "part of page.png")
        assert ("<image_00>" in text) == any(told in text for told in pictures)
    assert task_start(TASKS[0]).images == ()
    assert "crop(page: str" in task_start(TASKS[0]).messages[0]["content"]
    whole = replace(TASKS[0], images=("page.png",))
    assert task_start(whole).images == (page_of(whole),)
    assert task_start(whole).messages[1]["content"].endswith("\n<image_00>")
    for group in contrastive_groups(shown, random.Random(0)):
        assert len(group.start.images) == group.start.step


@pytest.fixture(scope="module")
def model(environment, tmp_path_factory):
    """A folder with a tiny random model and corpora that it can be trained on."""
    folder = tmp_path_factory.mktemp("vision")
    tasks = TaskConfig(seed=3, families=VISION_FAMILIES)
    write_corpora(DataConfig(str(folder / "data"), count=30, tasks=tasks), environment)
    records = [r for n in ("clean", "rot") for r in read_records(folder / "data" / f"{n}.jsonl")]
    texts = [render_template(r["conversations"]) for r in records]
    tokenizer = with_markup(build_tokenizer(texts, [REFLECTION_OPENER, "Thought:"]))
    for part in (vision_model("qwen2-vl", tokenizer), tokenizer, image_processor()):
        part.save_pretrained(folder / "base")
    return folder


def test_sft_and_rl_on_executed_crops(model, environment, tmp_path):
    """The whole way: records with crops, then trajectories that are sampled on other pages."""
    sft = SFTConfig(
        model=str(model / "base"),
        out=str(tmp_path / "sft"),
        data=[SourceConfig(str(model / "data" / "rot.jsonl"), mask="repair")],
        steps=4,
        batch_tokens=1500,
        optim=OptimConfig(lr=3e-3),
        lora=LoraSettings(rank=4),
    )
    start = run_sft(sft)
    rl = TrainConfig(
        model=start,
        out=str(tmp_path / "rl"),
        steps=2,
        states=3,
        group_size=3,
        max_new_tokens=24,
        forced_share=0.5,
        own_states_share=0.3,
        batch_tokens=3000,
        zero_variance="keep",
        tasks=TaskConfig(seed=5, families=VISION_FAMILIES),
        log_trajectories_every=1,
    )
    run_rl(rl, environment)
    lines = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["trajectories"] == 9 for line in lines)
    assert all(line["log_probs/sampler"] < 1e-3 for line in lines if "log_probs/sampler" in line)
    assert (tmp_path / "rl/model/preprocessor_config.json").exists()


def test_the_tokens_of_a_record_hold_its_images(model):
    tokenizer = load_tokenizer(str(model / "base"))
    reader = load_image_reader(str(model / "base"), tokenizer)
    record = read_records(model / "data" / "rot.jsonl")[0]
    files = [(model / "data" / path).read_bytes() for path in record["image"].values()]
    images = read_images(reader, files)
    tokens = tokenize_conversation(tokenizer, record["conversations"], reader=reader, images=images)
    assert set(tokens.images) == {image.key for image in images.values()}
    assert sum(value < 0 for value in tokens.input_ids) == sum(map(len, images.values()))


@pytest.fixture
def page(tmp_path):
    """A folder of a user's with a page and a broken one."""
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "page.png").write_bytes(page_of(TASKS[0]))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_an_agent_is_shown_images(model, page):
    agent = ReGRPOAgent(str(model / "base"), max_new_tokens=8, device="cpu")
    trajectory = agent.run("What is on it?", page, images=["page.png", "page.png"])
    text = trajectory.start.messages[1]["content"]
    assert text == "Task: What is on it?\n<image_00>\n<image_01>"
    (image,) = trajectory.tokens.images.values()
    assert trajectory.tokens.input_ids.count(image.key) == 2 * len(image)
    assert "crop(page: str" in trajectory.start.messages[0]["content"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.png", "no image 'none.png' in its workspace"),
        ("../page.png", r"no image '\.\./page\.png' in its workspace"),
        ("broken.png", "<image_00>: .*; expected an image that Pillow reads"),
    ],
)
def test_an_agent_names_an_image_that_it_cannot_show(model, page, name, told):
    agent = ReGRPOAgent(str(model / "base"), max_new_tokens=4, device="cpu")
    with pytest.raises(ValueError, match=told):
        agent.run("What is on it?", page, images=[name])


def test_the_command_line_shows_images(model, page, capsys):
    command = ["run", "--model", str(model / "base"), "--workspace", str(page), "--device", "cpu"]
    command += ["--task", "What?", "--max_new_tokens", "4"]
    with pytest.raises(SystemExit, match="the agent came to no answer"):
        main([*command, "--images", '["page.png"]'])
    assert "<image_00>" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no image 'none\.png' in its workspace"):
        main([*command, "--images", '["none.png"]'])


def test_the_papers_run_trains_a_tiny_model(model, tmp_path):
    """The files of the paper's run, on a tiny random model of the same architecture: only the
    model, its data and the lengths are those of a test."""
    small = ["--steps", "1", "--model", str(model / "base")]
    sources = [
        {"path": str(model / "data" / f"{name}.jsonl"), "mask": mask}
        for name, mask in (("clean", "clean"), ("rot", "rot"))
    ]
    path = str(CONFIG_FILES / "qwen2_vl_7b_sft.yaml")
    options = ["--data", json.dumps(sources), "--out", str(tmp_path / "sft")]
    main(["sft", "--config", path, *small, *options])
    start = str(tmp_path / "sft/model")
    path = str(CONFIG_FILES / "qwen2_vl_7b_regrpo.yaml")
    small = ["--steps", "1", "--model", start, "--max_new_tokens", "8"]
    main(["train", "--config", path, *small, "--out", str(tmp_path / "rl")])
    (line,) = metrics_of(tmp_path / "sft")
    assert line["grad_norm"] > 0
    planned, trained = build_on_meta(TrainConfig(model=start, out="o")), load_model(start)
    assert [(n, p.shape, p.requires_grad) for n, p in planned.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in trained.named_parameters()
    ], "the adapter of a folder"
    (line,) = metrics_of(tmp_path / "rl")
    assert line["trajectories"] == 5
    assert line["lr"] == pytest.approx(1e-7)  # the first of ten steps that warm up
    assert (tmp_path / "rl/model/adapter_config.json").exists()
