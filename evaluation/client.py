"""Asks a chat-completions server about pictures, OpenAI's or any that speaks like it; never loses a reply that was paid for, never asks for it again.

Where it stands: beside annotate.py, which says what to ask and what the replies are worth.

    request ─ room in the budget? ─ POST ─ 200: into the journal, synced to disk, then read; if it can't be read, asked again, --tries times
                                         ─ 429, 5xx, late, cut off: again after a while or Retry-After; in the end set aside until the next start
                                         ─ 400: asked in simpler ways, as servers differ in how they are asked for JSON
                                         ─ 401, 404 and the like: no waiting helps, the run ends

A process that is killed loses what is on its way to it, at most --concurrency replies, and nothing else.
"""

import base64
import fcntl
import http.client
import io
import ipaddress
import json
import os
import random
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

MAX_REPLY = 1 << 20  # bytes; a longer one is no annotation
PATIENCE = 600  # seconds: a server that asks to wait longer ends the run


# ---------------------------------------------------------------------------------------------- a request
@dataclass(frozen=True)
class Request:
    key: str  # what a reply in the journal answers
    name: str  # of the picture, for people who read the journal
    system: str
    user: str
    schema: dict  # of the reply, in JSON Schema
    parse: Callable  # the reply's text -> what it says. Raises ValueError


