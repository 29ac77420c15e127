"""Which shapes are measured: the headline of a device, or the grid."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARIES = (32000, 102400, 128256, 151936, 262144)
TOKENS = (1, 128, 4096, 16384)
SHARES = (0.05, 0.2, 1.0)
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RowCase:
    """Logits `[tokens, vocab]`.

    Attributes:
        share: of the tokens that are trained.
        logits: "flat" (N(0, 2^2)) or "peaked" (the same, with one token of probability near 1).
        view: "packed" `[T, V]`, or "shifted": `padded[:, :-1]` of padded logits `[B, L + 1, V]`.
    """

    tokens: int
    vocab: int
    dtype: str
    share: float = 1.0
    logits: str = "flat"
    view: str = "packed"

    @property
    def shape(self) -> str:
        return f"{self.tokens} x {self.vocab}"

    @property
    def variant(self) -> str:
        """What sets the case apart from all tokens trained on flat, packed logits."""
        parts = [f"{self.share:g} trained"] if self.share != 1.0 else []
        parts += [part for part in (self.logits, self.view) if part not in ("flat", "packed")]
        return ", ".join(parts)

    @property
    def nbytes(self) -> int:
        return self.tokens * self.vocab * ITEM_BYTES[self.dtype]

    @property
    def needs(self) -> int:
        """Bytes without which the case cannot be set up: the logits, the copy they are restored
        from, and a fresh gradient.
        """
        return 3 * self.nbytes

    def __str__(self) -> str:
        return " ".join(filter(None, (self.shape, self.dtype, self.variant)))


@dataclass(frozen=True)
class LinearCase:
    """Hidden states `[tokens, hidden]` and a head `[vocab, hidden]`, trained or frozen."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    share: float = 1.0
    head: str = "trained"
    once: bool = False  # for its memory: one call, which is not warmed up

    @property
    def shape(self) -> str:
        return f"{self.tokens} x {self.vocab} x {self.hidden}"

    @property
    def variant(self) -> str:
        parts = [f"{self.share:g} trained"] if self.share != 1.0 else []
        parts += [f"{self.head} head"] if self.head != "trained" else []
        parts += ["one call"] if self.once else []
        return ", ".join(parts)

    @property
    def trained(self) -> int:
        return max(round(self.share * self.tokens), 1)

    @property
    def needs(self) -> int:
        """Bytes without which the case cannot be set up: inputs and gradients."""
        rows = 2 * (self.tokens + self.vocab) * self.hidden * ITEM_BYTES[self.dtype]
        return rows + 4 * self.vocab * self.hidden + (512 << 20)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.shape, self.dtype, self.variant)))


@dataclass(frozen=True)
class GroupCase:
    """``group`` trajectories behind one context."""

    context: int
    group: int
    vocab: int
    dtype: str

    @property
    def shape(self) -> str:
        return f"{self.context} x {self.group} x {self.vocab}"

    @property
    def needs(self) -> int:
        """Bytes without which the case cannot be set up: the model (and one gradient of logits)."""
        return 4 * 512 * self.vocab + (1 << 30)

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


