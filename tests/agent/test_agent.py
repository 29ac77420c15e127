"""The agent: other architectures, a user's tools, bounds, and what it says to wrong input."""

import functools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from regrpo import agent as agents
from regrpo.agent import ReGRPOAgent
from regrpo.cli import main
from regrpo.config import RunConfig, TriggerConfig
from regrpo.environment import LocalEnvironment
from regrpo.modeling import load_model, load_tokenizer
from regrpo.prompts import SYSTEM_PROMPT, opening
from regrpo.sampling import LocalPolicy, Sample, sample
from regrpo.segments import ChatFormat, tokenize_conversation
from regrpo.tool_calls import ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.tools.custom import custom_tools
from regrpo.trajectory import End
from regrpo.trigger import Clause
from regrpo_kernels import Segment

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|start_header_id|>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}<|end_header_id|>\n"
    "{{ message['content'] | trim }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>model<|end_header_id|>\n{% endif %}"
)
# Moves the system message to the last user turn, as Mistral 7B v0.3 does.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}<|start_header_id|>"
    "{{ system if loop.last }}{{ message['content'] }}<|end_header_id|>"
    "{% else %}{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
)
ARCHITECTURES = {
    "qwen2": (Qwen2Config, {}, None),
    "qwen3": (Qwen3Config, {"head_dim": 8}, None),
    "llama": (LlamaConfig, {}, None),
    "mistral": (MistralConfig, {"sliding_window": 64}, MISTRAL_TEMPLATE),
    "gemma": (GemmaConfig, {"head_dim": 8}, GEMMA_TEMPLATE),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 64}, GEMMA_TEMPLATE),
}


