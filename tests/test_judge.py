"""The judge against an endpoint that is late, busy, broken or silent: nothing is lost, nothing is
paid for twice."""

import contextlib
import hashlib
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
from evaluation_helpers import command
from PIL import Image

import evaluation.judge as judge
from evaluation.__main__ import main as evaluation_main


class Endpoint:
    """A server that answers as `behave(n, text)` says: a text; a dict, sent as JSON; a status, or
    (status, headers, text); or one of late, half, noise, strange, silent. `paid` counts whole
    replies, `headers` are those of all requests, `last` the last request."""

    def __init__(self, behave):
        self.behave, self.asked, self.paid, self.headers = behave, 0, 0, []
        self.lock = threading.Lock()
        handler = type("EndpointHandler", (Handler,), {"endpoint": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint = self.endpoint
        with endpoint.lock:
            endpoint.asked += 1
            n = endpoint.asked
            endpoint.headers.append(dict(self.headers))
            endpoint.last, endpoint.key = body, self.headers.get("Authorization")
        what = endpoint.behave(n, body["messages"][1]["content"][0]["text"])

        # The connection closes without a word.
        if what in ("late", "silent"):
            return time.sleep(0.6 * (what == "late"))
        if isinstance(what, int):
            what = (what, {"Retry-After": "0.01"}, "no")
        if isinstance(what, tuple):
            return self.send(*what)
        if what in ("noise", "strange"):
            text = {"noise": "<html>busy</html>", "strange": '{"object": "error"}'}[what]
            return self.send(200, {}, text)

        if isinstance(what, str):
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            reply = {"choices": [{"message": {"content": what}}], "usage": usage}
        else:
            reply = what
        if what != "half":
            with endpoint.lock:
                endpoint.paid += 1
        self.send(200, {}, json.dumps(reply), half=what == "half")

    def send(self, status, headers, text, half=False):
        payload = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if half else payload)

    def log_message(self, *args):
        pass


WORDS = ("good", "bad")  # with which the answers of the two models begin


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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path, url, *extra, mode="pairwise", key="k"):
    """judge.py's command line in this process: (status, what it printed, its error line)."""
    files = []
    for name, word in zip("ab", WORDS):
        files.append(answer_file(tmp_path / f"{name}.answers.jsonl", word))
    if mode == "grade":
        files = files[:1]
    argv = [
        "evaluation",
        "judge",
        mode,
        *files,
        "--base-url",
        url,
        "--model",
        "j",
        "-o",
        tmp_path / "out.json",
        "--timeout",
        "0.3",
        "--backoff",
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
            evaluation_main()
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
    assert fake.asked == 12 + 9
    assert fake.paid == 12
    assert fake.key == "Bearer k"
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["judged"] == 6
    assert not found["troubles"]
    # Two of the nine troubles are a whole HTTP 200: paid for, at 120 tokens by guess.
    assert found["tokens"]["completion_tokens"] == 120 + 2 * 120
    assert found["tokens"]["prompt_tokens"] > 1200
    value = {(r["measure"].split(" (")[0], r["language"]): r for r in found["judge"]}
    assert value["points of the first model", "all"]["value"] == 1
    assert value["same verdict in both orders", "ko"]["value"] == 1
    assert value["points of the answer shown first", "all"]["value"] == 0.5
    assert value["points of the first model", "all"]["n"] == 6
    assert value["points of the first model", "all"]["low"] < 1
    assert fake.last["messages"][1]["content"][1]["image_url"]["url"].startswith(
        "data:image/jpeg;base64,"
    )
    again = run(tmp_path, fake.url)
    assert again.returncode == 0
    assert fake.paid == 12
    assert fake.asked == 21, "the second run asks nothing"


def test_a_judge_who_always_likes_the_first_answer_finds_no_difference(tmp_path, endpoint):
    done = run(tmp_path, endpoint(lambda n, text: "VERDICT: 1").url)
    assert done.returncode == 0, done.stderr
    value = {
        r["measure"].split(" (")[0]: r["value"]
        for r in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["judge"]
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
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["judged"] == 4
    assert found["troubles"] == {"refused": 2, "malformed": 2}
    assert fake.paid == 2 + 2 * judge.MAX_UNREADABLE + 8, (
        "a refusal is taken as one, a malformed reply is asked for anew"
    )


def test_an_endpoint_that_stops_answering_loses_nothing(tmp_path, endpoint):
    fake = endpoint(lambda n, text: prefers_good(n, text) if n <= 5 else "silent")
    done = run(tmp_path, fake.url, "--tries", "2")
    assert done.returncode == 1
    assert "7 requests have no reply" in done.stderr
    assert "run the same command again" in done.stderr
    journal = [json.loads(line) for line in open(tmp_path / "out.journal.jsonl", encoding="utf-8")]
    assert sum("text" in entry for entry in journal) == 5
    with open(tmp_path / "out.journal.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "cut o')  # a crash in the middle of a line
    awake = endpoint(prefers_good)
    assert run(tmp_path, awake.url).returncode == 0
    assert awake.paid == 7, "what was paid for before is not asked again"


def test_another_judge_prompt_or_answer_file_is_named_before_anything_is_asked(
    tmp_path, endpoint, monkeypatch
):
    fake = endpoint(prefers_good)
    assert run(tmp_path, fake.url, "--limit", "3").returncode == 0
    assert run(tmp_path, fake.url).returncode == 0, "more questions go on"
    paid, before = fake.paid, (tmp_path / "out.json").read_bytes()
    assert paid == 12

    assert "(model: j → k)" in run(tmp_path, fake.url, "--model", "k").stderr
    assert "(mode: pairwise → grade; sides: " in run(tmp_path, fake.url, mode="grade").stderr
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "WORDS", ("good", "worse"))
        assert "(answers: " in (done := run(tmp_path, fake.url)).stderr
        assert "b.answers.jsonl changed); --fresh" in done.stderr
    with monkeypatch.context() as patch:
        patch.setitem(judge.PROMPTS, "en", judge.PROMPTS["en"] | {"system": "Judge."})
        assert "(prompts: " in run(tmp_path, fake.url).stderr
    assert fake.paid == paid and (tmp_path / "out.json").read_bytes() == before

    assert run(tmp_path, fake.url, "--model", "k", "--fresh").returncode == 0
    assert fake.paid == 2 * paid
    assert (tmp_path / "out.json.old-1").read_bytes() == before
    assert (tmp_path / "out.journal.jsonl.old-1").exists()


def test_which_questions_are_drawn_does_not_hang_on_the_order_of_a_file(tmp_path):
    """A run that was interrupted has answered them in another one."""
    path = answer_file(tmp_path / "a.answers.jsonl", "good", n=30)
    args = SimpleNamespace(answers=[path, path], seed=0, limit=9)
    drawn = []
    for cut in (1, 17):
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join([header, *rows[cut:], *rows[:cut]]), encoding="utf-8")
        _, questions, _ = judge.read_side(str(path))
        drawn.append(judge.choose_questions(args, questions, questions))
    assert sorted(drawn[0]) == sorted(drawn[1]) and len(drawn[0]) == 9


def test_the_judge_reads_the_conversation_and_gets_no_question_about_two_images(tmp_path, capsys):
    path = answer_file(tmp_path / "a.answers.jsonl", "good", n=3)
    header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rows = [row | {"id": 7, "turn": n, "language": "en"} for n, row in enumerate(rows)]
    rows.append(rows[0] | {"id": 8, "image": ["p.png", "q.png"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)), encoding="utf-8")
    args = SimpleNamespace(answers=[str(path)], mode="grade", seed=0, limit=9, model="j")
    questions, requests = judge.make_requests(args)
    assert [q.turn for q in questions] and {q.id for q in questions} == {7}
    assert "1 questions are left out: the judge sees one image" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the judge sees one image, all questions have several"):
        judge.choose_questions(args, two := {"8": SimpleNamespace(image=["p", "q"])}, two)
    texts = {q.turn: requests[2 * n][0].user for n, q in enumerate(questions)}
    # Of what is graded the reference is one of the two answers, and the judge is not told which.
    head = "Question: question 0?\ntruth 0\n\nquestion 1?\n"
    assert texts[1].startswith(f"{head}\nAnswer 1:\n<<<good 1>>>\n\nAnswer 2:\n<<<truth 1>>>\n")
    args.mode, args.answers = "pairwise", [str(path), f"{path}:blind"]
    questions, requests = judge.make_requests(args)
    texts = {q.turn: requests[2 * n][0].user for n, q in enumerate(questions)}
    assert texts[2].startswith(f"{head}truth 1\n\nquestion 2?\nReference answer: truth 2\n\nAns")


def test_the_same_answers_twice_are_refused(tmp_path, endpoint):
    one = answer_file(tmp_path / "a.answers.jsonl", "good")
    words = ["judge", "pairwise", one, one, "--base-url", endpoint(prefers_good).url]
    with pytest.raises(ValueError, match="a.answers.jsonl: given twice"):
        command(*words, "--model", "j", "-o", tmp_path / "out.json")


def test_a_wrong_key_is_one_clear_line_and_is_not_tried_again(tmp_path, endpoint):
    fake = endpoint(lambda n, text: 401)
    done = run(tmp_path, fake.url, "--concurrency", "1")
    assert done.returncode == 1
    assert "HTTP 401" in done.stderr
    assert fake.asked < 12
    done = run(tmp_path, "https://example.invalid/v1", key="")
    assert done.returncode == 1
    assert done.stderr == "no key: set FAKE_KEY, or name another with --key-env"


def test_a_dry_run_asks_nothing_and_shows_the_cost(tmp_path, endpoint):
    fake = endpoint(prefers_good)
    done = run(tmp_path, fake.url, "--dry-run", "--price-in", "1000000", "--price-out", "0")
    assert done.returncode == 0
    assert fake.asked == 0
    assert "12 to ask" in done.stdout
    tokens, dollars = (
        re.search(r"about ([\d,]+) tokens sent", done.stdout)[1],
        re.search(r"received, about ([\d.]+)", done.stdout)[1].rstrip("."),
    )
    assert float(dollars) == int(tokens.replace(",", "")) > 12 * 85
    assert not (tmp_path / "out.journal.jsonl").exists(), "nothing was paid for"


def test_grades_are_the_mean_of_both_orders_beside_the_reference(tmp_path, endpoint):
    # The model's answers get 4, the reference 8; whoever stands first gets one more.
    def behave(n, text):
        return "SCORES: 5, 8" if text.index("<<<good") < text.index("<<<truth") else "SCORES: 9 4"

    done = run(tmp_path, endpoint(behave).url, mode="grade")
    assert done.returncode == 0, done.stderr
    value = {
        r["measure"]: r["value"]
        for r in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["judge"]
        if r["language"] == "all"
    }
    assert value["grade of the model, 1 – 10"] == 4.5
    assert value["grade of the reference, 1 – 10"] == 8.5
    assert value["the model's grades over the reference's"] == pytest.approx(9 / 17)
    assert value["both orders within one grade"] == 1


@pytest.mark.parametrize(
    "mode, text, want",
    [
        ("pairwise", "VERDICT: 1 … no.\nVERDICT: 2", 2),
        ("pairwise", "**verdict：TIE**", 0),
        ("pairwise", "VERDICT: 12", "malformed"),
        ("pairwise", "도와드릴 수 없습니다", None),
        ("grade", "SCORES: 10 1", (10, 1)),
        ("grade", "SCORES: 8/10, 7/10", (8, 7)),
        ("grade", "**SCORES: 8, 7.**", (8, 7)),
        ("grade", "SCORES: **9** and **6**", (9, 6)),
        ("grade", "SCORES: 7.5 9", "malformed"),
        ("grade", "SCORES: 7 8.5", "malformed"),
        ("grade", "SCORES: 11 3", "malformed"),
    ],
)
def test_what_counts_as_a_verdict_and_what_as_a_refusal(mode, text, want):
    if want == "malformed":
        with pytest.raises(ValueError, match="no verdict"):
            judge.read_verdict(mode, text)
    else:
        assert judge.read_verdict(mode, text) == want


# ------------------------------------------------------------------ what an endpoint may answer
def in_full(text, finish="stop", **more):
    """A whole completion, as servers send it."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": finish}]} | more


def results(tmp_path):
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def test_content_in_parts_is_joined_and_a_null_usage_is_guessed(tmp_path, endpoint):
    def behave(n, text):
        head, _, end = prefers_good(n, text).partition("VERDICT")
        parts = [{"type": "text", "text": head}, {"type": "text", "text": f"VERDICT{end}"}]
        return in_full(parts, usage=None)

    fake = endpoint(behave)
    for _ in range(2):
        done = run(tmp_path, fake.url)
        assert done.returncode == 0, done.stderr
        assert results(tmp_path)["judged"] == 6
        assert results(tmp_path)["tokens"]["completion_tokens"] == 12 * 120
        assert fake.paid == 12


def test_a_server_without_max_tokens_and_temperature_is_asked_as_it_wants(tmp_path, endpoint):
    def behave(n, text):
        if "max_tokens" in fake.last or fake.last.get("temperature", 1) != 1:
            return 400, {}, '{"error": {"message": "no", "code": "unsupported_parameter"}}'
        return prefers_good(n, text)

    fake = endpoint(behave)
    for _ in range(2):
        done = run(tmp_path, fake.url, "--concurrency", "1")
        assert done.returncode == 0, done.stderr
        assert results(tmp_path)["judged"] == 6
        assert fake.asked == 1 + 12
    assert fake.last["max_completion_tokens"] == 1000


def test_a_judge_that_spends_its_tokens_on_thinking_is_said_and_more_tokens_ask_again(
    tmp_path, endpoint
):
    def behave(n, text):
        if fake.last["max_tokens"] < 2000:
            return in_full("", finish="length")
        return prefers_good(n, text)

    fake = endpoint(behave)
    more = ("--limit", "3", "--concurrency", "1")
    for _ in range(2):
        done = run(tmp_path, fake.url, *more)
        assert done.returncode == 1
        assert "no question was judged; 6 malformed" in done.stderr
        assert "malformed, 6 times: cut off: --max-tokens or the server's" in done.stdout
        assert fake.paid == 6 * judge.MAX_UNREADABLE
    for _ in range(2):
        done = run(tmp_path, fake.url, *more, "--max-tokens", "2000")
        assert done.returncode == 0, done.stderr
        assert results(tmp_path)["judged"] == 3
        assert fake.paid == 6 * judge.MAX_UNREADABLE + 6


@pytest.mark.parametrize("status", [403, 400])
def test_a_question_that_moderation_refuses_is_set_aside_and_the_rest_goes_on(
    tmp_path, endpoint, status
):
    def behave(n, text):
        if "question 2?" in text:
            return status, {}, '{"error": {"message": "your input was flagged"}}'
        return prefers_good(n, text)

    fake = endpoint(behave)
    for n in (1, 2):
        done = run(tmp_path, fake.url)
        assert done.returncode == 1
        assert "2 requests have no reply" in done.stderr
        assert f"no reply, 2 times: HTTP {status}: your input was flagged" in done.stdout
        assert results(tmp_path)["judged"] == 5
        assert fake.paid == 10, "what was paid for is not asked again"
        if status == 403:
            assert fake.asked == 10 + 2 * n, "what was refused is asked once a run"


@pytest.mark.parametrize("status", [500, 400])
def test_a_server_that_takes_no_images_is_quoted_even_if_the_budget_ends_first(
    tmp_path, endpoint, status
):
    reason = "image input is not supported by this server"
    fake = endpoint(lambda n, text: (status, {}, json.dumps({"error": {"message": reason}})))
    for n in (1, 2):
        done = run(tmp_path, fake.url, "--max-requests", "2")
        assert done.returncode == 1
        assert fake.asked == 2 * n
        assert f"HTTP {status}: {reason}" in done.stdout
        assert "--max-requests 2 reached: 12 requests have no reply" in done.stderr


def test_where_nobody_listens_the_system_is_quoted_even_if_the_budget_ends_first(
    tmp_path, endpoint
):
    gone = endpoint(prefers_good)
    gone.server.shutdown()
    gone.server.server_close()
    for _ in range(2):
        done = run(tmp_path, gone.url, "--max-requests", "2")
        assert done.returncode == 1
        assert "times: ConnectionRefusedError" in done.stdout
        assert "--max-requests 2 reached: 12 requests have no reply" in done.stderr


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_ends_the_run_and_the_key_goes_nowhere(tmp_path, endpoint, status):
    other = endpoint(prefers_good)
    header = {"Location": f"{other.url}/chat/completions"}
    fake = endpoint(lambda n, text: (status, header, "moved"))
    for n in (1, 2):
        done = run(tmp_path, fake.url, "--concurrency", "1")
        assert done.returncode == 1
        assert f"HTTP {status}: moved" in done.stderr
        assert fake.asked == n
    assert other.headers == []


def test_two_equal_requests_at_the_same_time_are_paid_for_once(tmp_path, endpoint):
    def behave(n, text):
        time.sleep(0.1)
        return "VERDICT: TIE"

    # Both models say the same: the two orders of a question are one request.
    fake = endpoint(behave)
    with mock.patch(f"{__name__}.WORDS", ("good", "good")):
        done = run(tmp_path, fake.url)
    assert done.returncode == 0, done.stderr
    assert "6 different requests" in done.stdout
    assert results(tmp_path)["judged"] == 6
    assert fake.paid == 6


def test_a_cost_limit_without_prices_is_refused(tmp_path, endpoint):
    fake = endpoint(prefers_good)
    done = run(tmp_path, fake.url, "--max-cost", "1")
    assert "--max-cost needs --price-in and --price-out" in done.stderr
    assert fake.asked == 0


def test_the_words_of_the_prompts_are_the_ones_that_journals_were_paid_for():
    """Who edits judge_prompts.json on purpose changes the hash here, and knows that every request
    of an old journal is asked, and paid for, again."""
    texts = json.dumps(judge.PROMPTS, sort_keys=True).encode()
    assert hashlib.sha256(texts).hexdigest().startswith("67ab3452fea278e1")
