"""vocabulary/: the .model file, fast and textbook BPE, streaming, scripts, report, benchmark."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from bpe_models import CHINESE, ENGLISH, KOREAN, model, random_text, zipf_text

import tokenizer as T
from tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, StreamDecoder, Tokenizer
from vocabulary import bench, fast_bpe, files, report, scripts
from vocabulary.sentencepiece_file import read_message, write_message

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def english():
    return T.train(ENGLISH, 300)


@pytest.fixture(scope="module")
def korean():
    return T.train(KOREAN, 305)


@pytest.fixture(scope="module")
def merged(english, korean):
    return T.merge_vocabularies(english, korean)


# ----------------------------------------------------------------------------------------- the file


def test_protobuf_fields_are_written_as_in_protobufs_own_documentation():
    number, string = bytes.fromhex("089601"), bytes.fromhex("120774657374696e67")
    assert write_message([(1, 0, 150)]) == number
    assert write_message([(2, 2, b"testing")]) == string
    assert read_message(number + string) == [(1, 0, 150), (2, 2, b"testing")]
    values = [0, 127, 128, 129, 16_383, 16_384, 1 << 40]
    assert read_message(write_message((1, 0, n) for n in values)) == [(1, 0, n) for n in values]
    for cut in (string[:-1], bytes.fromhex("0d0000"), bytes.fromhex("0000")):
        with pytest.raises(ValueError, match="damaged protobuf"):
            read_message(cut)


def test_the_package_reads_the_same_pieces_scores_and_types_from_our_file(merged, tmp_path):
    merged.save(tmp_path / "m.model")
    package = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert package.vocab_size() == merged.vocab_size
    for i, piece in enumerate(merged.pieces):
        assert package.id_to_piece(i) == piece.text
        assert package.get_score(i) == piece.score
        assert package.is_byte(i) == (piece.type == BYTE)
        assert package.is_control(i) == (piece.type == CONTROL)
        assert package.is_unknown(i) == (piece.type == UNKNOWN)
    ours = (merged.bos_id, merged.eos_id, merged.pad_id, merged.unk_id)
    assert (package.bos_id(), package.eos_id(), package.pad_id(), package.unk_id()) == ours


def test_fields_that_we_do_not_know_are_kept_byte_for_byte(english):
    odd_piece = [(1, 2, b"odd"), (2, 5, bytes(4)), (3, 0, NORMAL), (201, 2, b"extension")]
    odd_fields = [(4, 2, write_message([(1, 2, b"self test")])), (999, 1, b"8 bytes!")]
    data = write_message([(1, 2, write_message(odd_piece))])
    data += english.to_bytes() + write_message(odd_fields)
    assert Tokenizer.from_bytes(data).to_bytes() == data


def test_a_damaged_file_is_refused_in_one_line_or_opens_but_never_crashes(english):
    data, rng = english.to_bytes(), random.Random(0)
    damaged = [data[:n] for n in range(0, len(data), 97)]
    damaged += [b"\x89PNG\r\n\x1a\n" + bytes(60), b"{}", json.dumps(["a"] * 50).encode()]
    for _ in range(150):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for d in damaged:
        try:
            Tokenizer.from_bytes(d, "x.model").encode("the cat")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("x.model: not a SentencePiece .model file")
            assert "\n" not in str(error)
    assert refused > 20


def test_saving_never_leaves_half_a_file(english, korean, tmp_path, monkeypatch):
    path = tmp_path / "t.model"
    english.save(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        korean.save(path)
    assert os.listdir(tmp_path) == ["t.model"]
    assert path.read_bytes() == english.to_bytes()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a temporary file of its own: the last to end is what stays."""
    path = tmp_path / "x"

    def outer(file):
        files.write_atomically(path, lambda other: other.write(b"inner"))
        file.write(b"outer")

    files.write_atomically(path, outer)
    assert path.read_bytes() == b"outer" and os.listdir(tmp_path) == ["x"]


def test_an_input_is_known_by_another_name_too(tmp_path):
    path, folder = tmp_path / "a.json", tmp_path / "b"
    folder.mkdir()
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="a.json: is an input of this command"):
        files.claim_output(path, lambda _: True, [folder / ".." / "a.json"])


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"고": [1]})
    assert path.read_bytes() == '{\n  "고": [\n    1\n  ]\n}\n'.encode()

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["x.json"]
    assert json.loads(path.read_bytes()) == {"고": [1]}
    files.write_json(str(path), [1, 2], indent=None)
    assert path.read_bytes() == b"[1, 2]\n"


def test_a_tokenizer_survives_pickling_to_a_data_loader_worker(merged):
    copy = pickle.loads(pickle.dumps(merged))
    assert copy.encode("the 고양이 <image>") == merged.encode("the 고양이 <image>")
    assert copy.image_id == merged.image_id


# ---------------------------------------------------------------------------- fast and textbook BPE

