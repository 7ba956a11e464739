"""The files for AutoProcessor: transformers has the same prompt, pixels and answer."""

import base64
import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from conftest import LINES, save_model
from PIL import Image

import checkpoint
import data
import generate
import tokenizer as tokenizer_module
import vision
from checkpoint.processor import chat_template, merge_rules, processor_files, tokenizer_json
from model import XLlava
from vocabulary.conversations import read_conversation

TURNS = [(["", "\nWhat colour is the cat?"], "red"), ("고양이는?", "빨간색"), ("And?", None)]
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What colour is the cat?"}],
    },
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "고양이는?"},
    {"role": "assistant", "content": [{"type": "text", "text": "빨간색"}]},
    {"role": "user", "content": "And?"},
]


def test_the_chat_template_gives_the_ids_that_we_train_on(tokenizer):
    jinja2 = pytest.importorskip("jinja2")  # PyTorch brings it
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    template = environment.from_string(chat_template(tokenizer))
    text = template.render(messages=CHAT, add_generation_prompt=True)
    ids = [tokenizer.bos_id]
    for part in re.split("(<image>|</s>)", text):
        is_control = part in ("<image>", "</s>")
        ids += [tokenizer.id(part)] if is_control else tokenizer.encode(part)
    assert ids == data.encode_chat(TURNS, tokenizer, num_patches=1)[0]
    assert template.render(messages=CHAT[:2]).endswith(" ASSISTANT: red</s>")


IMAGE, TEXT = {"type": "image", "image": "a.png"}, "What is different?"
CONTENTS = [
    [{"type": "text", "text": "First:"}, IMAGE, {"type": "text", "text": "Second:"}, IMAGE],
    [IMAGE, IMAGE, {"type": "text", "text": TEXT}],
    [IMAGE, {"type": "text", "text": "Look closely."}, {"type": "text", "text": TEXT}],
    [{"type": "text", "text": " Look. "}, IMAGE, {"type": "text", "text": TEXT}],
    [IMAGE],
    " <image>\nWhat?  ",
    "What?",
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_puts_images_and_system_texts_where_training_has_them(
    tokenizer, content, system
):
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    messages += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "cat"}]
    images = ["a.png"] if isinstance(content, str) and "<image>" in content else None
    found = read_conversation({"messages": messages, "images": images})
    pieces = []
    for question, answer in found.turns:
        pieces.append("USER: " + "<image>".join(question) + f" ASSISTANT: {answer}</s>")

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template(tokenizer))
    assert template.render(messages=messages) == "".join(pieces)


def test_the_image_processor_is_told_what_preprocess_does(config, tokenizer):
    for mode, kind in (("pad", "LlavaImageProcessor"), ("square", "CLIPImageProcessor")):
        mode_config = dataclasses.replace(config, image_aspect_ratio=mode)
        settings = processor_files(mode_config, tokenizer)["preprocessor_config.json"]
        assert settings["image_processor_type"] == kind and settings["do_pad"] == (mode == "pad")
        assert settings["size"] == {"shortest_edge": 16}
        assert settings["crop_size"] == {"height": 16, "width": 16}
        assert settings["resample"] == Image.Resampling.BICUBIC
        assert settings["rescale_factor"] == 1 / 255
        assert settings["image_mean"] == vision.CLIP_MEAN
        assert settings["image_std"] == vision.CLIP_STD


