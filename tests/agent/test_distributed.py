"""Two gloo processes against one: gradients, runs, what they write, and how they end."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import STEPS, metrics_of, rl_config, same, sft_config, state_of
from transformers import AutoModelForCausalLM
from two_processes import CASES, GROUPS, SETTINGS, configs, updates

from regrpo import cli
from regrpo.collect import draw_groups, sample_starts
from regrpo.config import LoraSettings, RewardConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.errors import RunError
from regrpo.modeling import load_model, load_tokenizer
from regrpo.rl import require_fitting
from regrpo.rl_metrics import combined
from regrpo.sampling import LocalPolicy
from regrpo.sft import run_sft

WORKER = Path(__file__).with_name("two_processes.py")


def launch(task, base, out):
    """The finished torchrun; its output is text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(WORKER), task, str(base), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """The folder of what two processes did, gradients and metrics, and the paths each wrote."""
    out = tmp_path_factory.mktemp("two")
    stopped = launch("interrupted", base, out)
    assert stopped.returncode != 0
    assert "Signal 9 (SIGKILL)" in stopped.stderr, stopped.stderr[-3000:]
    assert [line["step"] for line in metrics_of(out / "rl")][-1] >= 4
    finished = launch("everything", base, out)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out, *pickle.loads((out / "results.pickle").read_bytes())


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory):
    return updates(base, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("setting", "split"), CASES)
def test_two_processes_give_the_gradient_of_one(two, expected, parallel, setting, split):
    _, results, _ = two
    gradients, metrics = results[parallel][setting, split]
    expected_gradients, expected_metrics = expected[setting, split]
    assert gradients.keys() == expected_gradients.keys()
    assert gradients
    # FSDP gathers all weights in bfloat16, where autocast leaves norms and residuals in float32.
    rounding = 2**-7 if parallel == "fsdp" else 1e-5
    tolerance = {"float64": 1e-9, "bfloat16 lora": rounding}.get(setting, 1e-5)
    nothing = split == "nothing learned" and "bfloat16" not in setting
    for name, value in expected_gradients.items():
        scale = value.abs().max().item()
        assert nothing or scale > 0 or "lora_A" in name or SETTINGS[setting]["beta"] == 0, name
        error = (gradients[name] - value).abs().max().item()
        assert error <= tolerance * max(scale, 1e-6), name
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=max(tolerance, 1e-5), abs=1e-6), name


def test_the_cases_are_what_they_are_called(expected):
    _, metrics = expected["plain", "uneven"]
    assert metrics["groups/with_variance"] == pytest.approx(3 / 5)
    assert metrics["trajectories"] == 4 * len(GROUPS)
    assert metrics["kl"] > 0
    assert metrics["clip_ratio/region_mean"] > 0
    _, metrics = expected["plain", "nothing learned"]
    assert metrics["groups/with_variance"] == 0
    _, metrics = expected["options", "uneven"]
    assert metrics["clip_bounds/high"] > 1.2


@pytest.mark.parametrize("name", ["rl", "fsdp"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(two, name):
    """One was stopped by an exception, one by the death of a process."""
    out, *_ = two
    expected = metrics_of(out / "whole" / name)
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert metrics_of(out / name) == expected
    ours, theirs = state_of(out / name), state_of(out / "whole" / name)
    assert same(ours, theirs)
    assert len(ours["ranks"]) == 2
    if name == "rl":
        replays = [own["extra"]["replay"] for own in ours["ranks"]]
        assert all(replays)
        assert replays[0] != replays[1], "each process keeps its own"


def test_sft_has_the_losses_of_one_process(two, base, tmp_path):
    out, *_ = two
    # In bfloat16 the order of sums alone, by the number of threads, moves the norm of a gradient by
    # 3 % within five updates. Its gradients are compared above.
    for name, tolerance in (("ddp", 0.1), ("fsdp", 1e-5), ("one", 1e-5)):
        config = configs(base, tmp_path)[name]
        run_sft(config)
        one, both = metrics_of(tmp_path / name), metrics_of(out / name)
        assert len(one) == len(both) == STEPS
        for line, other in zip(one, both, strict=True):
            assert other == pytest.approx(line, rel=tolerance), name
    # Some batches hold one sequence, so a process has none.
    assert min(line["trained_tokens"] for line in metrics_of(tmp_path / "one")) > 0


def test_sampling_from_shards_is_sampling_from_the_whole(two):
    out, *_ = two
    ours, theirs = metrics_of(out / "rl fsdp"), metrics_of(out / "rl")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-5)
    # Behind an update rounding may decide a draw. What is drawn is the learner's all the same; the
    # weights of before the update are as far from it as the second pass is from the first.
    assert len(ours) == STEPS
    for line in ours:
        assert line["log_probs/sampler"] < 1e-5
        assert line["log_probs/moved"] > 1e-3


def test_only_the_first_process_writes(two):
    out, _, (first, second) = two
    assert any(path.endswith("metrics.jsonl") for _, path in first)
    assert any("state.pt" in path for _, path in first)
    assert not second
    for name in configs(out, out):
        lines = [line["step"] for line in metrics_of(out / name)]
        assert lines == list(range(STEPS))
        assert len(list((out / name / "checkpoints").iterdir())) == 2


def test_sharded_models_load_with_plain_from_pretrained(two, base):
    out, *_ = two
    plain = AutoModelForCausalLM.from_pretrained(base / "model")
    adapted = dict(PeftModel.from_pretrained(plain, out / "fsdp" / "model").named_parameters())
    state = state_of(out / "fsdp")["model"]
    assert state
    for name, value in state.items():
        assert torch.equal(adapted[name], value), name
    whole = AutoModelForCausalLM.from_pretrained(out / "one" / "model")
    for name, value in state_of(out / "one")["model"].items():
        assert torch.equal(whole.get_parameter(name), value), name


def test_another_number_of_processes_is_refused(two, base):
    out, *_ = two
    with pytest.raises(RunError, match="differs in: processes"):
        run_sft(configs(base, out)["ddp"])


def test_a_process_that_fails_ends_all_with_one_line(base, tmp_path):
    failed = launch("one_fails", base, tmp_path)
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if line.startswith("regrpo sft")]
    assert lines == ["regrpo sft (rank 1 of 2): the tools are gone"]


