"""Configuration: frozen dataclasses, filled from YAML and the command line by jsonargparse.

An unknown key, a wrong type or a value out of range is an error that names it.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from regrpo.provenance import PROVENANCES
from regrpo.tasks import FAMILIES, Task, generate_tasks

# Of an offline group; see regrpo.data_engine.contrast.
CANDIDATES = (
    "one_shot",
    "plain_retry",
    "recovery",
    "failed_recovery",
    "long_recovery",
    "bare_recovery",
)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are generated.

    Args:
        seed: tasks of different seeds are different.
        hops: least and most hops of a serial repair.
        tail: probability that a repair takes a further hop, again and again, up to six.
        trap_share: how often the call that the wording suggests fails.
        families: task families.
    """

    seed: int = 0
    hops: tuple[int, int] = (1, 3)
    tail: float = 0.0
    trap_share: float = 0.65
    families: tuple[str, ...] = tuple(FAMILIES)

    def __post_init__(self) -> None:
        self.generate(0)

    def generate(self, count: int, first: int = 0) -> list[Task]:
        """The tasks ``first`` to ``first + count - 1``."""
        return generate_tasks(
            count,
            first=first,
            seed=self.seed,
            hops=self.hops,
            tail=self.tail,
            trap_share=self.trap_share,
            families=self.families,
        )


