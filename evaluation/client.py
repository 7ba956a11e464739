"""The one HTTP client: asks a chat-completions server about images, and never pays twice.

Pipeline: annotation/ and judge.py make requests; this file asks; journal.py keeps the replies. Any
server with OpenAI's interface will do: OpenAI, vLLM, Ollama …

    request ─ room in the budget? ─ POST ─ 200: the reply goes to the journal and is read then;
                                           unreadable: asked again, --tries times
                                         ─ 408, 429, 5xx, late, cut off: again after a while or
                                           after Retry-After; in the end set aside
                                         ─ 400, 415, 422 before any success: asked in another
                                           dialect
                                         ─ these afterwards, 403, 413: this request is set aside
                                         ─ 401, 404, a redirect: the run ends, waiting won't help

A killed process loses the replies that are on their way, at most --concurrency of them.
"""

import base64
import http.client
import io
import ipaddress
import json
import math
import os
import random
import re
import ssl
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

import vision
from evaluation.journal import CUT_OFF, NOT_ASKED
from vocabulary import flags

MAX_REPLY_BYTES = 1 << 20  # a longer reply is no answer
MAX_RETRY_AFTER = 600  # seconds; a server that asks to wait longer ends the run
MAX_FAILURES = 10  # requests in a row without a good reply end the run
BUSY = (0, 408, 409, 425, 429)  # status codes that pass, beside 5xx; 0: no whole answer came
NOT_UNDERSTOOD = (400, 415, 422)  # status codes of a server that may want another dialect
REFUSED = (403, 413)  # status codes that concern this request alone
HINTS = {
    401: "; is the key in the environment variable of --key-env right?",
    404: "; are --base-url, which mostly ends in /v1, and --model right?",
}


# ------------------------------------------------------------------------------------ a request
@dataclass(frozen=True)
class Request:
    """One question to the server, with or without an image."""

    key: str  # under which the journal keeps the replies
    name: str  # of the image, for people who read the journal
    system: str
    user: str
    parse: Callable  # the reply's text -> its value; ValueError if it can't be read
    schema: dict | None = None  # of the reply in JSON Schema; None: plain text
    temperature: float | None = None  # of the first try; None: the server's default
    max_unreadable: int = 10**9  # unreadable replies to pay for, if fewer than --tries


class Dialect(NamedTuple):
    """What servers understand differently."""

    response_format: str = "json_schema"  # or "json_object", or "text"
    limit: str = "max_tokens"  # or "max_completion_tokens"
    temperature: bool = True  # may the request set one?

    def seen_in(self, request):
        """What of the dialect a request's body shows."""
        response_format = self.response_format if request.schema is not None else None
        return response_format, self.limit, self.temperature and request.temperature is not None


# In this order, until the server takes one. A reason that names the trouble chooses by itself.
DIALECTS = [
    Dialect(response_format, *limit)
    for limit in (("max_tokens", True), ("max_completion_tokens", False))
    for response_format in ("json_schema", "json_object", "text")
]


def strict_object(properties):
    """The JSON Schema of an object with exactly these properties."""
    required = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties} | required


def encode_jpeg(path, max_side):
    """The JPEG bytes to send: upright, `max_side` pixels at most, nothing of the file but its
    pixels. ValueError if the image can't be read."""
    image = vision.load_image(path)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)

    # A comment or a colour profile would travel in `image.info`: copy the pixels only.
    bare, file = Image.new("RGB", image.size), io.BytesIO()
    bare.paste(image)
    bare.save(file, "JPEG", quality=90)
    return file.getvalue()


def make_body(request, args, image, dialect=DIALECTS[0], attempt=0):
    """The JSON to post. image: JPEG in base64, or None. attempt: unreadable replies so far."""
    content = [{"type": "text", "text": request.user}]
    if image is not None:
        url = f"data:image/jpeg;base64,{image}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "system", "content": request.system}, {"role": "user", "content": content}]
    body = {"model": args.model, "messages": messages, dialect.limit: args.max_tokens}

    # After an unreadable reply the same words must be able to give another one.
    if request.temperature is not None and dialect.temperature:
        body["temperature"] = request.temperature if attempt == 0 else 0.7
        body["seed"] = attempt

    if request.schema is not None and dialect.response_format != "text":
        body["response_format"] = {"type": dialect.response_format}
        if dialect.response_format == "json_schema":
            schema = {"name": "reply", "strict": True, "schema": request.schema}
            body["response_format"]["json_schema"] = schema
    return body


