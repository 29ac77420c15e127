"""Using a trained agent: evaluation, single tasks, comparisons, and pages about runs."""

from dataclasses import dataclass, field

from regrpo.config.benchmark import BENCHMARKS, BenchmarkConfig
from regrpo.config.checks import require
from regrpo.config.rollout import RolloutConfig
from regrpo.config.tasks import TaskConfig
from regrpo.config.trigger import TriggerConfig


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out tasks, or on a public benchmark.

    Args:
        model: Hugging Face name or path, or what the endpoint of `bench.endpoint` calls its model.
        out: folder for report.json and transcripts.jsonl; None prints only, and is
            runs/eval-BENCHMARK for a benchmark, which goes on from what is there.
        benchmark: gta or gaia instead of generated tasks; `count`, `tasks` have no effect then.
        data: folder of the benchmark's data (GTA: with dataset.json, or such a file; GAIA: with
            metadata.jsonl).
        bench: how the benchmark is run.
        count: tasks.
        tasks: which tasks; use a seed that no training used.
        reflect: open a reflection block after a typed failure.
        trigger: what else opens one.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        rollout: where trajectories are sampled; of a server, its own `rollout.model` is evaluated,
            which may be an adapter that it serves, and `model` is where the tokenizer is.
        seed: sampling and choice of near-misses.
    """

    model: str
    out: str | None = None
    benchmark: str | None = None
    data: str | None = None
    bench: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    count: int = 480
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1_000_003, hops=(1, 7)))
    reflect: bool = True
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    temperature: float = 0.0
    max_new_tokens: int = 128
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        known = self.benchmark is None or self.benchmark in BENCHMARKS
        require(known, "benchmark", self.benchmark, " or ".join(BENCHMARKS))
        given, wanted = self.data is not None, self.benchmark is not None
        require(given == wanted, "data", self.data, "a folder with benchmark, null without")
        if self.benchmark is not None:
            margin = self.trigger.confidence_margin
            require(margin is None, "trigger.confidence_margin", margin, "null with benchmark")
        require(self.count > 0, "count", self.count, "1 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        self.trigger.require_reflect(self.reflect)


@dataclass(frozen=True)
class RunConfig:
    """One task about the files of a folder.

    Args:
        task: the question.
        model: Hugging Face name or path.
        workspace: folder with the files; tools only read it.
        images: paths in the workspace, shown with the question to a vision-language model, whose
            tools then give pictures; [] shows none at first. null is for models of text.
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
    images: tuple[str, ...] | None = None
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
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "a positive number")
        dtypes = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in dtypes, "dtype", self.dtype, ", ".join(dtypes))
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
    pretrain_steps: int = 500
    data_tasks: int = 8000
    sft_steps: int = 300
    rl_steps: int = 120
    eval_tasks: int = 320

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "data_tasks", "sft_steps", "rl_steps", "eval_tasks"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")


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
        require(self.seeds > 1, "seeds", self.seeds, "2 or more: intervals are over seeds")


@dataclass(frozen=True)
class ReportConfig:
    """One HTML page about one run or several.

    Args:
        runs: folders of runs of sft, train or pretrain.
        out: the page; None writes report.html into the folder that holds them all.
    """

    runs: list[str]
    out: str | None = None
