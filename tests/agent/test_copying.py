"""What pretraining trains can be known from the context; nothing else is trained."""

import random
from itertools import takewhile

import pytest

from regrpo.copying import LENGTH, Copying
from regrpo_kernels import Segment

ACTION = int(Segment.ACTION)


def trained(trajectory):
    return [i for i, kind in enumerate(trajectory.segment_ids) if kind == ACTION]


@pytest.mark.parametrize("seed", range(20))
def test_a_plain_string_comes_back_whole(tokenizer, seed):
    copying = Copying(tokenizer)
    trajectory = copying._plain(random.Random(seed))
    ids = trajectory.input_ids
    assert len(ids) == LENGTH
    period = len(list(takewhile(lambda kind: kind != ACTION, trajectory.segment_ids))) - 1
    assert 3 <= period <= 16
    assert len(set(ids[:period])) == period
    assert set(ids) <= set(copying.symbols)
    assert trained(trajectory) == list(range(period + 1, LENGTH))
    assert all(ids[i] == ids[i - period] for i in trained(trajectory))


@pytest.mark.parametrize("seed", range(20))
def test_pairs_come_back_along_their_edges(tokenizer, seed):
    copying = Copying(tokenizer)
    trajectory = copying._pairs(random.Random(seed))
    ids = trajectory.input_ids
    first = trained(trajectory)[0]
    inside, between = ids[1], ids[3]
    assert {inside, between}.isdisjoint(copying.symbols)
    listed = [tuple(ids[i : i + 4]) for i in range(0, first - 2, 4)]
    assert all((s, b) == (inside, between) for _, s, _, b in listed)
    follows = {a: b for a, _, b, _ in listed}
    assert len(follows) == len(listed)  # no symbol leads to two others
    for i in trained(trajectory):
        assert ids[i - 1] == inside
        assert ids[i] == follows[ids[i - 2]]
        assert ids[i + 1] in (inside, between)


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_back_by_their_names(tokenizer, seed):
    copying = Copying(tokenizer)
    trajectory = copying._table(random.Random(seed))
    ids, actions = trajectory.input_ids, trained(trajectory)
    opening, between = ids[1], ids[-1]
    rows = []  # (name, values, where the values are)
    start = 0
    while start < len(ids):
        stop = ids.index(between, start)
        rows.append((ids[start], ids[start + 2 : stop : 2], list(range(start + 2, stop, 2))))
        assert ids[start + 1] == opening
        assert len(set(ids[start + 3 : stop : 2])) == 1  # one separator inside
        start = stop + 1
    known = {}
    for name, values, places in rows:
        assert known.setdefault(name, values) == values
        shown = places[0] < actions[0]
        assert set(places).isdisjoint(actions) if shown else set(places) <= set(actions)
    assert 3 <= len(known) <= 5
    assert {opening, between}.isdisjoint(copying.symbols)


def test_rows_share_values(tokenizer):
    """Otherwise the value before would tell which row it is."""
    copying = Copying(tokenizer)
    followers = {}
    for seed in range(20):
        ids = copying._table(random.Random(seed)).input_ids
        for value, after in zip(ids[2:], ids[4:], strict=False):
            followers.setdefault((seed, value), set()).add(after)
    assert sum(len(after) > 1 for after in followers.values()) > len(followers) / 3


def test_a_tokenizer_of_another_kind_is_refused_by_name(llama_tokenizer):
    with pytest.raises(ValueError, match=r"splits 'agate' into several tokens; expected a token"):
        Copying(llama_tokenizer)
