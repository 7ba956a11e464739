"""The page's server and OpenAI's endpoint: answers beside plain computations, and attacks."""

import base64
import contextlib
import http.client
import io
import json
import math
import re
import socket
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import chat.__main__
import checkpoint
import data
import generate
from chat import answers, server
from chat.requests import read_request
from evaluation.heatmap import heat, word_scores
from model import XLlava
from vision import preprocess
from vocabulary.command import run_main

PAGE = Path(server.__file__).parent
JSON = {"Content-Type": "application/json"}
PATIENCE = 600  # seconds, for a busy machine


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine clients are slow, too. The tests of slow ones set limits of their own."""
    monkeypatch.setattr(server, "READ_SECONDS", PATIENCE)
    monkeypatch.setattr(server.Handler, "timeout", PATIENCE)


def png(colour=(200, 30, 30), size=(20, 24)):
    """A data URL."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(text, *urls):
    """A user's message."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def run(config, tokenizer_file, tmp_path_factory):
    """A run of three stages. Their names are not in the order of their training."""
    folder = tmp_path_factory.mktemp("run")
    for day, name in enumerate(("c", "a", "b")):
        torch.manual_seed(day)
        model = XLlava(config).init_weights()
        torch.nn.init.normal_(model.decoder.lm_head.weight, std=1.0)  # decided answers
        weights = model.state_dict().items()
        checkpoint.write_model(config, weights, tokenizer_file, folder / name)
        row = json.dumps({"time": f"2026-01-0{day + 1}T00:00:00"})
        (folder / name / "runs.jsonl").write_text(row + "\n", encoding="utf-8")
    (folder / "data").mkdir()
    return folder


@pytest.fixture(scope="module")
def answerer(run):
    return answers.Answerer(run / "b", "cpu")


@contextlib.contextmanager
def serving(answerer, **options):
    with server.Server(answerer, **options) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running.server_address[1]
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture
def port(answerer):
    with serving(answerer) as number:
        yield number


def fetch(port, path, body=None, headers=JSON, method=None):
    """(status, headers, text)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def ask(port, messages, **fields):
    """(status, JSON) of a completion."""
    messages = [user(messages)] if isinstance(messages, str) else messages
    body = {"messages": messages, "max_tokens": 12} | fields
    status, _, text = fetch(port, "/v1/chat/completions", body)
    return status, json.loads(text)


def chunks(text):
    """The values of an event stream, without the last one, [DONE]."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def stream(port, messages, **fields):
    body = {"messages": messages, "max_tokens": 12, "stream": True} | fields
    return chunks(fetch(port, "/v1/chat/completions", body)[2])


def raw(port, *parts):
    """What comes back for bytes as they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
        reply = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                reply += part
    return reply.decode()


def status_of(reply):
    return int(reply.split()[1])


def is_error(text, kind="invalid_request_error"):
    """Whether it is an error in OpenAI's form, of one line."""
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error["type"] == kind


# ------------------------------------------------------------------------------------ answers
MESSAGES = [user("What colour is the cat?", png())]
TURNS = [(["", "\nWhat colour is the cat?"], None)]


def plain_answer(answerer, turns, images, stage="b", **options):
    """The answer as generate.py gives it."""
    model, tokenizer = answerer.load(stage)
    pixels = [preprocess(image, 16) for image in images]
    options = {"max_new_tokens": 12} | options
    pixels = torch.stack(pixels) if pixels else None
    return "".join(generate.stream_answer(model, tokenizer, turns, pixels, **options)).lstrip()


def test_an_answer_is_that_of_generate_streamed_or_not(answerer, port):
    expected = plain_answer(answerer, TURNS, [Image.new("RGB", (20, 24), (200, 30, 30))])
    status, whole = ask(port, MESSAGES)
    assert status == 200
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected}
    prompt, _ = data.encode_chat(TURNS, answerer.load("b")[1], 4)
    assert whole["usage"]["prompt_tokens"] == len(prompt)
    assert expected and whole["model"] == "b"

    found = stream(port, MESSAGES, stream_options={"include_usage": True})
    *events, last = found
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert set(reasons[:-1]) == {None} and reasons[-1] == whole["choices"][0]["finish_reason"]
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}


