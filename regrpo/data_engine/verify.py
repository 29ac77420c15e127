"""The gates of a corpus, one line a problem.

The official release's nine checks, each on what the record really holds: schema, duplicate id,
ungrounded evidence, label leak, empty corrected code, doubled code marker, failed equals corrected,
reflection turn missing, empty trained span. And three of ours: the failure stands right before the
reflection, the evidence cites a rare span, executing everything again gives what was recorded.

**Rare span.** A span is a longest run of words that evidence and failed observation share. It is
rare if neither the task nor the failed action holds it, one of its words has four letters or a
digit, and at most ``max_share`` of the other failed observations of the corpus (but always one)
hold it. Evidence that cites an observation of one line whole passes as well: there is nothing rarer
to cite.

**Executing again** takes a record whose ``regrpo.provenance`` is ``executed`` and that names its
files (``regrpo.workspace``). Every call must give the observation that follows it in the
conversation, and the pixels of the picture that stands behind it if one does; the failed action
must fail and the corrected action succeed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrpo import provenance
from regrpo.config import DataVerifyConfig
from regrpo.data_engine.exchange import Report, read_files
from regrpo.data_engine.recorded import answered, code_of, normal_code, observation
from regrpo.environment import Environment, LocalEnvironment
from regrpo.image_files import PLACEHOLDER, opened, readable_image, without_placeholders
from regrpo.records import REFLECTION, Record
from regrpo.tool_calls import ERROR_TYPES, reflection_span
from regrpo.tools import Observation, Status
from regrpo.trajectory import Message
from regrpo.workspace import WorkspaceFile, file_from_dict

_Ready = tuple[str, Record, tuple[WorkspaceFile, ...]]
KNOWN_TYPES = (*ERROR_TYPES, "NonCommit")
BATCH = 256

_WORD = re.compile(r"\w+(?:[./:-]\w+)*")
_CODE_MARKER = re.compile(r"^[ \t]*\**Code:", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one record."""

    where: str
    id: str
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.where} ({self.id}): {self.check}: {self.message}"


def words(text: str) -> list[str]:
    """Words and numbers, lower case; paths and dotted names stay whole."""
    return _WORD.findall(text.lower())


def _joined(run: Sequence[str]) -> str:
    """With a space around every word, so that a run is in a text if this is in that."""
    return " ".join(["", *run, ""])


def shared_runs(one: Sequence[str], other: Sequence[str]) -> set[tuple[str, ...]]:
    """Every run of words in both that cannot be longer at its place."""
    runs = set()
    before = [0] * (len(other) + 1)
    for i, word in enumerate(one):
        lengths = [0] * (len(other) + 1)
        for j, second in enumerate(other):
            if word != second:
                continue
            lengths[j + 1] = before[j] + 1
            ends = i + 1 == len(one) or j + 1 == len(other) or one[i + 1] != other[j + 1]
            if ends:
                runs.add(tuple(one[i + 1 - lengths[j + 1] : i + 1]))
        before = lengths
    return runs


class Observations:
    """How often a run of words occurs in the failed observations of a corpus, each counted once."""

    def __init__(self, texts: Sequence[str]):
        self._texts = [_joined(words(text)) for text in dict.fromkeys(texts)]
        self._holders: dict[str, set[int]] = defaultdict(set)
        for index, text in enumerate(self._texts):
            for word in text.split():
                self._holders[word].add(index)

    def __len__(self) -> int:
        return len(self._texts)

    def count(self, run: tuple[str, ...]) -> int:
        """Observations that hold the run."""
        candidates = set.intersection(*(self._holders[word] for word in run))
        return sum(_joined(run) in self._texts[index] for index in candidates)