@dataclass(frozen=True)
class TeacherConfig:
    """Who writes the reflections.

    Args:
        base_url: OpenAI-compatible endpoint, such as https://api.openai.com/v1, which is asked at
            base_url/chat/completions; null is the deterministic teacher, which needs no network.
        model: the endpoint's name of the model.
        api_key_env: environment variable that holds the key; null sends none. The key itself is
            neither stored nor printed.
        images: attach the page images that a call names, for vision models.
        temperature: of the model; null leaves it to the endpoint.
        max_tokens: limit of one answer; null leaves it to the endpoint.
        asks: how often one failure is asked about at most; an answer that is not grounded in the
            observation is asked again with the reason.
        concurrency: requests under way at a time.
        timeout_s: seconds until one request is given up, however slowly it answers.
        retries: how often a request is repeated that was refused, broken, or too slow.
        backoff_s: seconds before the first repetition; they double, less a seeded part.
        max_wait_s: longest wait, the endpoint's own Retry-After included; where that is longer, the
            build stops and says so.
        input_price: USD per million input tokens, for the count of the cost.
        output_price: USD per million output tokens.
        seed: of the waits.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    images: bool = False
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    asks: int = 3
    concurrency: int = 4
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    max_wait_s: float = 120.0
    input_price: float = 0.0
    output_price: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        url = self.base_url
        parts = urlsplit(url or "http://host")
        _require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            "teacher.base_url",
            url,
            "http://... or https://...",
        )
        # Both would be stored with the configuration.
        if parts.username or parts.query or parts.fragment:
            raise ValueError("teacher.base_url: expected no user, password or query in it")
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "teacher.api_key_env: expected the name of an environment variable, in capitals; "
                "not the key"
            )
        _require(
            (url is None) == (self.model is None),
            "teacher.model",
            self.model,
            "a name together with teacher.base_url, null without",
        )
        for name in ("asks", "concurrency"):
            _require(getattr(self, name) > 0, f"teacher.{name}", getattr(self, name), "1 or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            value = getattr(self, name)
            _require(value > 0, f"teacher.{name}", value, "a positive number")
        for name in ("retries", "input_price", "output_price"):
            _require(getattr(self, name) >= 0, f"teacher.{name}", getattr(self, name), "0 or more")
        for name in ("temperature", "max_tokens"):
            value, least = getattr(self, name), 0 if name == "temperature" else 1
            _require(
                value is None or value >= least, f"teacher.{name}", value, f"{least} or more, null"
            )


@dataclass(frozen=True)
class DataConfig:
    """Executed demonstrations: success.jsonl, clean.jsonl and rot.jsonl.

    Args:
        out: folder of the records.
        count: tasks to demonstrate.
        tasks: which tasks.
        near_miss_share: share of the tasks without a trap that get a forced near-miss as well.
        long_share: share of the reflections that say the same in more words, as freely written
            ones do; what a cost on reflection can save.
        non_commit_share: target share of near-misses that give no answer where it is due
            (NonCommit); 0 makes none.
        teacher: who writes the reflections.
    """

    out: str
    count: int = 8000
    tasks: TaskConfig = field(default_factory=TaskConfig)
    near_miss_share: float = 0.35
    long_share: float = 0.0
    non_commit_share: float = 0.0
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        _require(self.count > 0, "count", self.count, "1 or more")
        _require(0 <= self.near_miss_share <= 1, "near_miss_share", self.near_miss_share, "a share")
        _require(0 <= self.long_share <= 1, "long_share", self.long_share, "a share")
        _require(
            0 <= self.non_commit_share < 1,
            "non_commit_share",
            self.non_commit_share,
            "a share below 1",
        )


@dataclass(frozen=True)
class DataImportConfig:
    """Records of others in our form: OUT/NAME.jsonl for every file, and OUT/import_report.json.

    Args:
        source: .json or .jsonl files with role/content or from/value turns.
        out: folder of the records.
        provenance: origin of records that do not say: executed, recorded or teacher; by default
            teacher for records with rot_meta (the official release invents its failures) and
            recorded for others.
    """

    source: list[str]
    out: str
    provenance: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.source) > 0, "source", self.source, "at least one file")
        _require(
            self.provenance in (None, *PROVENANCES),
            "provenance",
            self.provenance,
            f"one of {', '.join(PROVENANCES)}, or null",
        )


@dataclass(frozen=True)
class DataExportConfig:
    """Records in the official schema.

    Args:
        source: .json or .jsonl files.
        out: .json (a list) or .jsonl file.
        turns: "official" writes role/content; "source" restores the turns of imported records.
    """

    source: list[str]
    out: str
    turns: str = "official"

    def __post_init__(self) -> None:
        _require(len(self.source) > 0, "source", self.source, "at least one file")
        _require(self.out.endswith((".json", ".jsonl")), "out", self.out, ".json or .jsonl")
        _require(self.turns in ("official", "source"), "turns", self.turns, "official or source")


@dataclass(frozen=True)
class DataMineConfig:
    """Natural recoveries in trajectories: OUT/mined.jsonl, pending.jsonl and mine_report.json.

    Args:
        source: .json or .jsonl files with trajectories.
        out: folder of the records.
    """

    source: list[str]
    out: str

    def __post_init__(self) -> None:
        _require(len(self.source) > 0, "source", self.source, "at least one file")


@dataclass(frozen=True)
class DataVerifyConfig:
    """One line a problem; fails if there is any. Verify together what is trained on together.

    Args:
        files: .json or .jsonl records.
        max_share: evidence is rare if at most this share of the other observations (or one of
            them) holds what it cites.
        execute: execute the calls of records that say on which files they ran.
    """

    files: list[str]
    max_share: float = 0.05
    execute: bool = True

    def __post_init__(self) -> None:
        _require(len(self.files) > 0, "files", self.files, "at least one file")
        _require(0 <= self.max_share < 1, "max_share", self.max_share, "a share below 1")


@dataclass(frozen=True)
class DataStatsConfig:
    """Counts and lengths.

    Args:
        files: .json or .jsonl records.
        tokenizer: Hugging Face name or path; counts tokens as well.
    """

    files: list[str]
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.files) > 0, "files", self.files, "at least one file")


@dataclass(frozen=True)
class TableConfig:
    """Which near-misses the types of the tools' parameters allow. There is nothing to choose."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, a plateau, and linear decay over the second half.

    Args:
        lr: peak learning rate.
        warmup_steps: steps to reach it.
        final_lr_share: share of the peak at the last step.
        weight_decay: decoupled weight decay of matrices.
        grad_clip: gradient norm limit.
    """

    lr: float = 1e-3
    warmup_steps: int = 10
    final_lr_share: float = 0.02
    weight_decay: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "a positive number")


TRACKERS = ("wandb", "trackio")


def _check_logging(log_to: tuple[str, ...], keep_checkpoints: int) -> None:
    unknown = [name for name in log_to if name not in TRACKERS]
    _require(not unknown, "log_to", unknown, f"some of {', '.join(TRACKERS)}")
    _require(keep_checkpoints > 0, "keep_checkpoints", keep_checkpoints, "1 or more")


@dataclass(frozen=True)
class PretrainConfig:
    """The small base model, pretrained on in-context copying.

    Args:
        out: folder of the run.
        hidden_size: width.
        num_layers: depth.
        num_heads: attention heads; those of the first layer start looking 1, 2, ... tokens back.
        tokenizer_tasks: generated tasks whose text the tokenizer is built from.
        steps: optimizer steps.
        optim: the optimizer.
        save_every: steps between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        seed: weights and data.
    """

    out: str
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 3
    tokenizer_tasks: int = 640
    steps: int = 400
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, warmup_steps=20))
    save_every: int = 250
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.steps > 0, "steps", self.steps, "1 or more")
        _require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        _check_logging(self.log_to, self.keep_checkpoints)
        # Rotary positions turn pairs of channels.
        heads = self.num_heads
        _require(heads > 0, "num_heads", heads, "1 or more")
        _require(
            self.hidden_size > 0 and self.hidden_size % (2 * heads) == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of 2 * num_heads={2 * heads}",
        )


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on attention projections.

    Args:
        rank: 0 trains all weights.
        alpha: scaling numerator.
        targets: names of the adapted modules.
    """

    rank: int = 0
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "0 or more")


