"""The ``regrpo`` command."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from regrpo import config as settings
from regrpo.errors import RunError
from regrpo.progress import disable_loading_bars, progress_bar

# torch and transformers take seconds to import: each command imports what it runs, so that
# --help is quick.


def _data_build(config: settings.DataConfig) -> None:
    from regrpo.data_engine.build import write_corpora
    from regrpo.environment import LocalEnvironment

    with LocalEnvironment() as environment, progress_bar() as progress:
        summary = write_corpora(config, environment, progress)
    print(summary)


def _data_table(config: settings.TableConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from regrpo.data_engine.near_miss import feasibility

    table = Table("tool", "error type", "near-misses")
    for tool, rows in feasibility().items():
        for error_type, ways in rows.items():
            if ways:
                table.add_row(tool, error_type, ", ".join(ways))
                tool = ""
        table.add_section()
    Console().print(table)


def _show(report: Any) -> None:
    print("\n".join(report.lines))
    if report.problem is not None:
        raise RunError(report.problem)


def _data_import(config: settings.DataImportConfig) -> None:
    from regrpo.data_engine.exchange import import_corpora

    _show(import_corpora(config))


def _data_export(config: settings.DataExportConfig) -> None:
    from regrpo.data_engine.exchange import export_corpus

    _show(export_corpus(config))


def _data_mine(config: settings.DataMineConfig) -> None:
    from regrpo.data_engine.mining import mine_corpora

    _show(mine_corpora(config))


def _data_verify(config: settings.DataVerifyConfig) -> None:
    from regrpo.data_engine.verify import verify_files

    _show(verify_files(config))


def _data_stats(config: settings.DataStatsConfig) -> None:
    from regrpo.data_engine.stats import corpus_stats

    _show(corpus_stats(config))


def _pretrain(config: settings.PretrainConfig) -> None:
    from regrpo.environment import LocalEnvironment
    from regrpo.pretrain import run_pretrain

    with LocalEnvironment() as environment, progress_bar() as progress:
        path = run_pretrain(config, environment, progress)
    print(f"model: {path}")


def _sft(config: settings.SFTConfig) -> None:
    from regrpo.distributed import Ranks
    from regrpo.sft import run_sft

    with Ranks.from_environment() as ranks, progress_bar(shown=ranks.main) as progress:
        path = run_sft(config, progress, ranks)
    if ranks.main:
        print(f"model: {path}")


def _train(config: settings.TrainConfig) -> None:
    from regrpo.distributed import Ranks
    from regrpo.environment import LocalEnvironment
    from regrpo.rl import run_rl

    with (
        Ranks.from_environment() as ranks,
        LocalEnvironment() as environment,
        progress_bar(shown=ranks.main) as progress,
    ):
        path = run_rl(config, environment, progress, ranks)
    if ranks.main:
        print(f"model: {path}")


def _eval(config: settings.EvalConfig) -> None:
    if config.benchmark is not None:
        from regrpo.benchmarks.evaluation import run_benchmark

        with progress_bar() as progress:
            text = run_benchmark(config, progress)
        print(text)
        return
    from regrpo.environment import LocalEnvironment
    from regrpo.evaluate import run_eval

    with LocalEnvironment() as environment:
        print(run_eval(config, environment))


def _plan(config: settings.PlanConfig) -> None:
    from regrpo.plan.report import make_plan, show

    show(make_plan(read_run(config.run, config.command), config))


def _run(config: settings.RunConfig) -> None:
    from rich.console import Console
    from rich.text import Text

    from regrpo.agent import ReGRPOAgent, existing_folder
    from regrpo.report import print_turn

    options = dict(vars(config))
    task, workspace = options.pop("task"), existing_folder(options.pop("workspace"))
    images = options.pop("images")
    agent = ReGRPOAgent(**options)
    console = Console()
    console.print(Text(f"Task: {task}", style="bold"))
    trajectory = agent.run(
        task, workspace, on_turn=lambda turn: print_turn(turn, console), images=images
    )
    console.print(Text(f"Answer: {trajectory.answer}", style="bold"))
    if trajectory.answer is None:
        assert trajectory.end is not None
        raise SystemExit(f"the agent came to no answer: {trajectory.end.value}")


def _report(config: settings.ReportConfig) -> None:
    from regrpo.run_page import write_page

    print(f"page: {write_page(config.runs, config.out)}")


def _demo(config: settings.DemoConfig) -> None:
    from regrpo.demo import run_demo

    run_demo(config)


def _vision_demo(config: settings.VisionDemoConfig) -> None:
    from regrpo.vision_demo import run_vision_demo

    run_vision_demo(config)


def _experiment(config: settings.ExperimentConfig) -> None:
    from regrpo.experiment import run_experiment

    run_experiment(config)


Command = tuple[str, type[Any], Callable[[Any], None], str]
COMMANDS: tuple[Command, ...] = (
    ("pretrain", settings.PretrainConfig, _pretrain, "make the small base model"),
    ("sft", settings.SFTConfig, _sft, "fine-tune on records"),
    (
        "train",
        settings.TrainConfig,
        _train,
        "ReGRPO, on-policy or offline (or GRPO with plain retries)",
    ),
    ("plan", settings.PlanConfig, _plan, "memory, FLOPs and time that a run's file asks for"),
    ("eval", settings.EvalConfig, _eval, "evaluate on held-out tasks, or on a benchmark"),
    ("run", settings.RunConfig, _run, "let a trained agent answer a task about a folder"),
    ("report", settings.ReportConfig, _report, "curves and trajectories of runs as one HTML page"),
    ("demo", settings.DemoConfig, _demo, "everything once: data, five agents, table, curves"),
    (
        "vision-demo",
        settings.VisionDemoConfig,
        _vision_demo,
        "the same on page images: a small vision-language model that crops",
    ),
    (
        "experiment",
        settings.ExperimentConfig,
        _experiment,
        "all agents over several seeds, with intervals, tables and figures",
    ),
)
DATA_COMMANDS: tuple[Command, ...] = (
    ("build", settings.DataConfig, _data_build, "execute near-misses and write records"),
    ("table", settings.TableConfig, _data_table, "show what near-misses each tool allows"),
    ("import", settings.DataImportConfig, _data_import, "bring records of others into our form"),
    ("export", settings.DataExportConfig, _data_export, "write records in the official schema"),
    ("mine", settings.DataMineConfig, _data_mine, "find natural recoveries in trajectories"),
    ("verify", settings.DataVerifyConfig, _data_verify, "check records, one line a problem"),
    ("stats", settings.DataStatsConfig, _data_stats, "count what records hold"),
)
# Commands that torchrun and accelerate launch may start in several processes.
DISTRIBUTED = ("sft", "train")
# Options that take several paths: jsonargparse itself reads a list as one JSON argument only.
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("--source", {"required": True, "help": ".json or .jsonl files"}),
    "files": ("files", {"help": ".json or .jsonl files"}),
    "runs": ("runs", {"help": "folders of runs (required)"}),
}


def _parser(description: str | None = None, **kwargs: Any) -> ArgumentParser:
    parser = ArgumentParser(description=description, **kwargs)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of the options below"
    )
    return parser


def read_run(path: str, command: str | None = None) -> settings.SFTConfig | settings.TrainConfig:
    """The configuration that ``regrpo sft`` or ``regrpo train`` reads from a file.

    Args:
        command: "sft" or "train"; None for sft where the file names data, train where it does not.

    Raises:
        ValueError: a key or value that the command does not take; names file and key.
    """
    text = Path(path).read_text(encoding="utf-8")
    if command is None:
        command = "sft" if re.search("^data *:", text, flags=re.MULTILINE) else "train"
    config_type = settings.SFTConfig if command == "sft" else settings.TrainConfig
    parser = _parser(exit_on_error=False)
    parser.add_class_arguments(config_type)
    try:
        values = vars(parser.instantiate(parser.parse_args(["--config", path])))
        del values["config"]
        return config_type(**values)
    except (ArgumentError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path}, as a file of regrpo {command}: {what}") from error


def _subparsers(parser: ArgumentParser, dest: str, commands: tuple[Command, ...]) -> Any:
    subcommands = parser.add_subcommands(dest=dest)
    for name, config, _, summary in commands:
        sub = _parser(f"{summary[0].upper()}{summary[1:]}.")
        several = {f.name for f in fields(config)} & set(SEVERAL)
        for option in several:
            flag, more = SEVERAL[option]
            sub.add_argument(flag, nargs="+", type=str, **more)
        sub.add_class_arguments(config, skip=several)
        subcommands.add_subcommand(name, sub, help=summary)
    return subcommands


def build_parser() -> ArgumentParser:
    """The parser of ``regrpo`` with all its commands."""
    parser = ArgumentParser(
        prog="regrpo", description="Train tool-using agents that reflect on a failure and recover."
    )
    subcommands = _subparsers(parser, "command", COMMANDS)
    data = ArgumentParser(description="Make training data.")
    subcommands.add_subcommand("data", data, help="make training data")
    _subparsers(data, "data_command", DATA_COMMANDS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line on stderr and status 1."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    names = ["data", parsed.data.data_command] if parsed.command == "data" else [parsed.command]
    commands = DATA_COMMANDS if parsed.command == "data" else COMMANDS
    config_type, action = next((c, a) for n, c, a, _ in commands if n == names[-1])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and names[0] not in DISTRIBUTED:
        sys.exit(
            f"regrpo {' '.join(names)}: started in {processes} processes; expected one "
            f"(of several are {' and '.join(DISTRIBUTED)})"
        )
    disable_loading_bars()
    who = f"regrpo {' '.join(names)}"
    if processes > 1:
        who += f" (rank {os.environ.get('RANK')} of {processes})"
    try:
        values = vars(parser.instantiate(parsed)[".".join(names)])
        action(config_type(**{k: v for k, v in values.items() if k != "config"}))
    except (OSError, ValueError, NotImplementedError, RunError) as error:
        sys.exit(f"{who}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{who}: interrupted; the same command resumes the run")