def estimate_tokens(request, jpeg):
    """(tokens in, tokens out) to expect: a token for 4 bytes of ASCII or 2 of other text, 85 + 170
    a tile for an image, and 250 for each property of the reply (120 for plain text)."""
    text = (request.system + request.user).encode()
    num_ascii = sum(byte < 128 for byte in text)
    tokens = num_ascii // 4 + (len(text) - num_ascii) // 2

    # OpenAI's count: tiles of 512 × 512 pixels.
    if jpeg is not None:
        with Image.open(io.BytesIO(jpeg)) as image:
            tiles = math.ceil(image.width / 512) * math.ceil(image.height / 512)
        tokens += 85 + 170 * tiles
    return tokens, 120 if request.schema is None else 250 * len(request.schema["properties"])


def price(tokens, args):
    """The cost of (tokens in, tokens out), in the currency of --price-in and --price-out."""
    return (tokens[0] * (args.price_in or 0) + tokens[1] * (args.price_out or 0)) / 1e6


def has_prices(args):
    """Whether costs can be told."""
    return args.price_in is not None and args.price_out is not None


# ------------------------------------------------------------------------------------ the server
class StopRun(Exception):
    """The run has to end here, in order; the message says why."""


class Endpoint:
    """One server: how to ask it, what it has cost, which dialect it takes, when it wants a rest."""

    def __init__(self, args, secret, journal):
        self.args, self.secret, self.journal = args, secret, journal
        self.url = check_url(args.base_url, args.insecure)
        self.lock = threading.Lock()
        self.request_locks = defaultdict(threading.Lock)
        self.stop, self.why = threading.Event(), "stopped"
        self.pause_until = 0.0
        self.failures = 0  # in a row
        self.sent = 0  # requests of this run
        self.spent = sum(price(tokens, args) for tokens in journal.tokens)
        # The requests on their way, and what they may cost at most.
        self.num_in_flight, self.in_flight = 0, 0.0
        self.dialect, self.refused_dialects, self.understood = DIALECTS[0], set(), False
        self.wants_new_limit = False  # the server named max_completion_tokens or temperature

    def answer(self, request, make_jpeg=None):
        """(state, value) as in Journal.outcome, asking only for what the journal lacks.

        make_jpeg: called if the server is asked. If it raises ValueError the request is set aside
        in state "image"."""
        with self.lock:
            alone = self.request_locks[request.key]

        # Two equal requests wait for one another: the second finds the first one's reply.
        with alone:
            state, value, _ = self.journal.outcome(request, self.args)
            if state == "no reply":
                try:
                    jpeg = make_jpeg() if make_jpeg else None
                except ValueError as error:
                    self.journal.append(request, failed=str(error), state="image")
                else:
                    self.ask(request, jpeg)
                state, value, _ = self.journal.outcome(request, self.args)
        return state, value

    def ask(self, request, jpeg):
        """Asks until the journal holds a good reply, or --tries unreadable ones. Without a whole
        reply it sets the request aside. Waits longer from try to try."""
        args = self.args
        image = None if jpeg is None else base64.b64encode(jpeg).decode()
        # Unreadable replies of earlier runs were paid for, too.
        num_bad = self.journal.outcome(request, args)[2]
        tried, status, reason, back_off = num_bad, None, "", 0

        while tried < args.tries:
            dialect = self.dialect
            body = json.dumps(make_body(request, args, image, dialect, num_bad)).encode()

            # The random factor keeps threads from coming back all at once.
            try:
                self.wait(back_off * random.uniform(0.5, 1.5))
                self.wait(self.pause_until - time.monotonic())
                status, headers, payload = self.send(request, jpeg, body)
            except StopRun:
                # What the server said must not be lost because the run ends for another reason.
                if reason and status != 200:
                    self.journal.append(request, failed=reason)
                raise
            back_off = min(60, args.backoff * 2**tried)
            tried += 1

            # A whole reply, which is paid for.
            if status == 200:
                self.understood = True
                state, reason, num_bad = self.journal.outcome(request, args)
                if state == "good":
                    self.failures = 0
                    return
                if state == "malformed":
                    break
                continue

            # No reply. Does waiting help, another dialect, or nothing?
            reason = self.one_line(payload)
            if status:
                reason = f"HTTP {status}: {reason}"
            if status in BUSY or status >= 500:
                # Most limits are by the minute: five tries wait for one in all.
                back_off *= 4 if status == 429 else 1
                self.pause(retry_after(headers))
            elif status not in REFUSED + NOT_UNDERSTOOD:
                self.end(f"{args.base_url} answers {reason}{HINTS.get(status, '')}")
            elif self.understood or status in REFUSED:
                break
            elif not self.use_simpler_dialect(request, reason, dialect):
                break
            else:
                tried, back_off = tried - 1, 0

        if status != 200:
            self.journal.append(request, failed=reason)

        # A model that can't do it, or a server that is down, is noticed soon.
        with self.lock:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                self.end(f"{MAX_FAILURES} requests in a row came to nothing, the last: {reason}")

    def send(self, request, jpeg, body):
        """(status, headers, payload) of one request. A reply is counted and in the journal by
        then. Status 0: no whole answer came."""
        most, lost = self.reserve(request, jpeg), 0.0
        try:
            status, headers, payload = self.post(body)
        except ssl.SSLCertVerificationError as error:
            self.end(
                f"{self.args.base_url}: its certificate is not trusted ({error.verify_message}); "
                "Python from python.org on a Mac needs Install Certificates.command once"
            )
        except (OSError, http.client.HTTPException) as error:
            status, headers, payload = 0, {}, f"{type(error).__name__}: {error}"
            # The server may have gone on, and bill it.
            if isinstance(error, (TimeoutError, http.client.IncompleteRead)):
                lost = most

        # Some gateways pass on a server's error as a success.
        if status == 200 and payload.lstrip().startswith(b'{"error"'):
            status = 502

        tokens = (0, 0)
        if status == 200:
            # A key that a local server takes for show, such as EMPTY, may be a word of the reply.
            is_secret = len(self.secret or "") >= 16
            if is_secret:  # before a part is cut out, which may end inside the key
                payload = payload.replace(self.secret.encode(), b"***")
            text, fault, tokens = read_completion(payload, estimate_tokens(request, jpeg))
            if fault != CUT_OFF:
                fault = self.redact(fault)
            if is_secret:
                text = self.redact(text)
            entry = {"text": text, "fault": fault, "tokens": tokens}
            self.journal.append(request, **entry, max_tokens=self.args.max_tokens)

        with self.lock:
            self.num_in_flight -= 1
            self.in_flight -= most
            self.spent += price(tokens, self.args) + lost
        return status, headers, payload

    def reserve(self, request, jpeg):
        """Waits until the budget has room for one request; returns what it may cost at most."""
        args = self.args
        known = estimate_tokens(request, jpeg)[0]
        while True:
            with self.lock:
                self.wait(0)
                if args.max_requests is not None and self.sent >= args.max_requests:
                    self.end(f"--max-requests {args.max_requests:,} reached")

                # Servers count otherwise than the estimate: the last replies tell how much so.
                tokens_in = max([known] + [tokens[0] for tokens in self.journal.tokens[-100:]])
                most = price((tokens_in, args.max_tokens), args)
                if args.max_cost is None or self.spent + self.in_flight + most <= args.max_cost:
                    self.sent += 1
                    self.num_in_flight += 1
                    self.in_flight += most
                    return most
                if not self.num_in_flight:
                    self.end(
                        f"--max-cost {args.max_cost:g} reached: {self.spent:.4f} spent, one more "
                        f"request may cost {most:.4f}"
                    )

            # The requests on their way may cost less than the most.
            self.wait(0.05)

    def post(self, body):
        """(status, headers, payload). OSError or HTTPException if no whole answer came in time.
        Follows no redirect, so the key never goes to another host; uses no proxy."""
        url, timeout = self.url, self.args.timeout
        deadline = time.monotonic() + timeout
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname, url.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"

        try:
            connection.request("POST", url.path.rstrip("/") + "/chat/completions", body, headers)
            response, payload = connection.getresponse(), b""

            # The connection's timeout is one of silence: a reply that drips in never meets it.
            while len(payload) <= MAX_REPLY_BYTES and (part := response.read1(1 << 16)):
                payload += part
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer drips in too slowly")

            # The server closed the connection before the end.
            if response.length and len(payload) <= MAX_REPLY_BYTES:
                raise http.client.IncompleteRead(payload, response.length)
            return response.status, response.headers, payload
        finally:
            connection.close()

    def use_simpler_dialect(self, request, reason, dialect):
        """After a refusal, before any success: choose another dialect. False if none is left."""
        with self.lock:
            # Another thread may have chosen one meanwhile.
            if dialect != self.dialect:
                return True

            # What of a dialect this request does not show was not refused.
            self.refused_dialects.add(dialect.seen_in(request))
            left = [d for d in DIALECTS if d.seen_in(request) not in self.refused_dialects]

            # It was not the dialect: the next request begins anew with the first one.
            if not left:
                self.dialect, self.wants_new_limit = DIALECTS[0], False
                self.refused_dialects.clear()
                return False

            if re.search("max_completion_tokens|temperature|unsupported.parameter", reason):
                self.wants_new_limit = True
            if self.wants_new_limit:
                left.sort(key=lambda d: d.temperature)  # stable: those without one come first
            self.dialect = left[0]

        what = ", ".join(self.dialect[:2])
        tqdm.write(f"the server refuses the request ({reason}): trying {what}", file=sys.stderr)
        return True

    def pause(self, seconds):
        """The server's wish to wait holds for all requests, not for this one only."""
        if seconds > MAX_RETRY_AFTER:
            self.end(f"the server asks to wait {seconds:,.0f} seconds; run the same command then")
        self.pause_until = max(self.pause_until, time.monotonic() + seconds)

    def end(self, why):
        """Nothing more is sent; all threads stop, for the same reason."""
        if not self.stop.is_set():
            self.why = why
        self.stop.set()
        raise StopRun(self.why)

    def wait(self, seconds):
        if self.stop.wait(max(0, seconds)):
            raise StopRun(self.why)

    def redact(self, text):
        """The text without the key."""
        return text.replace(self.secret, "***") if self.secret and text else text

    def one_line(self, text):
        """What a server or an exception says, fit to print: short, printable, without the key."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")

        # Most servers wrap the reason in JSON.
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass

        # A reason could hold control sequences of the terminal.
        printable = "".join(c if c.isprintable() else " " for c in str(text)[:2000])
        return self.redact(printable)[:200].strip()


def retry_after(headers):
    """Seconds that the header asks for, as a number or a date; 0 if it says nothing of use."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def read_completion(payload, guess):
    """A server's answer -> (text, fault, [tokens in, tokens out]): what the model wrote, why that
    can't be used, and what it cost (the guess if the server does not say)."""
    text, fault, usage = None, None, None
    try:
        if len(payload) > MAX_REPLY_BYTES:
            return None, f"longer than {MAX_REPLY_BYTES:,} bytes", list(guess)
        reply = json.loads(payload)
        usage, choice = reply.get("usage"), reply["choices"][0]
        message = choice["message"]

        # A thinking model may have content null, or spend all its tokens before the first word.
        text = join_parts(message.get("content")) or join_parts(message.get("refusal"))
        if message.get("role", "assistant") != "assistant":
            fault = "the message is not the assistant's"
        elif choice.get("finish_reason") == "length":
            fault = CUT_OFF
        elif not text.strip():
            thought = message.get("reasoning_content") or message.get("reasoning")
            fault = "no text: only reasoning; turn it off" if thought else "no text: empty"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        fault = f"not a chat completion: {payload[:150].decode('utf-8', 'replace')!r}"

    # Some servers count wrong, or not at all.
    tokens = list(guess)
    for i, name in enumerate(("prompt_tokens", "completion_tokens")):
        count = usage.get(name) if isinstance(usage, dict) else None
        if type(count) is int and 0 <= count < 10**8:
            tokens[i] = count
    return text, fault, tokens