@dataclass(frozen=True)
class SourceConfig:
    """One data file of supervised fine-tuning.

    Args:
        path: .jsonl or .json records.
        mask: which turns are trained: "clean", every assistant turn; "rot", the reflection turn
            only; "repair", every assistant turn but the failed ones.
        reflections: "keep", or "strip" for failure-then-retry without reflection.
        provenance: origins that are trained on: executed, recorded, teacher; None is all.
    """

    path: str
    mask: str = "clean"
    reflections: str = "keep"
    provenance: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require(
            self.provenance is None
            or (self.provenance != () and set(self.provenance) <= set(PROVENANCES)),
            "provenance",
            self.provenance,
            f"some of {', '.join(PROVENANCES)}, or null",
        )
        _require(self.mask in ("clean", "rot", "repair"), "mask", self.mask, "clean, rot or repair")
        _require(
            self.reflections in ("keep", "strip"), "reflections", self.reflections, "keep or strip"
        )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on records.

    Args:
        model: Hugging Face name or path.
        out: folder of the run.
        data: data files.
        steps: optimizer steps.
        batch_tokens: tokens a step, at most.
        max_length: longest sequence; longer ones are counted and left out.
        optim: the optimizer.
        lora: adapter settings.
        save_every: steps between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        seed: order of the data.
    """

    model: str
    out: str
    data: list[SourceConfig]
    steps: int = 400
    batch_tokens: int = 4096
    max_length: int = 1024
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    save_every: int = 100
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _require(len(self.data) > 0, "data", self.data, "at least one data file")
        _require(self.steps > 0, "steps", self.steps, "1 or more")
        _require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        _check_logging(self.log_to, self.keep_checkpoints)
        _require(
            self.max_length <= self.batch_tokens,
            "max_length",
            self.max_length,
            f"at most batch_tokens={self.batch_tokens}",
        )


@dataclass(frozen=True)
class RewardConfig:
    """R = lambda_exec * success - eta * reflection tokens / tokens_per_cost + lambda_val * V.

    V is the training-time verifier of ``regrpo.rewards``; advantages are those of R in its group.

    Args:
        lambda_exec: weight of executed success.
        eta: weight of the reflection cost.
        tokens_per_cost: reflection tokens that cost one unit.
        lambda_val: weight of the verifier inside the reward.
        alpha: two-stream advantages instead, A_out + alpha * A_V: outcome and verifier are
            normalised (and clipped) apart; null for one stream.
        baseline: what a reward is compared with: "mean" of its group, "leave_one_out" (the mean of
            the others), or "none".
        scale: divide by the standard deviation of the "group", of the "batch", or not at all:
            "none".
        min_std: floor of that standard deviation, in units of reward: where all succeed, the
            differences in cost stay small.
        clip: advantages are clipped to [-clip, clip].
    """

    lambda_exec: float = 1.0
    eta: float = 0.1
    tokens_per_cost: float = 100.0
    lambda_val: float = 0.0
    alpha: float | None = None
    baseline: str = "mean"
    scale: str = "none"
    min_std: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.tokens_per_cost > 0, "tokens_per_cost", self.tokens_per_cost, "positive")
        _require(self.lambda_val >= 0, "lambda_val", self.lambda_val, "0 or more")
        _require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive, or null")
        # With alpha the verifier would count twice.
        _require(
            self.alpha is None or self.lambda_val == 0,
            "lambda_val",
            self.lambda_val,
            "0 with alpha",
        )
        _require(
            self.baseline in ("mean", "leave_one_out", "none"),
            "baseline",
            self.baseline,
            "mean, leave_one_out or none",
        )
        scales = ("none", "group", "batch")
        _require(self.scale in scales, "scale", self.scale, "none, group or batch")
        _require(self.min_std >= 0, "min_std", self.min_std, "0 or more")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "positive, or null")


@dataclass(frozen=True)
class TriggerConfig:
    """When a reflection opens, at most once a step: always after a typed failure.

    Args:
        confidence_margin: also after a call that worked but that the policy was less sure of than
            of the earlier steps' first calls: u < mean(earlier u) - confidence_margin, where u is
            the geometric mean of its tokens' probabilities; 0 is the paper's rule, null never.
    """

    confidence_margin: float | None = None

    def __post_init__(self) -> None:
        margin = self.confidence_margin
        _require(
            margin is None or 0 <= margin < 1,
            "trigger.confidence_margin",
            margin,
            "0 or more and below 1, or null",
        )

    def require_reflect(self, reflect: bool) -> None:
        """Raises ValueError for the confidence clause without reflections.

        A retry after a call that worked would be told nothing of why.
        """
        _require(
            reflect or self.confidence_margin is None,
            "trigger.confidence_margin",
            self.confidence_margin,
            "null where reflect is false",
        )


@dataclass(frozen=True)
class OptionsConfig:
    """Options from neighbouring work, all off by default; ``regrpo.options`` has the formulas.

    Args:
        ratio_level: what has one clipped ratio: a "token", a "sequence" (GSPO), or a "segment",
            each reflection and each action apart.
        clip_target: adaptive clip bounds (BAPO): least share of the gradient that comes from
            positive advantages; null for the fixed bounds.
        clip_high_max: the upper bound of the ratio may go up to this.
        clip_low_max: the lower bound of the ratio may go up to this.
        clip_step: by how much a bound moves at a time.
        step_weight: weight of step-level advantages among turns in the same anchor state (GiGPO).
        step_gamma: discount of the reward a turn further back.
        demonstration_weight: weight of the NLL of executed demonstrations for states in which no
            trajectory succeeded (ReLIFT).
        penalty: most that reflecting and writing at length takes off a success, in successes
            (ARLCP).
        penalty_thresholds: reflection tokens up to which the reflection's part of the penalty is a
            quarter, and a half; beyond, three quarters.
        keep: trajectories a group that are trained on, those of greatest variance (D3S); null for
            all.
        replay: earlier trajectories that are kept, to join groups of the same state whose outcomes
            are all the same (R3).
        repeat_after: the states of an update come again this many updates later; null for never.
        refinements: further corrections that are sampled for a group without a success
            (Critique-GRPO).
        refinement_gamma: gamma of their shaped ratio p / (p + gamma).
    """

    ratio_level: str = "token"
    clip_target: float | None = None
    clip_high_max: float = 3.0
    clip_low_max: float = 0.9
    clip_step: float = 0.05
    step_weight: float = 0.0
    step_gamma: float = 1.0
    demonstration_weight: float = 0.0
    penalty: float = 0.0
    penalty_thresholds: tuple[int, int] = (40, 80)
    keep: int | None = None
    replay: int = 0
    repeat_after: int | None = None
    refinements: int = 0
    refinement_gamma: float = 0.1

    def __post_init__(self) -> None:
        levels = ("token", "sequence", "segment")
        for name, holds, expected in (
            ("ratio_level", self.ratio_level in levels, "token, sequence or segment"),
            (
                "clip_target",
                self.clip_target is None or 0 < self.clip_target < 1,
                "between 0 and 1, or null",
            ),
            # The bounds are found with token ratios.
            (
                "clip_target",
                self.clip_target is None or self.ratio_level == "token",
                f"null with ratio_level={self.ratio_level}",
            ),
            ("clip_high_max", self.clip_high_max > 1, "more than 1"),
            ("clip_low_max", 0 < self.clip_low_max < 1, "between 0 and 1"),
            ("clip_step", self.clip_step > 0, "a positive number"),
            ("step_weight", self.step_weight >= 0, "0 or more"),
            ("step_gamma", 0 < self.step_gamma <= 1, "above 0, at most 1"),
            ("demonstration_weight", self.demonstration_weight >= 0, "0 or more"),
            ("penalty", self.penalty >= 0, "0 or more"),
            (
                "penalty_thresholds",
                0 <= self.penalty_thresholds[0] <= self.penalty_thresholds[1],
                "0 <= first <= second",
            ),
            ("keep", self.keep is None or self.keep > 1, "2 or more, or null"),
            ("replay", self.replay >= 0, "0 or more"),
            # Without a state that comes again nothing could be replayed.
            (
                "replay",
                self.replay == 0 or self.repeat_after is not None,
                "0 without options.repeat_after",
            ),
            (
                "repeat_after",
                self.repeat_after is None or self.repeat_after > 0,
                "1 or more, or null",
            ),
            ("refinements", self.refinements >= 0, "0 or more"),
            ("refinement_gamma", self.refinement_gamma > 0, "a positive number"),
        ):
            _require(holds, f"options.{name}", getattr(self, name), expected)


@dataclass(frozen=True)
class TrainConfig:
    """ReGRPO: on-policy on local trajectories or episodes, or offline on fixed candidates.

    Args:
        model: Hugging Face name or path, usually of an SFT run.
        out: folder of the run.
        mode: "local", one step from a state; "episodes", whole tasks; "offline", as the official
            release: the fixed, executed candidates of a state and nothing sampled.
        tasks: where states come from.
        reflect: open a reflection block after a typed failure; False is GRPO with plain retries.
        trigger: what else opens one.
        steps: updates.
        states: states an update.
        group_size: trajectories a state (K).
        candidates: of a state offline, group_size of them: one_shot, plain_retry, recovery,
            failed_recovery, long_recovery, bare_recovery; the official release has all but
            long_recovery.
        forced_share: share of the states that start behind an executed near-miss; an offline group
            always holds one.
        own_states_share: share of the states that are turns of whole episodes that the policy runs
            first; needs mode "local".
        max_steps: of an episode: tool calls, corrections not counted.
        zero_variance: groups without any advantage: "keep" them (what they add is the KL term),
            "skip" them, or "resample": draw new states for groups that all succeed or all fail,
            and skip what is left.
        resample_rounds: draws of new states an update, at most.
        epochs: passes over the trajectories of an update.
        batch_tokens: tokens of one forward and backward pass, at most, those that trajectories of a
            group share counted once; an update adds the passes up.
        temperature: of sampling and of the loss.
        max_new_tokens: limit of one turn.
        policy: objective of a token: "clip", "cispo" or "sapo" by ratios to the policy that
            sampled, or "reinforce", -A log pi, as the official release; the only one offline, where
            there is nothing to take a ratio to.
        epsilon_low: lower clip bound of the ratio.
        epsilon_high: upper clip bound of the ratio.
        beta: weight of the KL to the starting model.
        kl_estimator: k1, k2 or k3; "k1-constant" is k1 as the official release differentiates it,
            with the constant gradient beta * grad log pi, an advantage lower by beta. It does not
            depend on the reference and holds nothing near it; needs policy "reinforce".
        loss_agg_mode: how token losses are averaged.
        reward: the reward.
        options: options from neighbouring work.
        optim: the optimizer.
        lora: adapter settings.
        save_every: updates between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        log_trajectories_every: updates from one to the next of which trajectories are stored for
            `regrpo report`; 0 stores none.
        log_groups: groups that are stored of such an update.
        seed: sampling, tasks and order.
    """

    model: str
    out: str
    mode: str = "local"
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1, hops=(2, 6)))
    reflect: bool = True
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    steps: int = 100
    states: int = 24
    group_size: int = 5
    candidates: tuple[str, ...] = CANDIDATES[:5]
    forced_share: float = 0.4
    own_states_share: float = 0.0
    max_steps: int = 6
    zero_variance: str = "skip"
    resample_rounds: int = 3
    epochs: int = 1
    batch_tokens: int = 16384
    temperature: float = 1.0
    max_new_tokens: int = 96
    policy: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.03
    kl_estimator: str = "k3"
    loss_agg_mode: str = "token-mean"
    reward: RewardConfig = field(default_factory=RewardConfig)
    options: OptionsConfig = field(default_factory=OptionsConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    lora: LoraSettings = field(default_factory=LoraSettings)
    save_every: int = 25
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    log_trajectories_every: int = 10
    log_groups: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.steps > 0, "steps", self.steps, "1 or more")
        _require(self.states > 0, "states", self.states, "1 or more")
        _require(self.group_size > 1, "group_size", self.group_size, "2 or more")
        _require(0 <= self.forced_share <= 1, "forced_share", self.forced_share, "between 0 and 1")
        choices = ("keep", "skip", "resample")
        _require(
            self.zero_variance in choices,
            "zero_variance",
            self.zero_variance,
            "keep, skip or resample",
        )
        rounds = self.resample_rounds
        _require(rounds > 0, "resample_rounds", rounds, "1 or more")
        keep, mode = self.options.keep, self.loss_agg_mode
        size = self.group_size
        _require(keep is None or keep <= size, "options.keep", keep, f"at most group_size={size}")
        # Its weights are those of the sequences that have one ratio each.
        _require(
            self.options.ratio_level != "segment" or mode != "seq-mean-token-mean",
            "loss_agg_mode",
            mode,
            "another one with options.ratio_level=segment",
        )
        _require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        _require(self.temperature > 0, "temperature", self.temperature, "a positive number")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.beta >= 0, "beta", self.beta, "0 or more")
        _require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        self.trigger.require_reflect(self.reflect)
        self._require_fitting_mode()
        _check_logging(self.log_to, self.keep_checkpoints)
        every = self.log_trajectories_every
        _require(every >= 0, "log_trajectories_every", every, "0 or more")
        _require(self.log_groups > 0, "log_groups", self.log_groups, "1 or more")

    def _require_fitting_mode(self) -> None:
        modes = ("local", "episodes", "offline")
        policies = ("clip", "cispo", "sapo", "reinforce")
        estimators = ("k1", "k2", "k3", "k1-constant")
        policy = self.policy
        _require(self.mode in modes, "mode", self.mode, "local, episodes or offline")
        _require(policy in policies, "policy", policy, "clip, cispo, sapo or reinforce")
        estimator = self.kl_estimator
        _require(estimator in estimators, "kl_estimator", estimator, "k1, k2, k3 or k1-constant")
        own = self.own_states_share
        _require(
            own >= 0 and own + self.forced_share <= 1 + 1e-9,
            "own_states_share",
            own,
            f"0 or more, and with forced_share={self.forced_share:g} at most 1",
        )
        _require(own == 0 or self.mode == "local", "own_states_share", own, "0 but in mode local")
        _require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        if estimator == "k1-constant":
            needed = "reinforce with kl_estimator k1-constant"
            _require(policy == "reinforce", "policy", policy, needed)
        if self.mode == "offline":
            needed = "reinforce with mode offline, which has no old log-probs"
            _require(policy == "reinforce", "policy", policy, needed)
            needed = "true with mode offline, whose candidates reflect"
            _require(self.reflect, "reflect", self.reflect, needed)
            names = self.candidates
            known = len(set(names)) == len(names) and set(names) <= set(CANDIDATES)
            _require(known, "candidates", names, f"different ones of {', '.join(CANDIDATES)}")
            needed = f"the number of candidates, {len(names)}, with mode offline"
            _require(self.group_size == len(names), "group_size", self.group_size, needed)
            for name, value, off in (
                ("zero_variance", self.zero_variance == "resample", "keep or skip"),
                ("trigger.confidence_margin", self.trigger.confidence_margin, "null"),
                ("options.replay", self.options.replay, "0"),
                ("options.refinements", self.options.refinements, "0"),
                ("options.clip_target", self.options.clip_target, "null"),
                ("options.ratio_level", self.options.ratio_level != "token", "token"),
            ):
                _require(not value, name, value, f"{off} with mode offline, which samples nothing")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out tasks.

    Args:
        model: Hugging Face name or path.
        out: folder for report.json and transcripts.jsonl; None prints only.
        count: tasks.
        tasks: which tasks; use a seed that no training used.
        reflect: open a reflection block after a typed failure.
        trigger: what else opens one.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        seed: sampling and choice of near-misses.
    """

    model: str
    out: str | None = None
    count: int = 480
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1_000_003, hops=(1, 6)))
    reflect: bool = True
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.count > 0, "count", self.count, "1 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        self.trigger.require_reflect(self.reflect)


