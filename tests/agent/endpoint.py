"""A local chat-completions endpoint that misbehaves as it is told, on a real socket."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, tokens=(100, 10), **fields):
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"choices": [{"message": {"content": content}}], "usage": usage, **fields}


def quoting(body):
    """What an able teacher answers: the first line of the observation, the corrected call."""
    text = body["messages"][1]["content"]
    text = text if isinstance(text, str) else text[0]["text"]
    observation = text.split("Observation:\n", 1)[1]
    call = text.rsplit("Corrected call: ", 1)[1]
    plan = f"call {call.split('(')[0]} as {call}"
    return json.dumps({"evidence": observation.splitlines()[0], "fix_plan": plan})


class Endpoint:
    """Answers each request by the next of ``script``, then by ``default``.

    An answer is a function of the handler and the body.
    """

    def __init__(self):
        self.script = []
        self.default = answer()
        self.bodies = []
        self.headers = []
        self.active = self.most_active = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.bodies.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.active += 1
                    endpoint.most_active = max(endpoint.most_active, endpoint.active)
                    respond = endpoint.script.pop(0) if endpoint.script else endpoint.default
                try:
                    respond(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client gave up
                finally:
                    with endpoint._lock:
                        endpoint.active -= 1

            def do_GET(self):
                endpoint.get(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def get(self, handler):
        _send(handler, 404, b"not found")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _send(handler, status, data, headers=(), length=None):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def answer(content=quoting, **fields):
    """A chat completion; ``content`` is text or a function of the request."""

    def respond(handler, body):
        text = content(body) if callable(content) else content
        _send(handler, 200, json.dumps(completion(text, **fields)).encode())

    return respond


def status(code, text="no", **headers):
    return lambda handler, body: _send(
        handler, code, text.encode(), [(k.replace("_", "-"), v) for k, v in headers.items()]
    )


def torn(handler, body):
    """Fewer bytes than announced, then the connection ends."""
    data = json.dumps(completion(quoting(body))).encode()
    _send(handler, 200, data[: len(data) // 2], length=len(data))
    handler.close_connection = True


def raw(text):
    return lambda handler, body: _send(handler, 200, text.encode())


def drip(seconds):
    """A byte now and then: no single read ever takes long."""

    def respond(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.01)
        handler.close_connection = True

    return respond


def hang(seconds):
    def respond(handler, body):
        time.sleep(seconds)
        _send(handler, 200, b"{}")

    return respond