def test_the_limit_of_tokens_is_told(port):
    _, reply = ask(port, MESSAGES, max_tokens=1)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 1
    assert (
        ask(port, MESSAGES, max_tokens=None, max_completion_tokens=1)[1]["usage"] == reply["usage"]
    )


def test_another_stage_gives_its_own_answer_and_two_models_stay_in_memory(answerer, port):
    image = Image.new("RGB", (20, 24), (200, 30, 30))
    for stage in ("a", "c", "b"):
        _, reply = ask(port, MESSAGES, model=stage)
        assert len(answerer.models) <= 2
        expected = plain_answer(answerer, TURNS, [image], stage)
        assert reply["choices"][0]["message"]["content"] == expected
    status, reply = ask(port, MESSAGES, model="../b")
    assert status == 404 and "must be one of c, a, b" in reply["error"]["message"]
    models = json.loads(fetch(port, "/v1/models")[2])["data"]
    assert [model["id"] for model in models] == ["c", "a", "b"], "in the order of training"


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_sent(answerer, port, monkeypatch):
    def tokens(*_, **__):
        yield from ((9, text) for text in ("one", " t", "w", "x tw", "o three"))
        yield 2, ""

    monkeypatch.setattr(answers, "stream_tokens", tokens)
    for stop, expected in ((["two"], "one twx "), ("twx", "one "), (["zz", "eeee"], None)):
        expected = expected or "one twx two three"
        _, reply = ask(port, MESSAGES, stop=stop)
        assert reply["choices"][0]["message"]["content"] == expected
        assert reply["choices"][0]["finish_reason"] == "stop"
        events = stream(port, MESSAGES, stop=stop)
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected


def test_no_half_syllable_is_sent(answerer, port, monkeypatch):
    _, tokenizer = answerer.load("b")
    ids = tokenizer.encode("뷁 a")
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ([i] for i in [*ids, None]))
    texts = [event["choices"][0]["delta"]["content"] for event in stream(port, MESSAGES)]
    assert "".join(texts) == "뷁 a" and "뷁" in texts and len(ids) > 4


def test_draws_follow_the_seed(port):
    def draw(**fields):
        return ask(port, MESSAGES, **fields)[1]["choices"][0]["message"]["content"]

    assert draw(temperature=5.0, seed=7) == draw(temperature=5.0, seed=7)
    assert len({draw(temperature=5.0, seed=seed) for seed in range(4)}) > 1
    assert len({draw(temperature=5.0) for _ in range(4)}) > 1, "without a seed"
    assert draw(temperature=5.0, top_p=0) == draw(), "a nucleus of one token"


# ------------------------------------------------------------------------------------ messages
def turns_of(*messages, **fields):
    return [tuple(turn) for turn in read_request({"messages": [*messages], **fields}, "b").turns]


def test_messages_become_the_turns_that_training_has():
    system, url = {"role": "system", "content": "Be short."}, png()
    reply = {"role": "assistant", "content": "a cat"}
    assert turns_of(user("What?", url)) == [(["", "\nWhat?"], None)]
    assert turns_of(system, user("What?")) == [(["Be short.\n\nWhat?"], None)]
    assert turns_of(system, user("What?", url)) == [(["", "\nBe short.\n\nWhat?"], None)]
    assert turns_of(user("What?", url), reply, {"role": "user", "content": "Where?"}) == [
        (["", "\nWhat?"], "a cat"),
        (["Where?"], None),
    ]
    assert turns_of(user("Same?", url, url)) == [(["", "", "\nSame?"], None)]


