"""In-context copying: what the small base model is pretrained on.

Plain strings of symbols come back whole. Pair lists ``a S b T c S d T ...`` come back along their
edges, ``a S b S ...``, in any order; ``S`` and ``T`` are any two other tokens. A name is the end of
one pair and the start of another, so looking up what followed it takes telling the separators
apart. No task text, no tool and no format is taught.
"""

import itertools
import random

from transformers import PreTrainedTokenizerBase

from regrpo.names import NAMES
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment

LENGTH = 64


class Copying:
    """Copying sequences in a tokenizer's vocabulary. Only what can be known is trained (ACTION).

    Raises:
        ValueError: the tokenizer splits one of the tasks' identifiers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in NAMES]
        if any(len(i) != 1 for i in ids):
            raise ValueError(
                f"copying: {tokenizer.name_or_path!r} splits identifiers into several tokens; "
                "expected a tokenizer of `regrpo pretrain`"
            )
        vocabulary = tokenizer.get_vocab()
        self.names: list[int] = [i for (i,) in ids]
        self.separators = sorted(set(vocabulary.values()) - set(self.names))

    def sequence(self, rng: random.Random) -> TokenizedTrajectory:
        """One sequence: a pair list three times in five, else a plain string."""
        return self._pairs(rng) if rng.random() < 0.6 else self._plain(rng)

    def _plain(self, rng: random.Random) -> TokenizedTrajectory:
        string = rng.sample(self.names, rng.randint(3, 16))
        copies = string * (LENGTH // len(string) + 1)
        trajectory = TokenizedTrajectory()
        trajectory.extend([*string, string[0]], Segment.CONTEXT)
        trajectory.extend(copies[1 : LENGTH - len(string)], Segment.ACTION)
        return trajectory

    def _pairs(self, rng: random.Random) -> TokenizedTrajectory:
        names = rng.sample(self.names, rng.randint(6, 15))
        inside, between = rng.sample(self.separators, 2)
        edges: list[tuple[int, int]] = []
        while len(names) > 1:
            chain = [names.pop() for _ in range(min(len(names), rng.randint(2, 5)))]
            edges += itertools.pairwise(chain)
        rng.shuffle(edges)
        follows = dict(edges)
        trajectory = TokenizedTrajectory()
        for start, end in edges:
            trajectory.extend([start, inside, end, between], Segment.CONTEXT)
        while len(trajectory) < LENGTH:
            name = rng.choice(edges)[0]
            trajectory.extend([name], Segment.CONTEXT)
            while True:
                trajectory.extend([inside], Segment.CONTEXT)
                name = follows[name]
                trajectory.extend([name], Segment.ACTION)
                if name not in follows or rng.random() < 0.4:
                    break
            trajectory.extend([between], Segment.CONTEXT)
        return trajectory
