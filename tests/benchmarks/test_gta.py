"""Evaluating on GTA, through a real endpoint on a socket."""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from made_up import gta, reference_player, write_gta

from regrpo.benchmarks.evaluation import run_benchmark
from regrpo.benchmarks.gta import read_gta
from regrpo.benchmarks.gta_scores import end_scores, oracle, step_scores
from regrpo.config import BenchmarkConfig, EndpointConfig, EvalConfig
from regrpo.errors import RunError
from regrpo.tools.gta.arithmetic import calculate_text
from tests.agent.endpoint import Endpoint, answer, status

DATA = os.environ.get("REGRPO_DATA_DIR")
real = pytest.mark.skipif(DATA is None, reason="REGRPO_DATA_DIR is not set")


@pytest.fixture
def endpoint():
    with Endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def data(tmp_path):
    return write_gta(tmp_path / "data")


def config(data, out, endpoint, limits=None, **bench):
    limits = {"retries": 1, "backoff_s": 0.01, "timeout_s": 20, **(limits or {})}
    return EvalConfig(
        model="m",
        benchmark="gta",
        data=str(data),
        out=str(out),
        max_new_tokens=900,
        bench=BenchmarkConfig(
            local_tools=bench.pop("local_tools", ("Calculator",)),
            endpoint=EndpointConfig(base_url=endpoint.url, **limits),
            **bench,
        ),
    )


def report(out):
    return json.loads((out / "report.json").read_text())


def test_the_reference_dialogs_get_everything_in_both_modes(data, tmp_path, endpoint):
    endpoint.default = answer(reference_player(read_gta(data).tasks))
    out = tmp_path / "out"
    text = run_benchmark(config(data, out, endpoint))
    written = report(out)
    fixed = written["scorers"]["fixed"]
    assert set(fixed["step"]["model"].values()) == {100.0}
    full = {"AnsAcc": 100, "P": 100, "O": 100, "L": 100, "ToolAcc": 100, "CodeExec": 100, "C": None}
    assert fixed["end"]["model"] == full
    assert "| model | 100.00 | 100.00 | 100.00 | 100.00 |" in text
    # -3 is never found by the official scorer, which also counts more answers than it expects.
    official = written["scorers"]["official"]
    assert official["end"]["model"]["AnsAcc"] == 50.0
    assert official["step"]["model"]["InstAcc"] == pytest.approx(100)
    assert official["answers_with_references_not_judged"] == 1
    assert written["problems"] == written["failures"] == []
    assert written["tool_calls"] == {"replayed": 6, "local": 1}
    page = (out / "transcripts/0.md").read_text()
    assert "jar 2.50" in page
    assert 'Calculator(expression="2.50 * 3")' in page
    # The prompts offer the task's tools and nothing of the answer.
    first = endpoint.bodies[0]
    assert first["model"] == "m"
    assert "OCR(image: str)" in first["messages"][0]["content"]
    assert "DrawBox" not in first["messages"][0]["content"]
    assert first["messages"][1]["content"].endswith("Files: image/shelf.png")


def test_a_killed_run_goes_on_and_another_run_is_refused(data, tmp_path, endpoint):
    out = tmp_path / "out"
    player = answer(reference_player(read_gta(data).tasks))
    endpoint.script = [player] * 6
    endpoint.default = status(401)
    with pytest.raises(RunError, match=r"status 401.*goes on"):
        run_benchmark(config(data, out, endpoint, concurrency=2))
    kept = (out / "episodes.jsonl").read_text().splitlines()
    assert 1 < len(kept) < 15
    (out / "episodes.jsonl").open("a").write('{"key": "torn')  # killed while it wrote
    asked = len(endpoint.bodies)
    endpoint.default = player
    run_benchmark(config(data, out, endpoint))
    assert (out / "episodes.jsonl").read_text().splitlines()[: len(kept)] == kept
    assert report(out)["scorers"]["fixed"]["end"]["model"]["AnsAcc"] == 100
    all_turns = 11 + 12
    assert asked < len(endpoint.bodies) < asked + all_turns
    before = len(endpoint.bodies)
    run_benchmark(config(data, out, endpoint, scorer="mat"))  # nothing is left to ask
    assert len(endpoint.bodies) == before
    with pytest.raises(RunError, match=r"another run: max_steps 10 \(now 3\)"):
        run_benchmark(config(data, out, endpoint, max_steps=3))


def test_wrong_turns_are_scored_and_failures_are_named(data, tmp_path, endpoint):
    def content(body):
        if "jars" in body["messages"][1]["content"]:
            return 'Thought: x\n\nCode:\n```py\nOCR(picture="x")\n```'
        return "I do not know."

    endpoint.default = answer(content)
    endpoint.script = [answer(content), status(400, "too long")]
    out = tmp_path / "out"
    run_benchmark(config(data, out, endpoint, max_steps=2, concurrency=1))
    written = report(out)
    step = written["scorers"]["fixed"]["step"]["model"]
    assert (step["InstAcc"], step["SummAcc"]) == (0, 0)
    assert step["ToolAcc"] == pytest.approx(100 / 7)  # OCR was named once where it was due
    assert step["ArgAcc"] == 0
    (failure,) = written["failures"]
    assert failure.startswith("step/0/1: the endpoint refused: status 400")
    assert written["scorers"]["fixed"]["end"]["model"]["CodeExec"] == 0
    assert "TypeError: OCR() missing a required argument" in (out / "transcripts/0.md").read_text()


