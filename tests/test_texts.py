"""The data set of the text stage."""

import os
import pickle
import sys

import numpy as np
import pytest
from bpe_models import byte_level_model

from training import texts
from training.texts import TextDataset


def test_a_long_document_continues_in_the_next_sample_and_every_token_is_a_target_once(
    tokenizer, tmp_path
):
    line = "What colour is the cat? " * 30
    (tmp_path / "t.txt").write_text(line + "\n\nred\n", encoding="utf-8")
    dataset = TextDataset([tmp_path / "t.txt"], tokenizer, 16, tmp_path / "cache")
    targets = []
    for i in range(len(dataset)):
        ids, loss_mask, *_ = dataset.sample(i)
        targets += [token for token, is_target in zip(ids, loss_mask) if is_target]
        assert len(ids) == dataset.sort_keys[i]
    encode, eos = tokenizer.sp_processor.encode, [tokenizer.eos_id]
    assert targets == encode(line.strip()) + eos + encode("red") + eos
    assert dataset.sort_keys.max() <= 16


def test_documents_are_told_apart_where_one_piece_begins_and_ends_them(tmp_path):
    tokenizer = byte_level_model().with_roles("<|end|>", "<|end|>")
    (tmp_path / "t.txt").write_text("a red cat\n고\n", encoding="utf-8")
    dataset = TextDataset([tmp_path / "t.txt"], tokenizer, 8, tmp_path / "cache")
    end = tokenizer.eos_id
    expected = [end, *tokenizer.encode("a red cat"), end]
    samples = [dataset.sample(i).ids for i in range(len(dataset))]
    assert samples == [expected[:8], expected[7:], [end, *tokenizer.encode("고"), end]]


def test_a_text_that_is_not_utf8_is_named_with_its_line(tokenizer, tmp_path):
    (tmp_path / "broken.txt").write_bytes("가\n".encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="broken.txt: line 2 is not UTF-8"):
        TextDataset([tmp_path / "broken.txt"], tokenizer, 10, tmp_path / "cache")


def test_texts_are_tokenized_once_and_half_a_cache_is_none(tokenizer, tmp_path):
    text, cache = tmp_path / "t.txt", tmp_path / "cache"
    encode = tokenizer.sp_processor.encode
    text.write_text("What colour is the cat?\n\n고양이\n", encoding="utf-8")
    first = TextDataset([text], tokenizer, 64, cache)
    (file,) = cache.iterdir()
    for i, line in enumerate(("What colour is the cat?", "고양이")):
        assert first.sample(i).ids == [tokenizer.bos_id, *encode(line), tokenizer.eos_id]

    # Changed by hand: the change is there if, and only if, the file is read again.
    ids = np.fromfile(file, np.uint16)
    ids[1] = 77
    ids.tofile(file)
    (cache / (file.name + ".1.tmp")).write_bytes(b"half")
    assert TextDataset([text], tokenizer, 64, cache).sample(0).ids[1] == 77

    text.write_text("What colour is the dog?\n", encoding="utf-8")  # another text: another file
    second = TextDataset([text], tokenizer, 64, cache)
    assert second.sample(0).ids[1:-1] == encode("What colour is the dog?")


class Words:
    """A tokenizer of a large vocabulary, in which a line is one id."""

    bos_id, eos_id, vocab_size = 1, 2, 70_000

    def __init__(self, first):
        self.first, self.sp_processor = first, self

    def to_bytes(self):
        return b"%d" % self.first

    def encode(self, texts, num_threads):
        return [[self.first + len(text)] for text in texts]


def test_ids_above_two_bytes_and_another_tokenizer_have_files_of_their_own(tmp_path):
    (tmp_path / "t.txt").write_text("red\n", encoding="utf-8")
    for first in (69_990, 69_000):
        dataset = TextDataset([tmp_path / "t.txt"], Words(first), 8, tmp_path / "cache")
        assert dataset.sample(0).ids == [1, first + 3, 2]


def test_the_other_processes_of_a_machine_wait_for_the_first(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("red\n", encoding="utf-8")
    given, waits = (tmp_path / "t.txt", Words(9), tmp_path / "cache"), []

    def the_first_writes(seconds):
        assert not (tmp_path / "cache").exists()
        waits.append(seconds)
        monkeypatch.setenv("LOCAL_RANK", "0")
        texts.read_tokens(*given)
        monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(texts.time, "sleep", the_first_writes)
    assert texts.read_tokens(*given).tolist() == [1, 12, 2] and len(waits) == 1


def test_documents_and_lines_are_found_beyond_the_first_block(tmp_path):
    ids = np.zeros((1 << 26) + 9, np.uint16)  # never all in memory: the system gives empty pages
    ids[[0, (1 << 26) + 4]] = 1
    expected = [[0, (1 << 26) + 4], [(1 << 26) + 4, (1 << 26) + 9]]
    assert texts.cut_documents(ids, 1, 2, 1 << 27).tolist() == expected

    (tmp_path / "broken.txt").write_bytes((b" " * 4095 + b"\n") * 1025 + b"\xff\n")
    with pytest.raises(ValueError, match="broken.txt: line 1026 is not UTF-8"):
        TextDataset([tmp_path / "broken.txt"], Words(9), 10, tmp_path / "cache")


def test_a_worker_maps_the_tokens_again_and_is_not_sent_them(tokenizer, tmp_path):
    """As on systems where a process is started anew: Windows, macOS."""
    text = tmp_path / "t.txt"
    text.write_text("What colour is the cat? " * 4000, encoding="utf-8")
    dataset = TextDataset([text], tokenizer, 64, tmp_path / "cache")
    sent = pickle.dumps(dataset.ids)
    assert dataset.ids[0].nbytes > 20_000 > 1000 > len(sent)
    assert np.array_equal(pickle.loads(sent)[0], dataset.ids[0])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no time of a file's last change")
def test_a_text_of_the_same_size_and_time_is_another_text(tokenizer, tmp_path):
    text, cache = tmp_path / "t.txt", tmp_path / "cache"
    text.write_text("What colour is the cat?\n", encoding="utf-8")
    time = text.stat().st_mtime_ns
    TextDataset([text], tokenizer, 64, cache)
    text.write_text("What colour is the dog?\n", encoding="utf-8")
    os.utime(text, ns=(time, time))
    (_, *ids, _) = TextDataset([text], tokenizer, 64, cache).sample(0).ids
    assert ids == tokenizer.sp_processor.encode("What colour is the dog?")
