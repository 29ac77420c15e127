"""The endpoint as a teacher, against a local server that misbehaves."""

import base64
import email.utils
import io
import json
import socket
import threading
import time

import pytest
from endpoint import Endpoint, answer, drip, hang, quoting, raw, status, torn
from PIL import Image

from regrpo.config import TeacherConfig
from regrpo.data_engine.openai_teacher import OpenAITeacher
from regrpo.data_engine.teacher import Case, Declined
from regrpo.data_engine.teacher_prompt import check_answer
from regrpo.endpoint import Endpoint as Requests
from regrpo.endpoint import read_key, retry_after
from regrpo.errors import RunError
from regrpo.journal import Journal
from regrpo.tool_calls import Reflection, ToolCall
from regrpo.workspace import PageFile

OBSERVATION = "FileNotFoundError: [Errno 2] No such file or directory: 'oak.txt'\noak.csv\nfir.md"
PAGE = PageFile("page.png", (60, 20), ((3, 4, "oak"),))


def case(number=0, failed="oak.txt"):
    calls = [ToolCall("read_file", (name,)) for name in (failed, "oak.csv")]
    return Case(f"What is in {number}?", "ArgInvalid", calls[0], OBSERVATION, calls[1])


def config(url, **fields):
    quick = {"model": "m", "backoff_s": 0.001, "retries": 3, "timeout_s": 5.0}
    return TeacherConfig(base_url=url, **{**quick, **fields})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint() as server:
        yield server


@pytest.fixture
def ask(endpoint, tmp_path):
    """Asks the endpoint about cases, in a run of its own; gives the results and the teacher."""

    def run(*cases, key=None, url=None, **fields):
        with Journal(tmp_path / "teacher.jsonl") as answers:
            teacher = OpenAITeacher(config(url or endpoint.url, **fields), key, answers)
            return teacher.explain(cases), teacher

    return run


GOOD = Reflection(
    "ArgInvalid", OBSERVATION.splitlines()[0], 'call read_file as read_file("oak.csv")'
)


def test_an_answer_becomes_a_triplet(ask, endpoint):
    results, teacher = ask(case(), key="secret", input_price=2.0, output_price=10.0)
    assert results == [GOOD]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    form = body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["required"] == ["evidence", "fix_plan"]
    assert OBSERVATION in body["messages"][1]["content"]
    assert "1 answers, 100 input and 10 output tokens, 0.0003 USD" in teacher.usage


def test_what_is_null_is_not_sent(ask, endpoint):
    ask(case(), temperature=None, max_tokens=None)
    assert {"temperature", "max_tokens"}.isdisjoint(endpoint.bodies[0])
    assert "Authorization" not in endpoint.headers[0]


@pytest.mark.parametrize(
    "fault",
    [
        status(429),
        status(429, Retry_After="0"),
        status(429, Retry_After="soon"),
        status(500, "<html>oops</html>"),
        status(503),
        torn,
        raw('{"choices": [{"mess'),
        raw("[]"),
        raw('{"choices": []}'),
        raw('{"choices": [{"message": {"content": 7}}]}'),
        raw("[" * 100_000),
    ],
    ids=["429", "429-0", "429-odd", "500", "503", "torn", "json", "list", "empty", "type", "deep"],
)
def test_a_broken_request_is_repeated(ask, endpoint, fault):
    endpoint.script = [fault, fault]
    results, teacher = ask(case())
    assert results == [GOOD]
    assert len(endpoint.bodies) == 3
    assert "3 requests, 2 failed" in teacher.usage
    assert endpoint.bodies[0] == endpoint.bodies[2]


@pytest.mark.parametrize("fault", [hang(20.0), drip(20.0)], ids=["hang", "drip"])
def test_a_slow_answer_is_given_up_as_a_whole(ask, endpoint, fault):
    endpoint.script = [fault]
    assert ask(case(), timeout_s=0.3, retries=30)[0] == [GOOD]
    assert len(endpoint.bodies) >= 2
    endpoint.script = [fault]
    with pytest.raises(RunError, match=r"no whole answer within 0.3 s \(1 attempts\); 1 of 1"):
        ask(case(1), timeout_s=0.3, retries=0)


def test_retry_after_is_honoured_by_all(ask, endpoint):
    times = []

    def timed(body):
        times.append(time.monotonic())
        return quoting(body)

    def limited(handler, body):
        times.append(time.monotonic())
        status(429, Retry_After="0.3")(handler, body)

    endpoint.script = [limited]
    endpoint.default = answer(timed)
    assert ask(case(0), case(1), case(2), concurrency=1)[0] == [GOOD] * 3
    assert times[1] - times[0] >= 0.3


