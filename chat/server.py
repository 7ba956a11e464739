"""HTTP for the page and OpenAI's chat completions: who may ask, and what is sent.

Nothing is fetched, logged or served by path. One request at a time has the model, the others wait;
where too many wait, the answer is 429. Who hangs up stops the answer.
"""

import contextlib
import hmac
import http.server
import ipaddress
import json
import os
import re
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

from chat.requests import read_part, read_request

MAX_BODY = 16 << 20  # bytes; a photo of a phone has 2 to 8 million
MAX_WAITING = 64  # requests for the model
MAX_CONNECTIONS = 128
READ_SECONDS = 30  # for a whole request
SILENCE_SECONDS = 10  # without a byte, either way

PAGE = {"/": "page.html", "/page.css": "", "/page.js": "", "/server_engine.js": ""}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class Refused(Exception):
    """(HTTP status, reason)"""


class Server(socketserver.ThreadingTCPServer):
    """Answers for one Answerer. Port 0: a free one. Without a token, anyone on `host` may ask."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS
    allow_reuse_address = os.name == "posix"  # on Windows, two servers could share a port

    def __init__(self, answerer, host="127.0.0.1", port=0, token=None):
        self.answerer, self.token = answerer, token
        self.names = {"127.0.0.1", "localhost", "[::1]", socket.gethostname().lower()}
        self.model_lock = threading.Lock()
        self.places = threading.BoundedSemaphore(MAX_WAITING)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        folder = Path(__file__).parent
        self.page = {url: folder / (name or url[1:]) for url, name in PAGE.items()}
        self.page = {url: (path.read_bytes(), path.suffix) for url, path in self.page.items()}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def process_request(self, request, client_address):
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        super().process_request_thread(request, client_address)
        self.connections.release()

    def handle_error(self, request, client_address):
        """A client that hung up is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, one request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "chat", ""
    timeout = SILENCE_SECONDS

    def setup(self):
        super().setup()
        # Bytes that drip in never meet the timeout.
        self.deadline = threading.Timer(READ_SECONDS, self.hang_up)
        self.deadline.daemon = True
        self.deadline.start()
        self.is_streaming = False

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        """Nothing is logged."""

    # -------------------------------------------------------------------------------- requests
    def do_GET(self):
        self.reply_to({"/x/info": self.send_info, "/v1/models": self.send_models})

    def do_POST(self):
        complete, pieces, heat = self.complete, self.send_pieces, self.send_heat
        self.reply_to({"/v1/chat/completions": complete, "/x/pieces": pieces, "/x/heat": heat})

    def reply_to(self, routes):
        try:
            self.check_sender()
            if self.command == "GET" and self.path in self.server.page:
                content, suffix = self.server.page[self.path]
                self.send(200, content, f"{TYPES[suffix[1:]]}; charset=utf-8")
            elif self.command == "GET" and self.path == "/health":
                self.send_json({"status": "ok"})
            elif self.path not in routes:
                raise Refused(404, "no such address, or another method")
            else:
                self.check_token()
                routes[self.path]()
        except Refused as refused:
            self.send_failure(*refused.args)
        except ValueError as error:
            self.send_failure(400, str(error))
        except OSError:  # the client is gone, or too slow
            return
        except Exception:
            traceback.print_exc()
            self.send_failure(500, "the server failed; its terminal says how")

    def check_sender(self):
        """A page of another site must not ask, not even if its name leads to this machine."""
        self.close_connection = True
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = re.sub(r":\d+$", "", host)
        if name not in self.server.names and not (self.server.token and is_address(name)):
            raise Refused(403, "Host: must be this machine's address")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, "Origin: only this server's own page may ask")

    def check_token(self):
        given = self.headers.get("Authorization", "").encode()
        token = self.server.token
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(401, "Authorization: must be Bearer and the token of this server")

    def read_json(self):
        """The JSON object in the body. Its size is checked before a byte is read."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type: must be application/json")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not re.fullmatch(
            "[0-9]{1,12}", ",".join(lengths)
        ):
            raise Refused(411, "Content-Length: must be the size of the body")
        if int(lengths[0]) > MAX_BODY:
            raise Refused(413, f"the body has {lengths[0]} bytes, the limit is {MAX_BODY}")
        body = self.rfile.read(int(lengths[0]))
        self.deadline.cancel()
        if len(body) < int(lengths[0]):
            raise Refused(400, "the body is shorter than Content-Length")
        try:
            body = json.loads(body)
        except RecursionError:
            body = None
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return body

    # -------------------------------------------------------------------------------- replies
    def send(self, status, content, content_type="application/json"):
        self.start(status, content_type, {"Content-Length": str(len(content))})
        self.wfile.write(content)

    def start(self, status, content_type, headers):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, value, status=200):
        self.send(status, json.dumps(value).encode())

    def send_failure(self, status, reason):
        """An error as OpenAI's servers send it; in a stream, as its last event."""
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        error = {"error": {"message": reason, "type": kind, "param": None, "code": None}}
        with contextlib.suppress(OSError):
            if self.is_streaming:
                self.send_event(error)
            else:
                self.send_json(error, status)
                self.drain()

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses: no HTML."""
        self.close_connection = True
        self.send_failure(code, message or "can't be read")

    def drain(self):
        """Read what is still coming, for a while: closing at once would cancel the reply."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        left = MAX_BODY
        while left > 0 and (part := self.connection.recv(1 << 16)):
            left -= len(part)

    def send_event(self, value):
        data = value if isinstance(value, str) else json.dumps(value)
        self.wfile.write(f"data: {data}\n\n".encode())

    def check_connected(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    # -------------------------------------------------------------------------------- the model
    @contextlib.contextmanager
    def turn(self):
        """Wait for the model."""
        if not self.server.places.acquire(blocking=False):
            raise Refused(429, f"{MAX_WAITING} requests are waiting: try again later")
        try:
            while not self.server.model_lock.acquire(timeout=0.2):
                self.check_connected()
            try:
                yield self.server.answerer
            finally:
                self.server.model_lock.release()
        finally:
            self.server.places.release()

    def check_stage(self, stage):
        if not isinstance(stage, str) or stage not in self.server.answerer.stages:
            raise Refused(404, f"model: must be one of {', '.join(self.server.answerer.stages)}")

    def send_info(self):
        self.send_json(self.server.answerer.info)

    def send_models(self):
        stages = self.server.answerer.stages
        models = [{"id": name, "object": "model", "owned_by": "this server"} for name in stages]
        self.send_json({"object": "list", "data": [each | {"created": 0} for each in models]})

    def send_pieces(self):
        text = self.read_json().get("text")
        if not isinstance(text, str) or len(text) > 10_000:
            raise ValueError("text: must be a text of at most 10,000 characters")
        self.send_json(self.server.answerer.pieces(text))

    def send_heat(self):
        body, images = self.read_json(), []
        self.check_stage(body.get("model"))
        read_part({"type": "image_url", "image_url": body.get("image")}, images)
        if not isinstance(body.get("word"), str) or len(body["word"]) > 1000:
            raise ValueError("word: must be a text of at most 1,000 characters")
        with self.turn() as answerer:
            found = answerer.heat(body["model"], body["word"], *images)
        self.send_json(found)

    def complete(self):
        body = self.read_json()
        request = read_request(body, self.server.answerer.info["stage"])
        self.check_stage(request.stage)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        head |= {"created": int(time.time()), "model": request.stage}
        with self.turn() as answerer, contextlib.closing(answerer.answer(request)) as events:
            if body.get("stream") is True:
                options = body.get("stream_options")
                wants_usage = isinstance(options, dict) and options.get("include_usage") is True
                return self.stream(head, events, wants_usage)
            text = ""
            for event in events:
                self.check_connected()
                text += event["text"]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice |= {"finish_reason": event["finish"], "logprobs": None}
        self.send_json(head | {"choices": [choice], "usage": event["usage"]})

    def stream(self, head, events, wants_usage):
        """Server-sent events. A wrong request is refused before the first."""
        head["object"] = "chat.completion.chunk"
        for event in events:
            self.check_connected()
            delta = {"content": event["text"]}
            if not self.is_streaming:
                delta["role"] = "assistant"
                self.start(200, "text/event-stream; charset=utf-8", {})
                self.is_streaming = True
            choice = {"index": 0, "delta": delta, "finish_reason": event.get("finish")}
            token = {"token": event["token"]} if event["token"] else {}
            self.send_event(head | {"choices": [choice]} | token)
        if wants_usage:
            self.send_event(head | {"choices": [], "usage": event["usage"]})
        self.send_event("[DONE]")


def is_address(name):
    """Whether a Host is an address in numbers: no other site's name."""
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
