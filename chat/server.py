"""HTTP for the page and OpenAI's chat completions: who may ask, and what is sent.

Nothing is fetched, logged, or served by path. One request has the model, others wait; if too many
wait, the reply is 429. A client that hangs up ends its answer.
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

MAX_BODY = 16 << 20  # bytes; a phone's photo has 2 to 8 million
MAX_WAITING = 64  # requests for the model
MAX_CONNECTIONS = 128
READ_SECONDS = 30  # for a whole request
SILENCE_SECONDS = 10  # without a byte, either way

PAGE = {"page.html": "html", "page.css": "css", "page.js": "javascript"}
PAGE["server_engine.js"] = "javascript"
FREE = ("/", "/health", *(f"/{name}" for name in PAGE))  # without a token
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src"
HEADERS = {
    "Content-Security-Policy": f"{POLICY} 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Refused(Exception):
    """(HTTP status, reason)"""


class Server(socketserver.ThreadingTCPServer):
    """Serves one Answerer. Port 0: a free one. Without a token, whoever reaches `host` may ask."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS
    allow_reuse_address = os.name == "posix"  # on Windows, two servers could share a port

    def __init__(self, answerer, host="127.0.0.1", port=0, token=None):
        self.answerer, self.token = answerer, token
        self.names = {"127.0.0.1", "localhost", "[::1]", host, socket.gethostname().lower()}
        self.model_lock = threading.Lock()
        self.places = threading.BoundedSemaphore(MAX_WAITING)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)

        # All that GET can ask for: (content, type) by path.
        model = {"object": "model", "created": 0, "owned_by": "this server"}
        models = [{"id": stage, **model} for stage in answerer.stages]
        values = {"/x/info": answerer.info, "/health": {"status": "ok"}}
        values["/v1/models"] = {"object": "list", "data": models}
        self.documents = {path: (value, "application/json") for path, value in values.items()}
        for name, kind in PAGE.items():
            content = (Path(__file__).parent / name).read_bytes()
            self.documents[f"/{name}"] = content, f"text/{kind}; charset=utf-8"
        self.documents["/"] = self.documents["/page.html"]
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
    timeout = SILENCE_SECONDS
    is_streaming = False

    def setup(self):
        super().setup()
        # Bytes that drip in never meet the timeout.
        self.deadline = threading.Timer(READ_SECONDS, self.hang_up)
        self.deadline.daemon = True
        self.deadline.start()

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def log_message(self, *_):
        """Nothing is logged."""

    def do_GET(self):
        self.reply(self.server.documents, self.send)

    def do_POST(self):
        actions = {"/x/pieces": self.pieces, "/x/heat": self.heat}
        actions["/v1/chat/completions"] = self.complete
        self.reply({path: (action,) for path, action in actions.items()}, self.call)

    def call(self, action):
        if (value := action(self.read_json())) is not None:
            self.send(value)

    def reply(self, known, act):
        """Checks who asks, then calls act(*known[path])."""
        self.close_connection = True
        try:
            self.check_sender()
            if self.path not in known:
                raise Refused(404, "no such address, or not by this method")
            act(*known[self.path])
        except Refused as refused:
            self.send_failure(*refused.args)
        except ValueError as error:
            self.send_failure(400, str(error))
        except OSError:  # the client is gone, or too slow
            pass
        except Exception:
            traceback.print_exc()
            self.send_failure(500, "the server failed; its terminal says how")

    # ------------------------------------------------------------------------------- who asks, what
    def check_sender(self):
        """Another site's page must not ask, not even if that site's name leads to this machine."""
        hosts, token = self.headers.get_all("Host", []), self.server.token
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = re.sub(r":\d+$", "", host)
        if name not in self.server.names and not (token and is_address(name)):
            raise Refused(403, "Host: must be this machine's address")
        if self.headers.get("Origin") not in (None, f"http://{host}"):
            raise Refused(403, "Origin: only this server's own page may ask")

        given = self.headers.get("Authorization", "").encode()
        is_known = not token or hmac.compare_digest(given, f"Bearer {token}".encode())
        if not is_known and not (self.command == "GET" and self.path in FREE):
            raise Refused(401, "Authorization: must be Bearer and the token of this server")

    def read_json(self):
        """The JSON object in the body. Its size is checked before a byte is read."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type: must be application/json")
        length = ",".join(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,12}", length):
            raise Refused(411, "Content-Length: must be the size of the body")
        if int(length) > MAX_BODY:
            raise Refused(413, f"the body has {length} bytes, the limit is {MAX_BODY}")
        body = self.rfile.read(int(length))
        self.deadline.cancel()
        if len(body) < int(length):
            raise ValueError("the body is shorter than Content-Length")
        try:
            body = json.loads(body)
        except RecursionError:
            body = None
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return body

    # -------------------------------------------------------------------------------- what is sent
    def start(self, status, content_type, length=None):
        self.send_response_only(status)
        for name, value in {"Content-Type": content_type, **HEADERS}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()

    def send(self, value, content_type="application/json", status=200):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.start(status, content_type, len(content))
        self.wfile.write(content)

    def send_event(self, value):
        data = value if isinstance(value, str) else json.dumps(value)
        self.wfile.write(f"data: {data}\n\n".encode())

    def send_failure(self, status, reason):
        """An error in OpenAI's form; in a stream it is the last event."""
        kind = "server_error" if status == 500 else "invalid_request_error"
        error = {"error": {"message": reason, "type": kind, "param": None, "code": None}}
        with contextlib.suppress(OSError):
            if self.is_streaming:
                return self.send_event(error)
            self.send(error, status=status)

            # Closing a connection on which bytes still come in would cancel the reply.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(MAX_BODY >> 16):
                if not self.connection.recv(1 << 16):
                    break

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses."""
        self.close_connection = True
        self.send_failure(code, message or "can't be read")

    def check_connected(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    # -------------------------------------------------------------------------------- the model
    @contextlib.contextmanager
    def model(self, stage):
        """Waits until the Answerer is free."""
        server = self.server
        if stage not in list(server.answerer.stages):
            raise Refused(404, f"model: must be one of {', '.join(server.answerer.stages)}")
        if not server.places.acquire(blocking=False):
            raise Refused(429, f"{MAX_WAITING} requests are waiting: try again later")
        try:
            while not server.model_lock.acquire(timeout=0.2):
                self.check_connected()
            try:
                yield server.answerer
            finally:
                server.model_lock.release()
        finally:
            server.places.release()

    def pieces(self, body):
        return self.server.answerer.pieces(read_text(body, "text"))

    def heat(self, body):
        images, word = [], read_text(body, "word")
        read_part({"type": "image_url", "image_url": body.get("image")}, images)
        with self.model(body.get("model")) as answerer:
            return answerer.heat(body["model"], word, *images)

    def complete(self, body):
        request = read_request(body, self.server.answerer.info["stage"])
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        head |= {"created": int(time.time()), "model": request.stage}
        with self.model(request.stage) as answerer:
            with contextlib.closing(answerer.answer(request)) as events:
                if body.get("stream") is True:
                    return self.stream(head, events, body.get("stream_options"))
                text = ""
                for event in events:
                    self.check_connected()
                    text += event["text"]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": event["finish"]}
        return head | {"choices": [choice], "usage": event["usage"]}

    def stream(self, head, events, options):
        """Server-sent events. A wrong request fails before the first one."""
        head["object"] = "chat.completion.chunk"
        for event in events:
            self.check_connected()
            delta = {"content": event["text"]}
            if not self.is_streaming:
                self.start(200, "text/event-stream; charset=utf-8")
                self.is_streaming = True
                delta["role"] = "assistant"
            choice = {"index": 0, "delta": delta, "finish_reason": event.get("finish")}
            token = {"token": event["token"]} if event["token"] else {}
            self.send_event(head | {"choices": [choice]} | token)
        if isinstance(options, dict) and options.get("include_usage") is True:
            self.send_event(head | {"choices": [], "usage": event["usage"]})
        self.send_event("[DONE]")


def read_text(body, name):
    if not isinstance(body.get(name), str) or len(body[name]) > 10_000:
        raise ValueError(f"{name}: must be a text of at most 10,000 characters")
    return body[name]


def is_address(name):
    """Whether a Host is an address in numbers, and so no other site's name."""
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