def test_a_typed_marker_is_text(answerer, port):
    texts = ["Is <image> or <video> or <|image_pad|> here?", "<image>"]
    for text in texts:
        for urls in ((), (png(),)):
            (turn,) = turns_of(user(text, *urls))
            assert "".join(turn[0]).strip() == text and len(turn[0]) == 1 + len(urls)
            model, tokenizer = answerer.load("b")
            ids, _ = data.encode_chat([turn], tokenizer, 4)
            assert ids.count(tokenizer.image_id) == 4 * len(urls)
    assert ask(port, texts[0])[0] == 200


WRONG = [
    ({"messages": None}, "no conversations"),
    ({"messages": []}, "no conversations"),
    ({"messages": [user(" ")]}, "the question is empty"),
    ({"messages": [user("a"), user("b")]}, "message 1: from 'human', must be 'gpt'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "from 'tool'"),
    ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "must be the user's"),
    ({"messages": [{"role": "user", "content": 5}]}, "the value is not a text"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ({"messages": [user("cat " * 300)]}, "the limit is 256"),
    ({"messages": [user("What?", *[png()] * 70)]}, "the limit is 256"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"seed": 2**70}, "seed is"),
    ({"n": 2}, "n: not supported"),
    ({"tools": [{}], "logprobs": True}, "tools, logprobs: not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format: not supported"),
    ({"stop": [""]}, "stop must be"),
    ({"stop": ["a"] * 5}, "stop must be"),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_what_is_wrong_is_told_in_openais_form(port, fields, message):
    for more in ({}, {"stream": True}):
        body = {"messages": MESSAGES} | fields | more
        status, headers, text = fetch(port, "/v1/chat/completions", body)
        assert status == 400 and headers["Content-Type"] == "application/json"
        assert is_error(text) and message in text.replace("\\u2026", "…")


def test_what_changes_nothing_is_taken(port):
    harmless = {"n": 1, "logprobs": False, "tools": [], "user": "x", "presence_penalty": 0}
    assert ask(port, MESSAGES, response_format={"type": "text"}, **harmless)[0] == 200


# ------------------------------------------------------------------------------------ attention
def rotate(x, theta):
    """RoPE as complex numbers: pairs (i, i + D/2) turn by position · theta^(−2i/D)."""
    T, _, D = x.shape
    angles = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], -1)


