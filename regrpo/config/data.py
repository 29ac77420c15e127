"""The data engine: building, importing, mining, verifying and counting records."""

from dataclasses import dataclass, field

from regrpo.config.checks import require, require_url, require_variable
from regrpo.config.tasks import TaskConfig
from regrpo.provenance import PROVENANCES


@dataclass(frozen=True)
class TeacherConfig:
    """Who writes the reflections.

    Args:
        base_url: OpenAI-compatible endpoint, such as https://api.openai.com/v1, which is asked at
            base_url/chat/completions; null is the deterministic teacher, which needs no network.
        model: the endpoint's name of the model.
        api_key_env: environment variable that holds the key; null sends none. The key itself is
            neither stored nor printed.
        images: attach the page images that a call names, for vision models.
        temperature: of the model; null leaves it to the endpoint.
        max_tokens: limit of one answer; null leaves it to the endpoint.
        asks: how often one failure is asked about at most; an answer that is not grounded in the
            observation is asked again with the reason.
        concurrency: requests under way at a time.
        timeout_s: seconds until one request is given up, however slowly it answers.
        retries: how often a request is repeated that was refused, broken, or too slow.
        backoff_s: seconds before the first repetition; they double, less a seeded part.
        max_wait_s: longest wait, the endpoint's own Retry-After included; where that is longer, the
            build stops and says so.
        input_price: USD per million input tokens, for the count of the cost.
        output_price: USD per million output tokens.
        seed: of the waits.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    images: bool = False
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    asks: int = 3
    concurrency: int = 4
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    max_wait_s: float = 120.0
    input_price: float = 0.0
    output_price: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        url = self.base_url
        require_url("teacher.base_url", url)
        require_variable("teacher.api_key_env", self.api_key_env)
        require(
            (url is None) == (self.model is None),
            "teacher.model",
            self.model,
            "a name together with teacher.base_url, null without",
        )
        for name in ("asks", "concurrency"):
            require(getattr(self, name) > 0, f"teacher.{name}", getattr(self, name), "1 or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            value = getattr(self, name)
            require(value > 0, f"teacher.{name}", value, "a positive number")
        for name in ("retries", "input_price", "output_price"):
            require(getattr(self, name) >= 0, f"teacher.{name}", getattr(self, name), "0 or more")
        for name in ("temperature", "max_tokens"):
            value, least = getattr(self, name), 0 if name == "temperature" else 1
            require(
                value is None or value >= least, f"teacher.{name}", value, f"{least} or more, null"
            )


@dataclass(frozen=True)
class DataConfig:
    """Executed demonstrations: success.jsonl, clean.jsonl and rot.jsonl.

    Args:
        out: folder of the records.
        count: tasks to demonstrate.
        tasks: which tasks.
        near_miss_share: share of the tasks without a trap that get a forced near-miss as well.
        long_share: share of the reflections that say the same in more words, as freely written
            ones do; what a cost on reflection can save.
        non_commit_share: target share of near-misses that give no answer where it is due
            (NonCommit); 0 makes none.
        teacher: who writes the reflections.
    """

    out: str
    count: int = 8000
    tasks: TaskConfig = field(default_factory=TaskConfig)
    near_miss_share: float = 0.35
    long_share: float = 0.0
    non_commit_share: float = 0.0
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        require(self.count > 0, "count", self.count, "1 or more")
        require(0 <= self.near_miss_share <= 1, "near_miss_share", self.near_miss_share, "a share")
        require(0 <= self.long_share <= 1, "long_share", self.long_share, "a share")
        require(
            0 <= self.non_commit_share < 1,
            "non_commit_share",
            self.non_commit_share,
            "a share below 1",
        )


@dataclass(frozen=True)
class DataImportConfig:
    """Records of others in our form: OUT/NAME.jsonl for every file, and OUT/import_report.json.

    Args:
        source: .json or .jsonl files with role/content or from/value turns, or GTA's dataset.json.
        out: folder of the records.
        provenance: origin of records that do not say: executed, recorded or teacher; by default
            teacher for records with rot_meta (the official release invents its failures) and
            recorded for others.
        images: show the images of records that only list them (GTA's) behind the first question,
            for vision-language models; `images` of a data source says where they lie.
    """

    source: list[str]
    out: str
    provenance: str | None = None
    images: bool = False

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "source", self.source, "at least one file")
        require(
            self.provenance in (None, *PROVENANCES),
            "provenance",
            self.provenance,
            f"one of {', '.join(PROVENANCES)}, or null",
        )


@dataclass(frozen=True)
class DataExportConfig:
    """Records in the official schema.

    Args:
        source: .json or .jsonl files.
        out: .json (a list) or .jsonl file.
        turns: "official" writes role/content; "source" restores the turns of imported records.
    """

    source: list[str]
    out: str
    turns: str = "official"

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "source", self.source, "at least one file")
        require(self.out.endswith((".json", ".jsonl")), "out", self.out, ".json or .jsonl")
        require(self.turns in ("official", "source"), "turns", self.turns, "official or source")


@dataclass(frozen=True)
class DataMineConfig:
    """Natural recoveries in trajectories: OUT/mined.jsonl, pending.jsonl and mine_report.json.

    Args:
        source: .json or .jsonl files with trajectories.
        out: folder of the records.
    """

    source: list[str]
    out: str

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "source", self.source, "at least one file")


@dataclass(frozen=True)
class DataVerifyConfig:
    """One line a problem; fails if there is any. Verify together what is trained on together.

    Args:
        files: .json or .jsonl records.
        max_share: evidence is rare if at most this share of the other observations (or one of
            them) holds what it cites.
        execute: execute the calls of records that say on which files they ran.
    """

    files: list[str]
    max_share: float = 0.05
    execute: bool = True

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "files", self.files, "at least one file")
        require(0 <= self.max_share < 1, "max_share", self.max_share, "a share below 1")


@dataclass(frozen=True)
class DataStatsConfig:
    """Counts and lengths.

    Args:
        files: .json or .jsonl records.
        tokenizer: Hugging Face name or path; counts tokens as well.
    """

    files: list[str]
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "files", self.files, "at least one file")


@dataclass(frozen=True)
class TableConfig:
    """Which near-misses the types of the tools' parameters allow. There is nothing to choose."""
