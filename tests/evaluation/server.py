"""A chat endpoint on a free port of this machine that misbehaves as it is told."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

HANG = "hang"  # no answer until the server ends


class Answer(NamedTuple):
    """What the server sends."""

    body: str
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None  # bytes after which the connection is closed


def said(text: str | None, prompt_tokens: int = 10, completion_tokens: int = 5) -> Answer:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop" if text else "content_filter", "message": message}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return Answer(json.dumps(body))


def failure(status: int, code: str = "", retry_after: str | None = None) -> Answer:
    headers = () if retry_after is None else (("Retry-After", retry_after),)
    return Answer(json.dumps({"error": {"message": f"status {status}", "code": code}}), status, headers)


# Prompt, and how often it has come before, to an answer (or HANG).
Behaviour = Callable[[str, int], Answer | str]


class Server(NamedTuple):
    """Where it listens, and what came when."""

    url: str
    calls: Counter[str]  # by prompt
    times: list[tuple[str, float]]  # prompt and seconds, in order
    requests: list[dict]


@contextmanager
def serving(behave: Behaviour) -> Iterator[Server]:
    """The server while it runs."""
    calls: Counter[str] = Counter()
    times: list[tuple[str, float]] = []
    requests: list[dict] = []
    lock, ended = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][0]["content"]
            with lock:
                before = calls[prompt]
                calls[prompt] += 1
                times.append((prompt, time.monotonic()))
                requests.append(request | {"authorization": self.headers.get("Authorization")})
            answer = behave(prompt, before)
            if isinstance(answer, str):
                ended.wait(30)
                self.close_connection = True
                return
            body = answer.body.encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: answer.cut])
            self.close_connection = answer.cut is not None

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """A client that has gone is no news."""

    listener = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{listener.server_port}/v1", calls, times, requests)
    finally:
        ended.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