def plain_attention(model, ids, pixels):
    """softmax(q·k / √D) of all tokens, (L, H, T, T)."""
    text = model.config.text
    x, maps = model.embed_inputs(torch.tensor([ids]), pixels), []
    rope = (*model.decoder.rope_cos_sin(len(ids), "cpu"), None)
    for block in model.decoder.layers:
        h = x[0] / (x[0].pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()
        h = h * block.attn_norm.weight
        q, k = (
            each(h).view(len(ids), -1, text.head_dim)
            for each in (block.attn.q_proj, block.attn.k_proj)
        )
        q, k = rotate(q, text.rope_theta), rotate(k, text.rope_theta)
        groups = text.num_attention_heads // text.num_key_value_heads
        scores = [q[:, i] @ k[:, i // groups].T / text.head_dim**0.5 for i in range(q.shape[1])]
        past = torch.ones(len(ids), len(ids)).tril().bool()
        maps.append(torch.stack(scores).masked_fill(~past, -math.inf).softmax(-1))
        x = block(x, rope)
    return torch.stack(maps)


@torch.inference_mode()
def test_attention_and_probabilities_are_those_of_a_plain_softmax(answerer, port):
    events = stream(port, MESSAGES, details=True, max_tokens=5)
    tokens = [event["token"] for event in events if "token" in event]
    assert len(tokens) >= 4

    model, tokenizer = answerer.load("b")
    prompt, _ = data.encode_chat(TURNS, tokenizer, 4)
    answer = [tokenizer.ids[token["piece"]] for token in tokens]
    pixels = preprocess(Image.new("RGB", (20, 24), (200, 30, 30)), 16)[None]
    maps = plain_attention(model, prompt + answer, pixels)
    patches = [i for i, token in enumerate(prompt) if token == tokenizer.image_id]
    hidden = model(torch.tensor([prompt + answer]), pixels)[0]
    probabilities = (hidden @ model.decoder.lm_head.weight.T).softmax(-1)
    for i, token in enumerate(tokens):
        at = len(prompt) - 1 + i  # where the token is predicted
        expected = maps[:, :, at, patches]
        assert torch.allclose(torch.tensor(token["maps"]), expected, atol=2e-5)
        assert torch.allclose(torch.tensor(token["attention"]), expected.mean((0, 1)), atol=2e-5)
        assert token["grid"] == [2, 2]

        best = probabilities[at].argsort(descending=True).tolist()
        assert best[0] == answer[i]
        assert token["probability"] == pytest.approx(float(probabilities[at][answer[i]]), rel=1e-4)
        named = [tokenizer.ids[other["text"]] for other in token["alternatives"]]
        assert named == best[1:5]


def test_details_change_no_answer_and_leave_no_hook(answerer, port):
    plain, detailed = stream(port, MESSAGES), stream(port, MESSAGES, details=True)
    text = [
        [event["choices"][0]["delta"]["content"] for event in each] for each in (plain, detailed)
    ]
    assert text[0] == text[1]
    model, _ = answerer.load("b")
    assert not any(module._forward_hooks for module in model.modules())
    blind = stream(port, [user("What?")], details=True)
    assert blind[0]["token"]["attention"] is None, "there is no image"


def test_pieces_and_heat(answerer, port, monkeypatch):
    model, tokenizer = answerer.load("b")
    _, _, text = fetch(port, "/x/pieces", {"text": "고양이 cat"})
    expected = [tokenizer.piece(i) for i in tokenizer.encode("고양이 cat")]
    assert json.loads(text) == [{"tokenizer": "expanded", "pieces": expected}]

    _, _, text = fetch(port, "/x/heat", {"model": "b", "word": "cat", "image": png()})
    pixels = preprocess(Image.new("RGB", (20, 24), (200, 30, 30)), 16)
    expected = heat(word_scores(model, tokenizer, pixels, ["cat"]))[0]
    assert json.loads(text)["scores"] == pytest.approx(expected.tolist(), abs=1e-4)
    for wrong in ({"word": ""}, {"word": 5}, {"image": "http://x/y.png"}):
        body = {"model": "b", "word": "cat", "image": png()} | wrong
        assert fetch(port, "/x/heat", body)[0] == 400


def test_the_base_tokenizer_is_the_beginning_of_the_models(tmp_path, tokenizer):
    import tokenizer as module

    base = module.train(["the cat and the dog", "the red cat"] * 20, 280)
    extended = module.merge_vocabularies(base, ["고양이", "고양", "이"], unreachable="keep")
    base.save(tmp_path / "some name.model")
    extended.save(tmp_path / "both.model")
    tokenizer.save(tmp_path / "another.model")
    (tmp_path / "word2vec.model").write_bytes(b"of another program")
    assert answers.find_base(tmp_path, extended).vocab_size == base.vocab_size
    assert answers.find_base(tmp_path, base) is None


def test_a_run_of_the_demo_offers_its_images(run, world, monkeypatch):
    records = json.loads((world / "chats.json").read_text(encoding="utf-8"))
    records = [record for record in records if "image" in record]
    text = json.dumps(records)
    (run / "data" / "unseen_images.json").write_text(text, encoding="utf-8")
    for record in records:
        (run / "data" / record["image"]).write_bytes((world / record["image"]).read_bytes())
    found = answers.find_examples(run / "data")
    (run / "data" / "unseen_images.json").unlink()
    assert [each["name"] for each in found] == [record["image"] for record in records]
    assert {*found[0]["questions"]} == {"What colour is the cat?"}
    content = base64.b64decode(found[0]["url"].partition(",")[2])
    assert content == (world / "0.png").read_bytes()


def test_no_file_from_outside_the_demos_folder_is_offered(run, world):
    (record, *_) = json.loads((world / "chats.json").read_text(encoding="utf-8"))
    path = run / "data" / "unseen_images.json"
    path.write_text(json.dumps([record | {"image": "../../key"}]), encoding="utf-8")
    (run.parent / "key").write_bytes((world / "0.png").read_bytes())
    try:
        with pytest.raises(ValueError, match="key leads out of its folder"):
            answers.find_examples(run / "data")
    finally:
        path.unlink()


# ------------------------------------------------------------------------------------ attacks
@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{}/a.png", "HTTPS://127.0.0.1:{}/", "//127.0.0.1:{}/a", "ftp://x/{}"]
)
def test_no_image_is_fetched(port, url):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.05)
        status, reply = ask(port, [user("What?", url.format(trap.getsockname()[1]))])
        assert status == 400 and "nothing is fetched" in reply["error"]["message"]
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize(
    "form", ["file://{}", "{}", "data:text/html;base64,{}", "data:{}", 5, None]
)
def test_no_file_is_read(port, world, form):
    path = world / "0.png"
    url = form.format(path) if isinstance(form, str) else form
    assert ask(port, [user("What?", url)])[0] == 400


@pytest.mark.parametrize(
    "path",
    "/../server.py /server.py /%2e%2e/data.py /page.css/ /x /./page.css "
    "/page.js?x /export.py http://127.0.0.1/page.css".split(),
)
def test_nothing_is_served_by_path(port, path):
    status, _, text = fetch(port, path)
    assert status == 404 and is_error(text)


def test_the_page_and_its_scripts_are_served(port):
    status, headers, text = fetch(port, "/")
    assert status == 200 and text == (PAGE / "page.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="([\w.]+)"', text):
        status, headers, content = fetch(port, f"/{name}")
        assert status == 200 and content == (PAGE / name).read_text(encoding="utf-8")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


def test_the_page_makes_no_html_of_text_and_loads_nothing_from_elsewhere():
    sources = [
        path.read_text(encoding="utf-8") for path in PAGE.glob("*.*") if path.suffix != ".py"
    ]
    text = "\n".join(sources)
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
    ):
        assert way not in text
    assert not re.search(r"https?://|@import|url\(", text)
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|<style>|\son\w+=|\sstyle=", html), "the policy forbids these"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.", None])
def test_another_name_of_this_machine_is_refused(port, host):
    for path in ("/", "/x/info"):
        line = "" if host is None else f"Host: {host}\r\n"
        reply = raw(port, f"GET {path} HTTP/1.1\r\n{line}\r\n".encode())
        assert status_of(reply) == 403
    twice = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert status_of(raw(port, twice)) == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", ""])
