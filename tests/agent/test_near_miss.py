"""Which near-misses there are follows from what tools declare about their arguments."""

import random

import pytest

from regrpo.cli import main
from regrpo.data_engine.build import demonstrate
from regrpo.data_engine.near_miss import (
    ERROR_SHARES,
    NON_COMMIT,
    feasibility,
    near_misses,
    target_shares,
)
from regrpo.data_engine.teacher import Case, GroundedTeacher
from regrpo.tasks import Step, generate_tasks
from regrpo.tool_calls import Reflection, ToolCall
from regrpo.tools import TOOLS, Observation, Status, call_tool
from regrpo.tools.parameters import (
    Answer,
    Coordinate,
    Kind,
    PathText,
    Query,
    typed_parameters,
)


def detect(
    root,
    label: Query,
    image: PathText,
    x0: Coordinate,
    y0: Coordinate,
    x1: Coordinate,
    y1: Coordinate,
):
    """A made-up tool."""


def submit(root, note: str, result: Answer):
    """Another way to answer."""


def scale(root, factor: float = 1.0):
    """Says nothing about its argument, which may be left out."""


def test_the_table_of_made_up_tools():
    table = feasibility((*TOOLS, detect, submit, scale))
    assert table["detect"] == {
        "GroundingDrift": ["box moves"],
        # Whatever takes a path or words, and nothing that needs more than the call has.
        "ToolMismatch": ["read_file", "list_dir", "read_region", "search"],
        "ArgInvalid": ["wrong word", "misspelled", "wrong extension", "wrong type"],
        "InfoInsufficient": ["missing argument", "key word gone"],
        NON_COMMIT: [],
    }
    assert {k: v for k, v in table["submit"].items() if v} == {NON_COMMIT: ["no answer"]}
    assert {k: v for k, v in table["scale"].items() if v} == {"ArgInvalid": ["wrong type"]}
    # A new tool is a neighbour of the others as well, where their arguments fill it.
    assert feasibility((*TOOLS, scale))["sql"] == feasibility()["sql"]
    assert "detect" not in table["read_region"]["ToolMismatch"]


def test_the_table_of_our_tools():
    table = {t: {k: v for k, v in row.items() if v} for t, row in feasibility().items()}
    assert {t for t, row in table.items() if "GroundingDrift" in row} == {"read_region"}
    assert table["sql"]["ToolMismatch"] == ["read_file", "list_dir"]
    assert table["search"]["ToolMismatch"] == ["read_file", "list_dir", "calculator"]
    assert table["calculator"]["ToolMismatch"] == ["search"]
    assert "InfoInsufficient" not in table["list_dir"]  # its path may be left out
    assert table["final_answer"] == {NON_COMMIT: ["no answer"]}


def test_near_misses_of_a_made_up_tool():
    tools = (*TOOLS, detect)
    call = ToolCall("detect", ("red maple", "a.md"), {"x0": 10, "y0": 20, "x1": 40, "y1": 30})
    seen = {name: set() for name in ERROR_SHARES}
    for seed in range(300):
        misses = near_misses(Step(call), random.Random(seed), tools=tools)
        assert list(misses) == list(ERROR_SHARES)
        for name, miss in misses.items():
            seen[name].add((miss.name, repr(miss.args)))
        left, top, right, bottom = misses["GroundingDrift"].args[2:]
        assert (right - left, bottom - top) == (30, 10)
        assert (left, top) != (10, 20)
        assert min(left, top) >= 0
        assert left == 10 or abs(left - 10) >= 30
        assert top == 20 or abs(top - 20) >= 10
    assert {name for name, _ in seen["ToolMismatch"]} == {
        "read_file",
        "list_dir",
        "read_region",
        "search",
    }
    assert ("search", "('red maple',)") in seen["ToolMismatch"]
    assert ("read_region", "('a.md', 10, 20, 40, 30)") in seen["ToolMismatch"]
    corrupted = {args for _, args in seen["ArgInvalid"]}
    for args in (
        "('red mapel', 'a.md', 10, 20, 40, 30)",
        "('red fern', 'a.md', 10, 20, 40, 30)",
        "('red maple', 'a.csv', 10, 20, 40, 30)",
        "(['red maple'], 'a.md', 10, 20, 40, 30)",
        "('red maple', 'a.md', '10', 20, 40, 30)",
    ):
        assert args in corrupted
    assert seen["InfoInsufficient"] == {
        ("detect", "('red maple', 'a.md', 10, 20, 40)"),
        ("detect", "('red', 'a.md', 10, 20, 40, 30)"),
    }


def test_what_the_values_do_not_allow_is_left_out():
    misses = near_misses(Step(ToolCall("list_dir")), random.Random(0))
    assert misses == {}
    for seed in range(20):
        misses = near_misses(Step(ToolCall("read_file", ("a",))), random.Random(seed))
        assert misses["ArgInvalid"] == ToolCall("read_file", (["a"],))


def test_non_commit_is_opt_in_and_fails(environment):
    tasks = generate_tasks(8, seed=2)
    plain, _ = demonstrate(environment, tasks, seed=0)
    assert all(f.error_type != NON_COMMIT for d in plain for f in d.failures)
    demonstrations, _ = demonstrate(environment, tasks, seed=0, non_commit=True)
    for demo, before in zip(demonstrations, plain, strict=True):
        *others, last = demo.failures
        assert tuple(others) == before.failures
        assert last.error_type == NON_COMMIT
        assert last.step == len(demo.task.steps) - 1
        assert last.call == ToolCall("final_answer")
        assert last.observation.status is Status.ERROR
        assert last.reflection.evidence in last.observation.text
        assert last.reflection.fix_plan == "use final_answer"


def test_target_shares():
    assert target_shares() == ERROR_SHARES
    shares = target_shares(0.2)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[NON_COMMIT] == 0.2
    assert shares["ArgInvalid"] == pytest.approx(0.8 * ERROR_SHARES["ArgInvalid"])


@pytest.mark.parametrize(
    ("failed", "corrected", "plan"),
    [
        (ToolCall("read_file", (["oak.txt"],)), ToolCall("read_file", ("oak.txt",)), "use oak.txt"),
        (
            ToolCall("read_region", ("p", 1, "2", 3, 4)),
            ToolCall("read_region", ("p", 1, 2, 3, 4)),
            "use [1, 2, 3, 4]",
        ),
    ],
)
def test_an_argument_of_the_wrong_type_is_explained_by_the_error(tmp_path, failed, corrected, plan):
    observation = call_tool(tmp_path, failed)
    assert observation.text.startswith("TypeError: ")
    told = GroundedTeacher().explain([Case("?", "ArgInvalid", failed, observation.text, corrected)])
    assert told == [Reflection("ArgInvalid", observation.text, plan)]


def test_typed_parameters_of_a_tool():
    def tool(root, path: PathText, plain: str, number: int = 3) -> Observation:
        return Observation("", Status.OK)

    path, plain, number = typed_parameters(tool)
    assert (path.name, path.type, path.kind, path.required) == ("path", str, Kind.PATH, True)
    assert (plain.type, plain.kind) == (str, None)
    assert (number.type, number.required) == (int, False)


def test_the_command_prints_the_table(capsys):
    main(["data", "table"])
    text = capsys.readouterr().out
    for words in ("box moves", "read_file, list_dir", "missing argument", "no answer"):
        assert words in text
