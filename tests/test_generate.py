"""Answers: batched and streamed ones against a plain loop without a cache, and users' mistakes."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import checkpoint
import data
import generate
from model import XLlava

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(3)
    model = XLlava(config).init_weights().double()
    # Decided answers, of varied lengths.
    torch.nn.init.normal_(model.decoder.lm_head.weight, std=1.0)
    return model


def greedy(model, prompt, pixels, eos_id, max_new_tokens):
    """The definition: the whole sequence again for each new token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        token = model.logits(model(torch.tensor([ids]), pixels))[0, -1].argmax().item()
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def generate_all(model, prompts, *args, **options):
    """The answers of `generate`, lists of ids."""
    answers = [[] for _ in prompts]
    for step in generate.generate(model, prompts, *args, **options):
        for answer, token in zip(answers, step):
            if token is not None:
                answer.append(token)
    return answers


# ------------------------------------------------------------------------------------ generation
def test_a_batch_of_prompts_of_all_lengths_gives_what_a_plain_loop_gives(model, config):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    image = [config.image_token_id] * config.vision.num_patches
    prompts = [[1, *image, 20, 21, 22], [1, 30], [1, 25, *image, 40, 41, 42, 43, 44]]
    expected = [
        greedy(model, prompts[0], pixels[:1], 2, 12),
        greedy(model, prompts[1], None, 2, 12),
        greedy(model, prompts[2], pixels[1:], 2, 12),
    ]
    assert any(expected)
    assert generate_all(model, prompts, pixels, max_new_tokens=12, eos_id=2) == expected


def test_prompts_that_share_images_give_what_a_plain_loop_gives_however_long_they_get(
    model, config
):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    model = copy.deepcopy(model)
    # Never the likeliest token: the plain loop reads its own answer again.
    model.decoder.lm_head.weight.data[config.image_token_id] = 0
    image = [config.image_token_id] * config.vision.num_patches
    prompts = [
        [1, 9, *image, 20, 21],
        [1, 9, *image, 30],
        [1, 9, *image, 31, 32, 33],
        [1, 9, *image, 22, *image, 40],
        [1, 9, *image, 23],
    ]
    indices = [[1], [0], [1], [0, 2], [1]]
    assert generate.shared_prefix_length(prompts, indices, config) == 2 + len(image)

    # An id that some answers have early and others late is taken for the end: rows leave the cache
    # at different steps, and the last one outgrows its first size.
    endless = [greedy(model, p, pixels[own], -1, 40) for p, own in zip(prompts, indices)]
    ids = endless[0][1:]
    eos = next(token for token in ids if sum(token in row for row in endless) < len(endless))
    expected = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert len({len(row) for row in expected}) > 1
    assert max(map(len, expected)) > 16
    options = {"max_new_tokens": 40, "eos_id": eos, "image_indices": indices}
    assert generate_all(model, prompts, pixels, **options) == expected


def test_a_prefix_is_shared_only_if_ids_and_some_images_are_the_same(config):
    image = [config.image_token_id] * config.vision.num_patches
    prompts = [[1, 9, *image, 20], [1, 9, *image, 30], [1, 9, *image, 31]]
    assert generate.shared_prefix_length(prompts, [[1], [0], [1]], config) == 2 + len(image)
    assert generate.shared_prefix_length(prompts, [[1], [0], [2]], config) == 0, "all different"
    other = [*prompts, [1, 8, *image, 20]]
    assert generate.shared_prefix_length(other, [[1], [0], [1], [1]], config) == 0, "another begin"
    text = [*prompts, [1, 9, 20]]
    assert generate.shared_prefix_length(text, [[1], [0], [1], []], config) == 0, "no image"


def test_sampling_keeps_to_the_nucleus_and_to_its_seed(model):
    def draw(seed, **sampling):
        generator = torch.Generator().manual_seed(seed)
        options = {"max_new_tokens": 8, "eos_id": -1, "generator": generator}
        return generate_all(model, [[1, 20, 21]], **options, **sampling)

    likeliest = generate_all(model, [[1, 20, 21]], max_new_tokens=8, eos_id=-1)
    assert draw(0, temperature=1.0, top_p=1e-9) == likeliest, "a nucleus of one token"
    assert draw(1, temperature=2.0) == draw(1, temperature=2.0)
    assert any(draw(seed, temperature=2.0) != likeliest for seed in range(5))


