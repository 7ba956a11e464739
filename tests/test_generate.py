"""Answers: batched and streamed ones against a plain loop without a cache, and what a user's mistakes give."""

import copy
import json
import subprocess
import sys
from pathlib import Path

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
    torch.nn.init.normal_(
        model.decoder.lm_head.weight, std=1.0
    )  # decided answers, of varied lengths
    return model


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model") / "m"
    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, folder)
    return folder


def greedy(model, prompt, pixels, eos, n):
    """The definition: the whole sequence again for each new token."""
    ids = list(prompt)
    for _ in range(n):
        new = model.logits(model(torch.tensor([ids]), pixels))[0, -1].argmax().item()
        if new == eos:
            break
        ids.append(new)
    return ids[len(prompt) :]


def test_a_batch_of_prompts_of_all_lengths_gives_what_a_plain_loop_gives(model, config, tokenizer):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    image = [config.image_token_id] * config.vision.num_patches
    prompts = [[1, *image, 20, 21, 22], [1, 30], [1, 25, *image, 40, 41, 42, 43, 44]]
    want = [
        greedy(model, prompts[0], pixels[:1], 2, 12),
        greedy(model, prompts[1], None, 2, 12),
        greedy(model, prompts[2], pixels[1:], 2, 12),
    ]
    got = [[], [], []]
    for step in generate.generate(model, prompts, pixels, max_new_tokens=12, eos_id=2):
        for row, id in enumerate(step):
            if id is not None:
                got[row].append(id)
    assert got == want and any(want)


def test_prompts_that_share_pictures_give_what_a_plain_loop_gives_however_long_they_get(
    model, config
):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    model = copy.deepcopy(model)
    model.decoder.lm_head.weight.data[config.image_token_id] = (
        0  # never likeliest: the plain loop reads its own words again
    )
    image = [config.image_token_id] * config.vision.num_patches
    prompts = [
        [1, 9, *image, 20, 21],
        [1, 9, *image, 30],
        [1, 9, *image, 31, 32, 33],
        [1, 9, *image, 22, *image, 40],
        [1, 9, *image, 23],
    ]
    pictures = [[1], [0], [1], [0, 2], [1]]
    assert generate.shared_prefix_length(prompts, pictures, config) == 2 + len(image)
    assert generate.shared_prefix_length(prompts[:2], pictures[:2], config) == 0, (
        "no two have a picture in common"
    )
    assert (
        generate.shared_prefix_length([*prompts, [1, 8, *image, 20]], [*pictures, [1]], config) == 0
    ), "one begins otherwise"
    # ids that some rows say early and others late serve as the end: rows leave the cache at different steps, and the last outgrows its first size
    endless = [greedy(model, p, pixels[own], -1, 40) for p, own in zip(prompts, pictures)]
    eos = next(id for id in endless[0][1:] if sum(id in row for row in endless) < len(endless))
    want = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert len({len(row) for row in want}) > 1 and max(map(len, want)) > 16
    got = [[] for _ in prompts]
    for step in generate.generate(
        model, prompts, pixels, max_new_tokens=40, eos_id=eos, pictures=pictures
    ):
        for row, id in enumerate(step):
            if id is not None:
                got[row].append(id)
    assert got == want


def test_sampling_keeps_to_the_nucleus_and_to_its_seed(model):
    draw = lambda seed, **kw: list(
        generate.generate(
            model,
            [[1, 20, 21]],
            max_new_tokens=8,
            eos_id=-1,
            generator=torch.Generator().manual_seed(seed),
            **kw,
        )
    )
    greedy_ids = list(generate.generate(model, [[1, 20, 21]], max_new_tokens=8, eos_id=-1))
    assert draw(0, temperature=1.0, top_p=1e-9) == greedy_ids, (
        "a nucleus of one token is the likeliest token"
    )
    assert draw(1, temperature=2.0) == draw(1, temperature=2.0)
    assert any(draw(seed, temperature=2.0) != greedy_ids for seed in range(5))


def test_what_is_streamed_is_what_is_decoded(model, tokenizer, config):
    turns = [("고양이는 무슨 색인가요?", None)]
    pieces = list(generate.stream_answer(model, tokenizer, turns, max_new_tokens=20))
    prompt, _ = data.encode_chat(turns, tokenizer, config.vision.num_patches)
    assert "".join(pieces) == tokenizer.sp_processor.decode(
        greedy(model, prompt, None, tokenizer.eos_id, 20)
    )


def ask(folder, *args, stdin=None):
    return subprocess.run(
        [
            sys.executable,
            ROOT / "generate.py",
            "--model",
            folder,
            "--max-new-tokens",
            "4",
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        input=stdin,
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--image", "nowhere.png", "What?"], "nowhere.png: no such image"),
        (["--image", "text.png", "What?"], "text.png: not an image that Pillow can read"),
        (["--image", "empty.png", "What?"], "empty.png: the file is empty (0 bytes)"),
        (["   "], "the question is empty"),
    ],
)
def test_a_users_mistake_gets_one_clear_line(folder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("hello")
    Path("empty.png").touch()
    done = ask(folder, *args)
    assert (
        done.returncode == 1
        and done.stderr.startswith(f"generate.py: {message}")
        and done.stderr.count("\n") == 1
    )


def test_one_question_a_chat_and_a_batch_as_commands(folder, world, tmp_path):
    one = ask(folder, "--image", world / "0.png", "What colour is the cat?")
    assert one.returncode == 0, one.stderr
    chat = ask(folder, "--image", world / "0.png", "--chat", stdin="What colour?\nWhere?\n\n")
    assert chat.returncode == 0 and chat.stdout.count("you: ") == 3
    out = tmp_path / "answers.jsonl"
    assert ask(folder, "--batch", world / "chats.json", "-o", out).returncode == 0
    whole = out.read_text()
    assert len(whole.splitlines()) == len(json.loads((world / "chats.json").read_text()))
    out.write_text(
        whole[: len(whole) // 2]
    )  # cut off in the middle of a line: the second run goes on
    assert ask(folder, "--batch", world / "chats.json", "-o", out).returncode == 0
    assert out.read_text() == whole
    other = ask(folder, "--batch", world / "captions.json", "-o", out)
    assert (
        other.returncode == 1
        and "answers.jsonl: holds answers of" in other.stderr
        and out.read_text() == whole
    )


def test_a_conversation_that_outgrows_the_model_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the model reads 256: start a new one"):
        list(generate.stream_answer(model, tokenizer, [("cat " * 300, None)]))
