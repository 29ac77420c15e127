"""Near-miss actions: a correct call with one plausible mistake.

What can go wrong follows from the types of a tool's parameters (`regrpo.tools.parameters`), never
from its name: `feasibility` derives it for any tools, and `regrpo data table` prints it. The error
types and their target shares are the paper's (arXiv 2606.31392):

- GroundingDrift: a box moves off what it should show.
- ToolMismatch: another tool whose parameters the call's own arguments fill.
- ArgInvalid: an argument is corrupted: a wrong word, a misspelled one, a wrong extension, a wrong
  type, an expression that breaks off.
- InfoInsufficient: an argument is missing, or a query has lost its key word.
- NonCommit, opt-in: the paper names it and leaves it out by default. Here it is an action that
  comes where the answer is due and gives none. An agent that repeats a working call instead does
  not commit either, but repeating it works, so execution cannot tell that it was wrong.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache, partial

from regrpo.names import NAMES
from regrpo.tasks import EXTENSIONS, Step
from regrpo.tool_calls import ToolCall
from regrpo.tools import TOOLS
from regrpo.tools.parameters import Kind, Parameter, typed_parameters

ERROR_SHARES = {
    "GroundingDrift": 0.294,
    "ToolMismatch": 0.246,
    "ArgInvalid": 0.308,
    "InfoInsufficient": 0.152,
}
NON_COMMIT = "NonCommit"
# What may stand for what, the same kind first. A term can be taken for a file name or a variable.
FITS = {
    Kind.PATH: (Kind.PATH, Kind.QUERY),
    Kind.COORDINATE: (Kind.COORDINATE,),
    Kind.QUERY: (Kind.QUERY, Kind.EXPRESSION, Kind.PATH),
    Kind.STATEMENT: (Kind.STATEMENT,),
    Kind.EXPRESSION: (Kind.EXPRESSION, Kind.QUERY),
    Kind.ANSWER: (),
}
Tool = Callable[..., object]
# Makes a near-miss of a call whose arguments are all positional, None where the values forbid it.
Way = Callable[[ToolCall, random.Random], ToolCall | None]
Ways = dict[str, dict[str, Way]]


def target_shares(non_commit_share: float = 0.0) -> dict[str, float]:
    """The share of each error type; NonCommit's is taken from the others in proportion."""
    shares = {name: share * (1 - non_commit_share) for name, share in ERROR_SHARES.items()}
    return {**shares, NON_COMMIT: non_commit_share} if non_commit_share > 0 else shares


def feasibility(tools: Sequence[Tool] = TOOLS) -> dict[str, dict[str, list[str]]]:
    """The table: for each tool and error type, the ways to make such a near-miss."""
    return {
        tool.__name__: {kind: list(ways) for kind, ways in _ways(tool, tuple(tools)).items()}
        for tool in tools
    }


def near_misses(
    step: Step,
    rng: random.Random,
    *,
    non_commit: bool = False,
    tools: Sequence[Tool] = TOOLS,
) -> dict[str, ToolCall]:
    """One near-miss call per feasible error type for a step.

    Where the wording itself suggests a failing call, that call is the only near-miss: an agent that
    errs in another way first would not learn from the observation what the repair needs.
    """
    if step.trap is not None and step.trap_type is not None:
        return {step.trap_type: step.trap}
    tool = next(tool for tool in tools if tool.__name__ == step.call.name)
    names = [p.name for p in typed_parameters(tool)][len(step.call.args) :]
    rest = [step.call.kwargs[name] for name in names if name in step.call.kwargs]
    call = ToolCall(step.call.name, (*step.call.args, *rest))
    misses = {}
    for error_type, ways in _ways(tool, tuple(tools)).items():
        if error_type == NON_COMMIT and not non_commit:
            continue
        made = [way(call, rng) for way in ways.values()]
        possible = [miss for miss in made if miss is not None]
        if possible:
            misses[error_type] = rng.choice(possible)
    return misses


@cache
def _ways(tool: Tool, tools: tuple[Tool, ...]) -> Ways:
    """What the types of the parameters allow."""
    parameters = typed_parameters(tool)
    kinds = [p.kind for p in parameters]
    ways: Ways = {name: {} for name in (*ERROR_SHARES, NON_COMMIT)}
    required = parameters and parameters[-1].required
    if Kind.ANSWER in kinds:  # a wrong answer is no failure that the environment shows
        if required:
            ways[NON_COMMIT]["no answer"] = _omit_last
        return ways
    box = next((i for i in range(len(kinds)) if kinds[i : i + 4] == [Kind.COORDINATE] * 4), None)
    if box is not None:
        ways["GroundingDrift"]["box moves"] = partial(_drift, box)
    ways["ToolMismatch"] = _swaps(tool, tools)
    named = {kind: [i for i, k in enumerate(kinds) if k is kind] for kind in Kind}
    words = sorted(named[Kind.PATH] + named[Kind.QUERY] + named[Kind.STATEMENT])
    corrupt = ways["ArgInvalid"]
    if words:
        corrupt["wrong word"] = partial(_wrong_word, words)
        corrupt["misspelled"] = partial(_misspell, words)
    if named[Kind.PATH]:
        corrupt["wrong extension"] = partial(_wrong_extension, named[Kind.PATH])
    if named[Kind.EXPRESSION]:
        corrupt["breaks off"] = partial(_break_off, named[Kind.EXPRESSION])
    if parameters:
        corrupt["wrong type"] = _wrong_type
    if required:
        ways["InfoInsufficient"]["missing argument"] = _omit_last
    if named[Kind.QUERY]:
        ways["InfoInsufficient"]["key word gone"] = partial(_strip_key_word, named[Kind.QUERY])
    return ways


