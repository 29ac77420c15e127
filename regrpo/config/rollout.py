"""Where trajectories are sampled."""

from dataclasses import dataclass

from regrpo.config.checks import require, require_url, require_variable


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling in this process, or by a server that others run.

    Args:
        backend: "local" samples from the model that is trained; "server" from an OpenAI-compatible
            server (vLLM) that serves its base model and takes the adapter after every update.
        cache_gib: keys and values kept through tool calls, in GiB, at most (local); trajectories
            beyond that compute their context again at every turn.
        base_url: of the server, such as http://localhost:8000/v1.
        model: the server's name of the base model.
        api_key_env: environment variable that holds the server's key; null sends none. The key
            itself is neither stored nor printed.
        processed_log_probs: the server's log-probs are those behind the temperature (vLLM:
            --logprobs-mode processed_logprobs); needed where the temperature of training is not 1.
        adapter_dir: folder where adapters are written for the server, which must see it under the
            same path; null is OUT/adapters.
        concurrency: requests under way at a time.
        timeout_s: seconds until one request is given up.
        retries: how often a request is repeated that was refused, broken, or too slow.
        backoff_s: seconds before the first repetition; they double, less a seeded part.
        max_wait_s: longest wait, the server's own Retry-After included.
    """

    backend: str = "local"
    cache_gib: float = 8.0
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    processed_log_probs: bool = False
    adapter_dir: str | None = None
    concurrency: int = 64
    timeout_s: float = 600.0
    retries: int = 4
    backoff_s: float = 1.0
    max_wait_s: float = 60.0

    def __post_init__(self) -> None:
        backend = self.backend
        require(backend in ("local", "server"), "rollout.backend", backend, "local or server")
        require(self.cache_gib >= 0, "rollout.cache_gib", self.cache_gib, "0 or more")
        require_url("rollout.base_url", self.base_url)
        require_variable("rollout.api_key_env", self.api_key_env)
        for name in ("base_url", "model"):
            value = getattr(self, name)
            given, wanted = value is not None, backend == "server"
            expected = "a value with rollout.backend=server, null without"
            require(given == wanted, f"rollout.{name}", value, expected)
        require(self.concurrency > 0, "rollout.concurrency", self.concurrency, "1 or more")
        require(self.retries >= 0, "rollout.retries", self.retries, "0 or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            value = getattr(self, name)
            require(value > 0, f"rollout.{name}", value, "a positive number")