def cites_rare_span(
    evidence: str, text: str, known: str, corpus: Observations, max_share: float
) -> bool:
    """Whether evidence cites a rare span of the observation ``text`` (see the module).

    Args:
        known: what is no news: the task and the failed action.
        corpus: all failed observations, this one among them.
    """
    whole = text.strip()
    if whole and "\n" not in whole and whole in evidence:
        return True
    limit = max(1, int(max_share * (len(corpus) - 1)))
    told = _joined(words(known))
    return any(
        _joined(run) not in told
        and any(len(word) >= 4 or any(map(str.isdigit, word)) for word in run)
        and corpus.count(run) - 1 <= limit
        for run in shared_runs(words(evidence), words(text))
    )


def _code(action: str) -> str | None:
    code = code_of(action)
    return normal_code(code) if code and code.strip() else None


def _meta_types(record: Record) -> Iterator[tuple[str, str]]:
    meta = record["rot_meta"]
    for name in ("failed_action", "failed_observation", "corrected_action"):
        if not isinstance(meta[name], str):
            yield "schema", f"rot_meta.{name} is {meta[name]!r:.40}; expected text"
    for name in REFLECTION:
        value = meta["reflection"][name]
        if not isinstance(value, str):
            yield "schema", f"rot_meta.reflection.{name} is {value!r:.40}; expected text"
    if type(meta["step_index"]) is not int:
        yield "schema", f"rot_meta.step_index is {meta['step_index']!r:.40}; expected a number"


def check_record(record: Record) -> list[tuple[str, str]]:
    """The checks that one record answers alone, as (check, message)."""
    problems: list[tuple[str, str]] = []
    missing = [key for key in ("id", "image", "answer") if key not in record]
    if missing:
        problems.append(("schema", f"lacks {', '.join(missing)}"))
    if not isinstance(record["id"], str) or not record["id"]:
        problems.append(("schema", f"id is {record['id']!r:.40}; expected text"))
    messages = record["conversations"]
    if not any(m["role"] == "user" for m in messages):
        problems.append(("schema", "no user turn"))
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        problems.append(("empty trained span", "no assistant turn says anything"))
    if record.get("rot_meta") is None:
        return problems
    types = list(_meta_types(record))
    return problems + (types or _check_reflection(record))


def _check_reflection(record: Record) -> list[tuple[str, str]]:
    meta, messages = record["rot_meta"], record["conversations"]
    told = meta["reflection"]
    problems = []
    if meta["error_type"] not in KNOWN_TYPES:
        expected = ", ".join(KNOWN_TYPES)
        problems.append(("schema", f"error type {meta['error_type']!r:.40}; expected {expected}"))
    if told["error_type"] != meta["error_type"]:
        problems.append(("schema", "rot_meta and its reflection differ in error_type"))
    empty = [name for name in ("evidence", "fix_plan") if not told[name].strip()]
    if empty:
        problems.append(("empty trained span", f"the reflection has no {' and no '.join(empty)}"))
    failed, corrected = _code(meta["failed_action"]), _code(meta["corrected_action"])
    if corrected is None:
        problems.append(("empty corrected code", "the corrected action has no code"))
    elif corrected == failed:
        problems.append(("failed equals corrected", f"both are {corrected[:60]!r}"))
    at = _reflection_turn(messages, told)
    if at is None:
        problems.append(("reflection turn missing", "no assistant turn holds this reflection"))
        return problems
    turn = messages[at]["content"]
    for name, text in (("corrected action", meta["corrected_action"]), ("reflection turn", turn)):
        if len(_CODE_MARKER.findall(text)) > 1:
            problems.append(("doubled code marker", f"the {name} says Code: more than once"))
    if corrected is not None:
        if _code(turn) != corrected:
            problems.append(("reflection turn missing", "its turn does not act as corrected"))
        early = [i for i, m in enumerate(messages[:at]) if _leaks(m, meta["corrected_action"])]
        if early and corrected != failed:
            problems.append(("label leak", f"turn {early[0]} already holds the corrected action"))
    before = messages[max(0, at - 2) : at]
    if (
        len(before) < 2
        or before[0]["content"].strip() != meta["failed_action"].strip()
        or meta["failed_observation"].strip() not in before[1]["content"]
    ):
        problems.append(("failure not before the reflection", "the model would not see it"))
    return problems


