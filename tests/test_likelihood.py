"""Likelihoods against a plain loop, and rankings worked by hand."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import command, make_question, write_random_model

import data
from evaluation.batching import Batcher
from evaluation.likelihood import likelihood_rows, log_likelihoods
from evaluation.questions import read_questions
from evaluation.retrieval import (
    pool_samples,
    rank_scores,
    read_captions,
    retrieve,
    score_translations,
)
from generate import load_for_inference


@pytest.fixture(scope="module")
def folder(config, tokenizer_file, tmp_path_factory):
    return write_random_model(config, tokenizer_file, tmp_path_factory.mktemp("model") / "m")


# ------------------------------------------------------------------------------------ likelihood
def test_likelihoods_are_those_of_a_plain_loop(folder, world, config, tokenizer):
    model, _ = load_for_inference(folder)
    samples = []
    for question in read_questions([world / "chats.json"], tokenizer, config)[:8]:
        answer = [*tokenizer.encode(question.truth), tokenizer.eos_id]
        samples.append((question.prompt, question.image_paths, answer))
        samples.append((question.blind_prompt, [], tokenizer.encode("blue")))
    got = log_likelihoods(model, samples, Batcher(model, "fp32", 5, 100))

    images = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
    for (prompt, paths, answer), value in zip(samples, got):
        pixels = torch.stack([images(path) for path in paths]) if paths else None
        want, ids = 0.0, list(prompt)
        for token in answer:
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([ids]), pixels))[0, -1]
            want += logits.log_softmax(-1)[token].item()
            ids.append(token)
        assert value == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_perplexity_and_bits_per_byte_of_known_likelihoods():
    questions = [
        make_question("가", "ko", id=0),
        make_question("나다", "ko", id=1),
    ]  # 3 and 6 bytes
    rows = {
        (row["metric"], row["model"]): row
        for row in likelihood_rows(questions, {"full": [-2.0, -4.0]}, [1, 3], 16)
        if row["language"] == "ko"
    }
    values = {key: row["value"] for key, row in rows.items()}
    assert values["perplexity", "full"] == pytest.approx(math.exp(6 / 4))
    assert values["bits per byte", "full"] == pytest.approx(6 / math.log(2) / 9)
    assert values["perplexity", "chance"] == pytest.approx(16)
    assert values["bits per byte", "chance"] == pytest.approx(4 * 4 / 9), "4 bits a token"


def test_the_likelihood_command_covers_questions_and_plain_text(folder, world, tmp_path):
    (tmp_path / "ko.txt").write_text("고양이는 빨간색\n\n파란 개는\n", encoding="utf-8")
    args = ["--data", world / "chats.json", "--text", tmp_path / "ko.txt"]
    command("likelihood", "--model", folder, *args, "-o", tmp_path / "l.json")
    rows = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))["likelihood"]
    of_questions = {("chats", model) for model in ("full", "blind", "chance")}
    of_text = {("ko", "full"), ("ko", "chance")}
    assert {(row["split"], row["model"]) for row in rows} == of_questions | of_text
    assert all(row["value"] > 0 for row in rows)
    text = [row for row in rows if row["split"] == "ko"]
    assert {(row["language"], row["n"]) for row in text} == {("ko", 2)}


def test_the_reference_is_measured_with_its_end(folder, world, tmp_path, config, tokenizer):
    """Perplexity counts </s>, and the whole of every reference."""
    args = ["--data", world / "captions.json", "--precision", "fp32"]
    command("likelihood", "--model", folder, *args, "-o", tmp_path / "l.json")
    rows = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))["likelihood"]
    model, _ = load_for_inference(folder)
    total, tokens = 0.0, 0
    for question in read_questions([world / "captions.json"], tokenizer, config):
        answer = [*tokenizer.encode(question.truth), tokenizer.eos_id]
        sample = question.blind_prompt, [], answer
        total += log_likelihoods(model, [sample], Batcher(model, "fp32", 1, 256))[0]
        tokens += len(answer)
    (blind,) = [r for r in rows if (r["model"], r["metric"]) == ("blind", "perplexity")]
    assert blind["value"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_a_long_document_goes_on_from_its_last_token(folder, tmp_path, tokenizer, config):
    text = "What colour is the cat? red " * 60
    (tmp_path / "en.txt").write_text(text + "\n", encoding="utf-8")
    command(
        "likelihood", "--model", folder, "--text", tmp_path / "en.txt", "-o", tmp_path / "l.json"
    )
    rows = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))["likelihood"]
    num_targets = len(tokenizer.encode(text.strip())) + 1
    limit = config.text.max_position_embeddings - 1  # targets of one piece of the document
    assert num_targets > 2 * limit
    assert {row["n"] for row in rows} == {math.ceil(num_targets / limit)}

    # Chance: every token but the first is a target once.
    (chance,) = [r for r in rows if (r["model"], r["metric"]) == ("chance", "bits per byte")]
    ids = [tokenizer.bos_id, *tokenizer.encode(text.strip()), tokenizer.eos_id]
    pieces = [ids[start : start + limit + 1] for start in range(0, num_targets, limit)]
    num_bytes = sum(len(tokenizer.decode(piece).encode()) for piece in pieces)
    bits = num_targets * math.log2(config.text.vocab_size)
    assert chance["value"] == pytest.approx(bits / num_bytes)


# ------------------------------------------------------------------------------------ retrieval
def test_ranks_share_ties_evenly():
    scores = np.array([3.0, 2, 1])
    assert rank_scores(scores, 0) == {"R@1": 1, "R@5": 1, "MRR": 1}
    assert rank_scores(scores, 2) == {"R@1": 0, "R@5": 1, "MRR": pytest.approx(1 / 3)}
    assert rank_scores(np.zeros(20), 7) == {
        "R@1": pytest.approx(1 / 20),
        "R@5": pytest.approx(5 / 20),
        "MRR": pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20),
    }
    # One above, two tied: ranks 2 and 3 are equally likely.
    tied = rank_scores(np.array([5.0, 4, 4, 1]), 2)
    assert tied == {"R@1": 0, "R@5": 1, "MRR": pytest.approx((1 / 2 + 1 / 3) / 2)}


def test_captions_find_images_and_each_other():
    """A caption that is unlikely of any image misleads the raw likelihood only."""
    K = 6
    sharp = np.full((K, K), -9.0)
    np.fill_diagonal(sharp, -3.0)
    prior = np.array([0.0] * 5 + [-20.0])
    equal = np.zeros(K)
    found = retrieve({"en": sharp + prior, "ko": sharp}, {"en": prior, "ko": equal})

    def mean(direction, model):
        return np.mean([scores["R@1"] for scores in found[direction, model]])

    for direction in ("image → en", "en → image", "en → ko", "ko → en"):
        assert mean(direction, "full") == 1
        assert mean(direction, "blind") == mean(direction, "chance") == pytest.approx(1 / K)
    assert mean("image → en, raw", "full") == 5 / 6

    # Korean captions that belong to other images
    shuffled = sharp[:, [1, 2, 3, 4, 5, 0]]
    found = retrieve({"en": sharp, "ko": shuffled}, {"en": equal, "ko": equal})
    assert mean("en → ko", "full") == 0


def test_captions_of_two_languages_meet_through_the_images():
    """The definition, with probabilities: Σ_i P(image | caption) · P(other | image) / P(other)."""
    rng = np.random.default_rng(0)
    p, q, prior = rng.random((4, 4)), rng.random((4, 4)), rng.random(4)
    got = score_translations(np.log(p), np.log(q) - np.log(prior))
    for caption in range(4):
        image_given_caption = p[:, caption] / p[:, caption].sum()
        want = [sum(image_given_caption * q[:, other]) / prior[other] for other in range(4)]
        assert np.exp(got[caption]) == pytest.approx(want)


def test_captions_without_a_translation_and_repeated_ones_are_left_out(tmp_path, world):
    for i in range(5):
        shutil.copy(world / f"{i}.png", tmp_path)

    def record(image, language, caption):
        turns = [
            {"from": "human", "value": "<image>\nDescribe."},
            {"from": "gpt", "value": caption},
        ]
        return {"image": image, "language": language, "conversations": turns}

    records = [record(f"{i}.png", "en", f"cat {i}") for i in range(5)]
    records += [record(f"{i}.png", "ko", f"고양이 {i}") for i in range(4)]
    records[1] = record("1.png", "en", "cat 0")
    (tmp_path / "c.json").write_text(json.dumps(records), encoding="utf-8")
    captions, questions = read_captions([tmp_path / "c.json"])
    assert questions == {"en": "Describe.", "ko": "Describe."}
    names = {Path(image).name for image in captions}
    assert names in ({"0.png", "2.png", "3.png"}, {"1.png", "2.png", "3.png"})
    assert captions[str(tmp_path / "3.png")] == {"en": "cat 3", "ko": "고양이 3"}


def test_the_retrieve_command_takes_images_with_a_caption_of_their_own(folder, world, tmp_path):
    args = ["--model", folder, "--data", world / "captions.json"]
    text = command("retrieve", *args, "--pool", "4", "-o", tmp_path / "r.json")
    assert "12 queries in 3 pools of 4" in text
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    rows = {(row["direction"], row["model"]): row for row in results["retrieval"]}
    assert rows["image → en", "full"]["n"] == 12
    assert rows["en → image", "chance"]["R@1"][0] == 0.25
    with pytest.raises(ValueError, match="a pool takes 20"):
        command("retrieve", *args)


def test_each_image_meets_the_captions_of_its_own_pool(tokenizer):
    captions = {image: {"en": f"cat {image}", "ko": f"고양이 {image}"} for image in "abcd"}
    samples = pool_samples(captions, {"en": "What?", "ko": "뭐?"}, 2, tokenizer, num_patches=4)
    got = [(paths, tokenizer.decode(answer)) for _, paths, answer in samples]
    want = []
    for image, pool in (("a", "ab"), ("b", "ab"), ("c", "cd"), ("d", "cd")):
        for name in ("cat", "고양이"):
            want += [([image], f"{name} {candidate}") for candidate in pool]
            want.append(([], f"{name} {image}"))
    assert got == want
    for prompt, paths, answer in samples:
        assert prompt.count(tokenizer.image_id) == 4 * len(paths)
        assert answer[-1] == tokenizer.eos_id


def test_a_pool_is_ranked_by_its_own_likelihoods(folder, world, tmp_path, config, tokenizer):
    """The command's numbers again, one sample at a time."""
    data_file = world / "captions.json"
    args = ["--model", folder, "--data", data_file, "--pool", "3", "--max-images", "7"]
    command("retrieve", *args, "--precision", "fp32", "-o", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["retrieval"]

    model, _ = load_for_inference(folder)
    prompts = {q.image_paths[0]: q for q in read_questions([data_file], tokenizer, config)}
    captions, _ = read_captions([data_file])
    images, found = list(captions)[:6], []  # a seventh would begin a pool that is not full
    for i, image in enumerate(images):
        pool = images[i // 3 * 3 :][:3]
        gains = []
        for candidate in pool:
            ids = [*tokenizer.encode(captions[candidate]["en"]), tokenizer.eos_id]
            question = prompts[image]
            samples = [(question.prompt, [image], ids), (question.blind_prompt, [], ids)]
            joint, prior = log_likelihoods(model, samples, Batcher(model, "fp32", 1, 256))
            gains.append(joint - prior)
        found.append(rank_scores(np.array(gains), pool.index(image))["R@1"])
    (row,) = [r for r in rows if (r["direction"], r["model"]) == ("image → en", "full")]
    assert row["n"] == 6 and row["R@1"][0] == pytest.approx(np.mean(found))
