"""Tools on a remote server that speaks AgentLego's protocol (InternLM/agentlego).

A tool is called by ``POST URL/NAME`` with its arguments as a multipart form, images as files. The
answer is JSON: a value, or an image as PNG in base64. Status 400 with ``detail`` is the tool's own
error.
"""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from regrpo.image_files import to_png
from regrpo.tools.gta.drawing import open_image
from regrpo.tools.gta.specs import GtaTool

MAX_BYTES = 64 * 2**20
_EXCERPT = 200


class ServerError(Exception):
    """The server, not the tool, failed; the message names both."""


class ToolServer:
    """One server; for use by several threads.

    Args:
        url: such as http://localhost:16180.
        timeout_s: until one call is given up, however slowly it answers.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._client = httpx.Client(timeout=timeout_s, follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def call(
        self, tool: GtaTool, arguments: dict[str, Any], read: Callable[[str], bytes]
    ) -> str | bytes:
        """What a tool gives: text, or the PNG of an image.

        Args:
            read: the bytes of an image by its path.

        Raises:
            ServerError: no answer in time, or none of this protocol.
            OSError, ValueError: an image cannot be read, or the tool's own error.
        """
        form: list[tuple[str, Any]] = []
        for key, value in arguments.items():
            if key in tool.images:
                form.append((key, (key, read(value))))
            elif value is not None:
                form.append((key, (None, str(value))))
        status, data = self._post(f"{self.url}/{tool.name}", form, tool.name)
        excerpt = " ".join(data[:_EXCERPT].decode(errors="replace").split()) or "(nothing)"
        if status in (400, 422):
            raise ValueError(_detail(data) or excerpt)
        if status != 200:
            raise ServerError(f"tool server, {tool.name}: status {status}: {excerpt}")
        try:
            value = json.loads(data)
            if tool.output == "image":
                return to_png(open_image(base64.b64decode(value, validate=True), "the result"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ServerError(
                f"tool server, {tool.name}: expected "
                f"{'an image in base64' if tool.output == 'image' else 'JSON'}, got {excerpt}"
            ) from error
        return value if isinstance(value, str) else json.dumps(value)

    def _post(self, url: str, form: list[tuple[str, Any]], name: str) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout_s  # of all; httpx's is of a single read
        data = bytearray()
        try:
            with self._client.stream("POST", url, files=form) as response:
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise ServerError(f"tool server, {name}: more than {MAX_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
                return response.status_code, bytes(data)
        except httpx.TimeoutException as error:
            raise ServerError(
                f"tool server, {name}: no whole answer within {self.timeout_s} s"
            ) from error
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServerError(f"tool server, {name}: {reason}") from error


def _detail(data: bytes) -> str:
    """FastAPI's: a text, or a list of what is wrong with the arguments."""
    try:
        detail = json.loads(data)["detail"]
        if isinstance(detail, list):
            return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in detail)
        return str(detail)
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
