"""Evaluation on public benchmarks."""

from dataclasses import dataclass, field

from regrpo.config.checks import require, require_url, require_variable

BENCHMARKS = ("gta", "gaia")


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint whose chat model is evaluated.

    Args:
        base_url: such as https://api.openai.com/v1, asked at base_url/chat/completions; null
            evaluates a model of this project instead.
        api_key_env: environment variable that holds the key; null sends none. The key itself is
            neither stored nor printed.
        limit_name: the endpoint's name for the limit of a turn: max_tokens or
            max_completion_tokens.
        concurrency: requests under way at a time.
        timeout_s: seconds until one request is given up.
        retries: how often a request is repeated that was refused, broken, or too slow.
        backoff_s: seconds before the first repetition; they double, less a seeded part.
        max_wait_s: longest wait, the endpoint's own Retry-After included.
    """

    base_url: str | None = None
    api_key_env: str | None = None
    limit_name: str = "max_tokens"
    concurrency: int = 8
    timeout_s: float = 300.0
    retries: int = 5
    backoff_s: float = 1.0
    max_wait_s: float = 120.0

    def __post_init__(self) -> None:
        require_url("bench.endpoint.base_url", self.base_url)
        require_variable("bench.endpoint.api_key_env", self.api_key_env)
        names = ("max_tokens", "max_completion_tokens")
        require(
            self.limit_name in names,
            "bench.endpoint.limit_name",
            self.limit_name,
            " or ".join(names),
        )
        for name, least in (("concurrency", 1), ("retries", 0)):
            value = getattr(self, name)
            require(value >= least, f"bench.endpoint.{name}", value, f"{least} or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            value = getattr(self, name)
            require(value > 0, f"bench.endpoint.{name}", value, "a positive number")


@dataclass(frozen=True)
class BenchmarkConfig:
    """How a benchmark is run.

    Args:
        mode: GTA step by step (step: every reference prefix is continued by one turn), end to end
            (end), or both.
        scorer: whose numbers the tables show (GTA): official, mat or fixed; report.json has all
            three.
        similarity: sentence-embedding model that compares an answer with reference texts, such as
            sentence-transformers/all-mpnet-base-v2; null: see `regrpo/benchmarks/answers.py`.
        limit: the first tasks only; null for all.
        max_steps: turns of an episode, at most.
        concurrency: episodes under way at a time.
        local_tools: GTA tools that run here: Calculator, Solver, Plot, DrawBox, AddText, OCR. The
            others are replayed, or asked of the server.
        server: address of a tool server that speaks AgentLego's protocol; null replays.
        server_timeout_s: seconds until a call of it is given up.
        tool_timeout_s: seconds of processor time for code of Solver and Plot.
        images: show the images of a task, and those that tools make, to a model that sees.
        endpoint: a chat model behind an endpoint, named by `model`.
    """

    mode: str = "both"
    scorer: str = "fixed"
    similarity: str | None = None
    limit: int | None = None
    max_steps: int = 10
    concurrency: int = 8
    local_tools: tuple[str, ...] = ("Calculator", "Solver")
    server: str | None = None
    server_timeout_s: float = 60.0
    tool_timeout_s: int = 20
    images: bool = False
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        for name, options in (
            ("mode", ("step", "end", "both")),
            ("scorer", ("official", "mat", "fixed")),
        ):
            value = getattr(self, name)
            require(value in options, f"bench.{name}", value, ", ".join(options))
        require(self.limit is None or self.limit > 0, "bench.limit", self.limit, "1 or more, null")
        require_url("bench.server", self.server)
        for name in ("max_steps", "concurrency", "server_timeout_s", "tool_timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"bench.{name}", value, "a positive number")
