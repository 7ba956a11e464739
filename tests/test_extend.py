"""vocabulary/extend.py: new pieces go on with the base's merges, and text can produce each."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bpe_models import (
    CHINESE,
    ENGLISH,
    KOREAN,
    PRE_TOKENIZERS,
    byte_level_model,
    model,
    package_model,
    random_text,
    zipf_text,
)

import tokenizer as T
from tokenizer import NORMAL, SPACE
from vocabulary.byte_level import ByteLevelTokenizer, to_bytes, to_letters
from vocabulary.extend import begins_foreign, is_new, learn_pieces

ROOT = Path(__file__).resolve().parent.parent


def english_base(kind):
    """A vocabulary that was learned from English alone: SentencePiece or byte-level."""
    if kind == "SentencePiece":
        return T.train(ENGLISH, 300)
    base = byte_level_model(kind)
    return base.with_pieces(learn_pieces(base, ENGLISH, 30, foreign_only=False))


def append(base, pieces):
    return T.merge_vocabularies(base, pieces, (), unreachable="keep", foreign_only=False)


KINDS = ["SentencePiece", *PRE_TOKENIZERS]


@pytest.mark.parametrize("kind", ["SentencePiece", "GPT-2", "Llama-3"])
@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_are_the_textbooks_on_the_bases_symbols(kind, seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcd", k=rng.randrange(2, 9))) for _ in range(30)]
    lines, more = [" ".join(words)], [" ".join(rng.choices(words, k=60))]
    if kind == "SentencePiece":
        base = T.train(lines, 275)
        symbols = {SPACE + word: T.bpe_textbook(SPACE + word, base.scores) for word in words}
    else:
        base = byte_level_model(kind)
        base = base.with_pieces(learn_pieces(base, lines, 8, foreign_only=False))
        symbols = {
            part + word: T.bpe_textbook(part + word, base.scores, " ")
            for word in words
            for part in ("", "Ġ")
        }
    head = more[0].split(" ")
    counts = Counter(SPACE + w for w in head)
    if kind != "SentencePiece":
        counts = Counter([head[0], *("Ġ" + w for w in head[1:])])

    expected = T.learn_merges_textbook({tuple(symbols[w]): n for w, n in counts.items()}, 20, 16)
    # A text that is a piece already gets no second number.
    expected = [text for text in dict.fromkeys(expected) if text not in base.ids]
    assert learn_pieces(base, more, 12, foreign_only=False) == expected[:12]


def test_by_hand_a_word_is_merged_as_far_as_the_base_does_it_and_then_further():
    base = model([("▁", -3.0), ("가나", -1.0), ("가", -2.0), ("나", -2.0), ("다", -2.0)])
    # The base leaves ▁ 가나 다 three times and ▁ 나 다 nine times. Among equals the shorter piece
    # comes first, then the first by code points: "▁" is before "나".
    text = ["가나다"] * 3 + ["나다"] * 9
    assert learn_pieces(base, text, 4) == ["▁나", "▁나다", "▁가나", "▁가나다"]
    with pytest.raises(ValueError, match="the text has pairs for 4 new pieces, not for 5"):
        learn_pieces(base, text, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_text_can_produce_every_new_piece(kind):
    base = english_base(kind)
    pieces = learn_pieces(base, KOREAN + CHINESE + zipf_text(1, 60), 150)
    longer = append(base, pieces)
    assert [piece.text for piece in longer.pieces] == [p.text for p in base.pieces] + pieces
    assert len(set(pieces)) == len(pieces) == 150
    assert not set(T.find_unreachable(longer)) & set(pieces)
    if kind != "SentencePiece":  # none begins inside a character
        assert not any(0x80 <= to_bytes(piece)[0] < 0xC0 for piece in pieces)

    # Each whole piece, put behind a character that is in no piece, is a token there.
    whole = 0
    for piece in pieces:
        text = longer.decode([longer.id(piece)])
        if "\ufffd" not in text:
            whole += 1
            ids = longer.encode("\ue000" + (text.replace(SPACE, " ")))
            assert longer.id(piece) in ids or kind == "SentencePiece" and piece[0] == SPACE
    assert whole > 60


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_a_letter_of_the_new_language_keeps_its_ids(kind):
    base, rng = english_base(kind), random.Random(0)
    longer = append(base, learn_pieces(base, KOREAN + ENGLISH + CHINESE, 80))
    texts = [*ENGLISH, *KOREAN, "“quoted” — 1/2 … © “"]
    texts += [random_text(rng, [" the", "cat", "!!", "“a”"]) for _ in range(300)]
    changed = 0
    for text in texts:
        if base.encode(text) != longer.encode(text):
            changed += 1
            letters = text if kind == "SentencePiece" else to_letters(text)
            assert is_new(base, letters), text
    assert changed > 0
    assert len(longer.encode(KOREAN[0])) < len(base.encode(KOREAN[0])) / 2


def test_a_vocabulary_trained_apart_has_pieces_that_no_text_produces_and_extend_has_none():
    base = byte_level_model("SmolLM2", merges=["ë ĭ", "ëĭ ¤", "ê ³", "³ ł"])
    text = zipf_text(2, 200)
    apart = byte_level_model("SmolLM2")
    apart = apart.with_pieces(learn_pieces(apart, text, 60))
    appended = [piece.text for piece in apart.pieces if piece.type == NORMAL]
    merged = base.with_vocabulary(apart, [x for x in appended if x not in base.ids])
    assert len(merged.find_unreachable()) > 0
    assert append(base, learn_pieces(base, text, 60)).find_unreachable() == []
    with pytest.raises(ValueError, match="no merge reaches the piece ê³łê: ê ³ł ê"):
        byte_level_model(merges=["³ ł"]).with_pieces(["ê³łê"])


def test_what_begins_a_foreign_character_by_hand():
    assert begins_foreign(b"\xea\xb0") and begins_foreign(b"\xe4")  # 가 …, U+4000 … U+4FFF
    assert not begins_foreign(b"\xe2\x80")  # “ … are English, too
    assert not begins_foreign(b"\xe2") and not begins_foreign(b"")
    assert not begins_foreign(b"\x80") and not begins_foreign(b"\xf0")
    base = byte_level_model()
    assert is_new(base, "Ġê°Ģ") and is_new(base, "aê°") and not is_new(base, "Ġa")


def test_characters_that_a_sentencepiece_base_lacks_become_pieces_first():
    base = T.train(ENGLISH, 300)
    text = ["가나 가나 가다", "가나 the —"]
    assert learn_pieces(base, text, 5, character_coverage=1.0)[:3] == ["가", "나", "다"]
    # "다" and "—" come once in 20 characters each; the dash is no foreign letter at all.
    assert "다" not in learn_pieces(base, text, 3, character_coverage=0.85)
    with pytest.raises(ValueError, match="2 pieces are too few for the 3 new characters"):
        learn_pieces(base, text, 2, character_coverage=1.0)


def test_what_is_no_bpe_of_ours_is_refused():
    base = package_model(ENGLISH, model_type="unigram", vocab_size=300)
    with pytest.raises(ValueError, match="only a BPE with the identity normaliser"):
        learn_pieces(base, KOREAN, 5)


def run(folder, *arguments):
    command = [sys.executable, str(ROOT / "tokenizer.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")


def test_the_command_extends_both_kinds_and_says_what_it_made(tmp_path):
    english_base("SmolLM2").save(tmp_path / "tokenizer.json")
    english_base("SentencePiece").save(tmp_path / "en.model")
    (tmp_path / "ko.txt").write_text("\n".join(KOREAN), encoding="utf-8")
    ends = {".": ("long", "long/tokenizer.json"), "en.model": ("long.model", "long.model")}
    for base, (out, written) in ends.items():
        done = run(tmp_path, "extend", base, "ko.txt", "--pieces", "40", "-o", out)
        assert done.returncode == 0, done.stderr
        assert "+ 40 new + 2 control; 0 of the new unreachable" in done.stdout
        longer = T.load(tmp_path / out)
        assert longer.vocab_size == T.load(tmp_path / base).vocab_size + 42
        assert longer.image_id is not None and (tmp_path / written).is_file()
        report = run(tmp_path, "report", base, out, "--text", "ko.txt").stdout
        assert "40 new pieces, 0 unreachable" in report

    # Never over a file that it did not write, nor over its input.
    again = run(tmp_path, "extend", ".", "ko.txt", "--pieces", "60", "-o", ".")
    assert again.returncode == 1 and "is an input of this command" in again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text(json.dumps({"mine": 1}), encoding="utf-8")
    other = run(tmp_path, "extend", ".", "ko.txt", "--pieces", "60", "-o", "mine")
    assert other.returncode == 1 and "was not written by this command" in other.stderr


def test_the_command_merges_a_byte_level_vocabulary_that_was_trained_apart(tmp_path):
    base = byte_level_model("SmolLM2", merges=["ë ĭ", "ëĭ ¤", "ê ³", "³ ł"])
    base.save(tmp_path / "tokenizer.json")
    apart = byte_level_model("SmolLM2")
    (tmp_path / "ko").mkdir()
    apart.with_pieces(learn_pieces(apart, zipf_text(2, 200), 60)).save(
        tmp_path / "ko/tokenizer.json"
    )
    options = ["merge", ".", "ko", "--no-foreign-only", "-o"]
    assert "unreachable pieces left out" in (run(tmp_path, *options, "dropped").stdout)
    assert ByteLevelTokenizer.load(tmp_path / "dropped").find_unreachable() == []
    kept = run(tmp_path, *options, "kept", "--unreachable", "keep")
    assert ByteLevelTokenizer.load(tmp_path / "kept").find_unreachable() != [], kept.stderr
    assert (
        "extend reaches all pieces"
        in run(tmp_path, *options, "x", "--unreachable", "repair").stderr
    )
    (tmp_path / "pieces.txt").write_text("a\n", encoding="utf-8")
    other = run(tmp_path, "merge", ".", "pieces.txt", "-o", "x")
    assert other.stderr.count("\n") == 1 and "extend . TEXT` learns them" in other.stderr