def test_another_sites_page_may_not_ask(port, origin):
    status, headers, text = fetch(
        port, "/v1/chat/completions", {"messages": MESSAGES}, JSON | {"Origin": origin}
    )
    assert status == 403 and is_error(text)
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_own_page_may_ask_and_a_preflight_gets_nothing(port):
    body, own = {"messages": MESSAGES}, {"Origin": f"http://127.0.0.1:{port}"}
    assert fetch(port, "/v1/chat/completions", body, JSON | own)[0] == 200
    status, headers, text = fetch(
        port, "/v1/chat/completions", None, {"Origin": "http://evil.example"}, "OPTIONS"
    )
    assert status == 501 and is_error(text)
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_can_send_is_refused(port, kind):
    body = json.dumps({"messages": MESSAGES}).encode()
    assert fetch(port, "/v1/chat/completions", body, {"Content-Type": kind})[0] == 415


POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "head, status",
    [
        (f"Content-Length: {server.MAX_BODY + 1}", 413),
        (f"Content-Length: {10**11}", 413),
        ("Content-Length: -5", 411),
        ("Content-Length: 1e3", 411),
        ("Content-Length: ²", 411),
        ("Content-Length: 5\r\nContent-Length: 50", 411),
        ("Transfer-Encoding: chunked", 411),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", 411),
        ("X: y", 411),
    ],
)
def test_a_body_is_refused_by_its_size_before_it_is_read(port, head, status):
    """No body is sent: a server that waits for it would meet its deadline, and answer nothing."""
    assert status_of(raw(port, f"{POST}{head}\r\n\r\n".encode())) == status


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"x"', b""])
def test_a_body_that_is_no_object_is_refused(port, body):
    status, _, text = fetch(port, "/v1/chat/completions", body)
    assert status == 400 and is_error(text)


