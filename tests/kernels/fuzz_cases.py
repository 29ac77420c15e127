"""Random batches for `test_fuzz.py`, and what fp64 says about them.

A bound is not a constant: it is how far a value can move when the row's log-prob moves by what fp32
rounding costs (`slack`). A token on the edge of a clip is so allowed either side of it, and nothing
else is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import GRADIENT_RTOL, log_probs64, token_loss64
from torch import Tensor

from regrpo_kernels.objective import KL_ESTIMATORS, LOSS_AGG_MODES, POLICIES, RATIO_LEVELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around vector widths, the blocks of the kernels and their tails
VOCABS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257, 1025]
VOCABS += [2047, 2048, 2049, 4095, 4096, 4097, 6145]
PLAIN_ROWS = ["normal", "wide", "constant", "offset", "peaked", "denormal", "largest", "forbidden"]
ROWS = [*PLAIN_ROWS * 3, "forbidden label", "nan", "inf", "all forbidden"]
PACKED_LAYOUTS = ["contiguous", "columns", "every other row"]
PADDED_LAYOUTS = ["contiguous", "shifted", "transposed"]
MANY = 1e20  # an advantage beyond what fp16 holds


def make_row(kind: str, label: int, vocab: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    noise = torch.randn(vocab, generator=g, dtype=torch.float64)
    limits = torch.finfo(dtype)
    x = {
        "wide": 30 * noise,
        "constant": torch.full_like(noise, 7.5),
        "offset": noise + 1e4,
        "denormal": noise * limits.tiny / 4,
        "largest": noise.sign() * min(limits.max * 0.9, 1e30),  # what is made of it is still finite
    }.get(kind, 3 * noise)
    some = torch.rand(vocab, generator=g) < 0.5
    other = int(torch.randint(vocab, (1,), generator=g))
    if kind == "peaked":
        x[other] += 60
    elif kind == "forbidden":
        x[some & (torch.arange(vocab) != label)] = -torch.inf
    elif kind == "forbidden label":
        x[label] = -torch.inf
    elif kind == "all forbidden":
        x[:] = -torch.inf
    elif kind in ("nan", "inf"):
        x[other] = float(kind)
    return x.to(dtype)


@dataclass
class Batch:
    """T tokens in sequences; everything flat, on the CPU."""

    logits: Tensor  # [T, V]
    labels: Tensor  # [T], in range
    trained: Tensor  # [T] bool
    lengths: list[int]
    padded: bool
    layout: str
    seed: int
    advantages: Tensor | None = None  # [T]
    given_advantages: Tensor | None = None  # [T] or [B], as the op gets them
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    normalizer: float | None = None

    @property
    def sequence(self) -> Tensor:
        """[T]: which sequence a token is of."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))


def near_and_far(log_probs: Tensor, g: torch.Generator, how: str) -> Tensor:
    """Log-probs of another policy: close by, or where clamps and overflow are."""
    other = log_probs + 0.4 * torch.randn(log_probs.shape, generator=g)
    if how == "far":
        far = torch.tensor([0.0, 15.0, -15.0, 30.0, -30.0, 1e4, -1e4, -torch.inf])
        other = other + far[torch.randint(len(far), other.shape, generator=g)]
    return other.float()


scaling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
        "softcap": st.sampled_from([None, None, 5.0, 30.0]),
    }
)
objectives = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "ratio_level": st.sampled_from(RATIO_LEVELS),
        "epsilon_low": st.sampled_from([0.1, 0.3]),
        "epsilon_high": st.sampled_from([0.1, 0.28, 5.0]),
        "delta": st.sampled_from([None, 0.5, 1.3, 4.0]),
        "beta": st.sampled_from([0.0, 0.04, 1.0]),
        "kl_estimator": st.sampled_from(KL_ESTIMATORS),
        "entropy_coef": st.sampled_from([0.0, 0.0, 0.01, 0.5]),
        "loss_agg_mode": st.sampled_from(LOSS_AGG_MODES),
        "max_completion_length": st.just(11),
        "sapo_tau_pos": st.sampled_from([1.0, 0.5]),
        "sapo_tau_neg": st.sampled_from([1.05, 3.0]),
    }
)