def test_the_nucleus_is_the_smallest_set_that_has_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, drawn in ((0.0, {0}), (0.4, {0}), (0.6, {0, 1}), (0.79, {0, 1}), (0.9, {0, 1, 2})):
        ids = generate.sample_tokens(logits, generate.Sampling(1.0, top_p, generator))
        assert set(ids.tolist()) == drawn
    # The first one has exactly half.
    ids = generate.sample_tokens(torch.zeros(2000, 2), generate.Sampling(1.0, 0.5, generator))
    assert len(set(ids.tolist())) == 1


def test_a_temperature_is_a_power_of_the_probabilities():
    """p^(1/t), normalised: at ½ of 0.8 and 0.2 it is 0.64 to 0.04."""
    n, p = 20_000, 0.64 / 0.68
    logits = torch.tensor([[0.8, 0.2]]).log().expand(n, 2)
    generator = torch.Generator().manual_seed(0)
    ids = generate.sample_tokens(logits, generate.Sampling(0.5, 1.0, generator))
    share, sigma = (ids == 0).double().mean(), (p * (1 - p) / n) ** 0.5
    assert abs(share - p) < 4 * sigma < 0.01


# ------------------------------------------------------------------------------------ answers
def test_what_is_streamed_is_what_is_decoded(model, tokenizer, config):
    turns = [("고양이는 무슨 색인가요?", None)]
    pieces = list(generate.stream_answer(model, tokenizer, turns, max_new_tokens=20))
    prompt, _ = data.encode_chat(turns, tokenizer, config.vision.num_patches)
    ids = greedy(model, prompt, None, tokenizer.eos_id, 20)
    assert "".join(pieces) == tokenizer.sp_processor.decode(ids)


def test_a_character_is_streamed_when_it_is_complete(model, tokenizer, config, monkeypatch):
    """A syllable that is no piece takes three tokens of a byte each."""
    ids = tokenizer.encode("뷁 a")
    assert len(ids) >= 5

    def stream(ids):
        steps = ([token] for token in ids)
        monkeypatch.setattr(generate, "generate", lambda *args, **options: steps)
        return list(generate.stream_answer(model, tokenizer, [("What?", None)]))

    pieces = stream(ids)
    assert "".join(pieces) == "뷁 a"
    assert "뷁" in pieces
    assert not any("\ufffd" in piece for piece in pieces)

    incomplete = ids[:-3]  # the answer ends within the character
    assert "\ufffd" in "".join(stream(incomplete))
    assert "".join(stream(incomplete)) == tokenizer.decode(incomplete)


def test_a_conversation_that_outgrows_the_model_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the model reads 256: start a new one"):
        list(generate.stream_answer(model, tokenizer, [("cat " * 300, None)]))
    # The model reads 256: after 255 there is room for one token.
    with pytest.raises(ValueError, match="the conversation has 256 tokens, the model reads 256"):
        list(generate.stream_tokens(model, tokenizer, [20] * 256))
    tokens = list(generate.stream_tokens(model, tokenizer, [20] * 255, max_new_tokens=9))
    assert len(tokens) == 2 and tokens[-1][0] in (None, tokenizer.eos_id)


def test_padding_rows_of_the_embeddings_are_never_drawn(model, tokenizer, monkeypatch):
    """As Qwen's, whose table has more rows than its tokenizer pieces."""
    logits = torch.tensor([[0.0, 0.0, 99.0]])
    for temperature in (0.0, 1.0):
        choice = generate.Sampling(temperature, vocab_size=2)
        assert generate.sample_tokens(logits, choice).item() < 2
    given = []
    monkeypatch.setattr(generate, "generate", lambda *_, **options: given.append(options) or [[5]])
    generate.answer_batch(model, tokenizer, [[1, 20]])
    list(generate.stream_tokens(model, tokenizer, [1, 20]))
    assert [options["vocab_size"] for options in given] == [tokenizer.vocab_size] * 2


def test_answers_of_a_batch_and_of_a_file_have_no_space_around_them(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda ids: " red \n")
    (answer,) = generate.answer_batch(model, tokenizer, [[1, 20, 21]], max_new_tokens=1)
    assert answer == "red"