def strict(properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def body_of(request, args, picture, format="json_schema", limit="max_tokens"):
    """What is posted; `picture` in base64. `format` and `limit` are what servers differ in."""
    formats = {
        "json_schema": {"json_schema": {"name": "reply", "strict": True, "schema": request.schema}},
        "json_object": {},
    }
    content = [
        {"type": "text", "text": request.user},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
    ]
    messages = [{"role": "system", "content": request.system}, {"role": "user", "content": content}]
    body = {"model": args.model, "messages": messages, limit: args.max_tokens}
    return body | (
        {"response_format": {"type": format} | formats[format]} if format in formats else {}
    )


def estimate(request, jpeg):
    """(tokens in, tokens out) to expect: three characters to a token, OpenAI's count for a picture, 250 tokens a language of answer."""
    with Image.open(io.BytesIO(jpeg)) as picture:
        tiles = -(-picture.width // 512) * -(-picture.height // 512)
    return (len(request.system) + len(request.user)) // 3 + 85 + 170 * tiles, 250 * len(
        request.schema["properties"]
    )


def cost(tokens, args):
    return (tokens[0] * (args.price_in or 0) + tokens[1] * (args.price_out or 0)) / 1e6


# ---------------------------------------------------------------------------------------------- the journal
class Journal:
    """Replies, appended one line each and synced before anything else happens. One process at a time; a line cut off by a crash is passed over."""

    def __init__(self, path):
        self.path, self.entries, self.tokens, self.passed_over, self.lock = (
            path,
            defaultdict(list),
            [],
            0,
            threading.Lock(),
        )
        self.file = open(path, "a+b")
        try:
            fcntl.flock(
                self.file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel lets go of it however the process ends
        except OSError:
            raise ValueError(
                f"{path}: another process writes to it; wait for it, or choose another -o"
            ) from None
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the file's name, too, has to outlive a power loss
        os.close(folder)
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        if lines[-1]:
            self.file.write(b"\n")  # the next line isn't glued to one that breaks off
        for line in filter(None, lines):
            try:
                self.remember(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self.passed_over += 1

    def remember(self, entry):
        self.entries[entry["key"]].append(entry)
        if "text" in entry:
            self.tokens.append(tuple(entry["tokens"]))

    def append(self, request, **entry):
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"key": request.key, "image": request.name, "time": now} | entry
        with self.lock:
            self.file.write(to_bytes(entry) + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.remember(entry)

    def outcome(self, request, tries):
        """What is known of a request: (state, value, number of bad replies). State "good": the value is what `parse` makes of the reply; else the state
        is "malformed", "no reply" or what an entry calls it, the value the reason."""
        state, reason, bad = "no reply", "not asked yet", 0
        for entry in self.entries.get(request.key, ()):
            if "text" not in entry:
                state, reason = entry.get("state", "no reply"), entry["failed"]
                continue
            try:
                if entry["fault"]:
                    raise ValueError(entry["fault"])
                return "good", request.parse(entry["text"]), bad
            except ValueError as error:
                bad, reason = bad + 1, str(error)
        return (
            ("malformed", f"{reason} ({bad} replies)", bad)
            if bad >= tries
            else (state, reason, bad)
        )


def to_bytes(record):
    """A record as one line of JSON; half a surrogate pair, which UTF-8 hasn't, stays the escape that it came as."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------- the endpoint
class Stop(Exception):
    """The run has to end here, in order; the message says why."""


class Endpoint:
    """One chat-completions server: how to ask it, what it has cost, what it understands, when it wants to be left alone. `args`: the options."""

    def __init__(self, args, secret, journal):
        self.args, self.secret, self.journal, self.url = (
            args,
            secret,
            journal,
            check_url(args.base_url, args.insecure),
        )
        self.lock, self.stop, self.why = threading.Lock(), threading.Event(), "stopped"
        self.pause_until, self.failures, self.sent, self.in_flight = 0.0, 0, 0, 0
        self.spent = sum(cost(tokens, args) for tokens in journal.tokens)
        self.format, self.limit, self.understood = "json_schema", "max_tokens", False

    def ask(self, request, jpeg):
        """Asks until the journal holds a good reply, or --tries bad ones; without a whole one it sets the request aside. Waits longer each time."""
        args, picture = self.args, base64.b64encode(jpeg).decode()
        tried, status, reason = self.journal.outcome(request, args.tries)[2], None, ""
        while tried < args.tries:
            if status is not None:
                self.wait(min(60, args.backoff * 2 ** (tried - 1)) * random.uniform(0.5, 1.5))
            self.wait(self.pause_until - time.monotonic())
            format, limit = self.format, self.limit
            status, headers, payload = self.send(
                request, jpeg, json.dumps(body_of(request, args, picture, format, limit)).encode()
            )
            tried += 1
            if status == 200:
                self.understood = True
                state, reason, _ = self.journal.outcome(request, args.tries)
                if state == "good":
                    self.failures = 0
                    return
                continue
            reason = (
                f"HTTP {status}: {self.one_line(payload)}" if status else self.one_line(payload)
            )
            if status in (0, 408, 409, 425, 429) or status >= 500:
                if (asked := retry_after(headers)) > PATIENCE:
                    self.end(
                        f"the server asks to wait {asked:,.0f} seconds; start the same line again then"
                    )
                self.pause_until = max(
                    self.pause_until, time.monotonic() + asked
                )  # the limit is for all requests, not for this one
            elif status not in (400, 413, 415, 422):
                hints = {
                    401: f"; is the key in ${args.key_env} right?",
                    404: "; are --base-url, which mostly ends in /v1, and --model right?",
                }
                self.end(f"{args.base_url} answers {reason}{hints.get(status, '')}")
            elif not self.understood and self.speak_simpler(reason, format, limit):
                tried, status = tried - 1, None
            else:
                break
        if status != 200:
            self.journal.append(request, failed=reason)
        with self.lock:
            self.failures += 1
            if self.failures >= 10:
                self.end(f"10 requests in a row came to nothing, the last one for: {reason}")

    def send(self, request, jpeg, body):
        """(status, headers, payload) of one request; a reply is counted and in the journal by then. Status 0: no whole answer came."""
        most = self.reserve(request, jpeg)
        try:
            status, headers, payload = self.post(body)
        except (OSError, http.client.HTTPException) as error:
            status, headers, payload = 0, {}, f"{type(error).__name__}: {error}"
        if status == 200 and payload.lstrip().startswith(b'{"error"'):
            status = 502  # some gateways pass a server's error on like this
        text, fault, tokens = (
            open_reply(payload, estimate(request, jpeg)) if status == 200 else (None, None, (0, 0))
        )
        with self.lock:
            self.in_flight, self.spent = self.in_flight - most, self.spent + cost(tokens, self.args)
        if status == 200:
            self.journal.append(
                request, text=self.hide(text), fault=self.hide(fault), tokens=tokens
            )
        return status, headers, payload

    def reserve(self, request, jpeg):
        """Waits for room in the budget for one more request beside those under way; returns what it may cost at most."""
        args, known = self.args, estimate(request, jpeg)[0]
        while True:
            with self.lock:
                self.wait(0)
                if args.max_requests is not None and self.sent >= args.max_requests:
                    self.end(f"--max-requests {args.max_requests:,} reached")
                most = cost(
                    (
                        max([known] + [tokens[0] for tokens in self.journal.tokens[-100:]]),
                        args.max_tokens,
                    ),
                    args,
                )
                if args.max_cost is None or self.spent + self.in_flight + most <= args.max_cost:
                    self.sent, self.in_flight = self.sent + 1, self.in_flight + most
                    return most
                if self.in_flight < 1e-12:
                    self.end(
                        f"--max-cost {args.max_cost:g} reached: {self.spent:.4f} spent, one more request may cost {most:.4f}"
                    )
            self.wait(0.05)  # those under way may cost less than the most

    def post(self, body):
        """(status, headers, payload). Raises OSError or HTTPException where no whole answer came in time. Follows no redirect, knows no proxy."""
        url, deadline = self.url, time.monotonic() + self.args.timeout
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname, url.port, timeout=self.args.timeout)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        )
        try:
            connection.request("POST", url.path.rstrip("/") + "/chat/completions", body, headers)
            response, payload = connection.getresponse(), b""
            while len(payload) <= MAX_REPLY and (
                part := response.read1(1 << 16)
            ):  # of a longer one no more is read: `open_reply` refuses it
                payload += part
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer drips in too slowly")
            if response.length and len(payload) <= MAX_REPLY:
                raise http.client.IncompleteRead(payload, response.length)
            return response.status, response.headers, payload
        finally:
            connection.close()

    def speak_simpler(self, reason, format, limit):
        """After a refusal, before any success: goes on to the next way of saying the same. False if there is none."""
        with self.lock:
            if (format, limit) != (self.format, self.limit):
                return True  # another thread has found out already
            if "max_completion_tokens" in reason and limit == "max_tokens":
                self.limit = "max_completion_tokens"
            elif format != "text":
                self.format = {"json_schema": "json_object", "json_object": "text"}[format]
            else:
                return False
        tqdm.write(
            f"the server refuses the request ({reason}): trying {self.limit}, {self.format}",
            file=sys.stderr,
        )
        return True

    def end(self, why):
        """Nothing more is sent; every thread stops, for the same reason."""
        self.why = self.why if self.stop.is_set() else why
        self.stop.set()
        raise Stop(self.why)

    def wait(self, seconds):
        if self.stop.wait(max(0, seconds)):
            raise Stop(self.why)

    def hide(self, text):
        return text.replace(self.secret, "***") if self.secret and text else text

    def one_line(self, text):
        """What a server or an exception says, fit to be printed: short, without control characters, without the key."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return self.hide("".join(c if c.isprintable() else " " for c in str(text)[:2000]))[
            :200
        ].strip()


def check_url(base, insecure):
    url = urlsplit(base)
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or url.query
        or url.fragment
        or "@" in url.netloc
    ):
        raise ValueError(
            "--base-url must look like https://host/v1, without a name, key or query in it"
        )
    try:
        local = url.hostname == "localhost" or ipaddress.ip_address(url.hostname).is_loopback
    except ValueError:
        local = False
    if url.scheme == "http" and not local and not insecure:
        raise ValueError(
            f"--base-url {base} is neither https nor this machine: pictures and key would travel in the open; --insecure allows it"
        )
    return url


def retry_after(headers):
    """Seconds that the header asks for, given as a number or a date; 0 where it says nothing of use."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        return (
            float(value)
            if re.fullmatch(r"\d{1,9}(\.\d+)?", value)
            else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        )
    except (ValueError, TypeError, OverflowError):
        return 0.0


def open_reply(payload, guess):
    """(text, fault, [tokens in, out]) of a server's answer: what the model wrote, why that can't be used, what it cost (a guess if it doesn't say)."""
    text, fault, used = None, None, None
    try:
        if len(payload) > MAX_REPLY:
            return None, f"longer than {MAX_REPLY:,} bytes", list(guess)
        reply = json.loads(payload)
        used, choice = reply.get("usage"), reply["choices"][0]
        text = choice["message"].get("content")
        if choice["message"].get("role", "assistant") != "assistant":
            fault = "the message is not the assistant's"
        elif choice.get("finish_reason") == "length":
            fault = "cut off: --max-tokens or the server's context is too small"
        elif not isinstance(text, str) or not text.strip():
            thought = choice["message"].get("reasoning_content") or choice["message"].get(
                "reasoning"
            )
            fault = f"no text: {str(choice['message'].get('refusal') or ('only reasoning; turn it off' if thought else 'empty'))[:200]}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        fault = f"not a chat completion: {payload[:150].decode('utf-8', 'replace')!r}"
    counts = [
        used.get(name) if isinstance(used, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    return (
        text if isinstance(text, str) else None,
        fault,
        [n if type(n) is int and 0 <= n < 10**8 else g for n, g in zip(counts, guess)],
    )