@st.composite
def batches(draw, max_length: int, extreme: bool = True) -> Batch:
    """Rows with labels. `extreme=False`: no infinities, and log-probs that 16 bits can tell."""
    seed = draw(st.integers(0, 2**32))
    g = torch.Generator().manual_seed(seed)
    padded, count = draw(st.booleans()), draw(st.sampled_from([1, 2, 3, 4]))
    # not drawn one by one: that gives too many empty batches
    lengths = torch.randint(max_length + 1, (count,), generator=g).tolist()
    lengths = [max(lengths)] * count if padded else lengths
    tokens = sum(lengths)
    vocab = draw(st.one_of(st.integers(1, 70), st.sampled_from(VOCABS)))
    dtype = draw(st.sampled_from(DTYPES))
    kinds = draw(st.lists(st.sampled_from(ROWS if extreme else ["normal"]), min_size=1, max_size=6))
    labels = torch.randint(vocab, (tokens,), generator=g)
    rows = [make_row(kinds[t % len(kinds)], int(labels[t]), vocab, dtype, g) for t in range(tokens)]
    return Batch(
        torch.stack(rows) if rows else torch.zeros(0, vocab, dtype=dtype),
        labels,
        torch.rand(tokens, generator=g) < draw(st.sampled_from([0.5, 0.8, 0.9, 1.0, 1.0, 0.0])),
        lengths,
        padded,
        draw(st.sampled_from(PADDED_LAYOUTS if padded else PACKED_LAYOUTS)),
        seed,
        options=draw(scaling),
    )


@st.composite
def losses(draw, max_length: int, extreme: bool = True) -> Batch:
    batch = draw(batches(max_length, extreme))
    batch.options |= draw(objectives)
    batch.normalizer = draw(st.sampled_from([None, None, 7.0]))
    g = torch.Generator().manual_seed(batch.seed + 1)
    log_probs = log_probs64(
        batch.logits, batch.labels, batch.options["temperature"], batch.options["softcap"]
    )[0]
    hows = ["near", "near", None, *["far"] * extreme]
    for name in ("old_log_probs", "ref_log_probs"):
        how = draw(st.sampled_from(hows))
        setattr(batch, name, how and near_and_far(log_probs, g, how))
    scales = [1.0, 0.0, 1e4, 1e-30, MANY] if extreme else [1.0, 0.0]
    scale = draw(st.sampled_from([1.0, 1.0, *scales]))
    per_sequence = draw(st.booleans()) and (batch.padded or len(batch.lengths) != len(log_probs))
    drawn = torch.randn(len(batch.lengths) if per_sequence else len(log_probs), generator=g) * scale
    drawn = drawn.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    if not per_sequence and len(drawn) and draw(st.booleans()):
        drawn = drawn[:1].expand(len(drawn))
    batch.given_advantages = drawn
    batch.advantages = drawn[batch.sequence] if per_sequence else drawn
    return batch


def weights64(batch: Batch) -> Tensor:
    """From the definition, sequence by sequence; rows that are not trained get 0."""
    mode, mask = batch.options["loss_agg_mode"], batch.trained.double()
    parts = mask.split(batch.lengths)
    count = mask.sum() if mode == "token-mean" else sum(bool(p.any()) for p in parts)
    divisor = {
        "token-mean": lambda p: 1.0,
        "seq-mean-token-sum": lambda p: 1.0,
        "seq-mean-token-mean": lambda p: max(p.sum(), 1.0),
        "seq-mean-token-sum-norm": lambda p: batch.options["max_completion_length"],
    }[mode]
    return torch.cat([p / divisor(p) for p in parts]) / (batch.normalizer or max(count, 1))