def test_a_chat_reads_what_was_said_before(model, tokenizer, monkeypatch, capsys):
    """A piped file may begin with a byte order mark."""
    typed, asked = ["\ufeffWhat colour?", " Where? ", ""], []

    def stream(model, tokenizer, turns, pixels, **options):
        asked.append([list(turn) for turn in turns])
        return iter([" red", " cat \n"])

    monkeypatch.setattr(generate, "stream_answer", stream)
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0))
    generate.chat(model, tokenizer, SimpleNamespace(question=None, chat=True), [], {})
    first = ["What colour?", None]
    assert asked == [[first], [["What colour?", "red cat"], ["Where?", None]]]
    assert capsys.readouterr().out == "red cat \n\n" * 2


# ------------------------------------------------------------------------------------ command line
@pytest.fixture(scope="module")
def model_folder(config, tokenizer_file, tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model") / "m"
    weights = XLlava(config).init_weights().state_dict().items()
    checkpoint.write_model(config, weights, tokenizer_file, folder)
    return folder


@pytest.fixture
def ask(model_folder):
    def ask(*args, stdin=None):
        command = [sys.executable, ROOT / "generate.py", "--model", model_folder, *map(str, args)]
        command += ["--max-new-tokens", "4"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", input=stdin)

    return ask


@pytest.mark.parametrize(
    "args, message",
    [
        (["--image", "nowhere.png", "What?"], "argument --image: nowhere.png: no such file"),
        (["--image", "text.png", "What?"], "text.png: not an image that Pillow can read"),
        (["--image", "empty.png", "What?"], "empty.png: the file is empty (0 bytes)"),
        (["   "], "the question is empty"),
        (["--device", "mps", "What?"], ""),
    ],
)
def test_a_users_mistake_gets_one_clear_line(
    model_folder, run_here, tmp_path, monkeypatch, args, message
):
    if "mps" in args and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("hello", encoding="utf-8")
    Path("empty.png").touch()
    status, error = run_here(ROOT / "generate.py", "--model", model_folder, *args)
    assert status in (1, 2)
    assert error.startswith(f"generate.py: {message}")
    assert error.count("\n") == 1


def test_a_tokenizer_of_another_model_is_noticed(model_folder, run_here, world, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["image_token_index"] += 1
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    file = world / "chats.json"
    for words in (
        ["generate.py", "--model", folder, "What?"],
        ["data.py", "check", file, "--model", folder],
        ["train.py", "align", "--model", folder, "--data", file, "-o", tmp_path / "out"],
    ):
        status, error = run_here(ROOT / words[0], *words[1:])
        assert status == 1 and f"its <image> is {settings['image_token_index']}:" in error, error


@pytest.mark.parametrize("precision, dtype", [("auto", "bfloat16"), ("fp32", "float32")])
def test_on_a_gpu_the_weights_have_the_precision_that_was_asked_for(
    model_folder, monkeypatch, precision, dtype
):
    loaded = []
    monkeypatch.setattr(generate, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("kernels.device.has_bf16", lambda _: True)

    def load(folder, dtype):
        loaded.append(dtype)
        return MagicMock()

    monkeypatch.setattr(generate, "load_model", load)
    generate.load_for_inference(model_folder, precision=precision)
    assert loaded == [getattr(torch, dtype)]


def test_one_question_and_a_chat_as_commands(ask, world):
    for device in ("auto", "cpu"):
        one = ask("--device", device, "--image", world / "0.png", "What colour is the cat?")
        assert one.returncode == 0, one.stderr

    chat = ask("--image", world / "0.png", "--chat", stdin="What colour?\nWhere?\n\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.count("you: ") == 3


def test_a_batch_that_was_cut_off_is_continued(ask, world, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert ask("--batch", world / "chats.json", "-o", out).returncode == 0
    complete = out.read_bytes()
    records = json.loads((world / "chats.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in complete.splitlines()]
    assert [row["id"] for row in rows] == [record["id"] for record in records]

    out.write_bytes(complete[: len(complete) // 2])  # cut off within a line
    assert ask("--batch", world / "chats.json", "-o", out).returncode == 0
    assert out.read_bytes() == complete

    other = ask("--batch", world / "captions.json", "-o", out)
    assert other.returncode == 1
    assert "answers.jsonl: is of another run (data: " in other.stderr
    assert out.read_bytes() == complete