MIXED = [
    "재밌다!! abc가나 다2024년 3kg :)  ３４번",
    "aaaa aaa ㅋㅋㅋㅋ 哈哈哈",
    "뷁a뷁",
    "マットの上に。",
]
OPTIONS = [
    {},
    {"split_digits": False},
    {"split_scripts": False},
    {"split_digits": False, "split_scripts": False},
    {"max_piece_length": 3},
    {"max_piece_length": 1},
    {"character_coverage": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lines", [KOREAN, CHINESE, ENGLISH, MIXED * 3 + KOREAN], ids="kcem")
def test_fast_training_finds_the_pieces_of_the_textbook_in_their_order(lines, options):
    coverage = options.get("character_coverage", 1.0)
    limit = options.get("max_piece_length", 16)
    splits = [options.get(name, True) for name in ("split_digits", "split_scripts")]
    arrays = fast_bpe.build_symbol_array(fast_bpe.count_words(lines), coverage, *splits)
    rare = f"[^{re.escape(arrays[0])}]"  # no piece holds a character that is not in the alphabet

    words = Counter()
    for word in " ".join(lines).split(" "):
        for part in scripts.split_word(SPACE + word, *splits):
            words.update(re.split(rare, part))
    expected = T.learn_merges_textbook(words, 150, limit)
    assert fast_bpe.learn_merges(*arrays, 150, limit) == expected
    assert len(expected) > 10 or limit == 1
    assert (re.search(rare, " ".join(lines).replace(" ", "")) is None) == (coverage == 1)


@pytest.mark.parametrize("seed", range(40))
def test_training_finds_the_merges_of_the_textbook_algorithm(seed):
    rng = random.Random(seed)
    # Two letters: overlaps such as aaa, and ties, everywhere.
    letters = ["ab", "abc", "abcdefgh"][seed % 3]
    words = ["".join(rng.choices(letters, k=rng.randrange(1, 12))) for _ in range(32)]
    lines = [" ".join(words[i::4]) for i in range(4)]
    limit = rng.choice([2, 3, 5, 16])
    expected = T.learn_merges_textbook(Counter(SPACE + word for word in words), 60, limit)
    alphabet = len(set("".join(words))) + 1
    tokenizer = T.train(lines, 259 + alphabet + len(expected), max_piece_length=limit)
    assert [p.text for p in tokenizer.pieces[259:-alphabet]] == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_heap_encodes_as_the_textbook_does(seed):
    rng = random.Random(seed)
    texts = {"".join(rng.choices("abc", k=rng.choice([2, 2, 3, 3, 4, 6]))) for _ in range(20)}
    scores = {text: float(rng.randrange(-8, 0)) for text in sorted(texts)}  # with ties
    for _ in range(100):
        text = "".join(rng.choices("abcd", k=rng.randrange(30)))
        assert fast_bpe.bpe(text, scores) == T.bpe_textbook(text, scores)


def test_the_textbook_by_hand():
    # "ab" comes five times. Then "c" + "ab" (3) wins, and "xy" (2) is before "cabab" (2).
    words = {"cabab": 2, "cab": 1, "xy": 2}
    assert T.learn_merges_textbook(words, 9, 16) == ["ab", "cab", "xy", "cabab"]
    assert T.learn_merges_textbook({"ba": 2, "ab": 2, "abc": 1}, 9, 2) == ["ab", "ba"]
    assert T.learn_merges_textbook({"aaaaa": 1, "xy": 3}, 2, 16) == ["xy", "aa"]
    assert T.merge_pair(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")
    assert T.bpe_textbook("aaab", {"aa": -1.0, "ab": -1.0}) == ["aa", "ab"]  # the leftmost first
    assert T.bpe_textbook("aaab", {"aa": -2.0, "ab": -1.0}) == ["aa", "ab"]
    assert T.bpe_textbook("abc", {"ab": -2.0, "bc": -1.0, "abc": -9.0}) == ["abc"]


def test_the_alphabet_covers_the_asked_share_of_the_text_by_hand():
    for coverage, alphabet in [(0.5, "a"), (0.51, "ab"), (0.75, "ab"), (0.76, "ab▁"), (1.0, "ab▁")]:
        arrays = fast_bpe.build_symbol_array(Counter({"aab": 1}), coverage, True, True)
        assert arrays[0] == alphabet
    # Three slots are put in: before the word, before the digit, at the end.
    alphabet, *arrays = fast_bpe.build_symbol_array(Counter({"aa1": 5}), 1.0, True, True)
    assert alphabet == "a1▁"
    assert [array.tolist() for array in arrays] == [[0, 3, 1, 1, 0, 2, 0], [0, 5, 5, 5, 0, 5, 0]]


def test_overlapping_pairs_are_counted_without_overlap():
    # By hand: "aaaaa" holds aa twice, "xy" comes three times; with overlap, aa (4) came first.
    tokenizer = T.train(["aaaaa", "xy xy xy"], 259 + 4 + 2)
    assert [p.text for p in tokenizer.pieces[259:261]] == ["xy", "▁xy"]


# ------------------------------------------------------------------------------------------ scripts


def test_words_are_cut_around_digits_and_where_the_script_changes():
    assert scripts.split_word("▁재밌다!!") == ["▁재밌다", "!!"]
    assert scripts.split_word("▁2024년abc") == ["▁", "2", "0", "2", "4", "년", "abc"]
    assert scripts.split_word("▁a12b", split_digits=False) == ["▁a", "12", "b"]
    assert scripts.split_word("▁a가1!", split_scripts=False) == ["▁a가", "1", "!"]
    assert scripts.split_word("▁a가1!", False, False) == ["▁a가1!"]
    assert scripts.split_word("▁マットのउ上") == ["▁マットの", "उ", "上"]
    assert scripts.split_word("▁") == ["▁"]


def test_signs_that_english_uses_are_not_foreign_and_letters_marks_and_emoji_are():
    signs = ["the", "▁", "▁“", "…", "©", "▁°", "€", "—", "½", "™", "→", "2024"]
    assert not any(map(T.is_foreign, signs))
    letters = ["가", "▁x가", "猫", "ー", "ก", "ั", "ع", "é", "😀", "❤️", "☃", "ㅋㅋ", "々", "،", "؟"]
    assert all(map(T.is_foreign, letters))


def test_a_language_is_guessed_by_its_script():
    texts = ["What is it?", "고양이 cat 猫", "猫 cat", "ㅋㅋ", "123", "", "éa", "cat قطة"]
    found = [scripts.guess_language(text) for text in texts]
    assert found == ["en", "ko", "zh", "ko", "en", "en", "en", "ar"]


def test_what_most_letters_of_a_vocabulary_are_decides_whether_it_is_latin():
    assert scripts.is_latin(["▁paka", "kedi", "고", "123", "。"])
    assert not scripts.is_latin(["▁고양이", "파란", "cat"]) and not scripts.is_latin(["،", "1"])


# ---------------------------------------------------------------------------------------- streaming


def test_the_stream_shows_a_character_when_its_last_byte_arrives(english):
    stream = StreamDecoder(english)
    ids = [english.id(f"<0x{b:02X}>") for b in "고 é".encode()]  # EA B3 A0 · 20 · C3 A9
    assert [stream.push(i) for i in ids] == ["", "", "고", " ", "", "é"]
    assert stream.flush() == ""


def test_the_stream_shows_broken_bytes_when_they_can_no_longer_become_whole(english):
    stream, byte = StreamDecoder(english), {b: english.id(f"<0x{b:02X}>") for b in range(256)}
    assert [stream.push(byte[b]) for b in (0xEA, 0xB3)] == ["", ""]
    assert stream.push(english.id("▁cat")) == "\ufffd\ufffd cat"
    assert stream.push(byte[0xFF]) == "\ufffd"
    assert stream.push(byte[0xF0]) == ""
    assert stream.flush() == "\ufffd"
    with pytest.raises(IndexError, match="outside the vocabulary"):
        stream.push(english.vocab_size)


def test_the_stream_is_always_a_prefix_of_the_packages_text(merged):
    rng = random.Random(3)
    for _ in range(300):
        ids = merged.encode(random_text(rng, [" the", "cat", "고양이", "뚫", " 😀"]))
        stream, shown = StreamDecoder(merged), ""
        for i in ids:
            shown += stream.push(i)
            assert merged.sp_processor.decode(ids).startswith(shown)
        assert shown + stream.flush() == merged.sp_processor.decode(ids)


# ----------------------------------------------------------------------------- report and benchmark


def test_the_report_counts_what_one_counts_by_hand(english):
    # "the 고": ▁the ▁ EA B3 A0: 5 tokens, 3 of them bytes; 5 characters, one of them without a
    # piece; 2 words; 7 bytes.
    counts, pieces = report.fertility_counts(english, ["the 고\n", "the\n"])
    assert (counts["tokens"], counts["byte_tokens"], counts["unknown"]) == (6, 3, 1)
    assert (counts["characters"], counts["words"], counts["bytes"]) == (8, 3, 10)
    assert pieces["▁the"] == 2 and pieces["<0xB3>"] == 1
    no_bytes = model([("▁", -1.0), ("a", -2.0)], byte_fallback=False)
    assert report.fertility_counts(no_bytes, ["a뷁뷁"])[0]["unknown"] == 2


def test_bench_names_every_peer_and_skips_what_is_not_installed(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(zipf_text(5, 400)), encoding="utf-8")
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'tokenizers' else find(name, *a); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", hide, str(ROOT / "tokenizer.py"), "bench"]
    command += [str(tmp_path / "text.txt"), "--vocab-size", "500"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=True, env=environment
    )
    assert run.stdout.count("CPU-seconds") == 2 and "FAILED" not in run.stdout
    assert "tokenizers     not installed, skipped" in run.stdout


def test_bench_measures_the_time_where_the_system_has_no_wait4(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    monkeypatch.delattr(os, "wait4", raising=False)
    monkeypatch.setattr(bench, "PEERS", {})
    bench.bench(str(tmp_path / "text.txt"), 290)
    out = capsys.readouterr().out
    assert " seconds" in out and "CPU" not in out and "FAILED" not in out
    with pytest.raises(SystemExit, match="1"):
        bench.bench(str(tmp_path / "text.txt"), 9)
    assert "FAILED: tokenizer.py: a vocabulary of 9 is too small" in capsys.readouterr().out