@dataclass
class Rows64:
    """The softmax of some rows in fp64. `slack`: what rounding may move a log-prob by."""

    x: Tensor
    labels: Tensor
    temperature: float
    softcap: float | None
    noise: Tensor | None = None  # [R], error that the logits already have

    def __post_init__(self) -> None:
        if self.noise is None:
            self.noise = torch.zeros(len(self.labels))
        self.noise = self.noise / self.temperature
        forbidden = (self.x == -torch.inf) & (self.softcap is None)
        # probability 0 as well, and without the 0 * inf of the entropy's derivative
        self.x = self.x.double().masked_fill(forbidden, -1e290).requires_grad_()
        self.log_probs, self.lse, self.entropy = log_probs64(
            self.x, self.labels, self.temperature, self.softcap
        )
        z = self.x.detach()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        self.chain = 1 - (z / self.softcap) ** 2 if self.softcap else torch.ones_like(z)
        z = z / self.temperature
        self.p = torch.softmax(z, -1)
        self.log_p = torch.where(self.p > 0, z - self.lse.detach()[:, None], 0.0)
        scaled = self.softcap is not None or self.temperature != 1.0
        # the cap has the rounding of its largest value
        largest = z.masked_fill(forbidden, 0.0).abs().amax(-1)
        largest = largest.clamp(min=(self.softcap or 0.0) / self.temperature)
        self.lse_slack = 5e-6 + 4e-7 * largest + 2 * self.noise
        self.slack = 5e-6 + 2 * self.noise + 4e-7 * (largest * scaled)
        self.slack = self.slack + 4e-7 * self.log_probs.detach().abs().clamp(max=1e30)
        inside = (~forbidden).any(-1)
        label_forbidden = forbidden.gather(-1, self.labels[:, None])[:, 0]
        self.poisoned = ~torch.isfinite(self.log_probs.detach()) | ~inside
        self.forbidden = label_forbidden & inside & ~self.poisoned
        self.sound = ~self.poisoned  # the gradient is finite
        # neither a number nor an edge is in doubt
        self.clear = self.sound & ~self.forbidden & (self.slack < 1e-2)
        self.entropy_slack = (1 + self.entropy.detach()) * (
            1e-5 + 2 * self.noise + 4e-7 * largest * scaled
        )

    def gradient(self, c: Tensor, k: Tensor, c_slack: Tensor, dtype: torch.dtype) -> tuple:
        """Of `sum c log_prob - k entropy`, and what ours may differ by."""
        total = (c * self.log_probs).nan_to_num().sum() - (k * self.entropy).nan_to_num().sum()
        (exact,) = torch.autograd.grad(total, self.x)
        onehot = torch.nn.functional.one_hot(self.labels, self.x.shape[-1])
        c, k, c_slack, slack, h_slack, h = (
            v.detach().abs()[:, None]
            for v in (c, k, c_slack, self.slack, self.entropy_slack, self.entropy)
        )
        drift = 5e-6 + 2 * slack  # of a probability, relative
        bound = c_slack * (onehot + self.p) + c * (self.p * drift + 1e-6)
        bound += k * (self.p * ((self.log_p.abs() + h) * drift + h_slack) + 1e-6 * (1 + h))
        if self.softcap is not None:  # 1 - (z / c)^2 cancels where the cap saturates
            size = c * (onehot + self.p) + k * self.p * (self.log_p.abs() + h)
            bound = bound * (self.chain + 1e-6) + size * (1e-6 + 2 * self.noise[:, None])
        bound = bound / self.temperature + GRADIENT_RTOL[dtype] * exact.abs()
        return exact, bound + (6e-8 if dtype == torch.float16 else 1e-37)


@dataclass
class Loss64:
    """The loss of the trained rows in fp64."""

    rows: Rows64
    tokens: Tensor  # [R] weighted losses
    token_slack: Tensor
    c: Tensor  # [R] d loss / d log_prob
    c_slack: Tensor
    k: Tensor  # [R] weight of the entropy


def loss64(batch: Batch, rows: Rows64) -> Loss64:
    """`rows` are those of the trained tokens."""
    o, kept = batch.options, batch.trained
    advantages, old, ref = (
        None if x is None else x[kept].double()
        for x in (batch.advantages, batch.old_log_probs, batch.ref_log_probs)
    )
    if old is not None:  # a forbidden token's ratio is the least there is, whatever it was
        old = old.masked_fill(rows.forbidden, 0.0)
    weights = weights64(batch)[kept]
    sequences = None
    if o["ratio_level"] == "sequence":
        sequences = batch.sequence[kept]
        for i in sequences.unique():  # what is in doubt for a token is so for its sequence
            of = sequences == i
            rows.sound[of] &= rows.sound[of].all()
            rows.clear[of] &= (rows.clear | rows.forbidden)[of].all()

    def objective(shift: Tensor | float) -> tuple[Tensor, Tensor]:
        log_probs = (rows.log_probs.detach() + shift).requires_grad_()
        token = token_loss64(log_probs, advantages, old, ref, sequences, **o)
        (slope,) = torch.autograd.grad(token.sum(), log_probs)
        return token.detach() * weights, slope * weights

    (token, c), low, high = (objective(s) for s in (0.0, -rows.slack, rows.slack))
    k = o["entropy_coef"] * weights
    size = weights * 0.0
    if o["policy"] == "sapo" and old is not None:  # the slope's exponential underflows
        d = (rows.log_probs.detach() - old).clamp(-20, 20)
        if sequences is not None:
            d = torch.stack([d[sequences == i].mean() for i in sequences]) if len(d) else d
        size = 1e-31 * weights * advantages.abs() * d.exp()
    if ref is not None:
        x = (ref - rows.log_probs.detach()).clamp(-20, 20)
        size = size + weights * o["beta"] * (x.abs() + x.expm1().abs())
    token_slack, c_slack = (
        torch.maximum((value - less).abs(), (value - more).abs()) + 2e-6 * (value.abs() + size)
        for value, less, more in zip((token, c), low, high, strict=True)
    )
    token_slack = token_slack + k * rows.entropy_slack
    return Loss64(rows, token - k * rows.entropy.detach(), token_slack, c, c_slack, k)
