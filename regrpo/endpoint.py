"""A JSON endpoint that may be slow, busy or down: what may work when it is repeated is repeated."""

import asyncio
import email.utils
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import httpx

from regrpo.errors import RunError

_REPEATABLE = (408, 429)  # and 500 and above
_EXCERPT_CHARS = 160
T = TypeVar("T")


class Patience(Protocol):
    """How long a configuration waits for an endpoint."""

    @property
    def timeout_s(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff_s(self) -> float: ...
    @property
    def max_wait_s(self) -> float: ...
    @property
    def concurrency(self) -> int: ...


class Broken(Exception):
    """A request that may work when it is repeated, after ``wait`` seconds at least."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """Requests to one server.

    Args:
        name: what errors call it.
        key: sent as a bearer token; None sends none. It is never printed.

    Attributes:
        requests, broken, answered: counts, of repeated requests each.
    """

    def __init__(self, name: str, key: str | None, patience: Patience) -> None:
        self.name = name
        self._key = key
        self._patience = patience
        self.requests = self.broken = self.answered = 0
        self._down: RunError | None = None

    def client(self) -> httpx.AsyncClient:
        """For the requests of one event loop, which begin with a clean slate."""
        self._not_before = 0.0
        self._down = None
        self._stopped = asyncio.Event()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self._patience.concurrency)
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits)

    @property
    def down(self) -> RunError | None:
        """Why no further request is made."""
        return self._down

    async def repeat(self, attempt: Callable[[], Awaitable[T]], seed: str) -> T:
        """What ``attempt`` returns, again and again while it raises ``Broken``.

        Args:
            seed: of the waits.

        Raises:
            RunError: it went on being broken, or the endpoint is down.
        """
        patience, answered = self._patience, self.answered
        rng = random.Random(seed)
        for number in range(patience.retries + 1):
            await self._pause(self._not_before - time.monotonic())
            if self._down is not None:
                raise self._down
            self.requests += 1
            try:
                result = await asyncio.wait_for(attempt(), patience.timeout_s)
                self.answered += 1
                return result
            except asyncio.TimeoutError:
                broken = Broken(f"no whole answer within {patience.timeout_s} s")
            except Broken as error:
                broken = error
            self.broken += 1
            limit = patience.max_wait_s
            if broken.wait > limit:
                raise self.stop(
                    f"{broken}, asks to wait {broken.wait:.0f} s; max_wait_s is {limit}"
                )
            if broken.wait:  # a limit of requests is one for all
                self._not_before = max(self._not_before, time.monotonic() + broken.wait)
            if number < patience.retries:
                backoff = patience.backoff_s * 2**number * rng.uniform(0.5, 1.0)
                await self._pause(min(backoff, limit))
        reason = f"{broken} ({patience.retries + 1} attempts)"
        if self.answered == answered:  # nor did anybody else get an answer meanwhile
            raise self.stop(reason)
        raise self.failed(reason)

    async def _pause(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def failed(self, reason: str) -> RunError:
        """The error of a request."""
        return RunError(f"{self.name}: {reason}")

    def stop(self, reason: str) -> RunError:
        """The error of a request, after which no further one is made."""
        self._down = self.failed(reason)
        self._stopped.set()
        return self._down

    async def post(self, client: httpx.AsyncClient, url: str, body: bytes) -> httpx.Response:
        """The response, of any status that a repetition would not change.

        Raises:
            Broken: another status, no connection, a broken one, or a torn body.
        """
        return await self._send(client.post(url, content=body))

    async def get(self, client: httpx.AsyncClient, url: str) -> httpx.Response:
        """See ``post``."""
        return await self._send(client.get(url))

    async def _send(self, request: Awaitable[httpx.Response]) -> httpx.Response:
        try:
            response = await request
        except httpx.RequestError as error:
            raise Broken(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code in _REPEATABLE or response.status_code >= 500:
            wait = retry_after(response.headers.get("Retry-After", ""))
            raise Broken(self.status(response), wait)
        return response

    def status(self, response: httpx.Response) -> str:
        """Its status and the beginning of its text."""
        return f"status {response.status_code}: {self.excerpt(response.text)}"

    def excerpt(self, text: str) -> str:
        """The beginning of what the endpoint said, fit for one line, never with the key."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(line.split())[:_EXCERPT_CHARS] or "(nothing)"


def read_key(option: str, variable: str | None) -> str | None:
    """The key in an environment variable that an option names; None without a variable.

    Raises:
        RunError: there is none, or no key can look like that.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RunError(f"{option}: the environment variable {variable} is not set")
    if re.fullmatch(r"[!-~]+", key) is None:
        raise RunError(f"{option}: the value of {variable} has characters that no key has")
    return key


def retry_after(value: str) -> float:
    """Seconds from a Retry-After header: a number or a date (RFC 9110); 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