def _swaps(tool: Tool, tools: tuple[Tool, ...]) -> dict[str, Way]:
    """The tools that can be called with this tool's arguments.

    Those that take arguments of the same kinds are the plausible ones; arguments taken for another
    kind are for tools without such a neighbour.
    """
    source = typed_parameters(tool)
    found: dict[bool, dict[str, Way]] = {True: {}, False: {}}
    for other in tools:
        indices = None if other is tool else _fill(typed_parameters(other), source)
        if indices:
            target = typed_parameters(other)
            same = all(source[i].kind is p.kind for i, p in zip(indices, target, strict=True))
            found[same][other.__name__] = partial(_swap, other.__name__, indices)
    return found[True] or found[False]


def _fill(target: Sequence[Parameter], source: Sequence[Parameter]) -> list[int] | None:
    """For each parameter of one tool the argument of the other that fills it, each used once."""
    used: list[int] = []
    for p in target:
        fits = FITS[p.kind] if p.kind else ()
        free = (
            i for kind in fits for i, s in enumerate(source) if s.kind is kind and i not in used
        )
        index = next(free, None)
        if index is None:
            return None
        used.append(index)
    return used


def _replace(call: ToolCall, index: int, value: object) -> ToolCall:
    return ToolCall(call.name, (*call.args[:index], value, *call.args[index + 1 :]))


def _drift(box: int, call: ToolCall, rng: random.Random) -> ToolCall | None:
    """Moves the box by its own size or more, so that it misses its line; lines are wide."""
    if len(call.args) < box + 4:
        return None
    axis, factors = rng.choice(((0, (-1, 1)), (1, (-2, -1, 1, 2))))
    low, high = call.args[box + axis], call.args[box + axis + 2]
    shift = rng.choice(factors) * (high - low + 7)
    if low + shift < 0:
        shift = -shift
    return _replace(_replace(call, box + axis, low + shift), box + axis + 2, high + shift)


def _swap(name: str, indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    if max(indices) >= len(call.args):
        return None
    return ToolCall(name, tuple(call.args[i] for i in indices))


def _pick(indices: Sequence[int], call: ToolCall, rng: random.Random) -> int | None:
    given = [i for i in indices if i < len(call.args)]
    return rng.choice(given) if given else None


def _wrong_word(indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    """Another word of the same kind for a known one."""
    for index in indices:
        value = call.args[index] if index < len(call.args) else ""
        known = [
            word for word in value.replace(",", " ").replace(".", " ").split() if word in NAMES
        ]
        if known:
            other = rng.choice([name for name in NAMES if name != known[0]])
            return _replace(call, index, value.replace(known[0], other))
    return None


def _misspell(indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    """Two neighbouring letters of the longest word change places; capitals are keywords."""
    index = _pick(indices, call, rng)
    if index is None:
        return None
    value = call.args[index]
    words = value.replace(",", " ").replace(".", " ").split()
    word = max((w for w in words if not w.isupper()), key=len, default="")
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return None
    at = rng.choice(places)
    wrong = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return _replace(call, index, value.replace(word, wrong, 1))


def _wrong_extension(indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    index = _pick(indices, call, rng)
    stem, dot, extension = call.args[index].rpartition(".") if index is not None else ("", "", "")
    if index is None or not stem or not dot:
        return None
    other = rng.choice([e for e in EXTENSIONS if e != extension])
    return _replace(call, index, f"{stem}.{other}")


def _break_off(indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    index = _pick(indices, call, rng)
    return None if index is None else _replace(call, index, f"{call.args[index]} +")


def _wrong_type(call: ToolCall, rng: random.Random) -> ToolCall | None:
    """A text in a list, anything else as text."""
    if not call.args:
        return None
    index = rng.randrange(len(call.args))
    value = call.args[index]
    return _replace(call, index, [value] if isinstance(value, str) else str(value))


def _omit_last(call: ToolCall, rng: random.Random) -> ToolCall | None:
    return ToolCall(call.name, call.args[:-1]) if call.args else None


def _strip_key_word(indices: Sequence[int], call: ToolCall, rng: random.Random) -> ToolCall | None:
    """Drops the longest word of a query; a query of one word has nothing else to say."""
    index = _pick(indices, call, rng)
    words = call.args[index].split() if index is not None else []
    if index is None or len(words) < 2:
        return None
    words.remove(max(words, key=len))
    return _replace(call, index, " ".join(words))
