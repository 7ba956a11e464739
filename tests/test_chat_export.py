"""The exported page computes what Python computes: its scripts run in node, where there is one."""

import json
import pickle
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bpe_models import ENGLISH, KOREAN, random_text
from bpe_models import model as bpe_model

import data
import tokenizer as tokenizer_module
import vision
from chat.answers import Recorder
from chat.export import MARK, assemble, check_supported, export_page, load_stage, tokenizer_settings
from checkpoint import write_model
from evaluation.heatmap import heat, word_scores
from generate import question_parts, stream_tokens
from model import XLlava

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(not NODE, reason="needs node")
QUESTIONS = [
    "What colour is the cat?",
    "고양이는 무슨 색인가요?",
    "猫是什么颜色？",
    "a 😀 <image> </s>",
]
QUESTIONS += ["  where   is it? ", "파란 개", "x"]


@pytest.fixture(scope="module")
def models(config):
    """{stage: a random model}, in numbers that the page has. The two differ in one tensor."""
    torch.manual_seed(0)
    first = XLlava(config).init_weights().eval()
    torch.nn.init.normal_(first.decoder.lm_head.weight, std=0.5)  # no near ties
    for parameter in first.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
            continue
        rows = parameter.data.flatten(1)
        steps = rows.abs().amax(1, keepdim=True) / 127
        parameter.data = ((rows / steps).round() * steps).view(parameter.shape)
    second = XLlava(config).eval()
    second.load_state_dict(first.state_dict())
    second.projector[2].bias.data += 1
    return {"align": first, "instruct": second}