def test_bad_data_is_named_and_the_run_goes_on(tmp_path, endpoint):
    tasks = gta()
    del tasks["0"]["gt_answer"]
    tasks["1"]["tools"].append({"name": "Teleport"})
    tasks["2"]["files"][0]["path"] = "../secret.png"
    tasks["4"] = {**gta()["0"], "files": [{"path": "image/gone.png"}]}
    data = write_gta(tmp_path / "data", tasks)
    (data / "image/shelf.png").write_bytes(b"no image")
    endpoint.default = answer(reference_player(read_gta(data).tasks))
    out = tmp_path / "out"
    run_benchmark(config(data, out, endpoint, mode="end", local_tools=("DrawBox",)))
    written = report(out)
    assert written["tasks"] == 2
    problems = "\n".join(written["problems"])
    assert len(written["problems"]) == 5
    for expected in (
        "task 0: malformed: KeyError: 'gt_answer'",
        "task 1: malformed: ValueError: unknown tools ['Teleport']",
        "task 2: malformed: ValueError: file '../secret.png'",
        "task 3: 'image/shelf.png' is no readable image",
        "task 4: file 'image/gone.png': No such file",
    ):
        assert expected in problems
    assert "is no readable image" in (out / "transcripts/3.md").read_text()


@pytest.mark.parametrize("content", [None, "[]", "{}", "{", '{"0": 1}'])
def test_wrong_data_is_an_error(tmp_path, endpoint, content):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(RunError, match="data: "):
        run_benchmark(config(tmp_path, tmp_path / "out", endpoint))
    assert not (tmp_path / "out").exists()


class ToolHandler(BaseHTTPRequestHandler):
    """AgentLego's protocol: OCR works, TextToBbox hangs, DrawBox gives an image."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.strip("/")
        if name == "TextToBbox":
            time.sleep(2)
        known = name != "ImageDescription" and b'name="image"; filename=' in body
        data = json.dumps("jar 2.50" if known else {"detail": "ValueError('no such thing')"})
        self.send_response(200 if known else 400)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data.encode())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *args):
        pass


def test_a_tool_server_works_refuses_and_hangs(data, tmp_path, endpoint):
    endpoint.default = answer(reference_player(read_gta(data).tasks))
    server = ThreadingHTTPServer(("127.0.0.1", 0), ToolHandler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        out = tmp_path / "out"
        bench = {"mode": "end", "server": url, "server_timeout_s": 1.0}
        run_benchmark(config(data, out, endpoint, **bench))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    pages = {name: (out / f"transcripts/{name}.md").read_text() for name in "0123"}
    assert "Observation (ok):\n\n````\njar 2.50" in pages["0"]
    assert "ValueError: ValueError('no such thing')" in pages["2"]
    assert "tool server, TextToBbox: no whole answer within 1.0 s" in pages["3"]
    assert "tool server, DrawBox: expected an image in base64" in pages["3"]
    assert report(out)["tool_calls"]["server failed"] == 2


@real
def test_the_recorded_dialogs_as_an_oracle():
    data = read_gta(Path(DATA or "") / "gta_subset.json")
    assert (len(data.tasks), data.problems) == (77, [])
    steps, ends = oracle(data.tasks)
    for scorer, inst, summ in (
        ("official", 105.71, 92.45),
        ("mat", 100, 100),
        ("fixed", 100, 94.31),
    ):
        scores = step_scores(scorer, data.tasks, steps)
        assert scores == {
            "InstAcc": pytest.approx(inst, abs=0.01),
            "ToolAcc": 100,
            "ArgAcc": 100,
            "SummAcc": pytest.approx(summ, abs=0.01),
        }
        end = end_scores(scorer, data.tasks, ends)
        assert end["AnsAcc"] == scores["SummAcc"]
        assert all(end[c] == pytest.approx(100, abs=0.01) for c in "POLC")


@real
def test_the_calculator_gives_what_was_recorded():
    steps = [s for t in read_gta(Path(DATA or "") / "gta_subset.json").tasks for s in t.steps]
    calls = [s for s in steps if s.call.name == "Calculator"]
    given = [calculate_text(**s.call.kwargs).text for s in calls]
    differ = {g: s.output for g, s in zip(given, calls, strict=True) if g != s.output}
    assert len(calls) == 25
    # Two were rounded by whoever recorded them, and one is no result of its expression.
    assert differ == {
        "4.1499999999999995": "4.15",
        "4.714285714285714": "4.71",
        "31.41": "345.92",
    }
