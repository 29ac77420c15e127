"""The demo on page images."""

from dataclasses import dataclass, field

from regrpo.config.checks import require
from regrpo.config.evaluation import DemoConfig
from regrpo.config.run import OptimConfig, check_logging


@dataclass(frozen=True)
class VisionPretrainConfig:
    """The small vision-language model, pretrained on looking at pages.

    Args:
        out: folder of the run.
        tokenizer_tasks: generated tasks whose text the tokenizer is built from.
        pages: pages a step.
        steps: optimizer steps.
        optim: the optimizer.
        save_every: steps between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        seed: weights and data.
    """

    out: str
    tokenizer_tasks: int = 200
    pages: int = 20
    steps: int = 450
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=50))
    save_every: int = 200
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "tokenizer_tasks", "pages"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        check_logging(self.log_to, self.keep_checkpoints)


@dataclass(frozen=True)
class VisionDemoConfig(DemoConfig):
    """The whole way through on page images, on two CPU cores.

    Args:
        out: folder of everything the demo makes.
        seed: of everything random.
        pretrain_steps: optimizer steps of the base model.
        data_tasks: tasks the supervised agents learn from.
        sft_steps: optimizer steps of each supervised agent.
        rl_steps: updates of each RL agent.
        eval_tasks: held-out tasks.
    """

    out: str = "runs/vision-demo"
    pretrain_steps: int = 450
    data_tasks: int = 1200
    sft_steps: int = 150
    rl_steps: int = 40
    eval_tasks: int = 200
