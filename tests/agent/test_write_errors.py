"""What cannot be written, or trained on, ends a run in one line and leaves its last checkpoint."""

import contextlib
import os
import re
import resource

import pytest
import torch
from runs import metrics_of, rl_config, same, sft_config, state_of
from safetensors import SafetensorError

from regrpo import trainer
from regrpo.config import OptimConfig, TaskConfig
from regrpo.errors import RunError
from regrpo.rl import run_rl, within
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import run_sft

FULL = "/dev/full"  # every write to it: no space left on device


@pytest.fixture
def whole(base, tmp_path):
    run_sft(sft_config(base, tmp_path / "whole"))
    return tmp_path / "whole"


def goes_on(base, out, whole):
    """The same command, with room again, is the uninterrupted run."""
    run_sft(sft_config(base, out))
    assert metrics_of(out) == metrics_of(whole)
    assert same(state_of(out), state_of(whole))


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk that is full in the middle of a file, as the kernel has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100_000])
@pytest.mark.parametrize("step", [2, 4])
def test_a_disk_that_is_full_at_a_checkpoint(base, tmp_path, monkeypatch, whole, step, size):
    out, save = tmp_path / "out", torch.save

    def save_on_a_full_disk(state, file):
        with files_of_at_most(size) if state["step"] == step else contextlib.nullcontext():
            save(state, file)

    monkeypatch.setattr(trainer.torch, "save", save_on_a_full_disk)
    stands = "there is no checkpoint yet" if step == 2 else "step-0000002 is intact"
    message = f"step {step}: cannot write a checkpoint in {out}: File too large; {stands}"
    with pytest.raises(RunError, match=re.escape(message)):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    # Half a checkpoint would take the room that is missing.
    kept = [p.name for p in (out / "checkpoints").iterdir()]
    assert kept == ([] if step == 2 else ["step-0000002"])
    goes_on(base, out, whole)


@pytest.mark.skipif(not os.path.exists(FULL), reason="no /dev/full")
def test_a_disk_that_is_full_at_a_log(base, tmp_path, monkeypatch, whole):
    out, append = tmp_path / "out", trainer.Run.append

    def append_on_a_full_disk(self, name, line):
        if self.step == 3:
            self._logs[name] = open(FULL, "a")  # noqa: SIM115
        append(self, name, line)

    monkeypatch.setattr(trainer.Run, "append", append_on_a_full_disk)
    message = "step 3: cannot write metrics.jsonl in .*: No space left on device; step-0000002 is"
    with pytest.raises(RunError, match=message):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    goes_on(base, out, whole)


def test_a_disk_that_is_full_at_the_model(base, tmp_path, monkeypatch, whole):
    def save_on_a_full_disk(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "out"
    monkeypatch.setattr(trainer, "save_pretrained", save_on_a_full_disk)
    with pytest.raises(RunError, match=r"cannot write the model in .*No space.*step-0000006 is"):
        run_sft(sft_config(base, out))
    monkeypatch.undo()
    assert not (out / "model").exists()
    goes_on(base, out, whole)
    assert (out / "model").exists()


def test_a_gradient_that_is_not_finite_ends_an_rl_run(base, tmp_path, environment):
    optim = OptimConfig(lr=1e30, warmup_steps=0)
    with pytest.raises(RunError, match=r"step 1: gradient norm is nan; .*intact"):
        run_rl(rl_config(base, tmp_path, optim=optim, save_every=1, epochs=1), environment)
    assert state_of(tmp_path)["step"] == 1
    assert all(v.isfinite().all() for v in state_of(tmp_path)["model"].values())


def test_trajectories_without_room_in_a_pass_are_left_out_and_counted(base, tmp_path, environment):
    def lengths(**kwargs):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run_rl(
            rl_config(base, out, steps=1, states=6, tasks=TaskConfig(seed=5), **kwargs), environment
        )
        return metrics_of(out)[0]

    assert lengths()["skipped/too_long"] == 0
    # Between the shortest prompt and the longest trajectory of these tasks.
    some = lengths(batch_tokens=75)
    assert 0 < some["skipped/too_long"] < 6 * 4
    assert some["grad_norm"] > 0
    with pytest.raises(RunError, match=r"batch_tokens is 8, and the shortest trajectory .* has"):
        lengths(batch_tokens=8)


def test_within_keeps_the_order():
    tokens = [TokenizedTrajectory([0] * n, [0] * n) for n in (5, 9, 3, 8)]
    assert within([3, 1, 0], tokens, 8) == ([3, 0], 1)
    assert within([0, 2], tokens, 5) == ([0, 2], 0)


def test_sft_counts_what_is_too_long(base, tmp_path, capsys):
    run_sft(sft_config(base, tmp_path, max_length=100, batch_tokens=400, steps=2))
    (count,) = re.findall(
        r"left out (\d+) records: longer than max_length=100", capsys.readouterr().out
    )
    assert 0 < int(count) < 24
    assert max(line["tokens"] for line in metrics_of(tmp_path)) <= 400
