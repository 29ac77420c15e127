"""The experiment: its stages, its intervals, its page."""

import json
import math

import pytest

from regrpo.config import EvalConfig, ExperimentConfig, TaskConfig
from regrpo.data_engine.build import demonstrate
from regrpo.errors import RunError
from regrpo.experiment import evaluate_agent, hops_of, jobs
from regrpo.experiment_report import (
    Interval,
    Results,
    agents_table,
    differences_table,
    figures,
    page_section,
    serial_recovery,
    write_section,
)
from regrpo.recipe import AGENTS
from regrpo.tasks import FAMILIES, generate_tasks


def rate(value, count=10):
    return {"percent": value, "interval": [0.0, 100.0], "count": count}


def report(success, tokens=10.0):
    names = ("success", "success_serial", "first_try", "recovery_own", "recovery_forced")
    values = {name: rate(success) for name in (*names, "unneeded")}
    families = {f: {name: rate(success) for name in names} for f in FAMILIES}
    hops = {"1": rate(success), "2": rate(success)}
    return {**values, "reflection_tokens": tokens, "families": families, "hops": hops}


@pytest.fixture
def results(tmp_path):
    """ReGRPO is 10 points above the others in one seed, 20 in the other."""
    reports, metrics = {}, {}
    for agent in AGENTS:
        gains = (10.0, 20.0) if agent == "regrpo" else (0.0, 0.0)
        reports[agent] = [report(50.0 + gain) for gain in gains]
        metrics[agent] = []
        for seed in range(2):
            path = tmp_path / f"{agent}-{seed}.jsonl"
            lines = [
                {
                    "step": step,
                    "tokens": 100,
                    "trained_tokens": 10,
                    "success": 0.5,
                    "reflection/tokens": 5.0,
                    **({} if AGENTS[agent].start is None else {"trajectories": 7}),
                }
                for step in range(3)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            metrics[agent].append(path)
    return Results(reports, metrics)


def test_interval_is_students():
    # Mean 3, deviation sqrt(2.5), t(4) = 2.776: 2.776 * sqrt(2.5 / 5) = 1.963.
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(1.963, abs=1e-3)
    assert str(Interval.of([math.nan, 1.0])) == "-"
    assert math.isnan(Interval.of([1.0]).half)


def test_tables_compare_within_a_seed(results):
    row = next(r for r in differences_table(results).splitlines() if r.startswith("| RoT-SFT |"))
    # 10 and 20: mean 15, t(1) * 7.07 / sqrt(2) = 63.5.
    assert row.split(" | ")[1] == "15.0 ± 63.5"
    assert "| ReGRPO | 65.0 ± 63.5 |" in agents_table(results)
    assert "-" not in agents_table(results).splitlines()[2].split("|")[2]


def test_serial_recovery_weighs_families_by_their_failures():
    made = report(50.0)
    made["families"]["links"]["recovery_own"] = rate(100.0, 30)
    made["families"]["renames"]["recovery_own"] = None
    made["families"]["see"]["recovery_own"] = rate(0.0, 10)
    assert serial_recovery(made) == 75.0


def test_page_section_is_put_between_its_marks(results, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# Title\n\n<!-- experiment -->\nold\n<!-- /experiment -->\n\nEnd.\n")
    drawn = figures(results, tmp_path / "figures")
    assert all(path.read_text(encoding="utf-8").startswith("<?xml") for path in drawn)
    section = page_section(results, [path.relative_to(tmp_path) for path in drawn])
    write_section(page, section)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith("End.\n")
    assert "old" not in text
    assert "(figures/experiment-agents.svg)" in text
    assert "| ReGRPO | RoT-SFT | 3 | 21 |" in text
    first = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in figures(results, tmp_path / "figures")] == first
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no section <!-- experiment -->"):
        write_section(page, section)


def test_stages_of_a_seed_share_its_data_and_no_other(tmp_path):
    config = ExperimentConfig(out=str(tmp_path), seeds=2, seed=3)
    staged = jobs(config)
    assert len(staged) == 2 * (2 + 2 * len(AGENTS))
    for name, job in staged.items():
        seed, _, stage = name.partition("/")
        assert all(other in staged and other.startswith(f"{seed}/") for other in job.after)
        assert getattr(job.config, "seed", int(seed)) == int(seed) or stage.startswith("eval")
    tasks = [job.config.tasks for job in staged.values() if hasattr(job.config, "tasks")]
    assert len({t.seed for t in tasks}) == 6  # data, RL and held-out tasks of two seeds
    rl = [j.config for j in staged.values() if hasattr(j.config, "group_size")]
    assert {c.steps for c in rl} == {config.rl_steps}
    sampled = [c.states * c.group_size for c in rl]
    assert max(sampled) - min(sampled) <= 1


def test_hops_are_those_of_the_trap(environment):
    tasks = generate_tasks(6, seed=1, hops=(3, 3), trap_share=1.0, families=("links", "see"))
    found, _ = demonstrate(environment, tasks, seed=0)
    assert [hops_of(d) for d in found] == [3] * 6
    tasks = generate_tasks(2, seed=1, trap_share=0.0, families=("links",))
    found, _ = demonstrate(environment, tasks, seed=0)
    assert [hops_of(d) for d in found] == [0, 0]


def test_an_evaluation_is_kept_and_another_refused(base, environment, tmp_path):
    config = EvalConfig(
        model=str(base / "model"),
        out=str(tmp_path / "eval"),
        count=8,
        tasks=TaskConfig(seed=9),
        max_new_tokens=4,
    )
    first = evaluate_agent(config, environment)
    path = tmp_path / "eval" / "report.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(first))
    marked = {**first, "reflection_tokens": -1.0}
    path.write_text(json.dumps(marked))
    assert evaluate_agent(config, environment)["reflection_tokens"] == -1.0  # not done again
    with pytest.raises(RunError, match="is of another evaluation"):
        evaluate_agent(EvalConfig(**{**vars(config), "count": 9}), environment)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="seeds: got 1; expected 2 or more"):
        ExperimentConfig(seeds=1)
