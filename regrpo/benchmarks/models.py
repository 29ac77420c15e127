"""Models that can be evaluated: a policy of this project, or any chat-completions endpoint."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx

from regrpo.benchmarks.episodes import Refused
from regrpo.config.benchmark import EndpointConfig
from regrpo.endpoint import Broken, Endpoint
from regrpo.errors import RunError
from regrpo.prompts import REFLECTION_OPENER
from regrpo.rollout import Policy
from regrpo.trajectory import Message

_ABOUT_THE_REQUEST = (400, 413, 422)


class PolicyChat:
    """A policy (`regrpo.rollout.Policy`) as a chat model.

    Args:
        max_length: tokens of a context, at most; None for no limit.
    """

    def __init__(self, policy: Policy, max_length: int | None = None) -> None:
        self._policy, self._max_length = policy, max_length

    def replies(
        self, conversations: Sequence[Sequence[Message]], reflecting: Sequence[bool]
    ) -> list[str]:
        """See `regrpo.benchmarks.episodes.ChatModel.replies`."""
        chat = self._policy.chat
        openers = [REFLECTION_OPENER if opened else "" for opened in reflecting]
        prompts = [
            chat.prompt(messages) + chat.encode(opener)
            for messages, opener in zip(conversations, openers, strict=True)
        ]
        limit = self._max_length
        fits = [i for i, p in enumerate(prompts) if limit is None or len(p) < limit]
        texts: list[str] = [Refused("its context was full")] * len(prompts)
        if fits:
            # A session of one turn: episodes come and go, and sessions know theirs beforehand.
            samples = self._policy.session().generate([prompts[i] for i in fits], fits)
            for i, sample in zip(fits, samples, strict=True):
                texts[i] = chat.segment(sample.ids, openers[i])[0]
        return texts


class EndpointChat:
    """A model behind an OpenAI-compatible endpoint.

    A request that the endpoint does not take ends its episode; when nothing is answered any more,
    `RunError` ends the run, and what has ended is kept.
    """

    def __init__(
        self,
        config: EndpointConfig,
        key: str | None,
        *,
        model: str,
        temperature: float | None,
        max_tokens: int,
        seed: int = 0,
    ) -> None:
        self._url = f"{(config.base_url or '').rstrip('/')}/chat/completions"
        self._fields: dict[str, Any] = {"model": model, config.limit_name: max_tokens}
        if temperature is not None:
            self._fields["temperature"] = temperature
        self._seed = seed
        self._concurrency = config.concurrency
        self._endpoint = Endpoint(f"model {self._url}", key, config)

    def replies(
        self, conversations: Sequence[Sequence[Message]], reflecting: Sequence[bool]
    ) -> list[str]:
        """See `regrpo.benchmarks.episodes.ChatModel.replies`.

        Raises:
            RunError: the endpoint is down.
        """
        return asyncio.run(self._replies(conversations))

    async def _replies(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        slots = asyncio.Semaphore(self._concurrency)
        async with self._endpoint.client() as client:

            async def one(messages: Sequence[Message]) -> str | RunError:
                body = json.dumps({**self._fields, "messages": list(messages)}).encode()
                async with slots:
                    try:
                        return await self._endpoint.repeat(
                            lambda: self._post(client, body), f"{self._seed}-{len(body)}"
                        )
                    except RunError as error:
                        return error

            results = await asyncio.gather(*map(one, conversations))
        failures = [result for result in results if isinstance(result, RunError)]
        if failures and (self._endpoint.down is not None or len(failures) == len(results)):
            raise RunError(f"{self._endpoint.down or failures[0]}; the same command goes on")
        return [
            Refused(f"the endpoint failed: {result}") if isinstance(result, RunError) else result
            for result in results
        ]

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> str:
        endpoint = self._endpoint
        response = await endpoint.post(client, self._url, body)
        if response.status_code in _ABOUT_THE_REQUEST and endpoint.answered:
            return Refused(f"the endpoint refused: {endpoint.status(response)}")
        if response.status_code != 200:
            raise endpoint.stop(endpoint.status(response))
        try:
            content = response.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise Broken(
                f"the answer is no chat completion: {endpoint.excerpt(response.text)}"
            ) from error
        if not isinstance(content, str):
            raise Broken(f"the answer is no text: {endpoint.excerpt(response.text)}")
        return content