def join_parts(content):
    """A message's content as one string: some providers send a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


# ------------------------------------------------------------------------------------ a run
def run_jobs(jobs, endpoint):
    """Runs functions without arguments that ask `endpoint`, --concurrency at a time. Returns why
    it ended early, or None."""
    why, bar = None, tqdm(total=len(jobs), unit="request", disable=None)
    pool = ThreadPoolExecutor(endpoint.args.concurrency)
    try:
        for future in as_completed([pool.submit(job) for job in jobs]):
            future.result()
            bar.update()
            if has_prices(endpoint.args):
                bar.set_postfix_str(f"cost {endpoint.spent:.4f}")
    except (StopRun, KeyboardInterrupt) as stopped:
        why = str(stopped) or "interrupted"
        print(f"\n{why}: waiting for the replies under way (Ctrl-C: don't wait)", file=sys.stderr)
    finally:
        # Replies that are under way are paid for, so they are waited for.
        endpoint.stop.set()
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            os._exit(130)
        bar.close()
    return why


def print_troubles(troubles):
    """Prints the most frequent of [(state, reason)]: why requests came to nothing."""
    counts = Counter(trouble for trouble in troubles if trouble[1] != NOT_ASKED)
    for (state, reason), n in counts.most_common(3):
        print(f"  {state}, {n:,} times: {reason}")


# ------------------------------------------------------------------------------------ options
def check_url(base_url, insecure):
    """The parsed address. ValueError if it is none, or would send image and key in the open."""
    try:
        url = urlsplit(base_url)
        is_web = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        is_web = False
    if not is_web or url.query or url.fragment or "@" in url.netloc:
        raise ValueError(
            "--base-url must look like https://host/v1, without a name, key or query in it"
        )
    if url.scheme == "http" and not is_local(url) and not insecure:
        raise ValueError(
            f"--base-url {base_url} is neither https nor this machine: images and key would "
            "travel in the open; --insecure allows it"
        )
    return url


def is_local(url):
    """Whether a parsed address is this machine's."""
    try:
        return url.hostname == "localhost" or ipaddress.ip_address(url.hostname).is_loopback
    except ValueError:
        return False


