"""What every training run has: the optimizer, an adapter, logs and checkpoints."""

from dataclasses import dataclass

from regrpo.config.checks import require

TRACKERS = ("wandb", "trackio")


def check_logging(log_to: tuple[str, ...], keep_checkpoints: int) -> None:
    unknown = [name for name in log_to if name not in TRACKERS]
    require(not unknown, "log_to", unknown, f"some of {', '.join(TRACKERS)}")
    require(keep_checkpoints > 0, "keep_checkpoints", keep_checkpoints, "1 or more")


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
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
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
