"""`regrpo eval --benchmark` with a model of this project."""

import json

import pytest
from made_up import write_gaia, write_gta

from regrpo.benchmarks.gta import read_gta
from regrpo.benchmarks.gta_dialogs import GtaEnvironment, to_record, to_starts, to_task
from regrpo.cli import main
from regrpo.rollout import run, task_start
from regrpo.sampling import LocalPolicy
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tools.gta.toolbox import Toolbox


@pytest.fixture
def data(tmp_path):
    return write_gta(tmp_path / "data")


@pytest.fixture
def model(data, tmp_path):
    """A folder with a tiny model that has learned nothing."""
    texts = [render_template(to_record(t)["conversations"]) for t in read_gta(data).tasks]
    tokenizer = build_tokenizer(texts, ["Reflection:\n- ErrorType:", "Thought:"])
    made = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2, seed=0)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return made, tokenizer


def test_a_model_here_is_evaluated_by_the_same_command(data, model, tmp_path, capsys):
    out = tmp_path / "out"
    where = ["--model", str(tmp_path / "model"), "--out", str(out), "--max_new_tokens", "5"]
    options = ["--bench.max_steps", "2", "--bench.local_tools", '["Calculator"]']
    main(["eval", "--benchmark", "gta", "--data", str(data), *where, *options])
    assert "| reference dialogs | 100.00 |" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["scorers"]["fixed"]["end"]["model"]["AnsAcc"] == 0
    assert report["ends"] == {"it had used up its steps": 4}
    # The correction of a failed call opens with a reflection.
    assert "Reflection:\n- ErrorType:" in (out / "transcripts/0.md").read_text()
    with pytest.raises(SystemExit, match="another run"):
        main(["eval", "--benchmark", "gaia", "--data", str(write_gaia(tmp_path / "g")), *where])


def test_states_of_the_dialogs_are_rolled_out(data, model):
    made, tokenizer = model
    tasks = read_gta(data)
    policy = LocalPolicy(made.eval(), tokenizer, max_new_tokens=5)
    with Toolbox() as toolbox:
        environment = GtaEnvironment(tasks.tasks, toolbox, tasks.root)
        starts = [start for task in tasks.tasks for start in to_starts(task)]
        ended = run(policy, environment, starts, reflect=True, whole=False)
        assert [t.success for t in ended] == [False] * len(starts)
        assert all(t.turns[1].text.startswith("Reflection:") for t in ended)
        (whole,) = run(
            policy, environment, [task_start(to_task(tasks.tasks[0]))], reflect=False, whole=True
        )
        assert whole.answer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark", "gta"], "data: got None"),
        (["--benchmark", "mmlu", "--data", "x"], "expected gta or gaia"),
        (["--benchmark", "gta", "--data", "nowhere"], "no GTA data"),
        (["--data", "x"], "null without"),
        (
            ["--benchmark", "gta", "--data", "x", "--bench.scorer", "best"],
            "expected official, mat, fixed",
        ),
        (
            ["--benchmark", "gta", "--data", "x", "--bench.endpoint.base_url", "http://u:p@h"],
            "no user, password",
        ),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--model", "m", *options])
    assert message in f"{ended.value}{capsys.readouterr().err}"