@dataclass(frozen=True)
class RunConfig:
    """One task about the files of a folder.

    Args:
        task: the question.
        model: Hugging Face name or path.
        workspace: folder with the files; tools only read it.
        reflect: open a reflection block after a typed failure.
        trigger: what else opens one.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        max_steps: tool calls, corrections not counted.
        timeout_s: limit of one tool call, in seconds of processor time.
        device: cpu, cuda or cuda:0, ...; null for the GPU where there is one.
        dtype: auto (as saved), float32, bfloat16 or float16.
        seed: sampling.
    """

    task: str
    model: str = "runs/demo/regrpo/model"
    workspace: str = "runs/demo/workspace"
    reflect: bool = True
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    temperature: float = 0.0
    max_new_tokens: int = 512
    max_steps: int = 6
    timeout_s: float = 2.0
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "a positive number")
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", self.dtype, ", ".join(dtypes))
        self.trigger.require_reflect(self.reflect)


@dataclass(frozen=True)
class DemoConfig:
    """The whole way through, on two CPU cores.

    Args:
        out: folder of everything the demo makes.
        seed: of everything random.
        pretrain_steps: optimizer steps of the base model.
        data_tasks: tasks the supervised agents learn from.
        sft_steps: optimizer steps of each supervised agent.
        rl_steps: updates of each RL agent.
        eval_tasks: held-out tasks.
    """

    out: str = "runs/demo"
    seed: int = 0
    pretrain_steps: int = 400
    data_tasks: int = 8000
    sft_steps: int = 500
    rl_steps: int = 60
    eval_tasks: int = 320

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "data_tasks", "sft_steps", "rl_steps", "eval_tasks"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class ExperimentConfig(DemoConfig):
    """The comparison of all agents over several seeds; each seed is a demo of its own.

    Args:
        out: folder of everything the experiment makes.
        seed: the first seed.
        pretrain_steps: optimizer steps of the base model.
        data_tasks: tasks the supervised agents learn from.
        sft_steps: optimizer steps of each supervised agent.
        rl_steps: updates of each RL agent.
        eval_tasks: held-out tasks a seed.
        seeds: how many seeds, one after the other.
        page: Markdown page whose section `<!-- experiment -->` takes the tables, with figures in
            the folder `figures` beside it; None leaves them in `out`.
    """

    out: str = "runs/experiment"
    seeds: int = 5
    page: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seeds > 1, "seeds", self.seeds, "2 or more: intervals are over seeds")


@dataclass(frozen=True)
class ReportConfig:
    """One HTML page about one run or several.

    Args:
        runs: folders of runs of sft, train or pretrain.
        out: the page; None writes report.html into the folder that holds them all.
    """

    runs: list[str]
    out: str | None = None
