"""Everything once, on two CPU cores: five agents from the same tasks and budgets, compared.

Run: ``regrpo demo --out runs/demo``. Each stage is a run of its own in a folder of its own; an
interrupted demo goes on where it stopped. The supervised agents see repairs of at most two hops;
reinforcement learning and evaluation go to four, which is what it has to improve.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrpo.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    OptimConfig,
    PretrainConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from regrpo.data_engine.build import write_corpora
from regrpo.environment import Environment, LocalEnvironment
from regrpo.evaluate import Report, evaluate, held_out
from regrpo.modeling import load_model, load_tokenizer
from regrpo.plots import COLUMNS, cell, plot_curves, plot_table
from regrpo.pretrain import run_pretrain
from regrpo.progress import progress_bar
from regrpo.records import write_atomically, write_records
from regrpo.report import print_transcript, transcript
from regrpo.rl import run_rl
from regrpo.rollout import Trajectory
from regrpo.sampling import LocalPolicy
from regrpo.sft import run_sft
from regrpo.workspace import build_workspace

WARM_HOPS, FULL_HOPS = (1, 2), (1, 4)


class Demo:
    """The stages of the demo; ``self.times`` is what each took, in seconds."""

    def __init__(self, config: DemoConfig, environment: Environment, progress: Progress):
        self.config = config
        self.out = Path(config.out)
        self.environment = environment
        self.progress = progress
        self.times: dict[str, float] = {}

    def timed(self, name: str, stage: Callable[[], str]) -> str:
        began = time.perf_counter()
        result = stage()
        self.times[name] = time.perf_counter() - began
        self.progress.console.print(f"{name}: {self.times[name]:.0f} s")
        return result

    def pretrain(self) -> str:
        config = PretrainConfig(
            out=str(self.out / "base"), steps=self.config.pretrain_steps, seed=self.config.seed
        )
        return self.timed("pretrain", lambda: run_pretrain(config, self.environment, self.progress))

    def data(self) -> None:
        tasks = TaskConfig(seed=10 * self.config.seed + 1, hops=WARM_HOPS)
        config = DataConfig(out=str(self.out / "data"), count=self.config.data_tasks, tasks=tasks)
        self.progress.console.print(
            self.timed("data", lambda: write_corpora(config, self.environment))
        )

    def sft(self, name: str, model: str, sources: list[SourceConfig]) -> str:
        config = SFTConfig(
            model=model,
            out=str(self.out / name),
            data=sources,
            steps=self.config.sft_steps,
            optim=OptimConfig(lr=2e-3, warmup_steps=20),
            seed=self.config.seed,
        )
        return self.timed(name, lambda: run_sft(config, self.progress))

    def rl(self, name: str, model: str, reflect: bool) -> str:
        config = TrainConfig(
            model=model,
            out=str(self.out / name),
            tasks=TaskConfig(seed=10 * self.config.seed + 2, hops=FULL_HOPS),
            reflect=reflect,
            steps=self.config.rl_steps,
            seed=self.config.seed,
        )
        return self.timed(name, lambda: run_rl(config, self.environment, self.progress))

    def evaluate(self, models: Mapping[str, str]) -> dict[str, tuple[Report, list[Trajectory]]]:
        config = EvalConfig(
            model="",
            count=self.config.eval_tasks,
            tasks=TaskConfig(seed=10 * self.config.seed + 3, hops=FULL_HOPS),
        )
        demonstrations = held_out(config, self.environment)
        results = {}
        began = time.perf_counter()
        for name, path in models.items():
            policy = LocalPolicy(
                load_model(path).eval(),
                load_tokenizer(path),
                temperature=config.temperature,
                max_new_tokens=config.max_new_tokens,
            )
            results[name] = evaluate(
                policy, self.environment, demonstrations, reflect=name in REFLECTING
            )
        self.times["evaluation"] = time.perf_counter() - began
        return results


REFLECTING = ("RoT-SFT", "ReGRPO")


def run_demo(config: DemoConfig) -> None:
    """Runs every stage and prints, plots and saves the comparison."""
    console = Console()
    out = Path(config.out)
    began = time.perf_counter()
    with LocalEnvironment() as environment, progress_bar() as progress:
        demo = Demo(config, environment, progress)
        base = demo.pretrain()
        demo.data()
        data = {name: str(out / "data" / f"{name}.jsonl") for name in ("success", "clean", "rot")}
        repairs = SourceConfig(data["rot"], mask="repair")
        first_tries = SourceConfig(data["clean"])
        models = {
            "SFT-success": demo.sft("sft-success", base, [SourceConfig(data["success"])]),
            "Retry-SFT": demo.sft(
                "retry-sft", base, [first_tries, replace(repairs, reflections="strip")]
            ),
            "RoT-SFT": demo.sft("rot-sft", base, [first_tries, repairs]),
        }
        models["GRPO"] = demo.rl("grpo", models["Retry-SFT"], reflect=False)
        models["ReGRPO"] = demo.rl("regrpo", models["RoT-SFT"], reflect=True)
        results = demo.evaluate(models)
    reports = {name: report for name, (report, _) in results.items()}
    console.print(comparison(reports, config.eval_tasks))
    sft = {name: out / name.lower() for name in ("SFT-success", "Retry-SFT", "RoT-SFT")}
    rl = {name: out / name.lower() for name in ("GRPO", "ReGRPO")}
    plot_curves(sft, rl, out / "curves.png")
    plot_table(reports, out / "table.png", f"{config.eval_tasks} held-out tasks, 95 % intervals")
    episodes = results["ReGRPO"][1]
    write_records(out / "transcripts.jsonl", (transcript(t) for t in episodes))
    summary = {
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "seconds": demo.times,
    }
    write_atomically(out / "results.json", json.dumps(summary, indent=2) + "\n")
    shown = examples(episodes)
    for title, episode in shown.items():
        console.rule(title)
        print_transcript(episode, console)
    example = shown.get("a recovery", episodes[0]).start.task
    folder = out / "workspace"
    if not folder.exists():
        folder.mkdir()
        assert not isinstance(example.workspace, Path)
        build_workspace(folder, example.workspace)
    minutes = (time.perf_counter() - began) / 60
    console.print(f"{minutes:.1f} minutes; table.png, curves.png and results.json are in {out}")
    console.print("Ask the trained agent about the files of a folder:", style="bold")
    console.print(
        f'  regrpo run --model {models["ReGRPO"]} --workspace {folder} --task "{example.question}"',
        soft_wrap=True,
    )


def comparison(reports: Mapping[str, Report], count: int) -> Table:
    """The comparison as a table for the terminal."""
    table = Table(title=f"{count} held-out tasks, 95 % Wilson intervals")
    table.add_column("agent")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, report in reports.items():
        table.add_row(name, *(cell(report, column).replace("[", r"\[") for column in COLUMNS))
    return table


def examples(episodes: list[Trajectory]) -> dict[str, Trajectory]:
    """A one-shot success, a recovery and a failure, the first of each there is."""
    kinds = {
        "a one-shot success": lambda t: t.success and not any(u.correction for u in t.turns),
        "a recovery": lambda t: t.success and any(u.correction for u in t.turns),
        "a failure": lambda t: not t.success,
    }
    found = ((title, next(filter(is_kind, episodes), None)) for title, is_kind in kinds.items())
    return {title: episode for title, episode in found if episode is not None}
