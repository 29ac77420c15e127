"""Sequences that begin alike -> a prefix tree in which what they share is computed once.

Causal hidden states depend on a token and on those before it. So tokens with equal ids, positions
and ancestors have equal hidden states, whatever follows them, and a group of trajectories needs one
copy of its context. Rows of the tree are in depth-first order: a node's own rows and those of all
its descendants are each one contiguous range.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

# Rows whose attention is merged from one more part, for what one token takes to compute.
ROWS_PER_TOKEN = 32


@dataclass(frozen=True)
class Node:
    """Rows ``[start, stop)`` of its own, ``[stop, end)`` of its descendants.

    ``parent`` is the index of its parent among the nodes, -1 where there is none; ``depth`` counts
    its ancestors. Nodes are in the order of their rows.
    """

    start: int
    stop: int
    end: int
    parent: int = -1
    depth: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


def single_nodes(bounds: Sequence[int]) -> tuple[Node, ...]:
    """Sequences that share nothing, by their starts and the end of the last (``cu_seqlens``)."""
    return tuple(Node(start, stop, stop) for start, stop in pairwise(bounds) if stop > start)


@dataclass(frozen=True)
class PrefixTree:
    """``S`` computed rows for ``T`` tokens of sequences.

    Attributes:
        input_ids, position_ids: int64 [S]; positions continue along a branch.
        source: int64 [T], the row that computes each token, sequence after sequence.
        nodes: the branches, in the order of their rows.
        tokens: int64 [S], one of the T tokens that each row computes.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    source: torch.Tensor
    nodes: tuple[Node, ...]
    tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "PrefixTree":
        """The tree with its tensors on a device."""
        return PrefixTree(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.source.to(device),
            self.nodes,
            self.tokens.to(device),
        )


@dataclass(eq=False)
class _Branch:
    """Positions ``[start, stop)`` of sequence ``first``, common to all that go through here.

    ``members`` are the sequences that end in it, which have no other branches behind them.
    """

    start: int
    stop: int
    first: int
    children: list["_Branch"] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    below: int = 0  # tokens of all descendants

    def split(self, at: int) -> None:
        lower = _Branch(at, self.stop, self.first, self.children, self.members)
        self.stop, self.children, self.members = at, [lower], []


def prefix_tree(sequences: Iterable[Sequence[int]]) -> PrefixTree:
    """The tree of token id sequences; ``source`` follows them in the order given.

    A node is shared where the tokens that it saves are worth a further part of attention for all
    rows behind it (``ROWS_PER_TOKEN``): a common first token alone is computed once a branch.
    """
    ids = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    nodes, rows, sources = _lay_out(_branches(ids), ids)
    starts = np.cumsum([0, *map(len, ids)])
    empty = [np.empty(0, dtype=np.int64)]
    return PrefixTree(
        torch.from_numpy(np.concatenate([ids[i][a:b] for i, a, b in rows] or empty)),
        torch.from_numpy(np.concatenate([np.arange(a, b) for _, a, b in rows] or empty)),
        torch.from_numpy(np.concatenate(sources or empty)),
        nodes,
        torch.from_numpy(
            np.concatenate([starts[i] + np.arange(a, b) for i, a, b in rows] or empty)
        ),
    )


def prefix_order(ids: Sequence[np.ndarray]) -> list[int]:
    """Indices in lexicographic order: sequences that begin alike are neighbours."""
    return sorted(range(len(ids)), key=lambda i: ids[i].astype(">i8").tobytes())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _branches(ids: Sequence[np.ndarray]) -> _Branch:
    """The compressed trie, under an empty root."""
    root = _Branch(0, 0, -1)
    path = [root]  # of the sequence before
    for i in prefix_order(ids):
        length = len(ids[i])
        if length == 0:
            continue
        last = path[-1]
        common = 0 if last is root else _common(ids[last.first], ids[i])
        if last is not root and common == last.stop:  # the sequence before is a prefix
            last.stop, last.first = length, i
        else:
            while path[-1].start >= common and path[-1] is not root:
                path.pop()
            if common < path[-1].stop:
                path[-1].split(common)
            path[-1].children.append(_Branch(common, length, i))
            path.append(path[-1].children[-1])
        path[-1].members.append(i)
    return root


def _preorder(root: _Branch) -> list[_Branch]:
    found, stack = [], [root]
    while stack:
        found.append(stack.pop())
        stack += reversed(found[-1].children)
    return found


def _lay_out(
    root: _Branch, ids: Sequence[np.ndarray]
) -> tuple[tuple[Node, ...], list[tuple[int, int, int]], list[np.ndarray]]:
    """Nodes, their rows as (sequence, from, to) and the rows of each sequence."""
    for branch in reversed(_preorder(root)):
        branch.below = sum(c.below + c.stop - c.start for c in branch.children)
    spans: list[tuple[int, int, int, int]] = []  # start, stop, parent, depth
    rows: list[tuple[int, int, int]] = []
    sources = [np.empty(0, dtype=np.int64)] * len(ids)
    stack = [(root, 0, -1)]  # a branch, from which position on it is to be computed, its parent
    while stack:
        branch, begin, parent = stack.pop()
        saved = (branch.stop - begin) * (len(branch.children) - 1)
        if not branch.children or saved * ROWS_PER_TOKEN >= branch.below > 0:
            if branch.stop == begin:
                continue  # a root without sequences
            start = spans[-1][1] if spans else 0
            depth = 0 if parent < 0 else spans[parent][3] + 1
            spans.append((start, start + branch.stop - begin, parent, depth))
            rows.append((branch.first, begin, branch.stop))
            begin, parent = branch.stop, len(spans) - 1
        stack += [(child, begin, parent) for child in reversed(branch.children)]
        if branch.members:
            own = _rows_to(spans, parent)
            for member in branch.members:
                sources[member] = own[: len(ids[member])]
    ends = [stop for _, stop, _, _ in spans]
    for index in reversed(range(len(spans))):
        parent = spans[index][2]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[index])
    nodes = tuple(
        Node(start, stop, end, parent, depth)
        for (start, stop, parent, depth), end in zip(spans, ends, strict=True)
    )
    return nodes, rows, sources


def _rows_to(spans: Sequence[tuple[int, int, int, int]], index: int) -> np.ndarray:
    """Rows from the root through node ``index``."""
    parts = []
    while index >= 0:
        start, stop, index, _ = spans[index]
        parts.append(np.arange(start, stop))
    return np.concatenate(parts[::-1])
