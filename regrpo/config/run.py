"""What every training run has: the optimizer, an adapter, logs and checkpoints."""

from dataclasses import dataclass

from regrpo.config.checks import require

TRACKERS = ("wandb", "trackio")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")


def check_logging(log_to: tuple[str, ...], keep_checkpoints: int) -> None:
    unknown = [name for name in log_to if name not in TRACKERS]
    require(not unknown, "log_to", unknown, f"some of {', '.join(TRACKERS)}")
    require(keep_checkpoints > 0, "keep_checkpoints", keep_checkpoints, "1 or more")


def check_execution(dtype: str, parallel: str) -> None:
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    require(parallel in PARALLEL, "parallel", parallel, f"one of {', '.join(PARALLEL)}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and a learning rate that warms up linearly and then follows a schedule.

    Args:
        lr: peak learning rate.
        schedule: behind the warm-up: "linear", a plateau, then linear decay over the second half of
            the steps; "cosine", half a cosine from the warm-up's end on; "constant".
        warmup_steps: steps to reach the peak.
        final_lr_share: share of the peak that linear and cosine decay to.
        weight_decay: decoupled weight decay of matrices.
        grad_clip: gradient norm limit.
    """

    lr: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int = 10
    final_lr_share: float = 0.02
    weight_decay: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        schedule, share = self.schedule, self.final_lr_share
        require(schedule in SCHEDULES, "optim.schedule", schedule, f"one of {', '.join(SCHEDULES)}")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= share <= 1, "optim.final_lr_share", share, "between 0 and 1")
        require(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "a positive number")


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
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
