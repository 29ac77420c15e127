"""Keys and values of rows of different lengths, in columns of which some are empty.

Positions are in the keys already (rotary or added), so the order of columns means nothing to
attention: where each column's token stands is kept beside them, and empty columns stand ``FAR``
behind every query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

FAR = 1 << 40  # a float holds it exactly, as padding has to


@dataclass
class Ragged:
    """What was kept of some rows.

    Attributes:
        positions: int64 [R, M], of the token of each column; ``FAR`` where there is none.
        layers: by index, keys and values [R, heads, M, D] of each layer.
    """

    positions: torch.Tensor
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def rows(self, index: torch.Tensor) -> "Ragged":
        """A copy of some rows [R']."""
        layers = {i: (keys[index], values[index]) for i, (keys, values) in self.layers.items()}
        return Ragged(self.positions[index], layers)

    def columns(self, count: int) -> "Ragged":
        """A view of the first columns."""
        layers = {i: (k[:, :, :count], v[:, :, :count]) for i, (k, v) in self.layers.items()}
        return Ragged(self.positions[:, :count], layers)

    def cut(self, lengths: torch.Tensor) -> None:
        """Empties the columns of tokens at or behind a length [R]."""
        self.positions = self.positions.masked_fill(self.positions >= lengths[:, None], FAR)


def join(parts: Sequence[Ragged]) -> Ragged:
    """All rows in one, with as few columns as hold them: each row's tokens at the right, in their
    order, empty columns before them."""
    longest = max(part.positions.shape[1] for part in parts)
    positions = torch.cat(
        [F.pad(p.positions, (longest - p.positions.shape[1], 0), value=FAR) for p in parts]
    )
    held = positions != FAR
    count = int(held.sum(1).max()) if longest else 0
    order = held.int().argsort(dim=1, stable=True)[:, longest - count :]

    def arranged(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in tensors])
        return whole.gather(
            2, order[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
        )

    layers = {}
    for index, pair in next((p.layers for p in parts if p.layers), {}).items():
        # A row that has no column yet has no layers either.
        pairs = [
            part.layers.get(index)
            or [x.new_empty(len(part.positions), x.shape[1], 0, x.shape[3]) for x in pair]
            for part in parts
        ]
        layers[index] = (arranged([p[0] for p in pairs]), arranged([p[1] for p in pairs]))
    return Ragged(positions.gather(1, order), layers)


def resumed(parts: Sequence[tuple[list[int], Ragged]], limits: Mapping[int, int]) -> Ragged:
    """Of rows by their numbers those that ``limits`` names, in its order, each with its tokens
    before that position."""
    for numbers, part in parts:
        lengths = [limits.get(number, 0) for number in numbers]
        part.cut(torch.tensor(lengths, dtype=torch.int64, device=part.positions.device))
    every = {number: i for i, number in enumerate(n for numbers, _ in parts for n in numbers)}
    whole = join([part for _, part in parts])
    index = torch.tensor([every[number] for number in limits], device=whole.positions.device)
    return whole.rows(index)