def test_the_processes_share_the_states(base, environment):
    """All draw the same; which of the groups they sample is a matter of their place."""
    config = rl_config(base, "unused", states=5, group_size=2)
    policy = LocalPolicy(load_model(config.model), load_tokenizer(config.model), max_new_tokens=2)
    expected = sample_starts(config, environment, 3)
    seen = {}
    for rank in range(3):
        groups, _ = draw_groups(config, policy, environment, 3, ranks=Ranks(rank, 3))
        seen[rank] = [group[0].start for group in groups]
    assert [len(starts) for starts in seen.values()] == [2, 2, 1]
    assert [seen[i % 3][i // 3] for i in range(5)] == expected
    # And what comes in place of two groups without variance is not met by the others.
    (one,), _ = draw_groups(config, policy, environment, 3, 1, Ranks(1, 3))
    assert one[0].start == expected[1]


def test_seeds_differ_by_process_and_step():
    seeds = {
        Ranks(r, 8).seed(s, t) & 0xFFFFFFFF for r in range(8) for s in range(5) for t in (0, 1)
    }
    assert len(seeds) == 80, "in the 32 bits that a CPU's generator takes"
    assert ALONE.seed(3, 5) == 3_000_014


def test_what_so_many_processes_cannot_do_is_refused(base):
    two = Ranks(0, 2)
    with pytest.raises(ValueError, match="states: got 1; expected at least one for each of the 2"):
        require_fitting(rl_config(base, "o", states=1), two)
    batch = rl_config(base, "o", reward=RewardConfig(scale="batch"))
    with pytest.raises(ValueError, match=r"reward.scale: got 'batch'; expected group or none with"):
        require_fitting(batch, two)
    require_fitting(batch, ALONE)


def test_a_launch_without_places_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RunError, match=r"WORLD_SIZE is 2, but RANK, .* not set; start"):
        Ranks.from_environment()
    with pytest.raises(SystemExit, match="regrpo report: started in 2 processes; expected one"):
        cli.main(["report", "somewhere"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.from_environment() is ALONE


def test_metrics_of_parts():
    parts = [
        ({"loss": 0.5, "tokens": 10, "kl": 1.0, "ratio/max": 2.0, "ratio/min": 0.5}, 3),
        ({"loss": 0.25, "tokens": 4, "kl": 5.0, "ratio/max": 1.0, "ratio/min": 0.4}, 1),
        ({"loss": 0.0, "tokens": 0, "kl": 99.0, "ratio/max": 9.0, "success": 1.0}, 0),
    ]
    assert combined(parts) == {
        "loss": 0.75,
        "tokens": 14,
        "kl": 2.0,
        "ratio/max": 2.0,
        "ratio/min": 0.4,
    }


def test_micro_batches_give_the_gradient_of_the_batch(base, tmp_path):
    for micro in (None, 1024, 500):
        config = sft_config(
            base,
            tmp_path / str(micro),
            micro_batch_tokens=micro,
            max_length=500,
            lora=LoraSettings(rank=2),
        )
        run_sft(config)
    whole = metrics_of(tmp_path / "None")
    for micro in ("1024", "500"):
        for line, expected in zip(metrics_of(tmp_path / micro), whole, strict=True):
            assert line == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "500" / "config.json").read_text())["micro_batch_tokens"] == 500
