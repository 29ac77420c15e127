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


def test_a_tokenizer_of_another_kind_is_refused_by_name(llama_tokenizer):
    with pytest.raises(ValueError, match=r"splits 'agate' into several tokens; expected a token"):
        Copying(llama_tokenizer)
