"""The tables of ``regrpo plan``."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from regrpo.config import PlanConfig, SFTConfig
from regrpo.config.checks import require
from regrpo.modeling import base_model, decoder, head
from regrpo.plan.activations import key_value_bytes
from regrpo.plan.flops import update_flops
from regrpo.plan.memory import MAX_BATCH, Part, memory, peak
from regrpo.plan.model import (
    CausalLM,
    RunConfig,
    build_on_meta,
    linear_numel,
    numel,
    precision,
    vision_tower,
)
from regrpo.plan.work import Work, work_of

GIB = 2**30
DECODING = "rollout, decoding"


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        memory: parts of one GPU's memory.
        peak_bytes: the most that is held at a time.
        flops: of an update, of all processes together, by part.
        seconds: of an update, by part.
    """

    run: RunConfig
    plan: PlanConfig
    model: CausalLM
    work: Work
    memory: list[Part]
    peak_bytes: float
    flops: dict[str, float]
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether a GPU has so much memory."""
        return self.peak_bytes <= self.plan.gpu_gib * GIB


def make_plan(run: RunConfig, plan: PlanConfig) -> Plan:
    """Plans a run; nothing is allocated, read or written but the model's configuration.

    Raises:
        ValueError: no configuration of the model, or lengths that the run does not allow.
        NotImplementedError: a model whose layers are not attention and a gated MLP.
    """
    model = build_on_meta(run, plan.model_config)
    work = work_of(run, plan)
    seeing = plan.images == 0 or vision_tower(model) is not None
    name = type(base_model(model)).__name__
    require(seeing, "images", plan.images, f"0 with {name}, which reads text only")
    parts = memory(run, model, work, plan)
    flops = update_flops(run, model, work)
    seconds = {
        name: value / (plan.peak_tflops * 1e12 * plan.utilization) for name, value in flops.items()
    }
    if DECODING in seconds:
        read = decoding_bytes(run, model, work) / (plan.bandwidth_gbs * 1e9)
        seconds[DECODING] = max(seconds[DECODING], read)
    everywhere = {name: plan.processes * value for name, value in flops.items()}
    return Plan(run, plan, model, work, parts, peak(parts), everywhere, seconds)


def decoding_bytes(run: RunConfig, model: CausalLM, work: Work) -> float:
    """Bytes that decoding reads in an update: with each token of a batch all weights of matrix
    products, each context's keys and values once, and of each trajectory those so far.

    Few rows meet whole weights, so memory bounds decoding, not arithmetic (Pope et al. 2022, arXiv
    2211.05102).
    """
    kinds = precision(run, model)
    batches = -(-work.trajectories // MAX_BATCH)
    weights = kinds.compute * (linear_numel(decoder(model)) + head(model)[0].numel())
    cached = key_value_bytes(model, kinds) * (
        work.groups * work.context + work.trajectories * work.branch / 2
    )
    return work.new * (batches * weights + cached)


def show(found: Plan, console: Console | None = None) -> None:
    """Prints the tables."""
    console = console or Console()
    run, plan, work = found.run, found.plan, found.work
    name = type(base_model(found.model)).__name__
    trained = numel(found.model, trained=True)
    console.print(
        f"{name}, {_count(numel(found.model))} parameters, {_count(trained)} trained; "
        f"{run.dtype}; {plan.processes} x {plan.gpu_gib:g} GiB"
        + (f", {run.parallel}" if plan.processes > 1 else ""),
        soft_wrap=True,
    )
    console.print(_what(work, isinstance(run, SFTConfig)), soft_wrap=True)
    console.print(_memory_table(found))
    verdict = "[bold]fits[/bold]" if found.fits else "[bold]does not fit[/bold]"
    advice = "" if found.fits else _advice(found)
    used = f"{found.peak_bytes / GIB:.1f} of {plan.gpu_gib:g} GiB"
    console.print(f"{verdict}: {used}{advice}", soft_wrap=True)
    console.print(_flops_table(found))
    console.print(
        f"Time: FLOPs / ({plan.peak_tflops:g} TFLOP/s x {plan.utilization:g}); decoding at least "
        f"what it reads / {plan.bandwidth_gbs:g} GB/s. An estimate: tools, data, communication, "
        "the optimizer and saving are left out (docs/plan.md).",
        soft_wrap=True,
    )
    if precision(run, found.model).compute == 4 and plan.peak_tflops == PlanConfig.peak_tflops:
        console.print(
            f"The run computes in float32, and {plan.peak_tflops:g} TFLOP/s is a peak of bfloat16; "
            "give that of the GPU's float32 with --peak_tflops.",
            soft_wrap=True,
        )


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _what(work: Work, supervised: bool) -> str:
    length = f"{work.context} tokens"
    if work.images:
        length += f" ({work.images} x {work.image_tokens} of images)"
    if supervised:
        return (
            f"A GPU's step: {work.groups} sequences of {length} and {work.new} trained ones, in "
            f"passes of {work.pass_tokens} tokens"
        )
    return (
        f"A GPU's update: {work.groups} states of {length} x {work.size} trajectories of "
        f"{work.new} trained and {work.observed} observed ones, in passes of {work.pass_tokens} "
        "tokens"
    )


def _memory_table(found: Plan) -> Table:
    table = Table("memory of a GPU", "held while")
    table.add_column("GiB", justify="right")
    for part in found.memory:
        table.add_row(part.name, part.phase, f"{part.bytes / GIB:.2f}")
    table.add_section()
    table.add_row("at most at a time", "", f"{found.peak_bytes / GIB:.2f}", style="bold")
    return table


def _flops_table(found: Plan) -> Table:
    table = Table("an update")
    for column in ("TFLOP", "share", "time"):
        table.add_column(column, justify="right")
    whole, total = sum(found.flops.values()), sum(found.seconds.values())
    for name, value in found.flops.items():
        seconds = found.seconds[name]
        table.add_row(name, f"{value / 1e12:,.1f}", f"{value / whole:.0%}", _time(seconds))
    table.add_section()
    table.add_row("together", f"{whole / 1e12:,.1f}", "", _time(total))
    updates = found.work.updates
    table.add_row(
        f"the run, {updates} updates",
        f"{updates * whole / 1e12:,.0f}",
        "",
        _time(updates * total),
        style="bold",
    )
    return table


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.2f} s"


def _advice(found: Plan) -> str:
    """What in the run's file makes it smaller."""
    run = found.run
    ways = []
    if not run.gradient_checkpointing:
        ways.append("gradient_checkpointing: true")
    if run.dtype == "float32":
        ways.append("dtype: bfloat16")
    if numel(found.model, trained=False) == 0:
        ways.append("lora.rank above 0")
    if found.plan.processes > 1 and run.parallel == "ddp":
        ways.append("parallel: fsdp")
    ways.append(
        "a smaller " + ("micro_batch_tokens" if isinstance(run, SFTConfig) else "batch_tokens")
    )
    return "; what makes it smaller: " + ", ".join(ways)