def save(folder, tokenizer, config_type, template=None, **kwargs):
    """A random model with its tokenizer; returns the folder as text."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = config_type(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # no near ties
        **{**shape, **heads, **kwargs},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_works_through_to_a_bounded_end(name, llama_tokenizer, tmp_path):
    config_type, kwargs, template = ARCHITECTURES[name]
    model = save(tmp_path, llama_tokenizer, config_type, template, **kwargs)
    seen = []
    agent = ReGRPOAgent(model, max_new_tokens=6, device="cpu")
    trajectory = agent.run("?", on_turn=seen.append)
    assert trajectory.end is End.FAILURE  # random tokens fail, and fail to repair
    assert [t.correction for t in trajectory.turns] == [False, True]
    assert seen == trajectory.turns
    assert all("no code block" in t.observation.text for t in trajectory.turns)
    assert trajectory.tokens.segment_ids.count(Segment.ACTION) <= 12
    text = agent.policy.chat.tokenizer.decode(trajectory.tokens.input_ids)
    assert SYSTEM_PROMPT in text
    assert text.index(SYSTEM_PROMPT) < text.index("Task: ?")
    # The prompt continues as the model itself would.
    (prompt,) = [agent.policy.chat.prompt(trajectory.start.messages)]
    (turn,) = sample(
        agent.policy.model, [prompt], stop_id=-1, pad_id=0, temperature=0.0, max_new_tokens=6
    )
    expected = agent.policy.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=6,
        do_sample=False,
    )
    assert turn.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("template", [GEMMA_TEMPLATE, MISTRAL_TEMPLATE])
def test_a_system_turn_that_the_template_cannot_show(llama_tokenizer, tmp_path, template):
    llama_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(tmp_path))
    messages = [*opening("?"), {"role": "assistant", "content": "A"}]
    plain = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\nTask: ?"}, messages[2]]
    assert ChatFormat(tokenizer).prompt(messages[:2]) == ChatFormat(tokenizer).prompt(plain[:1])
    trained = tokenize_conversation(tokenizer, messages, trained_turns=[2])
    assert trained == tokenize_conversation(tokenizer, plain, trained_turns=[1])
    assert trained.count(Segment.ACTION) == 2


def test_an_adapter_and_the_tokenizer_of_its_base(llama_tokenizer, tmp_path):
    base = save(tmp_path / "base", llama_tokenizer, LlamaConfig)
    adapted = get_peft_model(load_model(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    torch.nn.init.normal_(
        adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight
    )
    adapted.save_pretrained(tmp_path / "adapter")
    agent = ReGRPOAgent(str(tmp_path / "adapter"), max_new_tokens=2, device="cpu")
    prompt = torch.tensor([agent.policy.chat.prompt(opening("?"))])
    with torch.no_grad():
        expected, plain = adapted(prompt).logits, load_model(base)(prompt).logits
        assert torch.equal(agent.policy.model(prompt).logits, expected)
    assert not torch.equal(expected, plain)
    assert agent.run("?").end is End.FAILURE


def test_a_recurrent_model_is_refused(llama_tokenizer, tmp_path):
    model = save(tmp_path, llama_tokenizer, MambaConfig, state_size=4)
    with pytest.raises(NotImplementedError, match="MambaForCausalLM keeps a recurrent state"):
        ReGRPOAgent(model, device="cpu")


def test_dtypes(llama_tokenizer, tmp_path):
    model = save(tmp_path, llama_tokenizer, LlamaConfig, dtype="bfloat16")
    saved = json.loads((tmp_path / "config.json").read_text())["dtype"]
    for dtype, expected in (("auto", saved), ("float32", "float32"), ("bfloat16", "bfloat16")):
        agent = ReGRPOAgent(model, dtype=dtype, max_new_tokens=2, device="cpu")
        assert agent.policy.model.dtype is getattr(torch, expected)
        assert agent.run("?").end is End.FAILURE


# Bounds, with scripted turns.

CALL = Turn(None, "?", ToolCall("list_dir", ("none",))).render()


class Scripted:
    """Says the same again and again, or one turn after the other."""

    max_length = None

    def __init__(self, tokenizer, *turns):
        self.chat = ChatFormat(tokenizer)
        self.turns = list(turns)

    def session(self):
        return self

    def generate(self, prompts, numbers):
        text = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        ids = [*self.chat.encode(text), self.chat.end_id]
        return [Sample(ids, [-0.1] * len(ids))]


@pytest.fixture
def small(tokenizer, model, tmp_path):
    """A folder with a small random model."""
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def scripted(small, tokenizer, *turns, **kwargs):
    agent = ReGRPOAgent(small, device="cpu", **kwargs)
    agent.policy = Scripted(tokenizer, *turns)
    return agent


def call(name, *args, **kwargs):
    return Turn(None, "?", ToolCall(name, args, kwargs)).render()


@pytest.mark.parametrize("reflect", [True, False])
def test_the_same_failing_call_again_and_again_ends(small, tokenizer, tmp_path, reflect):
    trajectory = scripted(small, tokenizer, CALL, reflect=reflect).run("?", tmp_path)
    assert trajectory.end is End.FAILURE
    assert [t.observation.status for t in trajectory.turns] == [Status.ERROR] * 2


def test_the_same_working_call_again_and_again_ends(small, tokenizer, tmp_path):
    (tmp_path / "a").touch()
    turns = [call("list_dir"), CALL] * 9  # every other one fails, and is repaired
    agent = scripted(small, tokenizer, *turns, max_steps=3, reflect=False)
    trajectory = agent.run("?", tmp_path)
    assert trajectory.end is End.MAX_STEPS
    assert [t.step for t in trajectory.turns] == [0, 1, 1, 2, 2]
    assert trajectory.answer is None


def test_text_without_code_is_a_typed_failure(small, tokenizer):
    trajectory = scripted(small, tokenizer, "I do not know.").run("?")
    assert trajectory.end is End.FAILURE
    assert [t.observation.status for t in trajectory.turns] == [Status.ERROR] * 2
    assert trajectory.turns[0].fired is Clause.FAILURE


def test_a_full_context_ends(tokenizer, small):
    config = json.loads((Path(small) / "config.json").read_text())
    room = len(ChatFormat(tokenizer).prompt(opening("?")))
    config["max_position_embeddings"] = room + 5
    (Path(small) / "config.json").write_text(json.dumps(config))
    trajectory = ReGRPOAgent(small, device="cpu").run("?")
    assert trajectory.end is End.CONTEXT
    assert len(trajectory.turns) == 1
    assert trajectory.tokens.count(Segment.ACTION) == 5
    config["max_position_embeddings"] = room
    (Path(small) / "config.json").write_text(json.dumps(config))
    trajectory = ReGRPOAgent(small, device="cpu").run("?")
    assert trajectory.end is End.CONTEXT
    assert trajectory.turns == []


def test_other_ends_of_text_end_a_turn(tokenizer, model):
    prompts = [ChatFormat(tokenizer).prompt(opening(q)) for q in ("?", "What?", "?")]
    free = LocalPolicy(model, tokenizer, temperature=0.0, max_new_tokens=12)
    free = free.session().generate(prompts, range(3))
    stop = free[0].ids[4]
    stopped = LocalPolicy(
        model,
        tokenizer,
        temperature=0.0,
        max_new_tokens=12,
        stop_ids=[tokenizer.eos_token_id, stop],
    )
    stopped = stopped.session().generate(prompts, range(3))
    for before, after in zip(free, stopped, strict=True):
        end = before.ids.index(stop) if stop in before.ids else len(before.ids)
        assert after.ids == before.ids[:end]
        assert after.log_probs == pytest.approx(before.log_probs[:end], abs=1e-5)
    assert len(stopped[0].ids) < 12


# A user's tools.

LIMIT = 3


def helper(n):
    return helper(n - 1) + 1 if n else 0


def repeat(text: str, times: int = 2, style: Literal["plain", "loud"] = "plain") -> str:
    """Says a text several times.

    More of it is not shown.
    """
    return " ".join([text.upper() if style == "loud" else text] * min(times, LIMIT))


def count(folder: Path, names: list[str], scale: float = 1.0, only: Optional[str] = None) -> float:  # noqa: UP045
    print("printed", end="")
    return scale * sum((folder / name).exists() for name in names if only in (None, name))


def behave(folder: Path, how: str) -> Any:
    if how == "print":
        for _ in range(10000):
            print("x" * 100)
    return {
        "depth": lambda: helper(4),
        "none": lambda: None,
        "empty": lambda: [],
        "zero": lambda: 0,
        "print": lambda: "printed",
        "raise": lambda: {}["key"],
        "exit": lambda: exit(3),
        "hang": lambda: [None for _ in iter(int, 1)],
        "own": lambda: Observation("nothing found", Status.EMPTY),
        "write": lambda: (folder / "new").write_text("x"),
        "long": lambda: "x" * 10**6,
    }[how]()


def environment_with(where, *functions, **kwargs):
    return LocalEnvironment(**{where: custom_tools(functions, ["sql"])}, **kwargs)


@pytest.fixture(scope="module", params=["tools", "local_tools"])
def toolbox(request):
    with environment_with(request.param, repeat, count, behave, timeout_s=0.5) as environment:
        environment.where = request.param
        yield environment


def observe(toolbox, folder, name, *args, **kwargs):
    (observation,) = toolbox.execute([(folder, call(name, *args, **kwargs))])
    return observation.text, observation.status.value


def test_tools_are_called_with_typed_arguments(toolbox, tmp_path):
    (tmp_path / "a").touch()
    observed = functools.partial(observe, toolbox, tmp_path)
    assert observed("repeat", "x", times=9) == ("x x x", "ok")
    assert observed("repeat", "x", style="loud") == ("X X", "ok")
    assert observed("count", ["a", "b"]) == ("1.0", "ok")
    assert observed("count", ["a"], 3) == ("3", "ok")
    assert observed("count", ["a"], only="b") == ("0.0", "ok")
    assert observed("calculator", "1 + 1") == ("2", "ok")
    wrong = {
        "repeat() argument 'times' must be int, not bool": ("repeat", "x", True),
        "repeat() argument 'style' must be Literal['plain', 'loud'], not int": (
            "repeat",
            "x",
            1,
            2,
        ),
        "repeat() missing a required argument: 'text'": ("repeat",),
        "count() argument 'names' must be list[str], not list": ("count", [1]),
        "count() too many positional arguments": ("count", [], 1.0, None, 5),
    }
    for message, (name, *args) in wrong.items():
        text, status = observed(name, *args)
        assert (text.replace("typing.", ""), status) == (f"TypeError: {message}", "error")
    unknown = observed("reheat")[0]
    assert unknown.endswith("calculator, final_answer, repeat, count, behave")


def test_what_tools_do_is_typed(toolbox, tmp_path):
    observed = functools.partial(observe, toolbox, tmp_path, "behave")
    assert observed("depth") == ("4", "ok")
    assert observed("none") == observed("empty") == ("(no output)", "empty")
    assert observed("zero") == ("0", "ok")
    assert observed("own") == ("nothing found", "empty")
    assert observed("print") == ("printed", "ok")
    assert observed("raise") == ("KeyError: 'key'", "error")
    text, status = observed("long")
    assert (len(text), status) == (4000 + len("… [truncated]"), "ok")
    if toolbox.where == "tools":
        assert observed("exit") == ("ToolCrash: behave ended with exit code 3", "error")
        assert observed("hang") == ("TimeoutError: behave took longer than 0.5 s", "error")
        assert observed("write") == ("OSError: [Errno 27] File too large", "error")
        assert observed("zero") == ("0", "ok")


def test_functions_of_a_script_or_a_closure_are_sent_by_value(tmp_path):
    secret = 41

    def closure(n: int) -> int:
        return secret + n

    def itself(n: int) -> int:
        return itself(n - 1) + 1 if n else 0

    with environment_with("tools", closure, itself) as environment:
        assert observe(environment, (), "closure", 1) == ("42", "ok")
        assert observe(environment, (), "itself", 3) == ("3", "ok")
    script = tmp_path / "script.py"
    script.write_text(
        """