@pytest.fixture(scope="module")
def run_folder(models, config, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, each in models.items():
        write_model(config, each.state_dict().items(), tokenizer, folder / name)
    tokenizer_module.train(ENGLISH, 300).save(folder / "other.model")  # is no base of this one
    tokenizer_module.Tokenizer(tokenizer.pieces[:320], tokenizer.fields).save(folder / "en.model")
    return folder


@pytest.fixture(scope="module")
def page(run_folder):
    path = run_folder / "page.html"
    export_page(run_folder / "instruct", path, ["align", "instruct"])
    return path


@pytest.fixture(scope="module")
def images():
    """RGB images of many shapes, and one of the model's own size."""
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (40, 23), (7, 90), (1, 1), (192, 192)]
    return [vision.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def as_rgba(image):
    """What a browser's canvas gives."""
    pixels = np.asarray(image.convert("RGBA")).flatten().tolist()
    return {"data": pixels, "width": image.width, "height": image.height}


def run_page(page, tmp_path, calls):
    """The results of calls of the page's engine: [(method, options), …]."""
    (tmp_path / "calls.json").write_text(json.dumps(calls), encoding="utf-8")
    script = Path(__file__).with_name("exported_page.js")
    command = [NODE, script, page, tmp_path / "calls.json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def answer_in_python(model, tokenizer, turns, pixels):
    """The tokens of the greedy answer, as the page's engine describes them, and its text."""
    prompt, _ = data.encode_chat(turns, tokenizer, model.config.vision.num_patches)
    tokens, text = [], ""
    with Recorder(model, tokenizer, prompt) as recorder:
        for token, piece in stream_tokens(model, tokenizer, prompt, pixels, max_new_tokens=24):
            text += piece
            if token not in (tokenizer.eos_id, None):
                tokens.append(recorder.describe(token))
    return tokens, text.strip()


@needs_node
def test_the_page_answers_as_python_does(page, models, tokenizer, images, tmp_path):
    calls, expected = [], []
    for stage, model in models.items():
        for i, question in enumerate(QUESTIONS):
            image = images[i % len(images)] if i % 3 else None
            messages = [{"role": "user", "text": question}]
            pixels, turns = None, [[question_parts(question, int(bool(image))), None]]
            if i % 2:  # a further turn
                turns = [[turns[0][0], "빨간색"], ["And then?", None]]
                messages += [{"role": "assistant", "text": "빨간색"}]
                messages += [{"role": "user", "text": "And then?"}]
            if image:
                pixels = vision.preprocess(image, model.config.vision.image_size)[None]
            options = {"stage": stage, "messages": messages, "temperature": 0, "maxTokens": 24}
            calls.append(("answer", options | {"image": image and json.dumps(as_rgba(image))}))
            expected.append(answer_in_python(model, tokenizer, turns, pixels))

    for (_, options), found, (tokens, text) in zip(
        calls, run_page(page, tmp_path, calls), expected
    ):
        assert [t["piece"] for t in found["tokens"]] == [t["piece"] for t in tokens]
        assert found["text"] == text
        assert text.startswith("".join(t["text"] for t in found["tokens"]).rstrip())
        for ours, theirs in zip(tokens, found["tokens"]):
            assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-4)
            names = [[each["text"] for each in t["alternatives"]] for t in (ours, theirs)]
            assert names[0] == names[1]
            assert (theirs["attention"] is None) == (options["image"] is None)
            if options["image"]:
                assert theirs["attention"] == pytest.approx(ours["attention"], abs=1e-4)
                assert theirs["grid"] == ours["grid"]
    answers = {found[1] for found in expected}
    assert len(answers) > len(QUESTIONS)  # they depend on question, image and stage


@needs_node
def test_attention_of_one_layer_and_head(page, models, tokenizer, images, tmp_path):
    model, image = models["instruct"], images[1]
    pixels = vision.preprocess(image, model.config.vision.image_size)[None]
    turns = [[question_parts("What?", 1), None]]
    prompt, _ = data.encode_chat(turns, tokenizer, model.config.vision.num_patches)
    with Recorder(model, tokenizer, prompt) as recorder:
        token, _ = next(stream_tokens(model, tokenizer, prompt, pixels))
        maps = np.array(recorder.describe(token)["maps"])  # (L, H, N)

    messages = [{"role": "user", "text": "What?"}]
    options = {"stage": "instruct", "messages": messages, "temperature": 0, "maxTokens": 1}
    choices = [(1, 2), (0, None), (None, 3)]
    calls = [("answer", options | {"image": json.dumps(as_rgba(image))})]
    calls += [("attention", {"token": 0, "layer": layer, "head": head}) for layer, head in choices]
    _, *found = run_page(page, tmp_path, calls)
    for weights, expected in zip(found, (maps[1, 2], maps[0].mean(0), maps[:, 3].mean(0))):
        assert weights == pytest.approx(expected, abs=1e-4)


@needs_node
def test_pieces_and_heat(page, models, tokenizer, images, tmp_path):
    text, image = "고양이 cat 🐈", images[1]
    calls = [("pieces", {"text": text})]
    options = {"stage": "align", "word": "고양이", "image": json.dumps(as_rgba(image))}
    cut, found = run_page(page, tmp_path, [*calls, ("heat", options)])
    base = tokenizer_module.Tokenizer(tokenizer.pieces[:320], tokenizer.fields)
    for each, expected in zip(cut, (base, tokenizer)):
        assert each["pieces"] == [expected.piece(i) for i in expected.encode(text)]
    assert [each["tokenizer"] for each in cut] == ["base", "expanded"]

    pixels = vision.preprocess(image, models["align"].config.vision.image_size)
    scores = word_scores(models["align"], tokenizer, pixels, ["고양이"])
    assert found["scores"] == pytest.approx(heat(scores)[0], abs=1e-4)


@needs_node
def test_images_are_resized_as_pillow_does(page, images, tmp_path):
    sizes = (16, 48, 33)
    calls = [("preprocess", {"image": as_rgba(i), "size": size}) for i in images for size in sizes]
    found = iter(run_page(page, tmp_path, calls))
    for image in images:
        for size in sizes:
            assert next(found) == vision.preprocess(image, size).flatten().tolist()


@needs_node
def test_text_becomes_the_same_tokens(page, tokenizer, tmp_path):
    """Against the sentencepiece package, in every setting that the page takes."""
    rng = random.Random(0)
    pieces = [(c, -50.0) for c in "▁abcde고양이"] + [("ab", -1.0), ("▁a", -2.0), ("aa", -3.0)]
    pieces += [(text, 0.0, tokenizer_module.USER_DEFINED) for text in ("bc", "bcd", "a+b")]
    each = [(fallback, prefix, trim) for fallback in (0, 1) for prefix in (0, 1) for trim in (0, 1)]
    tokenizers = [tokenizer, *(bpe_model(pieces, *settings) for settings in each)]
    texts = [random_text(rng, ENGLISH + KOREAN + ["a+b", "abcde", "aaaaa"]) for _ in range(60)]
    texts += ["", " ", "a  b ", "aaa", "bcde", "\ud800", "x\ufffdy"]
    ids = [[rng.randrange(tokenizer.vocab_size) for _ in range(8)] for _ in range(60)]
    byte_ids = [[tokenizer.id(f"<0x{rng.randrange(128, 256):02X}>") for _ in range(6)] for _ in ids]

    calls = [("encode", {"spec": tokenizer_settings(t), "list": texts}) for t in tokenizers]
    calls.append(("decode", {"spec": tokenizer_settings(tokenizer), "list": ids + byte_ids}))
    *encoded, decoded = run_page(page, tmp_path, calls)
    for each, found in zip(tokenizers, encoded):
        assert found == [each.encode(text) for text in texts]
    assert decoded == [tokenizer.decode(each) for each in ids + byte_ids]


@needs_node
def test_a_weight_is_off_by_half_a_step_of_its_row(run_folder, config, tokenizer, tmp_path):
    model = XLlava(config).init_weights()
    write_model(config, model.state_dict().items(), tokenizer, tmp_path / "run" / "align")
    export_page(tmp_path / "run" / "align", tmp_path / "page.html")
    (found,) = run_page(tmp_path / "page.html", tmp_path, [("tensors", {"stage": "align"})])
    state = model.state_dict()
    assert set(state) - set(found) == {"vision.final_norm.weight", "vision.final_norm.bias"}
    for name, values in found.items():
        if state[name].dim() == 1:
            assert values == state[name].tolist()
            continue
        rows = state[name].flatten(1)
        step = rows.abs().amax(1, keepdim=True) / 127
        error = (torch.tensor(values).view(rows.shape) - rows).abs()
        assert (error <= 0.5001 * step).all() and error.max() > 0, name


@needs_node
def test_the_scripts_parse():
    for name in ("local_engine.js", "scene.js", "page.js"):
        path = Path(__file__).parent.parent / "chat" / name
        subprocess.run([NODE, "--check", path], check=True)


def test_stages_share_the_tensors_that_no_stage_changed(page, run_folder, models, tmp_path):
    export_page(run_folder / "align", tmp_path / "one.html")
    length = [len(path.read_text(encoding="utf-8")) for path in (page, tmp_path / "one.html")]
    more = length[0] - length[1]
    index_size = len(json.dumps({"instruct": read_settings(page)["tensors"]["instruct"]}))
    assert more <= index_size + 6 * models["align"].projector[2].bias.numel()  # 4 bytes, base64


def read_settings(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="settings">(.*?)</script>', text)[1])


def test_the_page_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith(MARK) and "default-src 'none'" in text
    assert not re.findall(r"<script[^>]* src=|<link[^>]* href=\"(?!data:)", text)
    assert text.count("<script") == text.count("</script>") == 6
    assert read_settings(page)["info"]["stages"] == ["align", "instruct"]


def test_no_piece_ends_the_script_that_holds_it():
    text = assemble({"pieces": ["</script>", "<!--", "é"]}, b"")
    assert text.count("</script>") == 6 and "<!--" not in text.removeprefix(MARK)
    assert json.loads(text.split('id="settings">')[1].split("</script>")[0])["pieces"][2] == "é"


def test_only_a_page_is_written_over(page, run_folder, tmp_path):
    before = page.read_bytes()
    export_page(run_folder / "instruct", page, ["align", "instruct"])
    assert page.read_bytes() == before
    (tmp_path / "mine.html").write_text("<p>", encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by this command"):
        export_page(run_folder / "instruct", tmp_path / "mine.html")


def test_a_checkpoint_is_a_stage(models, run_folder):
    import torch.distributed.checkpoint as dcp

    folder = run_folder / "align" / "checkpoints" / "step-00000010"
    weight = torch.full_like(models["align"].projector[2].bias, 0.5)
    state = {"weight.model.projector.2.bias": weight, "exp_avg.model.projector.2.bias": weight}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    stages = {"align": run_folder / "align"}
    found = load_stage("align/step-00000010", stages)[0].state_dict()
    for name, tensor in models["align"].state_dict().items():
        assert found[name].equal(weight if name == "projector.2.bias" else tensor)
    for name in ("align/step-7", "vision", "align/../align"):
        with pytest.raises(ValueError, match=f"--stages {name}"):
            load_stage(name, stages)
    (folder / ".metadata").write_bytes(pickle.dumps(print))  # it would be called, or worse
    with pytest.raises(ValueError, match="builtins.print in it: not what train.py writes"):
        load_stage("align/step-00000010", stages)


def test_other_families_are_refused_by_name(config, tokenizer):
    check_supported(config, tokenizer, "x")
    text, eyes = config.text, config.vision
    siglip = replace(eyes, model_type="siglip_vision_model")
    for change, reason in (
        ({"text": replace(text, model_type="qwen2")}, "qwen2"),
        ({"vision": siglip}, "siglip"),
        ({"image_aspect_ratio": "square"}, "square"),
        ({"text": replace(text, vocab_size=10**6)}, "parameters"),
    ):
        with pytest.raises(ValueError, match=f"^x: has [^\n]*{reason}[^\n]*$"):
            check_supported(replace(config, **change), tokenizer, "x")
    with pytest.raises(ValueError, match="byte-level"):
        check_supported(config, object(), "x")
