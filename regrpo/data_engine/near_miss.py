"""Near-miss actions: a correct call with one plausible mistake.

What can go wrong follows from the tool's typed parameters, not from its name. The error types and
their target shares are the paper's (arXiv 2606.31392).
"""

import inspect
import random

from regrpo.names import NAMES
from regrpo.tasks import EXTENSIONS, Step
from regrpo.tool_calls import ToolCall
from regrpo.tools import TOOLS

ERROR_SHARES = {
    "GroundingDrift": 0.294,
    "ToolMismatch": 0.246,
    "ArgInvalid": 0.308,
    "InfoInsufficient": 0.152,
}
PATH_PARAMETERS = ("path", "database", "page")
_TOOLS = {tool.__name__: tool for tool in TOOLS}


def near_misses(step: Step, rng: random.Random) -> dict[str, ToolCall]:
    """One near-miss call per feasible error type for a step.

    Where the wording itself suggests a failing call, that call is the only near-miss: an agent that
    errs in another way first would not learn from the observation what the repair needs.
    """
    if step.trap is not None and step.trap_type is not None:
        return {step.trap_type: step.trap}
    call = step.call
    if call.name == "final_answer":
        return {}
    parameters = list(inspect.signature(_TOOLS[call.name]).parameters.values())[1:]
    integers = [i for i, p in enumerate(parameters) if p.annotation in (int, "int")]
    texts = [i for i, p in enumerate(parameters) if p.annotation in (str, "str")]
    misses = {}
    if len(integers) >= 4:  # a box
        misses["GroundingDrift"] = _drift(call, integers, rng)
    if parameters[0].name in PATH_PARAMETERS:
        misses["ToolMismatch"] = _swap_tool(call, rng)
    if texts:
        misses["ArgInvalid"] = _corrupt(call, texts[-1], rng)
    if len(call.args) > 1:
        misses["InfoInsufficient"] = ToolCall(call.name, call.args[:-1])
    return misses


def _drift(call: ToolCall, integers: list[int], rng: random.Random) -> ToolCall:
    """Moves the box by its own height or more, so that it misses its line."""
    args = list(call.args)
    height = args[integers[3]] - args[integers[1]]
    shift = rng.choice((-2, -1, 1, 2)) * (height + 7)
    if args[integers[1]] + shift < 0:
        shift = -shift
    for i in (integers[1], integers[3]):
        args[i] += shift
    return ToolCall(call.name, tuple(args))


def _swap_tool(call: ToolCall, rng: random.Random) -> ToolCall:
    """Another tool that takes a path, called in its own plausible way on the same path."""
    path = call.args[0]
    choices = {
        "read_file": (path,),
        "sql": (path, "SELECT number FROM goods"),
        "read_region": (path, 0, 0, 100, 20),
    }
    name = rng.choice([name for name in choices if name != call.name])
    return ToolCall(name, choices[name])


def _corrupt(call: ToolCall, index: int, rng: random.Random) -> ToolCall:
    """Replaces a word of a text argument by another of its kind."""
    value = call.args[index]
    assert isinstance(value, str)
    stem, dot, extension = value.rpartition(".")
    if dot and extension in EXTENSIONS:
        wrong = f"{stem}.{rng.choice([e for e in EXTENSIONS if e != extension])}"
    else:
        known = [word for word in value.replace(",", " ").split() if word in NAMES]
        wrong = value.replace(known[0], rng.choice(NAMES)) if known else f"{value} +"
    return ToolCall(call.name, (*call.args[:index], wrong, *call.args[index + 1 :]))
