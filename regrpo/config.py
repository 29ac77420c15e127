"""Configuration: frozen dataclasses, filled from YAML and the command line by jsonargparse.

An unknown key, a wrong type or a value out of range is an error that names it.
"""

from dataclasses import dataclass, field

from regrpo.tasks import FAMILIES, Task, generate_tasks


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
class DataConfig:
    """Executed demonstrations: success.jsonl, clean.jsonl and rot.jsonl.

    Args:
        out: folder of the records.
        count: tasks to demonstrate.
        tasks: which tasks.
        near_miss_share: share of the tasks without a trap that get a forced near-miss as well.
    """

    out: str
    count: int = 8000
    tasks: TaskConfig = field(default_factory=TaskConfig)
    near_miss_share: float = 0.35

    def __post_init__(self) -> None:
        _require(self.count > 0, "count", self.count, "1 or more")
        _require(0 <= self.near_miss_share <= 1, "near_miss_share", self.near_miss_share, "a share")


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
    """

    path: str
    mask: str = "clean"
    reflections: str = "keep"

    def __post_init__(self) -> None:
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
    """R = lambda_exec * success - eta * reflection tokens / tokens_per_cost; group advantages of R.

    Args:
        lambda_exec: weight of executed success.
        eta: weight of the reflection cost.
        tokens_per_cost: reflection tokens that cost one unit.
        scale: "none", or "group" to divide by the group's standard deviation.
        min_std: floor of that standard deviation.
        clip: advantages are clipped to [-clip, clip].
    """

    lambda_exec: float = 1.0
    eta: float = 0.1
    tokens_per_cost: float = 100.0
    scale: str = "none"
    min_std: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.tokens_per_cost > 0, "tokens_per_cost", self.tokens_per_cost, "positive")
        _require(self.scale in ("none", "group"), "scale", self.scale, "none or group")
        _require(self.min_std >= 0, "min_std", self.min_std, "0 or more")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "positive, or null")


@dataclass(frozen=True)
class TrainConfig:
    """On-policy ReGRPO on local trajectories.

    Args:
        model: Hugging Face name or path, usually of an SFT run.
        out: folder of the run.
        tasks: where states come from.
        reflect: open a reflection block after a typed failure; False is GRPO with plain retries.
        steps: updates.
        states: states an update.
        group_size: trajectories a state (K).
        forced_share: share of the states that start behind an executed near-miss.
        skip_zero_variance: leave groups without any advantage out of the update; what they would
            add is the KL term.
        epochs: passes over the trajectories of an update.
        batch_tokens: tokens of one forward and backward pass, at most; an update adds them up.
        temperature: of sampling and of the loss.
        max_new_tokens: limit of one turn.
        epsilon_low: lower clip bound of the ratio.
        epsilon_high: upper clip bound of the ratio.
        beta: weight of the KL to the starting model.
        kl_estimator: k1, k2 or k3.
        loss_agg_mode: how token losses are averaged.
        reward: the reward.
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
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1, hops=(2, 6)))
    reflect: bool = True
    steps: int = 100
    states: int = 24
    group_size: int = 5
    forced_share: float = 0.4
    skip_zero_variance: bool = True
    epochs: int = 1
    batch_tokens: int = 16384
    temperature: float = 1.0
    max_new_tokens: int = 96
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.03
    kl_estimator: str = "k3"
    loss_agg_mode: str = "token-mean"
    reward: RewardConfig = field(default_factory=RewardConfig)
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
        _require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        _require(self.temperature > 0, "temperature", self.temperature, "a positive number")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.beta >= 0, "beta", self.beta, "0 or more")
        _require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        _check_logging(self.log_to, self.keep_checkpoints)
        every = self.log_trajectories_every
        _require(every >= 0, "log_trajectories_every", every, "0 or more")
        _require(self.log_groups > 0, "log_groups", self.log_groups, "1 or more")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out tasks.

    Args:
        model: Hugging Face name or path.
        out: folder for report.json and transcripts.jsonl; None prints only.
        count: tasks.
        tasks: which tasks; use a seed that no training used.
        reflect: open a reflection block after a typed failure.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        seed: sampling and choice of near-misses.
    """

    model: str
    out: str | None = None
    count: int = 480
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1_000_003, hops=(1, 6)))
    reflect: bool = True
    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.count > 0, "count", self.count, "1 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")


@dataclass(frozen=True)
class RunConfig:
    """One task about the files of a folder.

    Args:
        task: the question.
        model: Hugging Face name or path.
        workspace: folder with the files; tools only read it.
        reflect: open a reflection block after a typed failure.
        max_steps: tool calls, corrections not counted.
    """

    task: str
    model: str = "runs/demo/regrpo/model"
    workspace: str = "runs/demo/workspace"
    reflect: bool = True
    max_steps: int = 6


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
    sft_steps: int = 400
    rl_steps: int = 80
    eval_tasks: int = 480

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "data_tasks", "sft_steps", "rl_steps", "eval_tasks"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class ReportConfig:
    """One HTML page about one run or several.

    Args:
        runs: folders of runs of sft, train or pretrain.
        out: the page; None writes report.html into the folder that holds them all.
    """

    runs: list[str]
    out: str | None = None