def _reflection_turn(messages: Sequence[Message], told: dict[str, str]) -> int | None:
    """The turn of this triplet; a conversation may hold other reflections before it."""
    for index, message in enumerate(messages):
        span = reflection_span(message["content"]) if message["role"] == "assistant" else None
        block = message["content"][slice(*span)] if span else ""
        if span and all(told[name].strip() in block for name in REFLECTION):
            return index
    return None


def _leaks(message: Message, corrected: str) -> bool:
    if message["role"] == "assistant":
        return _code(message["content"]) == _code(corrected)
    return (code_of(corrected) or "").strip() in message["content"]


def _task_text(record: Record) -> str:
    """The system prompt aside, what stands before the first assistant turn."""
    texts = []
    for message in record["conversations"]:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            texts.append(message["content"])
    return "\n".join(texts)


def check_evidence(records: Sequence[tuple[str, Record]], max_share: float) -> Iterator[Problem]:
    """Grounding, over a whole corpus: what is rare depends on the others."""
    told = [(where, r) for where, r in records if r.get("rot_meta") is not None]
    told = [(where, r) for where, r in told if not list(_meta_types(r))]
    corpus = Observations([r["rot_meta"]["failed_observation"] for _, r in told])
    for where, record in told:
        meta = record["rot_meta"]
        evidence, text = meta["reflection"]["evidence"], meta["failed_observation"]
        if not evidence.strip():
            continue
        shared = {w for w in words(evidence) if len(w) >= 4 or w.isdigit()} & set(words(text))
        whole = text.strip()
        if not shared and not (whole and whole in evidence):
            message = f"{evidence[:60]!r} shares no word with the failed observation"
            yield Problem(where, record["id"], "ungrounded evidence", message)
            continue
        known = f"{_task_text(record)}\n{meta['failed_action']}"
        if not cites_rare_span(evidence, text, known, corpus, max_share):
            message = f"{evidence[:60]!r} cites nothing that tells this observation from others"
            yield Problem(where, record["id"], "no rare span", message)


@dataclass(frozen=True)
class _Expected:
    """What a turn is recorded to observe: the text as it is shown, and the picture's file."""

    text: str
    picture: str | None


def _expected(record: Record, content: str) -> _Expected:
    text, files = observation(content).text, record.get("image")
    before, _, last = text.rpartition("\n")
    picture = files.get(last) if PLACEHOLDER.fullmatch(last) and isinstance(files, dict) else None
    return _Expected(before, picture) if isinstance(picture, str) else _Expected(text, None)


def _requests(record: Record) -> list[tuple[str, str, _Expected | None]]:
    """What to run: (what it is, the turn, what it is expected to observe or None)."""
    requests: list[tuple[str, str, _Expected | None]] = [
        (f"turn {index}", turn, _expected(record, after))
        for index, turn, after in answered(record["conversations"])
    ]
    meta = record.get("rot_meta")
    if meta is not None and not list(_meta_types(record)):
        requests.append(("failed action", meta["failed_action"], None))
        requests.append(("corrected action", meta["corrected_action"], None))
    return requests


def _workspace(record: Record) -> tuple[WorkspaceFile, ...]:
    files = record[provenance.KEY]["workspace"]
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError("regrpo.workspace must be a list of objects")
    return tuple(file_from_dict(file) for file in files)


def executable(record: Record) -> bool:
    """Whether a record says that it was executed here, and on which files."""
    block = record.get(provenance.KEY, {})
    return block.get("provenance") == "executed" and "workspace" in block


