"""Runs interrupted anywhere and resumed bit for bit, and what is refused to go on."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from runs import STEPS, metrics_of, rl_config, same, sft_config, state_of

from regrpo import trainer
from regrpo.config import LoraSettings, OptimConfig, SourceConfig
from regrpo.errors import RunError
from regrpo.records import write_records
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.trainer import Run

MODES = {
    "episodes": {"mode": "episodes", "max_steps": 2},
    "own": {"own_states_share": 0.7, "forced_share": 0.3},
    "offline": {"mode": "offline", "policy": "reinforce", "group_size": 5},
}


@pytest.fixture(params=["sft", "sft-lora", "rl", "rl-lora", *(f"rl-{mode}" for mode in MODES)])
def training(request, base, environment):
    """`(run, config)`: starts, or resumes, a run in a folder."""
    kind, _, variant = request.param.partition("-")
    settings = LoraSettings(rank=2 if variant == "lora" else 0)
    if kind == "sft":
        return run_sft, lambda out: sft_config(base, out, lora=settings)
    return (
        lambda config: run_rl(config, environment),
        lambda out: rl_config(base, out, lora=settings, **MODES.get(variant, {})),
    )


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


def trajectories_of(out):
    path = out / "trajectories.jsonl"
    return path.read_text() if path.exists() else None


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
        assert trajectories_of(out) == trajectories_of(whole), stops
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
            path.write(b"torn")
            raise Interrupted
        save(state, path)

    monkeypatch.setattr(trainer.torch, "save", torn)
    with pytest.raises(Interrupted):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    run_sft(sft_config(base, out))
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert same(state_of(out), state_of(tmp_path / "whole"))
    assert len(list((out / "checkpoints").glob("*"))) == 2


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


FORKS = """
import json, os, signal, sys, time
import torch
import transformers.models.qwen2.modeling_qwen2  # here, and not in every child
from pathlib import Path
torch.set_num_threads(1)
from regrpo.config import LoraSettings, OptimConfig, SFTConfig, SourceConfig
from regrpo.sft import run_sft
fields, kills = json.loads(sys.argv[1])
fields["data"] = [SourceConfig(**source) for source in fields["data"]]
fields["optim"] = OptimConfig(**fields["optim"])
fields["lora"] = LoraSettings(**{**fields["lora"], "targets": tuple(fields["lora"]["targets"])})
config = SFTConfig(**fields)
checkpoints = Path(config.out) / "checkpoints"
for partials, delay in kills:
    child = os.fork()  # this process has computed nothing, so it has no threads to lose
    if child == 0:
        run_sft(config)
        os._exit(0)
    seen, before = 0, False
    while seen < partials:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        now = any(checkpoints.glob(".*.partial"))
        seen, before = seen + (now and not before), now
        time.sleep(0.0002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(*sorted(p.name for p in checkpoints.iterdir()), flush=True)
"""


@pytest.mark.slow
def test_killed_while_checkpoints_are_written(base, tmp_path):
    steps, out = 40, tmp_path / "out"  # more than the kills leave time for
    config = sft_config(base, out, steps=steps, save_every=1, batch_tokens=400, max_length=400)
    # The n-th checkpoint seen being written, and so many seconds into that.
    rng = random.Random(0)
    kills = [(1 + n % 2, max(0, rng.random() - 0.5) * 0.008) for n in range(5)]
    arguments = [sys.executable, "-c", FORKS, json.dumps([asdict(config), kills])]
    seen = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(seen) == len(kills)
    assert any("partial" in names for names in seen), "no kill came while a checkpoint was written"
    run_sft(config)
    run_sft(replace(config, out=str(tmp_path / "whole")))
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert same(state_of(out), state_of(tmp_path / "whole"))


def test_how_much_is_kept_and_told_may_change(base, tmp_path, interrupt, monkeypatch):
    run_sft(sft_config(base, tmp_path / "whole"))
    out = tmp_path / "out"
    interrupt(4)
    with pytest.raises(Interrupted):
        run_sft(sft_config(base, out, keep_checkpoints=1))
    monkeypatch.undo()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-0000004"]
    run_sft(sft_config(base, out, keep_checkpoints=3))
    assert len(list((out / "checkpoints").iterdir())) == 2
    assert metrics_of(out) == metrics_of(tmp_path / "whole")


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


def test_a_torn_last_line_of_a_log_is_written_again(
    base, tmp_path, interrupt, monkeypatch, environment
):
    run_rl(rl_config(base, tmp_path / "whole", epochs=1), environment)
    out = tmp_path / "out"
    interrupt(5)
    with pytest.raises(Interrupted):
        run_rl(rl_config(base, out, epochs=1), environment)
    monkeypatch.undo()
    for name, lines in (("metrics.jsonl", 6), ("trajectories.jsonl", 12)):
        text = (out / name).read_text()
        assert text.count("\n") == lines
        (out / name).write_text(text[:-20])
    run_rl(rl_config(base, out, epochs=1), environment)
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert trajectories_of(out) == trajectories_of(tmp_path / "whole")


def test_a_data_file_that_changed_is_refused_by_name(
    base, corpus, tmp_path, interrupt, monkeypatch
):
    data = tmp_path / "data.jsonl"
    write_records(data, corpus.rot[:24])
    config = sft_config(base, tmp_path / "out", data=[SourceConfig(str(data))])
    interrupt(3)
    with pytest.raises(Interrupted):
        run_sft(config)
    monkeypatch.undo()
    write_records(data, corpus.rot[:23])
    with pytest.raises(RunError, match=rf"another .* data \(differs in: sha256\.{data}\)"):
        run_sft(config)
    write_records(data, corpus.rot[:24])
    run_sft(config)
    assert len(metrics_of(tmp_path / "out")) == STEPS
