"""Models that can be evaluated: a policy of this project, or any chat-completions endpoint."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from regrpo.benchmarks.episodes import Refused
from regrpo.config.benchmark import EndpointConfig
from regrpo.endpoint import Broken, Endpoint
from regrpo.errors import RunError
from regrpo.image_files import data_url, placeholder
from regrpo.images import read_images
from regrpo.prompts import REFLECTION_OPENER
from regrpo.rollout import Policy
from regrpo.trajectory import Message

_ABOUT_THE_REQUEST = (400, 413, 422)


def with_images(messages: Sequence[Message], files: Sequence[bytes]) -> list[dict[str, Any]]:
    """Messages in which images stand as data URLs where placeholders named them.

    What the model said stays as it is.
    """
    urls = {placeholder(index): data_url(data) for index, data in enumerate(files)}
    names = re.compile(f"({'|'.join(urls)})") if urls else None
    told: list[dict[str, Any]] = []
    for message in messages:
        pieces = names.split(message["content"]) if names else [message["content"]]
        if message["role"] == "assistant" or len(pieces) == 1:
            told.append(dict(message))
            continue
        parts = [
            {"type": "image_url", "image_url": {"url": urls[piece]}}
            if piece in urls
            else {"type": "text", "text": piece}
            for piece in pieces
            if piece.strip()
        ]
        told.append({**message, "content": parts})
    return told


class PolicyChat:
    """A policy (`regrpo.rollout.Policy`) as a chat model.

    Args:
        max_length: tokens of a context, at most; None for no limit.
    """

    def __init__(self, policy: Policy, max_length: int | None = None) -> None:
        self._policy, self._max_length = policy, max_length

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        reflecting: Sequence[bool],
        images: Sequence[Sequence[bytes]],
    ) -> list[str]:
        """See `regrpo.benchmarks.episodes.ChatModel.replies`.

        Raises:
            ValueError: there are images, and the model sees none.
        """
        chat = self._policy.chat
        openers = [REFLECTION_OPENER if opened else "" for opened in reflecting]
        shown = [read_images(chat.reader, files) for files in images]  # held until the end
        prompts = [
            chat.prompt(messages, seen) + chat.encode(opener)
            for messages, opener, seen in zip(conversations, openers, shown, strict=True)
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
        self,
        conversations: Sequence[Sequence[Message]],
        reflecting: Sequence[bool],
        images: Sequence[Sequence[bytes]],
    ) -> list[str]:
        """See `regrpo.benchmarks.episodes.ChatModel.replies`.

        Raises:
            RunError: the endpoint is down.
        """
        told = zip(conversations, images, strict=True)
        return asyncio.run(self._replies([with_images(m, files) for m, files in told]))

    async def _replies(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
        slots = asyncio.Semaphore(self._concurrency)
        async with self._endpoint.client() as client:

            async def one(messages: Sequence[Mapping[str, Any]]) -> str | RunError:
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
