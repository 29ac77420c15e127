"""How the benchmarks time several ways of computing one thing."""

import time

import pytest

from bench.measure import Case, Provider, measure


class Rounds:
    """The part of pytest-benchmark's fixture that `measure` uses."""

    def pedantic(self, target, setup=lambda: None, rounds=1, iterations=1):
        for _ in range(rounds):
            setup()
            target()


def run(providers, events=None, **changes):
    restored = [] if events is None else events
    case = Case(
        restore=lambda: restored.append("restore"),
        error=lambda result: abs(result - 1.0),
        tolerance=1e-3,
        record={"op": "an op"},
        **changes,
    )
    return {r["provider"]: r for r in measure(case, providers, Rounds())}


def ours(call=lambda: 1.0):
    return Provider("ours", "ours", lambda: call)


def failing():
    raise ValueError("no such shape\nand more")


def test_a_peer_that_fails_is_recorded_with_its_error():
    results = iter([1.0])  # the second call raises
    found = run(
        [
            ours(),
            Provider("import", "peer", failing, note="a note"),
            Provider("first call", "peer", lambda: failing),
            Provider("second call", "peer", lambda: lambda: next(results)),
        ]
    )
    for name in ("import", "first call"):
        assert found[name]["status"] == "failed"
        assert found[name]["note"] == "ValueError: no such shape"
        assert found[name]["seconds"] is None
    assert (found["second call"]["status"], found["second call"]["note"]) == (
        "failed",
        "StopIteration",
    )
    assert found["ours"]["status"] == "ok"
    assert found["ours"]["seconds"] > 0


def test_what_does_not_fit_is_left_out_before_it_runs():
    found = run([ours(), Provider("eager", "eager", failing, needs=1 << 60)])
    assert found["eager"]["status"] == "left out"
    assert found["eager"]["note"].startswith("needs at least 1152921504.6 GB, may use ")


@pytest.mark.parametrize(
    ("result", "status", "note"),
    [(1.0, "ok", ""), (1.01, "ok", "relative error 0.01"), (1.2, "wrong", "relative error 0.2")],
)
def test_a_peer_s_result_is_checked(result, status, note):
    found = run([ours(), Provider("peer", "peer", lambda: lambda: result)])
    assert (found["peer"]["status"], found["peer"]["note"]) == (status, note)
    assert found["peer"]["seconds"] > 0


@pytest.mark.parametrize("result", [1.01, float("nan")])
def test_ours_may_not_be_wrong(result):
    with pytest.raises(AssertionError, match="ours: relative error"):
        run([ours(lambda: result)])


def test_ours_may_not_fail():
    with pytest.raises(ValueError, match="no such shape"):
        run([ours(failing)])


def test_rounds_are_taken_in_turns_and_inputs_restored_before_each():
    events = []

    def call(name, seconds):
        def timed():
            events.append(name)
            time.sleep(seconds)
            return 1.0

        return lambda: timed

    slow = Provider("eager", "eager", call("eager", 0.3))
    found = run([Provider("ours", "ours", call("ours", 0.01)), slow], events)
    assert found["ours"]["rounds"] == 9
    assert found["eager"]["rounds"] == 3
    assert 0.01 <= found["ours"]["seconds"] <= found["ours"]["median"] < 0.3
    for i, event in enumerate(events):
        assert event == "restore" or events[i - 1] == "restore"
    order = [e for e in events if e != "restore"][2:]  # after the warm-ups
    # eager's rounds are spread over those of ours
    between = [i for i, e in enumerate(order) if e == "eager"]
    assert between[1] - between[0] >= 3
    assert between[2] - between[1] >= 3


def test_a_case_for_its_memory_runs_once():
    events = []
    found = run([ours(lambda: events.append("call"))], once=True)
    assert events == ["call"]
    assert found["ours"]["rounds"] == 1
