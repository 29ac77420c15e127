"""Generated tasks, executed: references work, traps fail, no shortcut picks the answer."""

import re
from collections import Counter

import pytest

from regrpo.prompts import thought
from regrpo.tasks import FAMILIES, SERIAL_FAMILIES, generate_tasks
from regrpo.tool_calls import Turn
from regrpo.tools import Status
from regrpo.workspace import LinkFile, SqliteFile, TextFile


def execute(environment, pairs):
    return environment.execute(
        [(task.workspace, Turn(None, thought(call.name), call).render()) for task, call in pairs]
    )


@pytest.fixture(scope="module")
def many():
    return [
        task
        for hops in ((1, 1), (1, 4), (7, 7))
        for task in generate_tasks(64, seed=5, hops=hops, trap_share=0.7)
    ]


def test_every_reference_call_succeeds_and_leads_to_the_answer(environment, many):
    pairs = [(task, step.call) for task in many for step in task.steps]
    observations = execute(environment, pairs)
    for (task, call), observation in zip(pairs, observations, strict=True):
        assert observation.status is Status.OK, (task.id, call, observation)
    by_task = Counter()
    for (task, _), observation in zip(pairs, observations, strict=True):
        by_task[id(task)] += bool(re.search(rf"\b{task.answer}\b", observation.text))
    # final_answer shows it, and so does the step before.
    assert all(by_task[id(task)] >= 2 for task in many)


def test_every_trap_fails_with_a_typed_status(environment, many):
    traps = [(task, step) for task in many for step in task.steps if step.trap is not None]
    assert {task.family for task, _ in traps} == set(FAMILIES)
    observations = execute(environment, [(task, step.trap) for task, step in traps])
    for (task, step), observation in zip(traps, observations, strict=True):
        assert observation.status in (Status.ERROR, Status.EMPTY), (task.id, step, observation)
        assert step.trap != step.call
    kinds = {(step.trap_type, o.status) for (_, step), o in zip(traps, observations, strict=True)}
    assert kinds == {
        ("ArgInvalid", Status.ERROR),
        ("InfoInsufficient", Status.EMPTY),
        ("GroundingDrift", Status.EMPTY),
    }


def test_trap_share_is_a_share_of_the_steps_that_can_have_one():
    for share in (0.0, 0.3, 1.0):
        tasks = generate_tasks(400, seed=2, trap_share=share, families=("links", "see", "layout"))
        assert sum(t.trapped for t in tasks) / 400 == pytest.approx(share, abs=0.07)


def chain_ends(task):
    """The things a guess would choose from, in the order in which they are shown."""
    files = task.workspace
    if task.family == "renames":
        (database,) = (f for f in files if isinstance(f, SqliteFile))
        return re.search(r"\n([^\n-]*)\);", database.script)[1].split(", ")
    if task.family == "links":
        return [f.path.split(".")[0] for f in files if isinstance(f, TextFile)]
    docs = (f for f in files if isinstance(f, TextFile) and f.path.endswith(".txt"))
    return [f.path.removeprefix("docs/").removesuffix(".txt") for f in docs]


def chain_edges(task):
    files = task.workspace
    if task.family == "links":
        return [
            (f.path.split(".")[0], f.target.split(".")[0]) for f in files if type(f) is LinkFile
        ]
    text = "\n".join(f.content if isinstance(f, TextFile) else f.script for f in files)
    return re.findall(r"(\w+) -> (\w+)", text)


def subject(call):
    """The name that a call is about."""
    text = call.args[-1].removeprefix("SELECT ")
    return re.match(r"\w+", text)[0]


@pytest.mark.parametrize("family", SERIAL_FAMILIES)
@pytest.mark.parametrize("hops", [(1, 1), (3, 3), (1, 4)])
def test_answers_are_balanced_over_three_chains(family, hops):
    tasks = generate_tasks(600, seed=9, hops=hops, trap_share=1.0, families=(family,))
    positions, edge_positions = Counter(), Counter()
    for task in tasks:
        (step, _) = task.steps
        asked, target = (subject(call) for call in (step.trap, step.call))
        ends, edges = chain_ends(task), chain_edges(task)
        assert len(ends) == 3
        positions[ends.index(target)] += 1
        follow = dict(edges)
        length = len(edges) // 3
        assert hops[0] <= length <= hops[1]
        assert len(follow) == len(edges) == 3 * length
        at = asked
        for _ in range(length):
            at = follow[at]
        assert at == target
        # Every end is reached by a chain of the same length, so length tells nothing.
        last = next(i for i, e in enumerate(edges) if e[1] == target)
        edge_positions[last * 3 // len(edges)] += 1
    # A guess among what exists is right one time in three (chi-squared, 2 degrees, p < 1e-4).
    for counts in (positions, edge_positions):
        assert sum((counts[i] - 200) ** 2 / 200 for i in range(3)) < 18.4, counts


def test_without_the_trap_the_asked_name_is_an_end_itself():
    for family in SERIAL_FAMILIES:
        for task in generate_tasks(30, seed=4, hops=(2, 4), trap_share=0.0, families=(family,)):
            ends = chain_ends(task)
            assert len(ends) == 3
            assert any(re.search(rf"\b{end}\b", task.question) for end in ends)


def test_same_seed_same_tasks_and_first_is_an_offset():
    whole = generate_tasks(40, seed=7, hops=(1, 3))
    assert generate_tasks(40, seed=7, hops=(1, 3)) == whole
    assert generate_tasks(15, seed=7, hops=(1, 3), first=9) == whole[9:24]
    assert generate_tasks(0, seed=7) == []


def test_other_seeds_give_other_tasks():
    seen = [t for seed in range(4) for t in generate_tasks(80, seed=seed, hops=(1, 4))]
    assert len({t.id for t in seen}) == len(seen)
    assert len({(t.question, t.workspace) for t in seen}) == len(seen)


def test_answers_spread_over_their_range():
    tasks = generate_tasks(800, seed=1, families=("links", "see", "layout", "formats", "renames"))
    (_, most), *_ = Counter(t.answer for t in tasks).most_common(1)
    different = len({t.answer for t in tasks})
    assert different >= 40
    assert most < 3 * 800 / different


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ("links", "nope")}, r"families: got \['nope'\]; expected some of"),
        ({"families": ()}, "families: got none"),
        ({"hops": (0, 2)}, r"hops: got \(0, 2\); expected 1 <= least <= most <= 7"),
        ({"hops": (3, 2)}, r"hops: got \(3, 2\)"),
        ({"hops": (1, 9)}, r"hops: got \(1, 9\)"),
        ({"trap_share": 1.1}, "trap_share: got 1.1; expected a share"),
        ({"count": -1}, "count, first: got -1, 0"),
        ({"first": -1}, "count, first: got 1, -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tasks(**{"count": 1, "seed": 0, **arguments})