def check_execution(
    environment: Environment, records: Sequence[tuple[str, Record]], folder: Path
) -> Iterator[Problem]:
    """Runs the calls of executed records again.

    Args:
        folder: of the data file, to which the paths of pictures are relative.
    """
    ready = []
    for where, record in records:
        if not executable(record):
            continue
        try:
            ready.append((where, record, _workspace(record)))
        except ValueError as error:
            yield Problem(where, record["id"], "workspace", _one_line(error))
    for first in range(0, len(ready), BATCH):
        batch = ready[first : first + BATCH]
        try:
            results = _run(environment, batch)
        except ValueError:  # one of them cannot be built: find it, and run the others
            for one in batch:
                try:
                    results = _run(environment, [one])
                except ValueError as error:
                    yield Problem(one[0], one[1]["id"], "workspace", _one_line(error))
                else:
                    yield from _compare([one], results, folder)
        else:
            yield from _compare(batch, results, folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _run(environment: Environment, batch: Sequence[_Ready]) -> list[Observation]:
    return environment.execute([(f, text) for _, r, f in batch for _, text, _ in _requests(r)])


def _compare(
    batch: Sequence[_Ready], observations: Sequence[Observation], folder: Path
) -> Iterator[Problem]:
    results = iter(observations)
    for where, record, _ in batch:
        for what, _, expected in _requests(record):
            seen = next(results)
            wrong = None
            if expected is not None:
                wrong = _difference(seen, expected, folder)
                wrong = wrong and f"{what} {wrong}"
            elif what == "failed action" and seen.status is Status.OK:
                wrong = f"the failed action succeeds: {seen.text[:60]!r}"
            elif what == "corrected action" and seen.status is not Status.OK:
                wrong = f"the corrected action fails: {seen.text[:60]!r}"
            if wrong is not None:
                yield Problem(where, record["id"], "executed again", wrong)


def _difference(seen: Observation, expected: _Expected, folder: Path) -> str | None:
    """What an observation has that the recorded one has not; None for the same."""
    text = without_placeholders(seen.text)
    if text != expected.text:
        return f"gives {text[:60]!r}, not {expected.text[:60]!r}"
    if expected.picture is None:
        return None if seen.image is None else "shows a picture, and the record none"
    recorded = readable_image(folder / expected.picture)
    if recorded is None:
        return f"has no picture at {expected.picture}"
    if seen.image is None or _pixels(seen.image) != _pixels(recorded):
        return f"shows another picture than {expected.picture}"
    return None


def _pixels(data: bytes) -> tuple[tuple[int, int], bytes]:
    with opened(data) as file:
        return file.size, file.convert("RGB").tobytes()


def check_ids(records: Sequence[tuple[str, Record]]) -> Iterator[Problem]:
    """Ids that stand twice, in one file or in two."""
    first: dict[str, str] = {}
    for where, record in records:
        at = first.setdefault(str(record["id"]), where)
        if at != where:
            yield Problem(where, str(record["id"]), "duplicate id", f"is also at {at}")


def verify_files(config: DataVerifyConfig) -> Report:
    """Runs every gate over the files together."""
    reading = read_files(config.files)
    records = [
        (where, record)
        for path, found in reading.records.items()
        for where, record in zip(reading.places[path], found, strict=True)
    ]
    problems = [
        Problem(where, str(record["id"]), check, message)
        for where, record in records
        for check, message in check_record(record)
    ]
    problems += check_ids(records)
    problems += check_evidence(records, config.max_share)
    executed = [r for _, r in records if provenance.provenance(r) == "executed"]
    ran = sum(map(executable, executed)) if config.execute else 0
    if ran:
        with LocalEnvironment() as environment:
            for path, found in reading.records.items():
                places = list(zip(reading.places[path], found, strict=True))
                problems += check_execution(environment, places, Path(path).parent)
    place = {where: index for index, (where, _) in enumerate(records)}
    problems.sort(key=lambda problem: place[problem.where])
    unread = [*reading.missing, *reading.skipped]
    checks = Counter(problem.check for problem in problems)
    if unread:
        checks["unreadable"] = len(unread)
    lines = [
        *unread,
        *map(str, problems),
        f"{len(records)} records in {len(reading.records)} files; "
        f"{ran} of {len(executed)} executed ones were executed again",
        *(f"  {count} {check}" for check, count in sorted(checks.items())),
    ]
    total = checks.total()
    return Report(lines, f"{total} problems" if total else None)
