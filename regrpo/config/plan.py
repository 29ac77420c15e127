"""What a run would need, before it is started."""

from dataclasses import dataclass

from regrpo.config.checks import require


@dataclass(frozen=True)
class PlanConfig:
    """Memory, FLOPs and time of the run that a file describes; nothing is loaded or trained.

    Lengths are not in a run's file, since they come with the data: they are given here.

    Args:
        run: YAML file of `regrpo sft --config` or `regrpo train --config`.
        command: "sft" or "train", whose file it is; null for sft where the file names data, train
            where it does not.
        model_config: the model's config.json, where the model itself is not here; null reads it
            from the run's model.
        processes: GPUs, one process each, that train together.
        prompt_tokens: tokens of a context, without images.
        new_tokens: tokens that a trajectory adds and that are trained; null for as many as the run
            allows: its turns times max_new_tokens, or what max_length leaves (sft).
        observation_tokens: tokens of an observation between two turns; sft has them in its
            prompt_tokens.
        images: images of a context.
        image_tokens: tokens of an image in the language model.
        gpu_gib: memory of a GPU, in GiB.
        peak_tflops: dense peak of a GPU in the run's dtype, in TFLOP/s. 312 is what NVIDIA gives
            for an A100 in bfloat16.
        bandwidth_gbs: memory bandwidth of a GPU, in GB/s, which bounds decoding. 2039 is what
            NVIDIA gives for an A100 SXM with 80 GB.
        utilization: share of the peak that is reached.
    """

    run: str
    command: str | None = None
    model_config: str | None = None
    processes: int = 1
    prompt_tokens: int = 512
    new_tokens: int | None = None
    observation_tokens: int = 64
    images: int = 0
    image_tokens: int = 768
    gpu_gib: float = 80.0
    peak_tflops: float = 312.0
    bandwidth_gbs: float = 2039.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        known = self.command in (None, "sft", "train")
        require(known, "command", self.command, "sft, train or null")
        for name in ("processes", "prompt_tokens", "image_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        for name in ("observation_tokens", "images"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        new = self.new_tokens
        require(new is None or new > 0, "new_tokens", new, "1 or more, or null")
        for name in ("gpu_gib", "peak_tflops", "bandwidth_gbs"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        share = self.utilization
        require(0 < share <= 1, "utilization", share, "above 0, at most 1")
