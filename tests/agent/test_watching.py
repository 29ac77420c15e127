"""What a run tells while it goes on: stored trajectories, trackers, the live line."""

import json
import sys
from types import ModuleType

import pytest
from runs import metrics_of, rl_config, sft_config

from regrpo import trajectory_log
from regrpo.errors import RunError
from regrpo.modeling import load_tokenizer
from regrpo.progress import live_line, progress_bar
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.trainer import Run


def groups_of(out):
    return [json.loads(line) for line in (out / "trajectories.jsonl").read_text().splitlines()]


def test_stored_trajectories_are_those_of_the_update(base, tmp_path, environment, monkeypatch):
    seen, tokenizer = [], load_tokenizer(str(base / "model"))
    write = trajectory_log.TrajectoryLog.write

    def spy(self, trajectories, result, group_ids):
        seen.append((trajectories, result))
        write(self, trajectories, result, group_ids)

    monkeypatch.setattr(trajectory_log.TrajectoryLog, "write", spy)
    config = rl_config(base, tmp_path, steps=5, states=4, log_trajectories_every=2, log_groups=3)
    run_rl(config, environment)
    groups = groups_of(tmp_path)
    assert [group["step"] for group in groups] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert any(group["error_type"] for group in groups)
    for group in groups:
        trajectories, result = seen[group["step"]]
        texts = []
        for trajectory in trajectories:
            ids = trajectory.tokens.input_ids
            parts = trajectory_log.segments_of(trajectory, tokenizer)
            assert sum(part["tokens"] for part in parts) == len(ids)
            texts.append("".join(part["text"] for part in parts))
        live = [bool(a) for a in result.advantages.view(-1, 4).abs().amax(1)]
        rows = {i: t for i, t in enumerate(texts) if t.startswith(group["context"])}
        for member in group["trajectories"]:
            whole = group["context"] + "".join(part["text"] for part in member["segments"])
            row = next(i for i, t in rows.items() if t == whole)
            assert member["success"] == trajectories[row].success
            assert (member["advantage"] != 0) <= live[row // 4]
    for step in (0, 2, 4):  # groups that teach nothing come only when there is no other
        live = int((seen[step][1].advantages.view(-1, 4).abs().amax(1) > 0).sum())
        kept = [g for g in groups if g["step"] == step]
        teaching = sum(any(m["advantage"] for m in g["trajectories"]) for g in kept)
        assert teaching == min(live, 3)


def test_no_trajectories_are_stored_where_none_are_asked_for(base, tmp_path, environment):
    run_rl(rl_config(base, tmp_path, steps=2, log_trajectories_every=0), environment)
    assert not (tmp_path / "trajectories.jsonl").exists()


@pytest.fixture
def tracker(monkeypatch):
    """A module with the calls of wandb and trackio; what it is told, in order."""

    def make(name):
        told, module = [], ModuleType(name)
        module.__spec__ = object()  # type: ignore[assignment]  # find_spec asks for one
        module.init = lambda **kwargs: told.append(("init", kwargs))
        module.log = lambda metrics, step: told.append(("log", step, metrics))
        module.finish = lambda: told.append(("finish",))
        monkeypatch.setitem(sys.modules, name, module)
        return told

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_hears_every_step_and_a_resumed_run_is_the_same(
    base, tmp_path, tracker, name, monkeypatch
):
    told = tracker(name)
    finish = Run.finish_step

    def stop_at_three(self, save_every):
        if self.step == 3:
            raise KeyboardInterrupt
        finish(self, save_every)

    config = sft_config(base, tmp_path / "run", log_to=(name,))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_step", stop_at_three)
        with pytest.raises(KeyboardInterrupt):
            run_sft(config)
    first = list(told)
    told.clear()
    run_sft(config)
    assert [entry[0] for entry in first] == ["init", *["log"] * 4, "finish"]
    assert [entry[0] for entry in told] == ["init", *["log"] * 4, "finish"]
    assert [entry[1] for entry in told[1:-1]] == [2, 3, 4, 5]
    assert told[0] == first[0]
    settings = told[0][1]
    assert settings["resume"] == "allow"
    assert settings["project"] == "regrpo"
    assert settings["name"].startswith("run-")
    assert settings.get("id") == (settings["name"][4:] if name == "wandb" else None)
    assert settings["config"]["steps"] == 6
    logged = {entry[1]: entry[2]["loss"] for entry in [*first, *told] if entry[0] == "log"}
    assert logged == {line["step"]: line["loss"] for line in metrics_of(tmp_path / "run")}


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_written(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"log_to names wandb, which is not installed: pip install"):
        run_sft(sft_config(base, out, log_to=("wandb",)))
    assert not out.exists()


def test_no_tracker_is_imported_unasked(base, tmp_path, tracker):
    told = tracker("wandb") + tracker("trackio")
    run_sft(sft_config(base, tmp_path, steps=1))
    assert told == []
    assert not (tmp_path / "tracker_run_id").exists()


def test_the_live_line(base, tmp_path, environment):
    metrics = {"reward/mean": 0.714, "success": 0.5, "time/tokens_per_s": 12345.6}
    line = live_line("train", metrics, ("reward/mean", "success"))
    assert line == "train  reward 0.71  success 0.50  12,346 tok/s"
    with progress_bar() as progress:
        run_rl(rl_config(base, tmp_path, steps=2), environment, progress)
        (task,) = progress.tasks
    last = metrics_of(tmp_path)[-1]
    for word, name in (
        ("reward", "reward/mean"),
        ("success", "success"),
        ("recovery", "recovery"),
        ("reflection", "reflection/rate"),
    ):
        assert f"{word} {last[name]:.2f}" in task.description
    assert "tok/s" in task.description
    assert task.finished