def test_a_wait_that_is_too_long_ends_with_a_line(ask, endpoint):
    endpoint.default = status(429, "quota", Retry_After="3600")
    with pytest.raises(
        RunError, match=r"status 429: quota, asks to wait 3600 s; max_wait_s is 120\S*; 1 of 1"
    ):
        ask(case())
    assert len(endpoint.bodies) == 1


def test_retry_after_as_a_date():
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < retry_after(later) <= 100
    assert retry_after(email.utils.formatdate(0, usegmt=True)) == 0
    assert [retry_after(v) for v in ("", "nan", "-3", "inf", "2.5")] == [0, 0, 0, 0, 2.5]


def rejected(*answers):
    return [answer(a if isinstance(a, str) else json.dumps(a)) for a in answers]


def test_an_answer_that_is_not_grounded_is_asked_again_with_the_reason(ask, endpoint):
    endpoint.script = rejected(
        '{"evidence": "oak',
        {"evidence": "the disk is full", "fix_plan": "use oak.csv"},
    )
    results, teacher = ask(case())
    assert results == [GOOD]
    said = [m["content"] for m in endpoint.bodies[2]["messages"]]
    assert said[2:] == [
        '{"evidence": "oak',
        "Rejected: the answer is no JSON. Answer again.",
        '{"evidence": "the disk is full", "fix_plan": "use oak.csv"}',
        "Rejected: evidence is not copied from the observation. Answer again.",
    ]
    assert teacher.usage.startswith("3 answers, 300 input and 30 output")


def test_after_so_many_answers_the_case_is_declined_and_the_others_go_on(ask, endpoint):
    endpoint.script = rejected("no", "no")
    results, _ = ask(case(0), case(1), asks=2, concurrency=1)
    assert results == [Declined("teacher: the answer is no JSON"), GOOD]
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"evidence": "oak.csv"}, "the answer is no object with evidence and fix_plan"),
        ({"evidence": "oak.csv", "fix_plan": ["use"]}, "fix_plan is not one line of text"),
        ({"evidence": "oak.csv\nfir.md", "fix_plan": "x"}, "evidence is not one line of text"),
        ({"evidence": "", "fix_plan": "x"}, "evidence is not one line of text"),
        ({"evidence": "oak", "fix_plan": "use oak.csv"}, "evidence is not copied from the obs"),
        ({"evidence": "ak.csv", "fix_plan": "use oak.csv"}, "evidence is not copied from the obs"),
        ({"evidence": "oak.csv", "fix_plan": "try again"}, "fix_plan does not name what"),
        ([], "the answer is no object with evidence and fix_plan"),
    ],
)
def test_which_answers_count(fields, reason):
    assert check_answer(json.dumps(fields), case()).startswith(reason)


def test_a_path_along_edges_is_cited():
    calls = [ToolCall("read_file", (name,)) for name in ("a", "cc")]
    told = Case("?", "ArgInvalid", calls[0], "OSError: x\nb -> cc\nd -> e\na -> b", calls[1])
    good = {"evidence": "a -> b -> cc", "fix_plan": "use cc"}
    assert check_answer(json.dumps(good), told) == Reflection("ArgInvalid", *good.values())
    bad = {**good, "evidence": "a -> b -> e -> cc"}
    assert check_answer(json.dumps(bad), told) == "evidence is not copied from the observation"


def test_images_that_a_call_names_are_attached(ask, endpoint, tmp_path):
    calls = [ToolCall("read_region", ("page.png", 0, y, 30, y + 9)) for y in (11, 2)]
    told = Case("?", "GroundingDrift", calls[0], "(empty region)\noak [3, 4]", calls[1], (PAGE,))
    ask(told, images=True)
    ask(told)
    text, image = endpoint.bodies[0]["messages"][1]["content"]
    assert text["text"] == endpoint.bodies[1]["messages"][1]["content"]
    kind, data = image["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (60, 20)
    assert picture.getextrema()[0] == 0  # something is drawn
    # The same from a folder; a name that is not there is no image.
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "page.png").write_bytes(base64.b64decode(data))
    calls[0] = ToolCall("read_region", ("gone.png", 0, 0, 1, 1))
    ask(Case("?", "ArgInvalid", *told_parts(calls), tmp_path / "files"), images=True)
    assert endpoint.bodies[2]["messages"][1]["content"][1:] == [image]


def told_parts(calls):
    return calls[0], "(empty region)\noak [3, 4]", calls[1]