def test_special_tokens_have_the_ids_of_the_tokenizer(config, tokenizer):
    files = processor_files(config, tokenizer)
    assert files["generation_config.json"] == {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    added = {token["content"]: token["id"] for token in files["tokenizer.json"]["added_tokens"]}
    names = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    assert added == {name: tokenizer.id(name) for name in names}
    assert files["tokenizer_config.json"]["pad_token"] == "<pad>"
    assert files["special_tokens_map.json"] == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    without_pad = tokenizer_module.train(LINES * 50, 350)
    files = processor_files(config, without_pad)
    assert "pad_token" not in files["tokenizer_config.json"]
    assert "pad_token" not in files["special_tokens_map.json"]


def test_the_merge_rules_of_tokenizer_json_build_the_same_pieces():
    """Each text is merged as `tokenizers` does it: by the first rule of the list that fits."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("aabbcde", k=30)) for _ in range(100)]
    tokenizer = tokenizer_module.train(texts, 400)
    rank = {tuple(pair): i for i, pair in enumerate(merge_rules(tokenizer))}
    for text in texts:
        symbols = ["▁", *text]
        while True:
            pairs = list(zip(symbols, symbols[1:]))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            i = pairs.index(best)
            symbols[i : i + 2] = ["".join(best)]
        assert [tokenizer.id(symbol) for symbol in symbols] == tokenizer.encode(text), text


def test_the_steps_around_bpe_are_those_of_the_tokenizer(tokenizer, tmp_path):
    def types(steps):
        return [step["type"] for step in steps]

    written = tokenizer_json(tokenizer)
    assert types(written["normalizer"]["normalizers"]) == ["Prepend", "Replace"]
    decoders = types(written["decoder"]["decoders"])
    assert decoders == ["Replace", "ByteFallback", "Fuse", "Strip"]

    other = train_with_sentencepiece(tmp_path)
    written = tokenizer_json(other)
    first, *rest = written["normalizer"]["normalizers"]
    assert base64.b64decode(first["precompiled_charsmap"]) == other.charsmap
    assert types(rest) == ["Strip", "Replace", "Prepend", "Replace"]
    assert types(written["decoder"]["decoders"]) == ["Replace", "Fuse", "Strip"]


# ------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_transformers_generates_the_same_text_about_an_image_through_its_processor(
    config, tokenizer, tokenizer_file, tmp_path, mode
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    model = XLlava(dataclasses.replace(config, image_aspect_ratio=mode)).init_weights().eval()
    # No end, and no byte pieces: the two write bytes that are no UTF-8 differently.
    model.decoder.lm_head.weight.data[:259] = 0
    save_model(model, tokenizer_file, tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)

    images = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        for shape in ((23, 40, 3), (30, 17, 3))
    ]
    question = "What colour is the cat? 고양이"
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=images, text=prompt, return_tensors="pt")

    pixels = torch.stack([vision.preprocess(image, 16, mode) for image in images])
    difference = inputs["pixel_values"] - vision.normalise(pixels)
    assert difference.abs().max() < 1.01 / 255 / 0.26  # one grey level
    turns = [(generate.question_parts(question, 2), None)]
    ids, _ = data.encode_chat(turns, tokenizer, config.vision.num_patches)
    assert inputs["input_ids"].tolist() == [ids]

    answer = theirs.generate(**inputs, max_new_tokens=40)[0, len(ids) :]
    want = processor.decode(answer, skip_special_tokens=True).strip()
    ours = checkpoint.load_model(tmp_path).eval()
    our_tokenizer = checkpoint.load_tokenizer(tmp_path)
    stream = generate.stream_answer(ours, our_tokenizer, turns, pixels, max_new_tokens=40)
    assert "".join(stream).strip() == want and len(want) > 20

    # What transformers writes means the same to us.
    theirs.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    assert checkpoint.load_model(tmp_path / "theirs").config == model.config


def test_transformers_tokenizer_and_chat_template_give_the_ids_that_we_train_on(
    saved_model, tokenizer
):
    transformers = pytest.importorskip("transformers")
    _, path = saved_model
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    mixed = "".join(random.Random(0).choices("abc 고양이猫", k=200))
    texts = [*LINES, "  two  spaces ", "tab\tand\nbreak", "햄버거 🍔 café", mixed]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids), text

    processor = transformers.AutoProcessor.from_pretrained(path)
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    assert theirs(text)["input_ids"] == data.encode_chat(TURNS, tokenizer, 1)[0]


def train_with_sentencepiece(folder):
    """A BPE that folds characters (NFKC), trims spaces, and has no byte pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "lines.txt").write_text("\n".join(LINES * 50), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "t"),
        model_type="bpe",
        vocab_size=120,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return tokenizer_module.Tokenizer.load(folder / "t.model")


def test_a_tokenizer_that_folds_characters_and_spaces_does_so_in_transformers_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_with_sentencepiece(tmp_path)
    assert tokenizer.remove_extra_whitespaces and tokenizer.charsmap and not tokenizer.byte_fallback
    file = tmp_path / "tokenizer.json"
    checkpoint.write_json(file, tokenizer_json(tokenizer))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    for text in ["  the  ＣＡＴ   is red ", "고양이 ½ x 한", "the blue dog"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), text
