"""The data set of the vision stage: phrases, labels, the dictionary."""

import json

import pytest
import torch

from training.phrases import PhraseDataset


def write_records(file, *records):
    conversations = []
    for image, kind, answer in records:
        turn = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": answer}]
        record = {"id": len(conversations), "language": "en", "kind": kind, "conversations": turn}
        if image:
            record["image"] = image
            if isinstance(image, list):
                turn[0]["value"] = "<image>\n" * len(image) + "Describe."
        else:
            turn[0]["value"] = "Describe."
        conversations.append(record)
    file.write_text(json.dumps(conversations, ensure_ascii=False), encoding="utf-8")
    return file


def texts_of(batch, tokenizer, prefix=""):
    """The phrases, or with prefix "word_" the words, of a batch."""
    ids, starts = batch[prefix + "ids"].tolist(), batch[prefix + "offsets"].tolist()
    ends = [*starts[1:], len(ids)]
    return [tokenizer.decode(ids[start:end]).strip() for start, end in zip(starts, ends)]


@pytest.fixture
def captions(tokenizer, config, world):
    return PhraseDataset([world / "captions.json"], tokenizer, config)


def test_phrases_shared_by_two_images_are_true_of_both(captions, tokenizer):
    batch = captions.batch([0, 1, 2])  # red, blue, red
    truth = dict(zip(texts_of(batch, tokenizer), batch["is_true"].tolist()))
    assert truth["red"] == truth["a red cat"] == [True, False, True]
    assert truth["blue"] == [False, True, False]
    assert truth["number 2"] == [False, False, True]


def test_phrases_end_at_commas_and_full_stops_of_any_width_and_six_are_drawn_by_the_seed(
    tokenizer, config, world, tmp_path
):
    (tmp_path / "0.png").write_bytes((world / "0.png").read_bytes())
    names = "red blue cat dog big small left right".split()
    answer = "，".join(names[:4]) + "。," + ", ".join(names[4:]) + "."
    file = write_records(tmp_path / "set.json", ("0.png", "object", answer))
    dataset, draws = PhraseDataset([file], tokenizer, config), set()
    for seed in range(9):
        texts = texts_of(dataset.batch([0], seed=seed), tokenizer)
        assert len(set(texts)) == 6 and set(texts) <= set(names)
        draws.add(tuple(texts))
    assert len(draws) > 1


def test_two_ranks_have_the_phrases_of_one_and_columns_by_rank(captions):
    whole = captions.batch([0, 1, 2])
    halves = [captions.batch([0, 1, 2], rank, 2) for rank in range(2)]  # 0 and 2, 1
    for rank, half in enumerate(halves):
        assert half["images_per_rank"] == [2, 1]
        assert half["sample_indices"] == [[0, 2], [1]][rank]
    rows = sorted(torch.cat([half["is_true"] for half in halves]).tolist())
    assert sorted(whole["is_true"][:, [0, 2, 1]].tolist()) == rows


def test_a_phrase_is_true_whatever_the_kind_of_its_record_and_unknown_where_its_kind_is_missing(
    tokenizer, config, world, tmp_path
):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    file = write_records(
        tmp_path / "set.json",
        ("0.png", "object", "a cat, big"),
        ("1.png", "place", "a cat, left"),
        ("1.png", "object", "small"),
    )
    batch = PhraseDataset([file], tokenizer, config).batch([0, 1])
    labels = {}
    for n, text in enumerate(texts_of(batch, tokenizer)):
        image = 0 if n < 2 else 1  # the first two are of image 0
        labels[text, image] = batch["is_true"][n].tolist(), batch["is_known"][n].tolist()
    assert labels["a cat", 0] == labels["a cat", 1] == ([True, True], [True, True])
    assert labels["big", 0] == ([True, False], [True, True])
    assert labels["small", 1] == ([False, True], [True, True])
    assert labels["left", 1] == ([False, True], [False, True]), "image 0 has no record of places"


def test_records_that_cannot_be_contrasted_are_counted_or_named(tokenizer, config, world, tmp_path):
    file = write_records(tmp_path / "set.json", (None, "object", "x"))
    dataset = PhraseDataset([world / "captions.json", file], tokenizer, config)
    assert len(dataset) == 12
    assert dataset.without_image == 1

    file = write_records(tmp_path / "two.json", (["0.png", "1.png"], "object", "x"))
    assert PhraseDataset([file], tokenizer, config).bad == [
        f"{file}: record 0 (id 0): 2 images, the vision stage takes one"
    ]


def test_a_rank_without_images_or_with_a_bad_one_has_no_part_in_the_contrast(captions):
    parts = [captions.batch([4], rank, 2) for rank in range(2)]
    assert [part["images_per_rank"] for part in parts] == [[1, 1]] * 2
    assert parts[1]["usable"].tolist() == [False]
    assert parts[1]["is_known"].shape == (0, 2)
    assert parts[0]["is_known"][:, 0].all()
    assert not parts[0]["is_known"][:, 1].any()

    captions.images[7] = captions.images[7]._replace(path="lost.png")
    batch = captions.batch([4, 7, 5])
    assert batch["usable"].tolist() == [True, False, True]
    assert "lost.png: no such image" in batch["bad_samples"][0]
    phrases = [len(captions.images[i].phrases) for i in (4, 5)]
    assert len(batch["offsets"]) == sum(phrases)


# ------------------------------------------------------------------------------------ dictionary
def test_words_of_a_dictionary_line_mean_the_same_and_each_pair_is_compared_once(
    tokenizer, config, world, tmp_path
):
    file = tmp_path / "words.txt"
    file.write_text("cat = 고양이 = 猫\nbig = 큰\nbig = 大\n", encoding="utf-8")
    dataset = PhraseDataset([world / "captions.json"], tokenizer, config, file)
    batch = dataset.batch([0, 1])
    words = texts_of(batch, tokenizer, "word_")
    assert sorted(words) == sorted(["cat", "고양이", "猫", "big", "큰", "big", "大"])

    same = set()
    for i, one in enumerate(words):
        for j, other in enumerate(words):
            if batch["word_true"][i, j] and one != other:
                same.add(frozenset((one, other)))
    lines = [("cat", "고양이"), ("cat", "猫"), ("고양이", "猫"), ("big", "큰"), ("big", "大")]
    assert same == {frozenset(pair) for pair in lines}
    assert torch.equal(batch["word_true"], batch["word_true"].T)

    # "big" is in two lines: whether it means the same as itself is unknown.
    known = [[one != other for other in words] for one in words]
    assert batch["word_known"].tolist() == known
    halves = [dataset.batch([0, 1], rank, 2)["word_known"].int() for rank in range(2)]
    assert (halves[0] + halves[1]).tolist() == [[int(pair) for pair in row] for row in known]


@pytest.mark.parametrize(
    "content, message",
    [
        ("cat = 고양이\nbig\n".encode(), r"words.txt: line 2: 'big' must be WORD = WORD …"),
        ("cat = 고양이\n".encode() + b"dog = \xff\n", "words.txt: line 2 is not UTF-8"),
        (b"", "words.txt: nothing to train on"),
    ],
)
def test_a_wrong_dictionary_is_named_with_its_line(
    tokenizer, config, world, tmp_path, content, message
):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PhraseDataset([world / "captions.json"], tokenizer, config, tmp_path / "words.txt")
