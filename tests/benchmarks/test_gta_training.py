"""GTA's dialogs as training records, and as states that can be executed."""

import json
import os
from pathlib import Path

import pytest
from made_up import gta, write_gta

from regrpo.benchmarks.gta import read_gta
from regrpo.benchmarks.gta_dialogs import GtaEnvironment, reference_turns, to_starts, to_task
from regrpo.config import DataImportConfig
from regrpo.data_engine.exchange import import_corpora
from regrpo.records import read_records
from regrpo.tools import Status
from regrpo.tools.gta.toolbox import Toolbox

DATA = os.environ.get("REGRPO_DATA_DIR")


@pytest.fixture
def data(tmp_path):
    return read_gta(write_gta(tmp_path / "data"))


def test_data_import_takes_the_file_and_names_what_it_cannot(tmp_path):
    tasks = gta()
    tasks["1"]["dialogs"].pop(1)
    source = write_gta(tmp_path / "data", tasks) / "dataset.json"
    report = import_corpora(DataImportConfig(source=[str(source)], out=str(tmp_path / "out")))
    assert any("dataset.json[1]: ValueError" in line for line in report.lines)
    records = read_records(tmp_path / "out/dataset.jsonl")
    assert [record["id"] for record in records] == ["gta-0", "gta-2", "gta-3"]
    assert records[0]["regrpo"] == {"provenance": "recorded"}
    turns = records[0]["conversations"]
    assert [t["role"] for t in turns] == ["system", "user", *["assistant", "user"] * 2, "assistant"]
    assert turns[3]["content"] == "[OUTPUT OF STEP 0] -> Observation:\n(3, 4, 40, 20) jar 2.50"
    assert 'final_answer("7.5")' in turns[-1]["content"]
    assert 'final_answer("image/dummy.jpg")' in records[2]["conversations"][-1]["content"]


def test_reference_turns_reach_what_each_state_expects(data):
    with Toolbox(local=("Calculator",)) as toolbox:
        environment = GtaEnvironment(data.tasks, toolbox, data.root)
        for task in data.tasks:
            turns = reference_turns(task)
            for start, turn in zip(to_starts(task), turns, strict=True):
                assert start.task.steps[start.step].call == turn.call
                (seen,) = environment.execute([(start.task.workspace, turn.render())])
                assert (seen.text, seen.status) == (start.expected, Status.OK)


def test_what_was_not_recorded_fails_and_the_scorer_judges_answers(data):
    with Toolbox() as toolbox:
        environment = GtaEnvironment(data.tasks, toolbox, data.root)
        workspace = to_task(data.tasks[0]).workspace

        def run(call):
            return environment.execute([(workspace, f"Thought: x\n\nCode:\n```py\n{call}\n```")])[0]

        seen = run('OCR("image/other.png")')
        assert seen.text == "LookupError: no output of this call of OCR was recorded"
        assert run('OCR("image/shelf.png")').status is Status.OK  # positions or names, the same
        assert run('DrawBox("image/shelf.png", "1,2,3,4")').text.startswith("NameError: ")
        assert run('final_answer("It is $7.50.")').text == "7.5"
        assert run('final_answer("17.5")').text == "17.5"
        assert toolbox.counts == {"replayed": 1, "not recorded": 1}
        with pytest.raises(ValueError, match="expected that of a GTA task"):
            environment.execute([((), "x")])


@pytest.mark.skipif(DATA is None, reason="REGRPO_DATA_DIR is not set")
def test_the_real_dialogs_become_records_and_states(tmp_path):
    source = Path(DATA or "") / "gta_subset.json"
    import_corpora(DataImportConfig(source=[str(source)], out=str(tmp_path)))
    report = json.loads((tmp_path / "import_report.json").read_text())
    assert (report["imported"], report["skipped"], report["missing"]) == (77, [], [])
    data = read_gta(source)
    reached = total = 0
    with Toolbox() as toolbox:
        environment = GtaEnvironment(data.tasks, toolbox, data.root)
        for task in data.tasks:
            for start, turn in zip(to_starts(task), reference_turns(task), strict=False):
                (seen,) = environment.execute([(start.task.workspace, turn.render())])
                total += 1
                reached += seen.text == start.expected and seen.status is Status.OK
    assert (reached, total) == (259, 259)
