"""A teacher behind an OpenAI-compatible endpoint.

It is asked for the evidence and the plan of a failure whose error type and repair are known, as
JSON of a fixed schema. What it says is checked: the evidence must be quoted from the observation
(or be a path along its ``a -> b`` edges) and the plan must name what the repair uses. An answer
that fails this is asked again with the reason. Every answer is written to a journal before it is
used, so that none is paid for twice.
"""

import asyncio
import email.utils
import hashlib
import json
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
from rich.progress import Progress

from regrpo.config import TeacherConfig
from regrpo.data_engine.teacher import Case, Declined
from regrpo.data_engine.teacher_prompt import SCHEMA, check_answer, question
from regrpo.errors import RunError
from regrpo.journal import Journal
from regrpo.tool_calls import Reflection

_REPEATABLE = (408, 429)  # and 500 and above
_ABOUT_THE_CASE = (400, 413, 422)
_EXCERPT_CHARS = 160


class _Broken(Exception):
    """A request that may work when it is repeated, after `wait` seconds at least."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


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
        self._key = key
        self._answers = answers
        self._known = {entry["key"]: entry for entry in answers.entries}
        self._progress = progress
        self._requests = self._broken = 0
        self._down: RunError | None = None

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
            f"{cost / 1e6:.4f} USD; this time {self._requests} requests, {self._broken} failed"
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
                f"{self._down or left[0]}; {len(left)} of {len(cases)} reflections are left, the "
                "rest is kept, and the same command goes on"
            )
        return [result for result in results if not isinstance(result, RunError)]

    async def _explain(self, cases: Sequence[Case]) -> list[Reflection | Declined | RunError]:
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._not_before = 0.0
        self._down = None
        self._stopped = asyncio.Event()
        bar = self._progress.add_task("teacher", total=len(cases)) if self._progress else None
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"

        limits = httpx.Limits(max_connections=self.config.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

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
                entry = {"key": key, **await self._request(client, body, key)}
                self._answers.append(entry)
                self._known[key] = entry
        return self._known[key]["content"]

    async def _request(self, client: httpx.AsyncClient, body: bytes, key: str) -> dict[str, Any]:
        """One answer, the request repeated where that may help."""
        answered = len(self._known)
        rng = random.Random(f"{self.config.seed}-{key}")
        for attempt in range(self.config.retries + 1):
            await self._pause(self._not_before - time.monotonic())
            if self._down is not None:
                raise self._down
            self._requests += 1
            try:
                return await asyncio.wait_for(self._post(client, body), self.config.timeout_s)
            except asyncio.TimeoutError:
                broken = _Broken(f"no whole answer within {self.config.timeout_s} s")
            except _Broken as error:
                broken = error
            self._broken += 1
            limit = self.config.max_wait_s
            if broken.wait > limit:
                raise self._stop(
                    f"{broken}, asks to wait {broken.wait:.0f} s; max_wait_s is {limit}"
                )
            if broken.wait:  # a limit of requests is one for all
                self._not_before = max(self._not_before, time.monotonic() + broken.wait)
            if attempt < self.config.retries:
                backoff = self.config.backoff_s * 2**attempt * rng.uniform(0.5, 1.0)
                await self._pause(min(backoff, limit))
        reason = f"{broken} ({self.config.retries + 1} attempts)"
        if len(self._known) == answered:  # nor did anybody else get an answer meanwhile
            raise self._stop(reason)
        raise RunError(f"teacher {self._url}: {reason}")

    async def _pause(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _stop(self, reason: str) -> RunError:
        self._down = RunError(f"teacher {self._url}: {reason}")
        self._stopped.set()
        return self._down

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> dict[str, Any]:
        try:
            response = await client.post(self._url, content=body)
        except httpx.RequestError as error:  # no connection, a broken one, or a torn body
            raise _Broken(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        status = response.status_code
        text = f"status {status}: {self._excerpt(response.text)}"
        if status in _REPEATABLE or status >= 500:
            raise _Broken(text, _retry_after(response.headers.get("Retry-After", "")))
        if status in _ABOUT_THE_CASE and self._known:
            raise _Refused(f"status {status}")
        if status != 200:
            raise self._stop(text)
        try:
            data = response.json()
            message, usage = data["choices"][0]["message"], data.get("usage") or {}
            content = message["content"] or ""
            tokens = {n: int(usage.get(n, 0)) for n in ("prompt_tokens", "completion_tokens")}
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            excerpt = self._excerpt(response.text)
            raise _Broken(f"the answer is no chat completion: {excerpt}") from error
        if not isinstance(content, str):
            raise _Broken(f"the answer is no text: {self._excerpt(response.text)}")
        return {"content": content, "usage": tokens}

    def _excerpt(self, text: str) -> str:
        """The beginning of what the endpoint said, fit for one line, never with the key."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(line.split())[:_EXCERPT_CHARS] or "(nothing)"


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None without a variable.

    Raises:
        RunError: there is none, or no key can look like that.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RunError(f"teacher.api_key_env: the environment variable {variable} is not set")
    if re.fullmatch(r"[!-~]+", key) is None:
        raise RunError(
            f"teacher.api_key_env: the value of {variable} has characters that no key has"
        )
    return key


def _retry_after(value: str) -> float:
    """Seconds from a Retry-After header: a number or a date (RFC 9110); 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
