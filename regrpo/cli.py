"""The ``regrpo`` command."""

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from regrpo import config as settings
from regrpo.errors import RunError
from regrpo.progress import disable_loading_bars, progress_bar

# torch and transformers take seconds to import: each command imports what it runs, so that
# --help is quick.


def _data_build(config: settings.DataConfig) -> None:
    from regrpo.data_engine.build import write_corpora
    from regrpo.environment import LocalEnvironment

    with LocalEnvironment() as environment:
        print(write_corpora(config, environment))


def _pretrain(config: settings.PretrainConfig) -> None:
    from regrpo.environment import LocalEnvironment
    from regrpo.pretrain import run_pretrain

    with LocalEnvironment() as environment, progress_bar() as progress:
        path = run_pretrain(config, environment, progress)
    print(f"model: {path}")


def _sft(config: settings.SFTConfig) -> None:
    from regrpo.sft import run_sft

    with progress_bar() as progress:
        path = run_sft(config, progress)
    print(f"model: {path}")


def _train(config: settings.TrainConfig) -> None:
    from regrpo.environment import LocalEnvironment
    from regrpo.rl import run_rl

    with LocalEnvironment() as environment, progress_bar() as progress:
        path = run_rl(config, environment, progress)
    print(f"model: {path}")


def _eval(config: settings.EvalConfig) -> None:
    from regrpo.environment import LocalEnvironment
    from regrpo.evaluate import run_eval

    with LocalEnvironment() as environment:
        print(run_eval(config, environment))


def _run(config: settings.RunConfig) -> None:
    from regrpo.agent import ReGRPOAgent
    from regrpo.report import print_transcript

    agent = ReGRPOAgent(config.model, reflect=config.reflect, max_steps=config.max_steps)
    trajectory = agent.run(config.task, config.workspace)
    print_transcript(trajectory)
    if trajectory.answer is None:
        raise SystemExit("the agent came to no answer")


def _report(config: settings.ReportConfig) -> None:
    from regrpo.run_page import write_page

    print(f"page: {write_page(config.runs, config.out)}")


def _demo(config: settings.DemoConfig) -> None:
    from regrpo.demo import run_demo

    run_demo(config)


Command = tuple[str, type[Any], Callable[[Any], None], str]
COMMANDS: tuple[Command, ...] = (
    ("pretrain", settings.PretrainConfig, _pretrain, "make the small base model"),
    ("sft", settings.SFTConfig, _sft, "fine-tune on records"),
    ("train", settings.TrainConfig, _train, "on-policy ReGRPO (or GRPO with plain retries)"),
    ("eval", settings.EvalConfig, _eval, "evaluate on held-out tasks"),
    ("run", settings.RunConfig, _run, "let a trained agent answer a task about a folder"),
    ("report", settings.ReportConfig, _report, "curves and trajectories of runs as one HTML page"),
    ("demo", settings.DemoConfig, _demo, "everything once: data, five agents, table, curves"),
)
DATA_COMMANDS: tuple[Command, ...] = (
    ("build", settings.DataConfig, _data_build, "execute near-misses and write records"),
)


def _subparsers(parser: ArgumentParser, dest: str, commands: tuple[Command, ...]) -> Any:
    subcommands = parser.add_subcommands(dest=dest)
    for name, config, _, summary in commands:
        sub = ArgumentParser(description=f"{summary[0].upper()}{summary[1:]}.")
        sub.add_argument(
            "--config", action=ActionConfigFile, help="YAML file with any of the options below"
        )
        if config is settings.ReportConfig:
            sub.add_argument("runs", nargs="+", help="folders of runs (required)")
        sub.add_class_arguments(config, skip={"runs"})
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
    disable_loading_bars()
    try:
        values = vars(parser.instantiate(parsed)[".".join(names)])
        action(config_type(**{k: v for k, v in values.items() if k != "config"}))
    except (OSError, ValueError, NotImplementedError, RunError) as error:
        sys.exit(f"regrpo {' '.join(names)}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"regrpo {' '.join(names)}: interrupted; the same command resumes the run")
