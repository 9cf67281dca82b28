"""A chat endpoint in a thread: a real HTTP server whose answers a test writes."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from glm45_jax.data.endpoint import Endpoint


def completion(content, *, reasoning=None, finish="stop"):
    """The body of a good answer."""
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


class Stub:
    """`say(body)` gives a completion's text, a body (dict), raw text (bytes), or
    (status, headers, text). bodies: what was asked, in the order of arrival.
    """

    def __init__(self, say):
        self.say, self.bodies, self.keys, self.paths = say, [], [], []
        self.lock, self.busy, self.most = threading.Lock(), 0, 0

    def answer(self, path, key, raw):
        body = json.loads(raw)
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.paths.append(path)
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            said = self.say(body)
        finally:
            with self.lock:
                self.busy -= 1
        if isinstance(said, tuple):
            return said
        if isinstance(said, bytes):
            return 200, {}, said
        if isinstance(said, str):
            said = completion(said)
        return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()


@contextlib.contextmanager
def serving(say, **fields):
    """(stub, endpoint); `say` may be changed while it runs. Waits are short."""
    stub = Stub(say)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, text = stub.answer(self.path, self.headers["Authorization"], raw)
            if status == 0:  # hang up without an answer
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield stub, Endpoint(**{"url": url, "model": "stub", "backoff_s": 0.01} | fields)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
