"""A chat-completions server for the tests of annotation/, that answers well, badly, late or never.

Which of these a request gets is drawn from (image, kind, how often it was asked): the same in every
run. Every request is written down in `asked` before it is answered, with what it got."""

import base64
import hashlib
import json
import random
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import annotation.prompts as prompts

WORDS = {
    "en": ["What is thing number {n} of {p}?", "It is a small thing of kind {n} in image {p}."],
    "ko": ["그림 {p}의 {n}번 물체는 무엇인가요?", "그림 {p}에 있는 {n}번 종류의 작은 물체예요."],
    "zh": ["图片{p}里的第{n}个东西是什么？", "它是图片{p}里第{n}种小东西。"],
}


def good(image, kind, languages, turns=3):
    """What a well-behaved model writes: different for every image and kind, the same in every
    language."""
    said = {}
    for code in languages:
        if code in WORDS:
            said[code] = []
            for n in range(turns):
                question, answer = (t.format(n=f"{n}{len(kind)}", p=image) for t in WORDS[code])
                said[code].append({"question": question, "answer": answer})
    return said


def completion(text, finish="stop", **more):
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text} | more, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
    }


def read_request(body):
    """(image's hash, kind, languages, JPEG, text) of a request, from what a server sees of it."""
    system, (text, image) = body["messages"][0]["content"], body["messages"][1]["content"]
    jpeg = base64.b64decode(image["image_url"]["url"].split(",", 1)[1])
    languages = [code for code in prompts.LANGUAGES if f"({code})" in system]
    kinds = [kind for kind, words in prompts.KINDS.items() if text["text"].startswith(words)]
    kind = kinds[0] if kinds else "verify"
    return hashlib.sha256(jpeg).hexdigest()[:8], kind, languages, jpeg, text["text"]


class Fake:
    """with Fake(reply) as fake: … fake.url. reply(body, count) -> what to do, see `Handler`; count:
    how often this was asked before."""

    def __init__(self, reply):
        self.reply, self.asked, self.counts, self.headers = reply, [], {}, []
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("FakeHandler", (Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        serve = partial(self.server.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Does what `reply` returns: a dict is sent as JSON; a text as it is; (status, headers, text);
    "close", "half", or a number of seconds to be late by, then a good reply."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, kind, languages, _, text = read_request(body)
        with self.fake.lock:
            count = self.fake.counts.get((image, kind, text), 0)
            self.fake.counts[image, kind, text] = count + 1
            self.fake.headers.append(dict(self.headers) | {"path": self.path})
            entry = {"image": image, "kind": kind, "time": time.monotonic(), "body": body}
            self.fake.asked.append(entry)
        what = self.fake.reply(body, count)
        entry["got"] = what
        status, headers = 200, {}
        if isinstance(what, float):
            time.sleep(what)
            what = completion(json.dumps(good(image, kind, languages), ensure_ascii=False))
        if isinstance(what, tuple):
            status, headers, what = what
        payload = what.encode() if isinstance(what, str) else json.dumps(what).encode()
        try:
            if what == "close":
                return self.connection.close()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload) + (50 if what == "half" else 0)))
            self.end_headers()
            self.wfile.write(payload)
        except OSError:
            pass  # the client has gone


def weather(seed=0):
    """A reply function that misbehaves about once in four requests, in every way; at the third time
    of asking it is good."""

    def reply(body, count):
        image, kind, languages, _, user = read_request(body)
        rng = random.Random(f"{seed} {image} {kind} {count}")
        said = good(image, kind, languages)
        if not languages:
            pairs = json.loads(user)
            said = {"pairs": [{"pair": n, "confirmed": True} for n in range(len(pairs))]}
        text = json.dumps(said, ensure_ascii=False)
        choices = [
            0.3,  # late
            (429, {"Retry-After": "0.05"}, '{"error": {"message": "slow down"}}'),
            (500, {}, "oops"),
            (503, {"Content-Type": "text/html"}, "<html>busy</html>"),
            "close",
            "half",
            completion(text[: len(text) // 2]),  # broken JSON
            completion(text[: len(text) // 2], finish="length"),
            {"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 0}},
            completion(None),
            completion(""),
            "this is not JSON",
        ]
        if count < 2 and rng.random() < 0.25:
            return rng.choice(choices)
        fate = random.Random(f"{seed} {image} {kind}").random()
        if not languages:
            pass
        elif fate < 0.03:
            said["ko"] = said["en"]  # wrong language
        elif fate < 0.06:
            said["zh"] = said["zh"][:-1]  # a turn short
        elif fate < 0.09:
            said["en"][1]["answer"] = "I'm sorry, but I cannot see the image."
        return completion(json.dumps(said, ensure_ascii=False))

    return reply
