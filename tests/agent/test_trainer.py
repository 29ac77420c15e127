"""Runs: SFT and RL end to end on tiny models, interrupted anywhere and resumed bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrpo import trainer
from regrpo.config import (
    LoraSettings,
    OptimConfig,
    PretrainConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from regrpo.errors import RunError
from regrpo.pretrain import run_pretrain
from regrpo.records import write_records
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.small_model import build_model
from regrpo.trainer import Run, build_optimizer, learning_rate

STEPS, SAVE_EVERY = 6, 2


@pytest.fixture(scope="module")
def base(tokenizer, corpus, tmp_path_factory):
    """A folder with a model that writes a turn now and then, `model`, and data, `rot.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2, seed=0)
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    write_records(folder / "rot.jsonl", corpus.rot[:24])
    optim = OptimConfig(lr=1e-2)
    config = sft_config(folder, folder, model=str(folder / "random"), steps=40, optim=optim)
    assert run_sft(config) == str(folder / "model")
    return folder


def sft_config(base, out, **kwargs):
    defaults = {
        "model": str(base / "model"),
        "out": str(out),
        "data": [SourceConfig(str(base / "rot.jsonl"))],
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "batch_tokens": 1500,
        "optim": OptimConfig(lr=3e-3, warmup_steps=2),
    }
    return SFTConfig(**{**defaults, **kwargs})


def rl_config(base, out, **kwargs):
    defaults = {
        "model": str(base / "model"),
        "out": str(out),
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "states": 2,
        "group_size": 4,
        "max_new_tokens": 24,
        "epochs": 2,
        "batch_tokens": 2000,
        "tasks": TaskConfig(seed=5),
    }
    return TrainConfig(**{**defaults, **kwargs})


@pytest.fixture(params=["sft", "sft-lora", "rl", "rl-lora"])
def training(request, base, environment):
    """`(run, config)`: starts, or resumes, a run in a folder."""
    kind, _, lora = request.param.partition("-")
    settings = LoraSettings(rank=2 if lora else 0)
    if kind == "sft":
        return run_sft, lambda out: sft_config(base, out, lora=settings)
    return (
        lambda config: run_rl(config, environment),
        lambda out: rl_config(base, out, lora=settings),
    )


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def state_of(out):
    """The last checkpoint: weights, optimizer and generators."""
    last = max((out / "checkpoints").iterdir())
    return torch.load(last / "state.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Makes a run stop once, at a step, before or after that step's checkpoint."""

    def arm(step, *, after_saving=False):
        finish = Run.finish_step

        def finish_step(self, save_every):
            if self.step == step and not after_saving:
                raise Interrupted
            finish(self, save_every)
            if self.step == step + 1 and after_saving:
                raise Interrupted

        monkeypatch.setattr(Run, "finish_step", finish_step)

    yield arm
    monkeypatch.undo()


def test_interrupted_anywhere_and_resumed_is_the_uninterrupted_run(
    training, tmp_path, interrupt, monkeypatch
):
    run, config = training
    whole = tmp_path / "whole"
    run(config(whole))
    expected = metrics_of(whole)
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert all(math.isfinite(v) for line in expected for v in line.values())
    assert all(line["grad_norm"] > 0 for line in expected)
    assert len({line["loss"] for line in expected}) == STEPS
    # At the first step, right before and behind a checkpoint, between two; and at several in turn.
    for number, stops in enumerate(
        [[(0, False)], [(3, False), (3, True)], [(2, True), (4, False)]]
    ):
        out = tmp_path / str(number)
        for step, after_saving in stops:
            interrupt(step, after_saving=after_saving)
            with pytest.raises(Interrupted):
                run(config(out))
            monkeypatch.undo()
            assert not (out / "model").exists()
        run(config(out))
        assert metrics_of(out) == expected, stops
        assert same(state_of(out), state_of(whole)), stops
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (whole / "model" / name).exists():
                written = (out / "model" / name).read_bytes()
                assert written == (whole / "model" / name).read_bytes()


def test_interrupted_while_a_checkpoint_is_written(base, tmp_path, monkeypatch):
    run_sft(sft_config(base, tmp_path / "whole"))
    out = tmp_path / "out"
    save = torch.save

    def torn(state, path):
        if state["step"] == 4:
            path.write_bytes(b"torn")
            raise Interrupted
        save(state, path)

    monkeypatch.setattr(trainer.torch, "save", torn)
    with pytest.raises(Interrupted):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    run_sft(sft_config(base, out))
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert same(state_of(out), state_of(tmp_path / "whole"))
    assert len(list((out / "checkpoints").glob("*"))) == trainer.KEEP_CHECKPOINTS


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from regrpo.config import LoraSettings, OptimConfig, SFTConfig, SourceConfig
from regrpo.sft import run_sft
fields = json.loads(sys.argv[1])
fields["data"] = [SourceConfig(**source) for source in fields["data"]]
fields["optim"] = OptimConfig(**fields["optim"])
fields["lora"] = LoraSettings(**{**fields["lora"], "targets": tuple(fields["lora"]["targets"])})
run_sft(SFTConfig(**fields))
"""


def test_killed_and_resumed_is_the_uninterrupted_run(base, tmp_path):
    steps = 400  # enough that the kill comes before the end
    out = tmp_path / "out"
    config = sft_config(base, out, steps=steps, save_every=3, batch_tokens=400, max_length=400)
    child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(asdict(config))])
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 8:
        assert child.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    reached = metrics.read_bytes().count(b"\n")
    assert reached < steps
    # Both go on to the same checkpoint, a few steps behind the kill, under the same schedule.
    stop = 3 * (reached // 3 + 2)

    def until(out):
        with pytest.MonkeyPatch.context() as patch:
            finish = Run.finish_step

            def finish_step(self, save_every):
                finish(self, save_every)
                if self.step == stop:
                    raise Interrupted

            patch.setattr(Run, "finish_step", finish_step)
            with pytest.raises(Interrupted):
                run_sft(replace(config, out=str(out)))

    until(tmp_path / "whole")
    until(out)
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert same(state_of(out), state_of(tmp_path / "whole"))


def test_another_configuration_in_the_same_folder_is_refused(base, tmp_path):
    run_sft(sft_config(base, tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    other = sft_config(base, tmp_path, seed=1, optim=OptimConfig(lr=1.0, warmup_steps=2))
    with pytest.raises(RunError) as error:
        run_sft(other)
    message = str(error.value)
    assert "differs in: optim.lr, seed" in message
    assert str(tmp_path) in message
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_moved_folder_goes_on(base, tmp_path, interrupt, monkeypatch):
    run_sft(sft_config(base, tmp_path / "whole"))
    interrupt(3)
    with pytest.raises(Interrupted):
        run_sft(sft_config(base, tmp_path / "before"))
    monkeypatch.undo()
    (tmp_path / "before").rename(tmp_path / "after")
    run_sft(sft_config(base, tmp_path / "after"))
    assert metrics_of(tmp_path / "after") == metrics_of(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(base, tmp_path):
    path = run_sft(sft_config(base, tmp_path))
    before = (metrics_of(tmp_path), state_of(tmp_path))
    assert run_sft(sft_config(base, tmp_path)) == path
    assert same(before, (metrics_of(tmp_path), state_of(tmp_path)))


def test_a_torn_last_line_of_the_metrics_is_written_again(base, tmp_path, interrupt, monkeypatch):
    run_sft(sft_config(base, tmp_path / "whole"))
    out = tmp_path / "out"
    interrupt(5)
    with pytest.raises(Interrupted):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    text = (out / "metrics.jsonl").read_text()
    assert text.count("\n") == 6
    (out / "metrics.jsonl").write_text(text[:-20])
    run_sft(sft_config(base, out))
    assert metrics_of(out) == metrics_of(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(base, tmp_path):
    optim = OptimConfig(lr=1e30, warmup_steps=0)
    config = sft_config(base, tmp_path, optim=optim, save_every=1)
    with pytest.raises(
        RunError, match=r"step 1: gradient norm is nan; the last checkpoint in .*intact"
    ):
        run_sft(config)
    assert [line["step"] for line in metrics_of(tmp_path)] == [0]
    state = state_of(tmp_path)
    assert state["step"] == 1
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "model").exists()


def test_sft_learns_and_its_model_loads_by_itself(base, tmp_path):
    random = str(base / "random")
    config = sft_config(base, tmp_path, model=random, steps=40, optim=OptimConfig(lr=1e-2))
    path = run_sft(config)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template
    for name, value in state_of(tmp_path)["model"].items():
        assert torch.equal(model.get_parameter(name), value), name
    line = metrics_of(tmp_path)[0]
    assert 0 < line["trained_tokens"] < line["tokens"] <= 1500
    assert any((tmp_path / "tensorboard").iterdir())


def test_an_adapter_loads_with_plain_peft(base, tmp_path):
    path = run_sft(sft_config(base, tmp_path, lora=LoraSettings(rank=2)))
    plain = AutoModelForCausalLM.from_pretrained(base / "model")
    adapted = PeftModel.from_pretrained(plain, path)
    ours = state_of(tmp_path)["model"]
    assert ours
    theirs = dict(adapted.named_parameters())
    for name, value in ours.items():
        assert "lora_" in name
        assert torch.equal(theirs[name], value), name
    assert any((v != 0).any() for n, v in ours.items() if "lora_B" in n)
    assert AutoTokenizer.from_pretrained(path).chat_template


def test_rl_reports_the_usual_names(base, tmp_path, environment):
    run_rl(rl_config(base, tmp_path, steps=2), environment)
    names = set(metrics_of(tmp_path)[0])
    assert names >= {
        "loss",
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "ratio/mean",
        "reward/mean",
        "reward/std",
        "success",
        "recovery",
        "reflection/tokens",
        "grad_norm",
        "lr",
    }


def test_rl_on_an_adapter_of_sft(base, tmp_path, environment):
    """Goes on training the adapter that it is given."""
    path = run_sft(sft_config(base, tmp_path / "sft", lora=LoraSettings(rank=2)))
    run_rl(rl_config(base, tmp_path / "rl", model=path, steps=2), environment)
    assert metrics_of(tmp_path / "rl")[0]["kl"] < 1e-3
    before, after = (state_of(tmp_path / kind)["model"] for kind in ("sft", "rl"))
    assert before.keys() == after.keys()
    assert not same(before, after)
    moved = max((after[n] - before[n]).abs().max().item() for n in before)
    assert moved < 0.01  # from where SFT ended, not from zero


def test_the_seed_draws_the_adapter_and_the_data(base, tmp_path):
    def first(name, seed):
        config = sft_config(base, tmp_path / name, steps=2, seed=seed, lora=LoraSettings(rank=2))
        run_sft(config)
        return state_of(tmp_path / name)["model"], metrics_of(tmp_path / name)

    torch.manual_seed(123)
    one = first("one", 0)
    torch.manual_seed(456)
    assert same(one, first("two", 0))
    assert not same(one, first("three", 1))


def test_wrong_inputs_are_errors_before_anything_is_written(base, tmp_path):
    out = tmp_path / "out"
    missing = [SourceConfig(str(tmp_path / "none.jsonl"))]
    with pytest.raises(FileNotFoundError, match=r"no data file at .*none\.jsonl"):
        run_sft(sft_config(base, out, data=missing))
    with pytest.raises(ValueError, match=r"no record to train on in .*longer than max_length=5"):
        run_sft(sft_config(base, out, max_length=5))
    with pytest.raises(FileNotFoundError, match=r"no model at .*no-model"):
        run_sft(sft_config(base, out, model=str(tmp_path / "no-model")))
    assert not out.exists()


def test_learning_rate():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(step, 24, config) for step in range(24)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert learning_rate(24, 24, config) == pytest.approx(0.1)
    assert learning_rate(0, 1, OptimConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_only_matrices_decay(model):
    matrices, vectors = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_pretraining_learns_to_copy(tmp_path, environment):
    config = PretrainConfig(
        out=str(tmp_path),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        tokenizer_tasks=64,
        steps=12,
        save_every=100,
    )
    path = run_pretrain(config, environment)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(tokenizer)