import re
from regrpo.environment import LocalEnvironment
from regrpo.tools.custom import custom_tools

PATTERN = re.compile("o+")

def longest(text: str) -> int:
    return max(map(len, PATTERN.findall(text)))

with LocalEnvironment(tools=custom_tools([longest], [])) as environment:
    turn = "Code:\\n```py\\nlongest('fooo, fo')\\n```"
    print(environment.execute([((), turn)])[0].text)
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_tools_that_cannot_be_sent_or_called():
    def of(annotation):
        def f(x):
            return x

        f.__annotations__ = {"x": annotation}
        return f

    def untyped(x):
        return x

    def many(*args: int) -> int:
        return 0

    def two(a: Path, b: Path) -> int:
        return 0

    async def later() -> int:
        return 0

    def sql(query: str) -> str:
        return ""

    wrong = {
        "parameter 'x' has no type; expected one that a call can write": untyped,
        "has type set[int]": of(set[int]),
        "has type list[torch.Tensor]": of(list[torch.Tensor]),
        "parameter 'args' is variadic positional": many,
        "a and b are folders": two,
        "tool later is asynchronous": later,
        "expected a function with a name": functools.partial(repeat, "x"),
        "name 'Nowhere' is not defined": of("Nowhere"),
    }
    for message, function in wrong.items():
        with pytest.raises(TypeError, match=re.escape(message)):
            custom_tools([function], [])
    for functions in ([sql], [repeat, repeat]):
        with pytest.raises(ValueError, match="another tool has this name"):
            custom_tools(functions, ["sql"])
    lock = threading.Lock()

    def locked(x: int) -> int:
        with lock:
            return x

    with pytest.raises(ValueError, match=r"tool locked cannot be sent .*lock.* local_tools"):
        LocalEnvironment(tools=custom_tools([locked], []))
    with environment_with("local_tools", locked) as environment:
        assert observe(environment, (), "locked", 1) == ("1", "ok")


