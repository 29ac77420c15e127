"""The prefix tree, and packs that count what is shared once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo.packing import best_fit_decreasing, collate, pack_groups
from regrpo.prefix_tree import ROWS_PER_TOKEN, Node, prefix_tree, single_nodes
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment

# Two letters, so that many begin alike, are prefixes of one another, or are the same.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=10)


def branch(tree, row):
    """Rows from the root through ``row``, by the nodes alone."""
    index = next(i for i, node in enumerate(tree.nodes) if node.start <= row < node.stop)
    rows = list(range(tree.nodes[index].start, row + 1))
    while (index := tree.nodes[index].parent) >= 0:
        rows = [*range(tree.nodes[index].start, tree.nodes[index].stop), *rows]
    return rows


@settings(deadline=None, max_examples=200)
@given(SEQUENCES)
def test_each_token_is_computed_behind_its_own_prefix(sequences):
    tree = prefix_tree(sequences)
    source = tree.source.tolist()
    assert len(source) == sum(map(len, sequences))
    assert set(source) == set(range(len(tree)))  # and no row is computed for nothing
    place = 0
    for sequence in sequences:
        for length in range(1, len(sequence) + 1):
            rows = branch(tree, source[place])
            assert tree.input_ids[rows].tolist() == sequence[:length]
            assert tree.position_ids[rows].tolist() == list(range(length))
            place += 1


@settings(deadline=None, max_examples=200)
@given(SEQUENCES)
def test_nodes_are_ranges_in_depth_first_order(sequences):
    tree = prefix_tree(sequences)
    stop = 0
    for index, node in enumerate(tree.nodes):
        assert node.start == stop < node.stop <= node.end
        stop = node.stop
        children = [n for n in tree.nodes if n.parent == index]
        assert len(children) != 1
        assert sum(c.end - c.start for c in children) == node.end - node.stop
        if node.parent >= 0:
            parent = tree.nodes[node.parent]
            assert node.depth == parent.depth + 1
            assert parent.stop <= node.start < node.end <= parent.end
        else:
            assert node.depth == 0
        # Sharing pays: its tokens, once for each further branch, for the rows behind them.
        saved = (node.stop - node.start) * (len(children) - 1)
        assert not children or saved * ROWS_PER_TOKEN >= node.end - node.stop
    assert stop == len(tree)
    assert len(tree) <= sum(map(len, sequences))


def test_a_tree_of_context_shared_first_turn_and_tails():
    context, first = [1, 2, 3, 4], [5, 6]
    tree = prefix_tree(
        [[*context, *first, 7], [*context, 8], [*context, *first, 9, 9], [*context, 8], [3, 3]]
    )
    assert tree.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 9, 8, 3, 3]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 4, 0, 1]
    assert tree.nodes == (
        Node(0, 4, 10),
        Node(4, 6, 9, parent=0, depth=1),
        Node(6, 7, 7, parent=1, depth=2),
        Node(7, 9, 9, parent=1, depth=2),
        Node(9, 10, 10, parent=0, depth=1),
        Node(10, 12, 12),
    )
    expected = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 9, 0, 1, 2, 3, 4, 5, 7, 8, 0, 1, 2, 3, 9, 10, 11]
    assert tree.source.tolist() == expected


def test_prefixes_and_copies_of_a_sequence_are_computed_with_it():
    tree = prefix_tree([[1, 2], [1, 2, 3, 4], [], [1, 2, 3, 4], [1]])
    assert tree.nodes == (Node(0, 4, 4),)
    assert tree.source.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_first_token_alone_is_not_worth_a_part_of_attention():
    long = [[0, *[i] * 50] for i in range(1, 4)]
    tree = prefix_tree(long)
    assert tree.nodes == single_nodes([0, 51, 102, 153])
    assert len(prefix_tree([[0, 0, 0, *s] for s in long])) == 4 + 150


def test_single_nodes_are_the_sequences_that_are_not_empty():
    assert single_nodes([0, 3, 3, 4]) == (Node(0, 3, 3), Node(3, 4, 4))
    assert prefix_tree([]).nodes == prefix_tree([[]]).nodes == single_nodes([0, 0]) == ()


def trajectories(sequences):
    return [TokenizedTrajectory(ids, [int(Segment.ACTION)] * len(ids)) for ids in sequences]


@settings(deadline=None, max_examples=150)
@given(st.lists(SEQUENCES.filter(bool), max_size=6), st.integers(12, 40))
def test_packs_of_groups_stay_within_the_budget_once_computed(groups, budget):
    rows = trajectories([ids for group in groups for ids in group])
    indices, start = [], 0
    for group in groups:
        indices.append(range(start, start + len(group)))
        start += len(group)
    packs = pack_groups(indices, rows, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    for pack in packs:
        assert len(collate([rows[i] for i in pack], share=True).tree) <= budget
    for group in indices:
        if len(prefix_tree([rows[i].input_ids for i in group])) <= budget:
            assert sum(bool(set(group) & set(pack)) for pack in packs) == 1, "a group is whole"


def test_packs_hold_more_where_trajectories_share():
    context = list(range(100))
    rows = trajectories([[*context, 200 + i, 300 + i] for i in range(8)])
    assert len(pack_groups([range(4), range(4, 8)], rows, 216)) == 1
    assert len(best_fit_decreasing([len(r) for r in rows], 216)) == 4


def test_a_group_over_the_budget_is_split_by_its_branches():
    one, two = [1] * 20, [2] * 20
    rows = trajectories([[*one, 5], [*two, 5], [*one, 6], [*two, 6]])
    assert pack_groups([range(4)], rows, 22) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match=r"trajectory 0 has 21 tokens.*budget of 20"):
        pack_groups([range(4)], rows, 20)


def test_a_shared_batch_moves_with_its_tree():
    batch = collate(trajectories([[1, 2, 3], [1, 2, 4]]), share=True)
    rows = torch.tensor([1, 4, 5])
    assert torch.equal(batch.computed(rows), batch.tree.source[rows])
    assert torch.equal(collate(trajectories([[1, 2], [1]])).computed(rows), rows)
    moved = batch.to("meta").tree
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.source)} == {"meta"}
    assert moved.nodes == batch.tree.nodes