def test_no_more_requests_than_allowed_at_a_time(ask, endpoint):
    together = threading.Barrier(3)  # each waits until there are three

    def wait(body):
        together.wait(30)
        return quoting(body)

    endpoint.default = answer(wait)
    assert ask(*(case(i) for i in range(12)), concurrency=3, timeout_s=60.0)[0] == [GOOD] * 12
    assert endpoint.most_active == 3


def test_what_was_answered_is_never_asked_again(ask, endpoint):
    endpoint.script = [answer(), answer(), answer()]
    endpoint.default = status(500, "out of memory")
    cases = [case(i) for i in range(5)]
    with pytest.raises(
        RunError,
        match=r"^teacher http://127.0.0.1:\d+/v1/chat/completions: status 500: out of memory "
        r"\(2 attempts\); 2 of 5 reflections are left, the rest is kept, and the same command",
    ):
        ask(*cases, retries=1, concurrency=1)
    assert len(endpoint.bodies) == 3 + 2  # no request for the fifth: nothing is answered any more
    endpoint.default = answer()
    endpoint.bodies.clear()
    results, teacher = ask(*cases)
    assert results == [GOOD] * 5
    assert len(endpoint.bodies) == 2
    assert teacher.usage.startswith("5 answers, 500 input")
    endpoint.bodies.clear()
    with Endpoint() as elsewhere:  # the same model behind another address
        assert ask(*cases, url=elsewhere.url)[0] == [GOOD] * 5
        assert not elsewhere.bodies
    assert ask(case(0), model="other")[0] == [GOOD]
    assert len(endpoint.bodies) == 1


def test_one_case_that_always_fails_does_not_hold_up_the_others(ask, endpoint):
    def respond(handler, body):
        poison = "in 1?" in body["messages"][1]["content"]
        (status(500, "crash") if poison else answer())(handler, body)

    endpoint.default = respond
    with pytest.raises(RunError, match=r"status 500: crash \(4 attempts\); 1 of 9 reflections"):
        ask(*(case(i) for i in range(9)), concurrency=2, backoff_s=0.02)
    endpoint.bodies.clear()
    endpoint.default = answer()
    assert len(ask(*(case(i) for i in range(9)))[0]) == 9
    assert len(endpoint.bodies) == 1


def test_the_same_question_twice_is_one_request(ask, endpoint):
    assert ask(case(), case(), case())[0] == [GOOD] * 3
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("code", [301, 400, 401, 404, 422])
def test_a_refusal_is_not_repeated(ask, endpoint, code):
    endpoint.default = status(code, "bad\nkey secret\x1b[31m" + "x" * 500, Location="http://x.y")
    with pytest.raises(RunError, match=rf"status {code}: bad key \*\*\* \[31mx{{100}}") as error:
        ask(case(), case(1), key="secret")
    assert "secret" not in str(error.value)
    assert len(str(error.value)) < 400
    assert len(endpoint.bodies) <= 2


def test_a_case_that_the_endpoint_refuses_while_it_takes_others_is_declined(ask, endpoint):
    endpoint.script = [answer(), status(400, "content filter")]
    results, _ = ask(case(0), case(1), case(2), concurrency=1)
    assert results == [GOOD, Declined("teacher: status 400"), GOOD]


def test_nobody_listens(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RunError, match=r"onnect.* \(4 attempts\); 3 of 3 reflections"):
            ask(case(), case(1), case(2), url=url)


def test_waits_are_seeded(ask, endpoint, monkeypatch):
    def waits(seed):
        found = []

        async def pause(self, seconds):
            found.append(seconds)

        monkeypatch.setattr(Requests, "_pause", pause)
        endpoint.default = status(500)
        with pytest.raises(RunError):
            ask(case(), seed=seed)
        return [s for s in found if s > 0]

    first = waits(0)
    assert first == waits(0) != waits(1)
    assert len(first) == 3
    for attempt, seconds in enumerate(first):
        assert 0.5 <= seconds / (0.001 * 2**attempt) <= 1.0


def test_the_key_comes_from_the_environment(monkeypatch):
    assert read_key("teacher.api_key_env", None) is None
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(RunError, match="environment variable TEACHER_KEY is not set"):
        read_key("teacher.api_key_env", "TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", " sk-1\n")
    assert read_key("teacher.api_key_env", "TEACHER_KEY") == "sk-1"
    monkeypatch.setenv("TEACHER_KEY", "sk-1\nX-Other: 2")
    with pytest.raises(RunError, match="has characters that no key has") as error:
        read_key("teacher.api_key_env", "TEACHER_KEY")
    assert "sk-1" not in str(error.value)