def test_the_agent_shows_and_calls_tools(small, tokenizer):
    def connected(key: str) -> str:
        return {"a": "7"}.get(key, "")

    answer = call("final_answer", "7 7")
    turns = [call("connected", "b"), call("connected", "a"), call("repeat", "7"), answer]
    agent = scripted(
        small, tokenizer, *turns, tools=[repeat], local_tools=[connected], reflect=False
    )
    trajectory = agent.run("?")
    assert trajectory.answer == "7 7"
    assert trajectory.end is End.ANSWER
    assert [t.observation.status.value for t in trajectory.turns] == ["empty", "ok", "ok", "ok"]
    system = trajectory.start.messages[0]["content"]
    lines = system.removeprefix(SYSTEM_PROMPT).replace("typing.", "").split("\n")
    assert lines == [
        "",
        "repeat(text: str, times: int = 2, style: Literal['plain', 'loud'] = 'plain'): "
        "Says a text several times.",
        "connected(key: str)",
    ]
    with pytest.raises(ValueError, match="tool repeat: another tool has this name"):
        ReGRPOAgent(small, tools=[repeat], local_tools=[repeat])


# The command.


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["run", *map(str, arguments)])
    assert error.value.code not in (0, None)
    message = "" if isinstance(error.value.code, int) else error.value.code
    return message + capsys.readouterr().err


