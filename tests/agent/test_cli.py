"""The commands, in one chain on a tiny model, and what they say to wrong input."""

import json

import pytest
import yaml

from regrpo.agent import ReGRPOAgent
from regrpo.cli import build_parser, main
from regrpo.records import read_records

TINY = ["--hidden_size", "32", "--num_layers", "2", "--num_heads", "2", "--tokenizer_tasks", "64"]


def fails(capsys, *arguments):
    """What is printed to stderr by a command that ends with an error."""
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert error.value.code not in (0, None)
    message = "" if isinstance(error.value.code, int) else error.value.code
    return message + capsys.readouterr().err


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Everything once: data, base, sft, train, eval."""
    folder = tmp_path_factory.mktemp("chain")

    def run(*arguments):
        main([str(a) for a in arguments])

    run("data", "build", "--out", folder / "data", "--count", 32, "--tasks.seed", 4)
    run("pretrain", "--out", folder / "base", "--steps", 2, *TINY)
    sft = {
        "model": str(folder / "base/model"),
        "out": str(folder / "sft"),
        "data": [
            {"path": str(folder / "data/clean.jsonl")},
            {"path": str(folder / "data/rot.jsonl"), "mask": "repair"},
        ],
        "steps": 50,
        "optim": {"lr": 0.01},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    run("sft", "--config", folder / "sft.yaml", "--steps", 2, "--optim.warmup_steps", 1)
    run(
        *("train", "--model", folder / "sft/model", "--out", folder / "rl", "--steps", 1),
        *("--states", 2, "--group_size", 2, "--max_new_tokens", 4, "--tasks.hops", "[1, 2]"),
    )
    run(
        *("eval", "--model", folder / "rl/model", "--out", folder / "eval", "--count", 4),
        *("--max_new_tokens", 4),
    )
    return folder


def test_the_chain_leaves_what_it_says(chain):
    for name in ("success", "clean", "rot"):
        assert read_records(chain / "data" / f"{name}.jsonl")
    for name in ("base", "sft", "rl"):
        assert (chain / name / "model" / "config.json").exists()
        assert (chain / name / "metrics.jsonl").exists()
    config = json.loads((chain / "sft" / "config.json").read_text())
    assert config["steps"] == 2  # the command line goes before the file
    assert config["optim"]["lr"] == 0.01
    assert config["optim"]["warmup_steps"] == 1
    assert json.loads((chain / "rl" / "config.json").read_text())["tasks"]["hops"] == [1, 2]
    assert json.loads((chain / "eval" / "report.json").read_text())["success"]["count"] == 4


def test_an_agent_works_on_a_folder(chain, tmp_path, capsys):
    (tmp_path / "oak.txt").write_text("number 7")
    agent = ReGRPOAgent(str(chain / "rl/model"), max_new_tokens=4)
    trajectory = agent.run("What is the number in oak.txt?", tmp_path)
    assert len(trajectory.turns) == 2  # a random model fails, and fails to repair
    assert trajectory.answer is None
    with pytest.raises(
        NotADirectoryError, match=r"workspace is .*none.*expected an existing folder"
    ):
        agent.run("?", tmp_path / "none")
    workspace = ("--workspace", tmp_path, "--model", chain / "rl/model")
    assert "no answer" in fails(capsys, "run", "--task", "What is it?", *workspace)


def test_no_bars_of_transformers(chain, tmp_path, capfd):
    main(["eval", "--model", str(chain / "rl/model"), "--count", "1", "--max_new_tokens", "1"])
    assert "Loading weights" not in capfd.readouterr().err
    arguments = ["sft", "--config", str(chain / "sft.yaml"), "--out", str(tmp_path), "--steps", "1"]
    main([*arguments, "--optim.warmup_steps", "1"])
    assert "shards" not in capfd.readouterr().err


COMMANDS = [
    "",
    "data",
    "data build",
    "data import",
    "data export",
    "data mine",
    "pretrain",
    "sft",
    "train",
    "eval",
    "plan",
    "run",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: regrpo")
    if command not in ("", "data"):
        own = {"run": "--workspace", "plan": "--run"}.get(command, "--out")
        for option in ("--config", own):
            assert option in text


def test_an_unknown_key_is_an_error(chain, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        yaml.safe_dump({"model": "m", "out": str(tmp_path / "o"), "data": [], "learning_rate": 1})
    )
    assert "learning_rate" in fails(capsys, "sft", "--config", config)
    assert "optim.momentum" in fails(
        capsys, "train", "--model", "m", "--out", tmp_path / "o", "--optim.momentum", 1
    )
    assert not (tmp_path / "o").exists()


def test_wrong_values_name_their_key(tmp_path, capsys):
    train = ("train", "--model", "m", "--out", tmp_path / "o")
    assert "steps" in fails(capsys, *train, "--steps", "many")
    assert "steps: got 0; expected 1 or more" in fails(capsys, *train, "--steps", 0)
    assert "expected 1 <= least <= most <= 7" in fails(capsys, *train, "--tasks.hops", "[3, 1]")
    assert "out" in fails(capsys, "data", "build")
    assert not (tmp_path / "o").exists()


def test_wrong_paths_and_records_end_in_one_line(chain, tmp_path, capsys):
    model = ("--model", chain / "base/model", "--out", tmp_path / "o")
    missing = json.dumps([{"path": str(tmp_path / "none.jsonl")}])
    message = fails(capsys, "sft", *model, "--data", missing)
    assert f"no data file at {tmp_path / 'none.jsonl'}" in message
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"conversations": [{"role": "tool", "content": "x"}]}\n')
    message = fails(capsys, "sft", *model, "--data", json.dumps([{"path": str(broken)}]))
    assert f"{broken}:1: conversations[0]: role is 'tool'; expected one of" in message
    nowhere = tmp_path / "no" / "model"
    message = fails(capsys, "eval", "--model", nowhere)
    assert f"no model at {nowhere}" in message
    assert "none.yaml" in fails(capsys, "sft", "--config", tmp_path / "none.yaml")
    assert not (tmp_path / "o").exists()


def test_another_configuration_in_a_folder_that_holds_a_run_is_refused(chain, capsys):
    message = fails(
        capsys, "pretrain", "--out", chain / "base", "--steps", 2, *TINY, "--optim.lr", 0.5
    )
    assert "differs in: optim.lr" in message


def test_the_parser_knows_every_command():
    text = build_parser().format_help()
    for command in ("data", "pretrain", "sft", "train", "eval", "run", "report", "demo"):
        assert command in text