def check_options(args):
    """Returns the API key, "" if it is not set. ValueError if options can't work together."""
    check_url(args.base_url, args.insecure)
    if args.max_cost is not None and not has_prices(args):
        raise ValueError("--max-cost needs --price-in and --price-out (per million tokens)")
    key = os.environ.get(args.key_env, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"${args.key_env} does not hold a key: no header can carry its characters")
    return key


def add_client_arguments(parser, tries=5, max_tokens=3000):
    """The options of a run that asks a server."""
    add = parser.add_argument
    amount = {"type": flags.at_least(0, float), "metavar": "AMOUNT"}
    url = "the server's address, without /chat/completions"
    add("--base-url", type=flags.text, required=True, metavar="URL", help=url)
    add("--model", type=flags.text, required=True, help="the model's name on the server")
    key = "environment variable with the key"
    add("--key-env", type=flags.text, default="OPENAI_API_KEY", metavar="NAME", help=key)
    add("--insecure", action="store_true", help="allow http to another machine")
    add(
        "--max-requests", type=flags.at_least(0), metavar="N", help="stop after so many in this run"
    )
    add("--max-cost", **amount, help="for the whole journal, earlier runs included")
    add("--price-in", **amount, help="per million tokens sent")
    add("--price-out", **amount, help="per million tokens received")
    add("--concurrency", type=flags.at_least(1, most=1000), default=4, help="requests at a time")
    add("--timeout", type=flags.at_least(0.01, float, 86400), default=600, help="seconds")
    add("--tries", type=flags.count, default=tries, help="of a request")
    backoff = "seconds before the second try"
    add("--backoff", type=flags.at_least(0, float, 86400), default=1, help=backoff)
    add("--max-tokens", type=flags.count, default=max_tokens, help="of a reply")
