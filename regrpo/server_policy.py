"""A policy behind an OpenAI-compatible server that returns token ids and log-probs (vLLM).

Prompts go as token ids and come back as token ids: nothing is tokenised twice. Equal prompts are
one request for several samples, so that a group's context is prefilled once; later turns find what
the server keeps of their prefix. The log-probs are those of the server at sampling, so the
learner's clipped ratio is taken to what really sampled, its numerics included.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
from transformers import PreTrainedTokenizerBase

from regrpo.config import RolloutConfig
from regrpo.endpoint import Broken, Endpoint, read_key
from regrpo.errors import RunError
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat

T = TypeVar("T")


class ServerPolicy:
    """Samples from what a server serves as ``config.model``; see `regrpo.rollout.Policy`.

    Args:
        temperature: 0 is greedy; log-probs are then those of temperature 1.
        max_new_tokens: limit of one turn.
        vocab: ids of the model, which are below it; None does not check.

    Raises:
        RunError: there is no key; or the server is not there, or does not serve ``config.model``.
    """

    what_next = "; see to the server and give the same command again"

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        vocab: int | None = None,
    ):
        assert config.base_url is not None
        self.chat = ChatFormat(tokenizer)
        self.config = config
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.served_name = config.model
        self._vocab = vocab
        self._url = config.base_url.rstrip("/")
        key = read_key("rollout.api_key_env", config.api_key_env)
        self._endpoint = Endpoint(f"rollout server {self._url}", key, config)
        self._seed, self._sessions = seed, 0
        self._run(self._require_served)

    def _run(self, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """Does the work of a coroutine function."""

        async def whole() -> T:
            async with self._endpoint.client() as client:
                return await work(client)

        try:
            return asyncio.run(whole())
        except RunError as error:
            raise RunError(f"{error}{self.what_next}") from error

    async def _served(self, client: httpx.AsyncClient) -> list[str]:
        """Names of the models and adapters that the server has."""

        async def attempt() -> list[str]:
            response = await self._endpoint.get(client, f"{self._url}/models")
            if response.status_code != 200:
                raise self._endpoint.stop(self._endpoint.status(response))
            try:
                return [str(entry["id"]) for entry in response.json()["data"]]
            except (ValueError, RecursionError, LookupError, TypeError) as error:
                said = self._endpoint.excerpt(response.text)
                raise Broken(f"the answer is no list of models: {said}") from error

        return await self._endpoint.repeat(attempt, "models")

    async def _require_served(self, client: httpx.AsyncClient) -> None:
        names = await self._served(client)
        if self.config.model not in names:
            raise self._endpoint.stop(
                f"rollout.model is {self.config.model!r}; the server has {', '.join(names)}"
            )

    def session(self) -> "ServerSession":
        """For trajectories that begin now."""
        self._sessions += 1
        return ServerSession(self, f"{self._seed}-{self._sessions}")

    def complete(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], seed: str
    ) -> list[Sample]:
        """One turn of every trajectory.

        Raises:
            RunError: the server is down, does not know the adapter, or returns something else than
                token ids and their log-probs.
        """
        together: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            together.setdefault(tuple(prompt), []).append(index)
        # Which of equal trajectories gets which sample, and its seed, follow from the numbers.
        groups = [
            (prompt, sorted(rows, key=lambda i: numbers[i])) for prompt, rows in together.items()
        ]

        async def work(client: httpx.AsyncClient) -> list[list[Sample]]:
            slots = asyncio.Semaphore(self.config.concurrency)

            async def one(prompt: tuple[int, ...], rows: list[int]) -> list[Sample]:
                async with slots:
                    return await self._group(
                        client, prompt, len(rows), f"{seed}-{numbers[rows[0]]}"
                    )

            return await asyncio.gather(*(one(prompt, rows) for prompt, rows in groups))

        results: dict[int, Sample] = {}
        for (_, rows), samples in zip(groups, self._run(work), strict=True):
            results |= zip(rows, samples, strict=True)
        return [results[index] for index in range(len(prompts))]

    async def _group(
        self, client: httpx.AsyncClient, prompt: tuple[int, ...], count: int, seed: str
    ) -> list[Sample]:
        """Samples behind one prompt, in one request."""
        greedy = self.temperature == 0  # samples are then all the same
        fields = {
            "model": self.served_name,
            "prompt": list(prompt),
            "n": 1 if greedy else count,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            # A server may take defaults from the model's folder; the learner knows none.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1,
            "ignore_eos": True,
            "stop_token_ids": [self.chat.end_id],
            "skip_special_tokens": False,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        body = json.dumps(fields).encode()

        async def attempt() -> list[Sample]:
            response = await self._endpoint.post(client, f"{self._url}/completions", body)
            if response.status_code != 200:
                raise self._endpoint.stop(self._endpoint.status(response))
            try:
                choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
                if len(choices) != fields["n"]:
                    raise Broken(f"{len(choices)} choices; expected {fields['n']}")
                return [self._sample(choice, prompt) for choice in choices]
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                said = self._endpoint.excerpt(response.text)
                raise Broken(f"the answer is no completion: {said}") from error

        samples = await self._endpoint.repeat(attempt, f"wait-{seed}")
        return samples * count if greedy else samples

    def _sample(self, choice: dict[str, Any], prompt: tuple[int, ...]) -> Sample:
        """A turn from a choice.

        Raises:
            RunError: it is of a server that cannot serve here. LookupError, TypeError, ValueError:
                it is malformed.
        """
        said = choice.get("logprobs") or {}
        values, ids = said.get("token_logprobs"), choice.get("token_ids")
        if ids is None and all(str(t).startswith("token_id:") for t in said.get("tokens") or [""]):
            ids = [int(token.removeprefix("token_id:")) for token in said["tokens"]]
        if ids is None or values is None:
            missing = (
                "log-probs (choices[].logprobs.token_logprobs)"
                if ids is not None
                else ("token ids (choices[].token_ids, or token_id:N in choices[].logprobs.tokens)")
            )
            raise self._endpoint.stop(f"the answer has no {missing}; expected those of vLLM")
        ids, values = [int(token) for token in ids], [float(value) for value in values]
        if not ids or len(ids) != len(values) or not all(map(math.isfinite, values)):
            raise ValueError("token ids without log-probs")
        told = choice.get("prompt_token_ids")
        if told is not None and tuple(told) != prompt:
            raise self._endpoint.stop("the server changed the prompt's token ids")
        if self._vocab is not None and not 0 <= min(ids) <= max(ids) < self._vocab:
            raise self._endpoint.stop(
                f"token id {max(ids)}; the model's vocabulary has {self._vocab}: the server serves "
                "another model"
            )
        end = self.chat.end_id
        complete = ids[-1] == end or len(ids) == self.max_new_tokens
        if len(ids) > self.max_new_tokens or end in ids[:-1] or not complete:
            raise self._endpoint.stop(
                f"a turn of {len(ids)} tokens ends with {ids[-1]}; expected it to end with the "
                f"first {end} (stop_token_ids), or after max_tokens={self.max_new_tokens}"
            )
        return Sample(ids, values)


class ServerSession:
    """Trajectories of one rollout; see `regrpo.rollout.Session`. What is kept of them is the
    server's."""

    def __init__(self, policy: ServerPolicy, seed: str) -> None:
        self._policy = policy
        self._seed = seed
        self._turns = 0

    def generate(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Sample]:
        """One turn of every trajectory; see `regrpo.rollout.Session.generate`."""
        self._turns += 1
        return self._policy.complete(prompts, numbers, f"{self._seed}-{self._turns}")
