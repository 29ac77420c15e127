"""A teacher behind an OpenAI-compatible endpoint.

It is asked for the evidence and the plan of a failure whose error type and repair are known, as
JSON of a fixed schema. What it says is checked: the evidence must be quoted from the observation
(or be a path along its ``a -> b`` edges) and the plan must name what the repair uses. An answer
that fails this is asked again with the reason. Every answer is written to a journal before it is
used, so that none is paid for twice.
"""

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import httpx
from rich.progress import Progress

from regrpo.config import TeacherConfig
from regrpo.data_engine.teacher import Case, Declined
from regrpo.data_engine.teacher_prompt import SCHEMA, check_answer, question
from regrpo.endpoint import Broken, Endpoint
from regrpo.errors import RunError
from regrpo.journal import Journal
from regrpo.tool_calls import Reflection

_ABOUT_THE_CASE = (400, 413, 422)


class _Refused(Exception):
    """A request that the endpoint does not take, while it takes others."""


class OpenAITeacher:
    """A `Teacher` that asks an endpoint.

    A case that gets no answer however often it is repeated is left, and the others go on. When
    nothing is answered at all any more, no further request is made.
    """

    def __init__(
        self,
        config: TeacherConfig,
        key: str | None,
        answers: Journal,
        progress: Progress | None = None,
    ) -> None:
        """`answers` holds what the endpoint answered in former runs, and takes what it says now."""
        self.config = config
        self._url = f"{(config.base_url or '').rstrip('/')}/chat/completions"
        self._endpoint = Endpoint(f"teacher {self._url}", key, config)
        self._answers = answers
        self._known = {entry["key"]: entry for entry in answers.entries}
        self._progress = progress

    @property
    def usage(self) -> str:
        """Answers, tokens and cost, those of former runs included; requests of this one."""
        known = self._known.values()
        tokens_in, tokens_out = (
            sum(entry["usage"][name] for entry in known)
            for name in ("prompt_tokens", "completion_tokens")
        )
        cost = tokens_in * self.config.input_price + tokens_out * self.config.output_price
        return (
            f"{len(known)} answers, {tokens_in} input and {tokens_out} output tokens, "
            f"{cost / 1e6:.4f} USD; this time {self._endpoint.requests} requests, "
            f"{self._endpoint.broken} failed"
        )

    def explain(self, cases: Sequence[Case]) -> list[Reflection | Declined]:
        """See `Teacher.explain`.

        Raises:
            RunError: some cases got no answer. What was answered is in the journal.
        """
        results = asyncio.run(self._explain(cases))
        left = [result for result in results if isinstance(result, RunError)]
        if left:
            raise RunError(
                f"{self._endpoint.down or left[0]}; {len(left)} of {len(cases)} reflections are "
                "left, the rest is kept, and the same command goes on"
            )
        return [result for result in results if not isinstance(result, RunError)]

    async def _explain(self, cases: Sequence[Case]) -> list[Reflection | Declined | RunError]:
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        bar = self._progress.add_task("teacher", total=len(cases)) if self._progress else None
        async with self._endpoint.client() as client:

            async def one(case: Case) -> Reflection | Declined | RunError:
                async with self._slots:
                    try:
                        result = await self._triplet(client, case)
                    except RunError as error:
                        return error
                if self._progress and bar is not None:
                    self._progress.update(bar, advance=1)
                return result

            return await asyncio.gather(*map(one, cases))

    async def _triplet(self, client: httpx.AsyncClient, case: Case) -> Reflection | Declined:
        messages = question(case, images=self.config.images)
        reason = ""
        for _ in range(self.config.asks):
            try:
                content = await self._answer(client, messages)
            except _Refused as error:
                return Declined(f"teacher: {error}")
            checked = check_answer(content, case)
            if isinstance(checked, Reflection):
                return checked
            reason = checked
            messages = [
                *messages,
                {"role": "assistant", "content": content},
                {"role": "user", "content": f"Rejected: {reason}. Answer again."},
            ]
        return Declined(f"teacher: {reason}")

    async def _answer(self, client: httpx.AsyncClient, messages: list[dict[str, Any]]) -> str:
        """What the endpoint says to the messages, now or in a former run."""
        fields: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reflection", "strict": True, "schema": SCHEMA},
            },
        }
        for name in ("temperature", "max_tokens"):
            if getattr(self.config, name) is not None:
                fields[name] = getattr(self.config, name)
        body = json.dumps(fields).encode()
        key = hashlib.sha256(body).hexdigest()  # the same model may move to another address
        async with self._locks[key]:  # two cases alike are one request
            if key not in self._known:
                answer = await self._endpoint.repeat(
                    lambda: self._post(client, body), f"{self.config.seed}-{key}"
                )
                entry = {"key": key, **answer}
                self._answers.append(entry)
                self._known[key] = entry
        return self._known[key]["content"]

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> dict[str, Any]:
        response = await self._endpoint.post(client, self._url, body)
        status = response.status_code
        if status in _ABOUT_THE_CASE and self._known:
            raise _Refused(f"status {status}")
        if status != 200:
            raise self._endpoint.stop(self._endpoint.status(response))
        try:
            data = response.json()
            message, usage = data["choices"][0]["message"], data.get("usage") or {}
            content = message["content"] or ""
            tokens = {n: int(usage.get(n, 0)) for n in ("prompt_tokens", "completion_tokens")}
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            excerpt = self._endpoint.excerpt(response.text)
            raise Broken(f"the answer is no chat completion: {excerpt}") from error
        if not isinstance(content, str):
            raise Broken(f"the answer is no text: {self._endpoint.excerpt(response.text)}")
        return {"content": content, "usage": tokens}