def test_wrong_arguments_end_in_one_line(small, tokenizer, tmp_path, capsys):
    ask = ("--task", "?", "--workspace", tmp_path)
    empty, bare, run = tmp_path / "empty", tmp_path / "bare", Path(small).parent
    empty.mkdir()
    tokenizer.save_pretrained(bare)
    (bare / "config.json").write_text((Path(small) / "config.json").read_text())
    torn = tmp_path / "torn"
    tokenizer.save_pretrained(torn)
    (torn / "config.json").write_text((Path(small) / "config.json").read_text())
    (torn / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (run / "model").symlink_to(small)
    (run / "config.json").write_text("{}")  # of a training run
    expected = {
        ("--model", tmp_path / "none"): "no model at .*none; expected a folder that holds one",
        ("--model", empty): "no model in .*empty; expected its config.json",
        ("--model", run): r"no model in .*; did you mean .*/model\?",
        ("--model", bare): "bare cannot be loaded: .*no file named model.safetensors",
        ("--model", torn): "torn cannot be loaded: .*header",
        ("--model", small, "--workspace", tmp_path / "no"): "workspace is .*; expected an existing",
        ("--model", small, "--device", "gpu"): "device: got 'gpu'; expected cpu, cuda",
        ("--model", small, "--device", "cuda:99"): "device: got 'cuda:99'; this machine has",
        ("--model", small, "--dtype", "int3"): "dtype: got 'int3'; expected auto, float32",
        ("--model", small, "--max_steps", 0): "max_steps: got 0; expected 1 or more",
        ("--model", small, "--trigger.confidence_margin", 2): "trigger.confidence_margin: got 2",
    }
    for arguments, message in expected.items():
        said = fails(capsys, *ask, *arguments)
        assert re.search(message, said), said
        if "usage" not in said:
            assert said.startswith("regrpo run: ")
            assert "\n" not in said.strip()
    assert "--verbose" in fails(capsys, *ask, "--verbose")
    assert "task" in fails(capsys, "--model", small)


def test_run_prints_turns_as_they_come(small, tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "oak.txt").write_text("7")
    turns = [call("read_file", "oak.csv"), call("read_file", "oak.txt"), call("final_answer", "7")]
    printed = []

    class Watched(Scripted):
        def generate(self, prompts, numbers):
            printed.append(capsys.readouterr().out)
            return super().generate(prompts, numbers)

    monkeypatch.setattr(agents, "LocalPolicy", lambda *_, **__: Watched(tokenizer, *turns))
    ask = ["--model", small, "--workspace", str(tmp_path), "--reflect", "false"]
    main(["run", "--task", "What is it?", *ask])
    printed.append(capsys.readouterr().out)
    assert printed[0] == "Task: What is it?\n"
    assert "[step 0, error] FileNotFoundError" in printed[1]
    assert "[step 0, ok] 7" in printed[2]
    assert printed[3].endswith("[step 1, ok] 7\nAnswer: 7\n")
    monkeypatch.setattr(agents, "LocalPolicy", lambda *_, **__: Watched(tokenizer, CALL))
    said = fails(capsys, "--task", "?", *ask)
    assert "came to no answer: the correction of a failed call did not work either" in said


def test_run_options_reach_the_agent():
    options = RunConfig("?", trigger=TriggerConfig(0.1), seed=3)
    assert options.trigger.confidence_margin == 0.1
    with pytest.raises(ValueError, match="expected null where reflect is false"):
        RunConfig("?", reflect=False, trigger=TriggerConfig(0.1))