def test_a_body_that_is_shorter_or_longer_than_it_says(port):
    body = json.dumps({"messages": MESSAGES}).encode()
    cut = f"{POST}Content-Length: {len(body) - 5}\r\n\r\n".encode()
    assert status_of(raw(port, cut, body)) == 400, "what is behind the length is not read"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(f"{POST}Content-Length: {len(body) + 5}\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in connection.recv(100)


@pytest.mark.parametrize("start", ["GET / HT", f"{POST}Content-Length: 100\r\n\r\n{{"])
def test_a_client_that_says_no_more_is_cut_off(answerer, monkeypatch, start):
    monkeypatch.setattr(server.Handler, "timeout", 0.2)
    with serving(answerer) as port:
        assert raw(port, start.encode()) == ""


def test_a_client_that_drips_is_cut_off(answerer, monkeypatch):
    """Each byte comes in time: only the deadline ends this."""
    monkeypatch.setattr(server, "READ_SECONDS", 0.3)
    with serving(answerer) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            with pytest.raises(OSError):
                for _ in range(1000):
                    connection.sendall(b"x")
                    threading.Event().wait(0.02)


def test_an_image_that_would_unpack_to_gigabytes_is_refused(port):
    def block(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"0"))
    for content in (bomb, b"hello", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"):
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        status, reply = ask(port, [user("What?", url)])
        assert status == 400 and reply["error"]["message"].startswith("the image: ")
    assert ask(port, [user("What?", "data:image/png;base64,*")])[0] == 400


def test_a_token_is_asked_for_and_the_page_alone_is_free(answerer):
    with serving(answerer, token="a-secret") as port:
        for path in ("/", "/page.js", "/health"):
            assert fetch(port, path)[0] == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a-secret"}):
            for path in ("/x/info", "/v1/models"):
                status, _, text = fetch(port, path, headers=given)
                assert status == 401 and is_error(text)
            assert fetch(port, "/x/pieces", {"text": "a"}, JSON | given)[0] == 401
        right = {"Authorization": "Bearer a-secret"}
        assert fetch(port, "/x/pieces", {"text": "a"}, JSON | right)[0] == 200
        assert fetch(port, "/x/info", headers=right | {"Host": "192.0.2.7:80"})[0] == 200
        assert fetch(port, "/x/info", headers=right | {"Host": "evil.example"})[0] == 403


def test_nothing_that_is_said_is_logged(port, capfd):
    ask(port, [user("a secret question", png())])
    fetch(port, "/a-secret-path")
    raw(port, b"secret\r\n\r\n")
    out, err = capfd.readouterr()
    assert out == err == ""


# ------------------------------------------------------------------------------------ many clients
def test_fifty_at_once_get_the_answers_that_one_gets(answerer, port):
    questions = [f"What colour is the cat {'now ' * (i % 5)}?" for i in range(50)]
    alone = [ask(port, text)[1]["choices"][0]["message"]["content"] for text in questions[:5]]
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda text: ask(port, text), questions))
    assert {status for status, _ in replies} == {200}
    found = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    assert found == alone * 10 and len(set(alone)) > 1


