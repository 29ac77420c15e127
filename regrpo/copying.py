"""In-context copying: what the small base model is pretrained on.

Plain strings of symbols come back whole. Pair lists ``a S b T c S d T ...`` come back along their
edges, ``a S b S ...``, in any order; ``S`` and ``T`` are any two other tokens. A symbol is the end
of one pair and the start of another, so looking up what followed it takes telling the separators
apart. Rows of tables ``a S x T y T U b S x T z T U ...`` come back by their names; rows share
values, so a value alone does not tell what follows it. Symbols are what tasks copy: names, numbers
and file extensions. No task text, no tool and no format is taught.
"""

import itertools
import random

from transformers import PreTrainedTokenizerBase

from regrpo.names import NAMES
from regrpo.segments import TokenizedTrajectory
from regrpo.tasks import EXTENSIONS
from regrpo_kernels import Segment

LENGTH = 64
# Words of the tasks that are copied, beside numbers; each must be one token.
WORDS = (*NAMES, *(f".{extension}" for extension in EXTENSIONS))


class Copying:
    """Copying sequences in a tokenizer's vocabulary. Only what can be known is trained (ACTION).

    Raises:
        ValueError: the tokenizer splits one of ``WORDS``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = tokenizer.get_vocab()
        split = [word for word in WORDS if word not in vocabulary]
        if split:
            raise ValueError(
                f"copying: {tokenizer.name_or_path!r} splits {split[0]!r} into several tokens; "
                "expected a tokenizer of `regrpo pretrain`"
            )
        numbers = [token for token in vocabulary if token.isdigit()]
        self.symbols = sorted(vocabulary[token] for token in [*WORDS, *numbers])
        self.separators = sorted(set(vocabulary.values()) - set(self.symbols))

    def sequence(self, rng: random.Random) -> TokenizedTrajectory:
        """One sequence: a pair list half of the time, else a plain string or a table."""
        kind = rng.random()
        if kind < 0.5:
            return self._pairs(rng)
        return self._plain(rng) if kind < 0.75 else self._table(rng)

    def _plain(self, rng: random.Random) -> TokenizedTrajectory:
        string = rng.sample(self.symbols, rng.randint(3, 16))
        copies = string * (LENGTH // len(string) + 1)
        trajectory = TokenizedTrajectory()
        trajectory.extend([*string, string[0]], Segment.CONTEXT)
        trajectory.extend(copies[1 : LENGTH - len(string)], Segment.ACTION)
        return trajectory

    def _pairs(self, rng: random.Random) -> TokenizedTrajectory:
        symbols = rng.sample(self.symbols, rng.randint(6, 15))
        inside, between = rng.sample(self.separators, 2)
        edges: list[tuple[int, int]] = []
        while len(symbols) > 1:
            chain = [symbols.pop() for _ in range(min(len(symbols), rng.randint(2, 5)))]
            edges += itertools.pairwise(chain)
        rng.shuffle(edges)
        follows = dict(edges)
        trajectory = TokenizedTrajectory()
        for start, end in edges:
            trajectory.extend([start, inside, end, between], Segment.CONTEXT)
        while len(trajectory) < LENGTH:
            symbol = rng.choice(edges)[0]
            trajectory.extend([symbol], Segment.CONTEXT)
            while True:
                trajectory.extend([inside], Segment.CONTEXT)
                symbol = follows[symbol]
                trajectory.extend([symbol], Segment.ACTION)
                if symbol not in follows or rng.random() < 0.4:
                    break
            trajectory.extend([between], Segment.CONTEXT)
        return trajectory

    def _table(self, rng: random.Random) -> TokenizedTrajectory:
        names = rng.sample(self.symbols, rng.randint(3, 5))
        opening, inside, between = rng.sample(self.separators, 3)
        width = rng.randint(2, 4)
        values = rng.sample(self.symbols, 4)
        rows = {name: rng.choices(values, k=width) for name in names}
        trajectory = TokenizedTrajectory()
        while len(trajectory) < LENGTH:
            shown = bool(names)
            name = names.pop() if shown else rng.choice(list(rows))
            trajectory.extend([name, opening], Segment.CONTEXT)
            for value in rows[name]:
                trajectory.extend([value], Segment.CONTEXT if shown else Segment.ACTION)
                trajectory.extend([inside], Segment.CONTEXT)
            trajectory.extend([between], Segment.CONTEXT)
        return trajectory
