import json

import pytest
from made_up import write_gaia

from regrpo.benchmarks.evaluation import run_benchmark
from regrpo.benchmarks.gaia import read_gaia
from regrpo.config import BenchmarkConfig, EndpointConfig, EvalConfig
from regrpo.errors import RunError
from tests.agent.endpoint import Endpoint, answer


def turn(call):
    return f"Thought: x\n\nCode:\n```py\n{call}\n```"


def content(body):
    """Reads the file before it answers; names colours; gives up."""
    messages = body["messages"]
    if "lines" in messages[1]["content"]:
        read = any(m["content"].endswith("\na\nb\nc") for m in messages[2:])
        return turn('final_answer("3.0")' if read else 'read_file("lines.txt")')
    if "colours" in messages[1]["content"]:
        return turn('final_answer("Red,Blue")')
    return turn('read_file("gone.txt")')


def test_a_run_by_level_with_a_missing_file(tmp_path):
    data, out = write_gaia(tmp_path / "data"), tmp_path / "out"
    with Endpoint() as endpoint:
        endpoint.default = answer(content)
        text = run_benchmark(
            EvalConfig(
                model="m",
                benchmark="gaia",
                data=str(data),
                out=str(out),
                bench=BenchmarkConfig(
                    max_steps=3, endpoint=EndpointConfig(base_url=endpoint.url, retries=0)
                ),
            )
        )
    report = json.loads((out / "report.json").read_text())
    assert report["scores"] == {
        "AnsAcc": pytest.approx(200 / 3),
        "Level 1": 100,
        "Level 2": 100,
        "Level 3": 0,
    }
    assert "| model | 100.00 | 100.00 | 0.00 | 66.67 |" in text
    assert report["problems"] == ["task a3: no file 'gone.txt'"]
    assert "it had used up its steps" in (out / "transcripts/a3.md").read_text()


def test_malformed_lines_are_named(tmp_path):
    data = write_gaia(tmp_path)
    good = (data / "metadata.jsonl").read_text()
    bad = [
        "{",
        '{"task_id": "b"}',
        good.splitlines()[0],
        good.splitlines()[1].replace('"a2"', '"../x"'),
        good.splitlines()[1].replace('"a2"', '"a4"').replace(": 2,", ": 7,"),
        good.splitlines()[2].replace('"a3"', '"a5"').replace("gone.txt", "../gone.txt"),
    ]
    (data / "metadata.jsonl").write_text(good + "\n".join(bad))
    read = read_gaia(data)
    assert [task.id for task in read.tasks] == ["a1", "a2", "a3"]
    assert len(read.problems) == len(bad)
    assert "metadata.jsonl:6: malformed: ValueError: task_id a1 twice" in read.problems
    with pytest.raises(RunError, match=r"expected a folder with metadata\.jsonl"):
        read_gaia(tmp_path / "nothing")