class Endless:
    """An answer without an end; `closed` is set when it is given up."""

    def __init__(self, monkeypatch):
        self.closed, self.running = threading.Event(), threading.Semaphore(0)
        monkeypatch.setattr(answers, "stream_tokens", self.tokens)

    def tokens(self, *_, **__):
        self.running.release()
        try:
            while True:
                yield 9, "x"
        finally:
            self.closed.set()


def send_question(port, **fields):
    """A connection on which a question was asked, and whose reply is not read."""
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(f"{POST}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_vanishes_ends_its_answer(port, monkeypatch, streamed):
    endless = Endless(monkeypatch)
    connection = send_question(port, stream=streamed)
    assert endless.running.acquire(timeout=PATIENCE)
    connection.close()
    assert endless.closed.wait(PATIENCE)
    monkeypatch.undo()
    assert ask(port, MESSAGES)[0] == 200


def test_who_does_not_read_is_cut_off(answerer, monkeypatch):
    monkeypatch.setattr(server.Handler, "timeout", 1)
    endless = Endless(monkeypatch)
    with serving(answerer) as port:
        connection = send_question(port, stream=True)
        while not endless.running.acquire(timeout=2):  # the question came too late
            connection.close()
            connection = send_question(port, stream=True)
        assert endless.closed.wait(PATIENCE)
        connection.close()


def test_too_many_that_wait_are_told_so_and_who_vanishes_frees_a_place(answerer, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 2)
    Endless(monkeypatch)
    with server.Server(answerer) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        port, free = running.server_address[1], running.places
        connections = [send_question(port), send_question(port)]
        wait_until(lambda: free._value == 0)
        body = {"model": "b", "word": "c", "image": png()}
        status, _, text = fetch(port, "/x/heat", body)
        assert status == 429 and is_error(text)

        for connection in connections:
            connection.close()
        wait_until(lambda: free._value == 2)
        assert fetch(port, "/x/heat", body)[0] == 200
        running.shutdown()


def wait_until(condition):
    for _ in range(50 * PATIENCE):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError


def test_connections_have_a_limit(answerer, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    with serving(answerer) as port:
        silent = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(2)]
        assert raw(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == ""
        for connection in silent:
            connection.close()


def test_a_fault_of_the_server_is_an_error_500_that_gives_nothing_away(port, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("a secret")
        yield

    monkeypatch.setattr(answers, "stream_tokens", fail)
    status, reply = ask(port, MESSAGES)
    assert status == 500 and "secret" not in json.dumps(reply)
    assert is_error(json.dumps(reply), "server_error")
    assert "RuntimeError: a secret" in capfd.readouterr().err


# ------------------------------------------------------------------------------------ command line
@pytest.mark.parametrize(
    "args, message",
    [
        ("{} --host 0.0.0.0", "--host 0.0.0.0 lets other machines in: give a --token"),
        ("{} --host example.org", "must be one such as 127.0.0.1"),
        ("{} --token short", "must be 8 or more letters"),
        ("{}/data", "not a model folder"),
    ],
)
def test_a_users_mistake_is_one_line(run, monkeypatch, capsys, args, message):
    folder = run / "b" if "--" in args else run
    monkeypatch.setattr(sys, "argv", ["chat", *args.format(folder).split()])
    with pytest.raises(SystemExit) as done:
        run_main(chat.__main__.main, "chat")
    error = capsys.readouterr().err if done.value.code == 2 else f"{done.value.code}\n"
    assert message in error and error.count("\n") == 1


def test_the_command_prints_where_it_is_and_refuses_a_taken_port(run, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["chat", str(run / "b"), "--port", str(port)])
        with pytest.raises(ValueError, match=f"port {port}: .*; try --port"):
            chat.__main__.main()
    monkeypatch.setattr(server.Server, "serve_forever", lambda self: None)
    chat.__main__.main()
    assert f"http://127.0.0.1:{port}/ " in capsys.readouterr().out
