"""The judge against a fake endpoint that is late, busy, broken or silent: nothing is lost, nothing is paid for twice."""

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest import mock

import pytest
from PIL import Image

import evaluation.judge as judge


class Endpoint:
    """A server that answers as `behave(n, text)` says: a text, a status, or one of late, half, noise, strange, silent. `paid` counts whole replies."""

    def __init__(self, behave):
        self.asked, self.paid, lock, outer = 0, 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked += 1
                    n = outer.asked
                text = body["messages"][1]["content"][-1]["text"]
                what = behave(n, text)
                outer.last, outer.key = body, self.headers.get("Authorization")
                if what == "late":
                    time.sleep(0.6)
                if what in ("late", "silent"):
                    return  # the connection closes without a word
                if isinstance(what, int):
                    self.send_response(what)
                    self.send_header("Retry-After", "0.01")
                    self.end_headers()
                    return self.wfile.write(b"no")
                reply = json.dumps(
                    {
                        "choices": [{"message": {"content": what}}],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                    }
                ).encode()
                if what in ("noise", "strange"):
                    reply = {"noise": b"<html>busy</html>", "strange": b'{"object": "error"}'}[what]
                elif what == "half":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    return self.wfile.write(reply[: len(reply) // 2])
                else:
                    with lock:
                        outer.paid += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint():
    started = []
    yield lambda behave: started.append(Endpoint(behave)) or started[-1]
    for one in started:
        one.server.shutdown()
        one.server.server_close()


def answer_file(path, word, n=6):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(path.parent / "p.png")
    rows = [{"model": path.stem, "data": [str(path.parent / "s.json")], "images": None}]
    for i in range(n):
        rows.append(
            {
                "split": "s",
                "id": i,
                "image": "p.png",
                "turn": 0,
                "language": ("en", "ko", "zh")[i % 3],
                "kind": "k",
                "skill": "k",
                "metric": "exact",
                "question": f"question {i}?",
                "truth": f"truth {i}",
                "full": f"{word} {i}",
                "blind": "?",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, url, *extra, mode="pairwise", key="k"):
    """judge.py's command line in this process: (status, what it printed, its error line)."""
    files = [
        answer_file(tmp_path / "a.answers.jsonl", "good"),
        answer_file(tmp_path / "b.answers.jsonl", "bad"),
    ][: 2 if mode == "pairwise" else 1]
    argv = [
        "judge.py",
        mode,
        *files,
        "--base-url",
        url,
        "--judge",
        "j",
        "-o",
        tmp_path / "out.json",
        "--timeout",
        "0.3",
        "--wait",
        "0.01",
        "--key-env",
        "FAKE_KEY",
        *extra,
    ]
    out, error = io.StringIO(), ""
    with (
        mock.patch.object(sys, "argv", list(map(str, argv))),
        mock.patch.dict(os.environ, {"FAKE_KEY": key}),
        contextlib.redirect_stdout(out),
    ):
        try:
            judge.main()
        except ValueError as line:
            error = str(line)
    return SimpleNamespace(returncode=int(bool(error)), stdout=out.getvalue(), stderr=error)


def prefers_good(n, text):
    """A fair judge: the verdict is where the good answer stands."""
    return "It fits.\nVERDICT: " + ("1" if text.index("<<<good") < text.index("<<<bad") else "2")


def test_a_fair_judge_in_trouble_loses_nothing_and_is_paid_once_for_each_request(
    tmp_path, endpoint
):
    troubles = iter([429, 500, "half", "late", "noise", "strange", "silent", 503, 429])
    fake = endpoint(lambda n, text: next(troubles, None) or prefers_good(n, text))
    done = run(tmp_path, fake.url)
    assert done.returncode == 0, done.stderr
    assert fake.asked == 12 + 9 and fake.paid == 12 and fake.key == "Bearer k"
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["judged"] == 6
        and found["tokens"] == {"prompt_tokens": 1200, "completion_tokens": 120}
        and not found["troubles"]
    )
    value = {(r["measure"].split(" (")[0], r["language"]): r for r in found["judge"]}
    assert (
        value["points of the first model", "all"]["value"] == 1
        and value["same verdict in both orders", "ko"]["value"] == 1
        and value["points of the answer shown first", "all"]["value"] == 0.5
    )
    assert (
        value["points of the first model", "all"]["n"] == 6
        and value["points of the first model", "all"]["low"] < 1
    )
    assert fake.last["messages"][1]["content"][0]["image_url"]["url"].startswith(
        "data:image/jpeg;base64,"
    )
    again = run(tmp_path, fake.url)
    assert again.returncode == 0 and fake.paid == 12 and fake.asked == 21, (
        "the second run asks nothing"
    )


def test_a_judge_who_always_likes_the_first_answer_finds_no_difference(tmp_path, endpoint):
    done = run(tmp_path, endpoint(lambda n, text: "VERDICT: 1").url)
    assert done.returncode == 0, done.stderr
    value = {
        r["measure"].split(" (")[0]: r["value"]
        for r in json.loads((tmp_path / "out.json").read_text())["judge"]
        if r["language"] == "all"
    }
    assert value == {
        "points of the first model": 0.5,
        "same verdict in both orders": 0,
        "points of the answer shown first": 1,
    }


def test_refusals_and_malformed_replies_are_counted_and_not_guessed(tmp_path, endpoint):
    def behave(n, text):
        if "question 0?" in text:
            return "I'm sorry, I can't help with that."
        return "They are both nice." if "question 1?" in text else "Equal.\nVERDICT: TIE"

    fake = endpoint(behave)
    done = run(tmp_path, fake.url)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["judged"] == 4 and found["troubles"] == {"refused": 2, "malformed": 2}
    assert fake.paid == 2 + 2 * judge.READINGS + 8, (
        "a refusal is taken as one, a malformed reply is asked for anew"
    )


def test_an_endpoint_that_stops_answering_loses_nothing(tmp_path, endpoint):
    fake = endpoint(lambda n, text: prefers_good(n, text) if n <= 5 else "silent")
    done = run(tmp_path, fake.url, "--tries", "2")
    assert (
        done.returncode == 1
        and "7 requests got no reply" in done.stderr
        and "run it again" in done.stderr
    )
    assert len((tmp_path / "out.cache.jsonl").read_text().splitlines()) == 5
    with open(tmp_path / "out.cache.jsonl", "a") as file:
        file.write('{"key": "cut o')  # a crash in the middle of a line
    awake = endpoint(prefers_good)
    assert run(tmp_path, awake.url).returncode == 0 and awake.paid == 7, (
        "what was paid for before is not asked again"
    )


def test_a_wrong_key_is_one_clear_line_and_is_not_tried_again(tmp_path, endpoint):
    fake = endpoint(lambda n, text: 401)
    done = run(tmp_path, fake.url, "--parallel", "1")
    assert done.returncode == 1 and "status 401" in done.stderr and fake.asked < 12
    done = run(tmp_path, "http://example.invalid/v1", key="")
    assert done.returncode == 1 and done.stderr == (
        "no key: set FAKE_KEY, or name another variable with --key-env"
    )


def test_a_dry_run_asks_nothing_and_shows_the_cost(tmp_path, endpoint):
    fake = endpoint(prefers_good)
    done = run(tmp_path, fake.url, "--dry-run", "--price-in", "1000000", "--price-out", "0")
    assert done.returncode == 0 and fake.asked == 0 and "12 to ask" in done.stdout
    tokens, dollars = (
        re.search(r"about ([\d,]+) tokens sent", done.stdout)[1],
        re.search(r"\$([\d.]+)", done.stdout)[1],
    )
    assert float(dollars) == int(tokens.replace(",", "")) > 12 * 85


def test_grades_are_the_mean_of_both_orders_beside_the_reference(tmp_path, endpoint):
    def behave(
        n, text
    ):  # the model's answers get 4, the reference 8; whoever stands first gets one more
        return "SCORES: 5, 8" if text.index("<<<good") < text.index("<<<truth") else "SCORES: 9 4"

    done = run(tmp_path, endpoint(behave).url, mode="grade")
    assert done.returncode == 0, done.stderr
    value = {
        r["measure"]: r["value"]
        for r in json.loads((tmp_path / "out.json").read_text())["judge"]
        if r["language"] == "all"
    }
    assert (
        value["grade of the model, 1 – 10"] == 4.5
        and value["grade of the reference, 1 – 10"] == 8.5
    )
    assert (
        value["the model's grades over the reference's"] == pytest.approx(9 / 17)
        and value["both orders within one grade"] == 1
    )


@pytest.mark.parametrize(
    "mode, text, want",
    [
        ("pairwise", "VERDICT: 1 … no.\nVERDICT: 2", (2, None)),
        ("pairwise", "**verdict：TIE**", (0, None)),
        ("pairwise", "VERDICT: 12", (None, "malformed")),
        ("pairwise", "도와드릴 수 없습니다", (None, "refused")),
        ("grade", "SCORES: 10 1", ((10, 1), None)),
        ("grade", "SCORES: 8/10, 7/10", ((8, 7), None)),
        ("grade", "**SCORES: 8, 7.**", ((8, 7), None)),
        ("grade", "SCORES: **9** and **6**", ((9, 6), None)),
        ("grade", "SCORES: 7.5 9", (None, "malformed")),
        ("grade", "SCORES: 7 8.5", (None, "malformed")),
        ("grade", "SCORES: 11 3", (None, "malformed")),
    ],
)
def test_what_counts_as_a_verdict(mode, text, want):
    assert judge.read_reply(mode, {"text": text}) == want