@dataclass(frozen=True)
class UpdateCase(GroupCase):
    """One update on trajectories of 64 to 128 tokens behind their context."""

    once: bool = False  # too slow for more than one call

    @property
    def tails(self) -> list[int]:
        return [64 + 64 * i // max(self.group - 1, 1) for i in range(self.group)]

    @property
    def tokens(self) -> int:
        """Of all trajectories."""
        return self.group * self.context + sum(self.tails)


@dataclass(frozen=True)
class StepCase(GroupCase):
    """One step of TRL's trainer on completions of 64 to 256 tokens behind their prompt."""

    @property
    def lengths(self) -> list[int]:
        return [64 + 192 * i // max(self.group - 1, 1) for i in range(self.group)]

    @property
    def tokens(self) -> int:
        """Of all prompts and completions, without the padding."""
        return self.group * self.context + sum(self.lengths)

    @property
    def needs(self) -> int:
        """Two models with a gradient each, and one gradient that both are compared with."""
        return 5 * (4 * 512 * self.vocab + (100 << 20)) + (1 << 30)


@dataclass(frozen=True)
class PaddedCase:
    """``group`` completions of a quarter of ``length`` to ``length`` tokens, padded."""

    group: int
    length: int
    vocab: int
    hidden: int
    dtype: str

    @property
    def lengths(self) -> list[int]:
        least = self.length // 4
        steps = max(self.group - 1, 1)
        return [least + (self.length - least) * i // steps for i in range(self.group)]

    @property
    def shape(self) -> str:
        return f"{self.group} x {self.length} x {self.vocab}"

    @property
    def logits_bytes(self) -> int:
        return self.group * (self.length + 1) * self.vocab * ITEM_BYTES[self.dtype]

    @property
    def needs(self) -> int:
        """Bytes without which the case cannot be set up: a head, its gradients, and on a GPU logits
        and the copy that they are restored from.
        """
        return 4 * 4 * self.vocab * self.hidden + 2 * self.logits_bytes

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


@dataclass(frozen=True)
class GenerationCase(GroupCase):
    """Two turns of each trajectory, an observation in between."""

    turn: int = 96  # sampled tokens of each turn
    observation: int = 64  # tokens, give or take an eighth

    @property
    def observations(self) -> list[int]:
        eighth = self.observation // 8
        steps = max(self.group - 1, 1)
        return [self.observation - eighth + 2 * eighth * i // steps for i in range(self.group)]


def generation_cases(device: str, grid: bool) -> list[GenerationCase]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    groups, vocabularies = ((5, 8, 16), (32000, 151936)) if grid else ((8,), (32000,))
    return [
        GenerationCase(context, group, vocab, dtype)
        for vocab in vocabularies
        for context in (256, 1024)
        for group in groups
    ]


def update_cases(device: str, grid: bool) -> list[UpdateCase]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    contexts, groups = ((256, 1024, 4096), (5, 8, 16)) if grid else ((1024,), (8,))
    return [
        UpdateCase(context, group, vocab, dtype, device == "cpu" and context * group > 8192)
        for vocab in (32000, 151936)
        for context in contexts
        for group in groups
    ]


def step_cases(device: str, grid: bool) -> list[StepCase]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    contexts, groups = ((128, 512, 1024), (4, 8, 16)) if grid else ((128, 512), (8,))
    return [
        StepCase(context, group, vocab, dtype)
        for vocab in (32000, 151936)
        for context in contexts
        for group in groups
    ]


def padded_cases(device: str, grid: bool) -> list[PaddedCase]:
    hidden, dtype = (512, "float32") if device == "cpu" else (4096, "bfloat16")
    shapes = [(4, 512), (8, 256), (16, 1024)] if grid else [(4, 512), (8, 256)]
    return [
        PaddedCase(group, length, vocab, hidden, dtype)
        for vocab in (32000, 151936)
        for group, length in shapes
    ]


def shares(tokens: int) -> list[float]:
    """Those of which a token is left."""
    return [share for share in SHARES if share * tokens >= 1]


def row_cases(device: str, grid: bool) -> list[RowCase]:
    if not grid:
        if device == "cpu":
            shapes = [(768, 151936), (4096, 32000), (1024, 102400)]
        else:
            shapes = [(16384, 151936), (16384, 32000), (8192, 128256), (128, 151936), (1, 151936)]
        return [RowCase(t, v, dtype) for t, v in shapes for dtype in ("bfloat16", "float32")]
    # Logits and views are varied one at a time, from all tokens trained on flat, packed logits.
    cases = []
    for dtype in ("bfloat16", "float32"):
        for vocab in VOCABULARIES:
            for tokens in TOKENS:
                cases += [RowCase(tokens, vocab, dtype, share) for share in shares(tokens)]
                cases.append(RowCase(tokens, vocab, dtype, logits="peaked"))
                cases.append(RowCase(tokens, vocab, dtype, view="shifted"))
    return cases


def linear_cases(device: str, grid: bool) -> list[LinearCase]:
    hidden, dtype = (1024, "float32") if device == "cpu" else (4096, "bfloat16")
    if grid:
        return [
            LinearCase(tokens, vocab, hidden, dtype, share, head)
            for vocab in VOCABULARIES
            for tokens in TOKENS
            for share in shares(tokens)
            for head in ("trained", "frozen")
        ]
    if device == "cpu":  # eager takes 3 to 7 s on two cores
        shapes = [(2048, 32000), (1024, 102400), (1024, 151936)]
    else:
        shapes = [(16384, 151936), (16384, 32000), (4096, 128256)]
    cases = [
        LinearCase(tokens, vocab, hidden, dtype, share)
        for tokens, vocab in shapes
        for share in (1.0, 0.2)
    ]
    cases += [LinearCase(*shapes[0], hidden, dtype, share, "frozen") for share in (1.0, 0.2)]
    return cases


def memory_case(device: str) -> LinearCase:
    """The one whose peak memory matters: a long batch before a large vocabulary."""
    return LinearCase(8192, 151936, 512, "float32" if device == "cpu" else "bfloat16", once=True)
