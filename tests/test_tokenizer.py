"""tokenizer.py against the sentencepiece package, and against numbers worked by hand."""

import itertools
import os
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
from bpe_models import CHINESE, ENGLISH, KOREAN, model, package_model, random_text, zipf_text

import tokenizer as T
from tokenizer import BYTE, CONTROL, SPACE, USER_DEFINED, Tokenizer
from vocabulary.command import run_main, text_width


@pytest.fixture(scope="module")
def english():
    return T.train(ENGLISH, 300)


@pytest.fixture(scope="module")
def korean():
    return T.train(KOREAN, 305)


@pytest.fixture(scope="module")
def merged(english, korean):
    return T.merge_vocabularies(english, korean)


# ---------------------------------------------------------------------------- encoding and decoding


def kinds_of_models(english, merged):
    yield english
    yield merged
    lines = ENGLISH + KOREAN
    user_defined = ["ca", "cat", "<image>", "고양", "!!"]
    options = [
        {"vocab_size": 360},
        {"vocab_size": 100, "byte_fallback": False, "remove_extra_whitespaces": True},
        {"vocab_size": 100, "byte_fallback": False, "unk_surface": "▁?"},
        {"vocab_size": 380, "add_dummy_prefix": False, "user_defined_symbols": user_defined},
        {"vocab_size": 340, "allow_whitespace_only_pieces": True, "control_symbols": ["<x>"]},
    ]
    for kind in options:
        yield package_model(lines, **kind)
    ties = [("aa", 0.0), ("aaa", 0.0), ("ba", 0.0), ("ab", -1.0), ("a", -2.0), ("b", -2.0)]
    yield model(ties)


def test_ids_equal_the_packages_on_arbitrary_unicode(english, merged):
    rng = random.Random(0)
    ordinary = " ".join(ENGLISH + KOREAN).split(" ") + ["aaaa", "ab", "ba", "cca", "<x>"]
    for n, tokenizer in enumerate(kinds_of_models(english, merged)):
        for _ in range(700):
            text = random_text(rng, ordinary)
            expected = tokenizer.sp_processor.encode(text)
            assert tokenizer.encode_reference(text) == expected, (n, text)


def test_decoding_equals_the_packages_for_any_ids(english, merged):
    rng = random.Random(1)
    for n, tokenizer in enumerate(kinds_of_models(english, merged)):
        hangul = tokenizer.sp_processor.encode("고양이 é 😀 ▁ 가")
        size = tokenizer.vocab_size
        for _ in range(700):
            ids = []
            for _ in range(rng.randrange(9)):
                drawn = [rng.randrange(size), rng.randrange(260) % size, rng.choice(hangul)]
                ids.append(rng.choice(drawn))
            assert tokenizer.decode(ids) == tokenizer.sp_processor.decode(ids), (n, ids)


def test_text_comes_back_from_its_ids(merged):
    rng = random.Random(2)
    for _ in range(500):
        # "▁" itself becomes a space, in every SentencePiece model.
        text = random_text(rng, ["the", " cat", "고양이"]).replace(SPACE, "")
        assert merged.decode(merged.encode(text, bos=True, eos=True)) == text


def test_control_pieces_typed_as_text_stay_text(merged):
    for control in ("<image>", "<pad>", "<s>", "</s>"):
        ids = merged.encode(f"see {control} here")
        assert merged.id(control) not in ids and merged.decode(ids) == f"see {control} here"
    snowman = T.merge_vocabularies(merged, [], control=["☃"])  # even one character
    assert snowman.vocab_size > merged.vocab_size
    assert snowman.encode_reference("☃") == snowman.encode("☃") != [snowman.id("☃")]


def test_encode_adds_the_ids_that_begin_and_end_a_text(merged):
    ids = merged.encode("a")
    assert merged.encode("a", bos=True, eos=True) == [merged.bos_id, *ids, merged.eos_id]
    assert merged.encode("a", bos=True) == [merged.bos_id, *ids]
    assert merged.encode("a", eos=True) == [*ids, merged.eos_id]


def test_half_a_surrogate_pair_becomes_a_replacement_character(merged):
    assert merged.decode(merged.encode("a\ud800b")) == "a\ufffdb"


def test_special_ids_are_none_where_the_model_has_none(english, merged):
    assert english.image_id is None and english.pad_id is None
    assert merged.piece(merged.image_id) == "<image>"
    assert merged.id("<pad>") == merged.pad_id == merged.vocab_size - 1
    assert model([("<image>", 0.0, USER_DEFINED)]).image_id is None  # it could be typed


# ----------------------------------------------------------------------------------------- training


def test_the_vocabulary_is_the_one_that_the_packages_trainer_finds():
    lines = zipf_text(0)
    ours = T.train(lines, 1200)
    theirs = package_model(lines, vocab_size=1200, character_coverage=1.0)
    assert ours.vocab_size == theirs.vocab_size == 1200
    assert len(ours.ids.keys() & theirs.ids.keys()) >= 0.99 * 1200
    unseen = zipf_text(1)
    tokens = [sum(map(len, t.sp_processor.encode(unseen))) for t in (ours, theirs)]
    assert abs(tokens[0] / tokens[1] - 1) < 0.005


def test_the_same_text_gives_the_same_model_in_any_order_and_from_any_iterable():
    lines = zipf_text(2, 300)
    first = T.train(lines, 500).to_bytes()
    assert T.train(iter(reversed(lines)), 500).to_bytes() == first
    assert T.train(["\n".join(lines) + "\r\n"], 500).to_bytes() == first


def test_pieces_respect_spaces_scripts_digits_and_length():
    def script(char):
        if "가" <= char <= "힣":
            return "hangul"
        return "latin" if char.isalpha() else "sign"

    lines = zipf_text(3, 300) + ["재밌다!! abc가나 다2024년 3kg :)"] * 50
    for p in T.train(lines, 700, max_piece_length=5).pieces[259:]:
        body = p.text.removeprefix(SPACE)
        assert SPACE not in body and len(p.text) <= 5
        assert not any(c.isdigit() for c in p.text) or len(p.text) == 1
        assert len(set(map(script, body))) <= 1
    loose = T.train(lines, 700, split_scripts=False, split_digits=False).ids
    assert "▁재밌다!!" in loose and ("2024년" in loose or "▁다2024년" in loose)


def test_character_coverage_leaves_the_rarest_characters_to_the_bytes():
    lines = ["가나다라 " * 100 + "뷁"]
    assert "뷁" in T.train(lines, 270).ids
    covered = T.train(lines, 268, character_coverage=0.99)
    ids = covered.encode("뷁")
    assert "뷁" not in covered.ids and len(ids) == 1 + 3 and covered.decode(ids) == "뷁"
    no_bytes = T.train(lines, 10, character_coverage=0.99, byte_fallback=False)
    assert no_bytes.encode("뷁뷁")[-1] == 0


def test_counting_words_streams_the_text():
    tracemalloc.start()
    counts = T.count_words(f"고양이 {i % 50} cat" for i in range(100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["cat"] == 100_000 and counts["7"] == 2_000 and len(counts) == 52
    assert peak < 6e6  # the lines alone would be ten


@pytest.mark.parametrize(
    "lines, size, words",
    [
        ([], 300, "no text"),
        (["", "  "], 300, "no text"),
        (["abc"], 262, "too small .* 259 special pieces and the 4 characters"),
        (["abc"], 300, "pairs for 266 pieces, not for 300"),
    ],
)
def test_impossible_vocabularies_are_refused_with_the_numbers(lines, size, words):
    with pytest.raises(ValueError, match=words):
        T.train(lines, size)


SENTENCES = {
    "thai": ["แมวสีแดงนั่งอยู่บนเสื่อ", "สุนัขสีฟ้านั่งอยู่บนเสื่อ"],
    "arabic": ["القطة الحمراء على السجادة", "الكلب الأزرق على السجادة"],
    "japanese": ["赤い猫がマットの上にいる。", "青い犬がマットの上にいる。", "マットの上"],
    "chinese": CHINESE,
    "emoji": ["👨‍👩‍👧 ❤️ 👍🏽", "👨‍👩‍👧👨‍👩‍👧 👍🏽❤️"],
    "hindi": ["लाल बिल्ली चटाई पर है", "नीला कुत्ता चटाई पर है"],
}


@pytest.mark.parametrize("language", SENTENCES)
def test_any_language_opens_with_the_same_calls(english, language):
    lines = SENTENCES[language] * 5
    alphabet = len(set("".join(lines).replace(" ", ""))) + 1
    merged = T.merge_vocabularies(english, T.train(lines, 259 + alphabet + 8))
    assert T.find_unreachable(merged) == [] and merged.vocab_size > english.vocab_size
    for line in lines:
        ids = merged.encode(line)
        assert merged.decode(ids) == line and len(ids) < len(english.encode(line)) / 2
        # A Chinese full stop is no foreign letter.
        assert all(merged.pieces[i].type != BYTE for i in ids) or line[-1] == "。"


def test_an_emoji_of_several_code_points_becomes_one_piece():
    assert {"▁👨‍👩‍👧", "▁👍🏽"} <= set(T.train(SENTENCES["emoji"] * 5, 279).ids)


def test_chinese_pieces_glue_words_across_grammar_unless_a_word_list_says_what_a_word_is(english):
    trained = [p.text for p in T.train(CHINESE, 294).pieces[259:]]
    short = [p.text for p in T.train(CHINESE, 284, max_piece_length=2).pieces[259:]]
    assert "色的" in trained and max(map(len, trained)) > 4 and max(map(len, short)) == 2
    words = ["红", "色", "的", "猫", "在", "垫", "子", "红色", "垫子", "在垫子上"]
    listed = T.merge_vocabularies(english, words, unreachable="drop")
    pieces = listed.sp_processor.encode("红色的猫在垫子", out_type=str)
    assert pieces == ["▁", "红色", "的", "猫", "在", "垫子"]


# ------------------------------------------------------------------------------------------ merging


def test_merging_changes_no_base_id_and_appends_control_pieces_last(english, korean, merged):
    assert merged.pieces[: english.vocab_size] == english.pieces
    assert [p.text for p in merged.pieces[-2:]] == ["<image>", "<pad>"]
    assert all(p.type == CONTROL for p in merged.pieces[-2:])
    new = {p.text for p in merged.pieces[english.vocab_size : -2]}
    assert new < korean.ids.keys() and "▁고양이" in new
    assert len({p.text for p in merged.pieces}) == merged.vocab_size
    assert T.merge_vocabularies(merged, korean).pieces == merged.pieces  # nothing left to add


def test_english_encodes_as_before_even_when_the_new_text_had_english_words(english):
    mixed = T.train(KOREAN + ["the OK dog runs :-) ... (the end)"] * 9, 345)
    merged, rng = T.merge_vocabularies(english, mixed), random.Random(4)
    pieces = [p.text for p in mixed.pieces[259:] if p.text.isascii() or p.text[0] == SPACE]
    words = [text.replace(SPACE, " ") for text in pieces]
    for _ in range(500):
        text = "".join(c for c in "".join(rng.choices(words, k=8)) if c.isascii())
        assert merged.sp_processor.encode(text) == english.sp_processor.encode(text)
    changed = T.merge_vocabularies(english, mixed, foreign_only=False)
    assert changed.encode("the OK dog :-)") != english.encode("the OK dog :-)")


def test_new_pieces_rank_below_base_words_but_above_runs_of_spaces_and_never_tie():
    runs_of_spaces = [("▁▁", -1e9), ("▁", -3e9)]  # as Llama-2 has them
    base = model([("ca", -1.0), ("▁ca", -2.0), *runs_of_spaces, ("c", -4.0), ("a", -4.0)])
    new = ["가나", "▁가나", "▁가나다"]
    merged = T.merge_vocabularies(base, new, control=())
    assert [p.score for p in merged.pieces[-3:]] == [-3.0, -4.0, -5.0]
    assert merged.sp_processor.encode("  ca  가나", out_type=str) == ["▁▁", "▁ca", "▁", "▁가나"]
    crowded = T.merge_vocabularies(model([("ca", -1e9)]), new, control=())
    last = range(crowded.vocab_size - 4, crowded.vocab_size)
    assert len({crowded.sp_processor.get_score(i) for i in last}) == 4  # float32


def produced(tokenizer, letters, longest):
    """Every piece that the package produces for any text of these letters, by trying all texts."""
    found = set()
    for n in range(1, longest + 1):
        for text in itertools.product(letters, repeat=n):
            found.update(tokenizer.sp_processor.encode("\ue000" + "".join(text), out_type=str))
    return found


@pytest.mark.parametrize("seed", range(25))
def test_unreachable_pieces_are_exactly_those_that_no_text_produces(seed):
    rng = random.Random(seed)
    texts = {"".join(rng.choices("abc", k=rng.choice([2, 2, 3, 3, 4, 5]))) for _ in range(14)}
    if seed % 4:
        scores = rng.sample(range(-50, 0), len(texts))
    else:  # with ties
        scores = [-rng.randrange(3) for _ in texts]
    characters = [("a", -90.0), ("b", -91.0), ("c", -92.0)]
    tokenizer = model([*characters, *zip(sorted(texts), map(float, scores))])
    assert set(T.find_unreachable(tokenizer)) == texts - produced(tokenizer, "abc", 7)


@pytest.mark.parametrize("seed", range(25))
def test_a_merge_leaves_out_or_repairs_exactly_the_unreachable_pieces(seed):
    rng = random.Random(seed)
    base = model([("ab", -1.0), ("ca", -2.0), ("a", -8.0), ("b", -8.0), ("c", -8.0)])
    lengths = [2, 2, 3, 3, 4, 6]
    new = ["".join(rng.choices("abcde", k=rng.choice(lengths))) for _ in range(20)]
    new = list(dict.fromkeys(new))
    options = {"foreign_only": False, "control": ()}
    kept = T.merge_vocabularies(base, new, unreachable="keep", **options)
    dropped = T.merge_vocabularies(base, new, unreachable="drop", **options)
    repaired = T.merge_vocabularies(base, new, unreachable="repair", **options)
    assert set(kept.ids) == set(base.ids) | set(new)
    assert set(dropped.ids) <= set(kept.ids) <= set(repaired.ids)
    assert T.find_unreachable(dropped) == T.find_unreachable(repaired) == []
    for tokenizer in (dropped, repaired):
        for p in tokenizer.pieces[259:]:
            assert tokenizer.sp_processor.encode("\ue000" + p.text, out_type=str)[-1] == p.text

    added, left_out = T.select_pieces(base, new, foreign_only=False)
    lost = left_out["unreachable"]
    assert sorted(added + lost) == sorted(set(new) - set(base.ids))
    for text in lost:  # even as the very next piece it could not be produced
        appended = T.merge_vocabularies(dropped, [text], unreachable="keep", **options)
        assert text in T.find_unreachable(appended)


def test_a_word_without_its_parts_is_unreachable_and_repair_adds_the_parts():
    base = model([(c, -1.0) for c in "해바라기"])

    def select(*new, **options):
        """-> (pieces to add, {reason: pieces left out, if any})."""
        added, left_out = T.select_pieces(base, new, **options)
        return added, {reason: names for reason, names in left_out.items() if names}

    lost = {"unreachable": ["해바라기"]}
    assert select("해바라기") == ([], lost)
    repaired = ["해바", "해바라", "해바라기"]
    assert select("해바라기", unreachable="repair") == (repaired, lost)
    # No part of it may be plain English: "xq" would change what becomes of English text.
    assert select("xq해바", unreachable="repair")[0] == ["q해", "xq해", "xq해바"]
    saved_by_a_later_piece = ["바라", "해바라", "해바라기"]
    assert select("해바라", "바라", "해바라기") == (saved_by_a_later_piece, {})
    reasons = {"known": ["해"], "english": ["hey"], "blocked": ["바 라"], "unreachable": ["해바라"]}
    assert select("hey", "바 라", "해바라", "", "해", "hey") == ([], reasons)
    with pytest.raises(ValueError, match="not 'Drop'"):
        T.select_pieces(base, ["바라"], unreachable="Drop")


def test_a_piece_that_holds_a_user_defined_one_is_unreachable():
    base = model([("바", 0.0, USER_DEFINED), ("해", -1.0), ("라", -1.0)])
    kept = T.merge_vocabularies(base, ["해바", "해라"], unreachable="keep", control=())
    assert T.find_unreachable(kept) == ["해바"] and "해바" not in produced(kept, "해바라", 4)
    added, left_out = T.select_pieces(base, ["해바", "해라"], unreachable="repair")
    assert added == ["해라"] and left_out["blocked"] == ["해바"] and not left_out["unreachable"]


def test_models_with_different_normalisers_are_refused(english):
    other = package_model(KOREAN, vocab_size=320, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match="normalise text differently, identity and nmt_nfkc"):
        T.merge_vocabularies(english, other)
    merged = T.merge_vocabularies(english, other, same_normalizer=False)
    assert merged.vocab_size > english.vocab_size


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in tmp_path -> (exit status, stdout, stderr)."""

    def run_command(*args):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *map(str, args)])
        status = 0
        try:
            run_main(T.main, "tokenizer.py")
        except SystemExit as stop:
            status, message = stop.code or 0, ""
            if isinstance(status, str):  # as the interpreter does: print it, and end with 1
                status, message = 1, f"{status}\n"
        out, err = capsys.readouterr()
        return status, out, err + message

    monkeypatch.chdir(tmp_path)
    return run_command


def test_train_merge_report_and_show_run_as_the_docstring_says(run):
    texts = {"en": ENGLISH, "ko": KOREAN, "zh": CHINESE}
    texts["words"] = ["▁빨간", "고양이", "", "파란 강아지", "dog", "▁cat"]
    for name, lines in texts.items():
        Path(f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, size in (("en", 300), ("ko", 305), ("zh", 290)):
        command = ("train", f"{name}.txt", "--vocab-size", size, "-o", f"{name}.model")
        assert run(*command) == (0, f"{name}.model: {size} pieces\n", "")

    status, out, _ = run("merge", "en.model", "ko.model", "-o", "both.model")
    both = Tokenizer.load("both.model")
    counts = f"300 + {both.vocab_size - 302} new + 2 control; 0 unreachable"
    assert status == 0 and f"{both.vocab_size} pieces = {counts}" in out
    assert run("merge", "en.model", "ko.model", "zh.model", "-o", "three.model")[0] == 0
    three = Tokenizer.load("three.model")
    assert three.pieces[: both.vocab_size - 2] == both.pieces[:-2]
    assert three.pad_id == three.vocab_size - 1 and "猫" in three.ids

    merge_words = ("merge", "en.model", "words.txt", "-o", "w.model", "--unreachable", "repair")
    status, out, _ = run(*merge_words)
    assert "3 made reachable: ▁빨간, 고양이, 파란▁강아지\n" in out
    assert "\n  1 left out that plain English could contain" in out and "takes them): dog\n" in out
    assert "\n  1 there already: ▁cat\n" in out
    pieces = Tokenizer.load("w.model").sp_processor.encode(
        "x빨간 빨간고양이파란 강아지", out_type=str
    )
    assert {"▁빨간", "고양이", "파란▁강아지"} <= set(pieces)
    status, out, _ = run(*merge_words, "--no-foreign-only")
    assert "left out" not in out and "dog" in Tokenizer.load("w.model").ids

    status, out, _ = run("report", "en.model", "both.model", "--text", "ko=ko.txt", "en.txt")
    assert status == 0 and "0 unreachable" in out
    heads = [line.split()[0] for line in out.splitlines() if "/character" in line]
    assert heads == ["ko", "en.txt"] and out.count("\nboth.model ") == 2
    assert max(map(text_width, out.split("\n\n")[0].splitlines())) <= 80
    status, out, _ = run("show", "en.model", "both.model", "the 고양이")
    assert "| ▁the | ▁ | <0xEA> | <0xB3> | <0xA0>" in out and "| ▁the | ▁고양이" in out
    names = os.listdir()
    assert len(names) == 4 + 6 and not any(name.endswith(".tmp") for name in names)


def test_words_in_latin_letters_are_taken_and_what_changes_in_english_is_said(run):
    texts = {"en": ENGLISH, "own": ["zqzq", "xwxw"], "few": ["고양이", "파란", "zqzq"]}
    texts["said"], others = ["zqzq a zqzq", "a"], "of the words have other ids than before"
    for name, lines in texts.items():
        Path(f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    assert run("train", "en.txt", "--vocab-size", "300", "-o", "en.model")[0] == 0
    flags = ("--unreachable", "repair", "--compare", "said.txt", "-o", "m.model")

    # 2 of the 4 words of said.txt become the new piece.
    status, out, _ = run("merge", "en.model", "own.txt", *flags)
    assert status == 0 and out.splitlines()[-1] == f"said.txt: 50.0% {others}: zqzq"
    assert {"zqzq", "xwxw"} <= set(Tokenizer.load("m.model").ids)
    for words in (["few.txt", *flags], ["own.txt", *flags, "--foreign-only"]):
        _, out, _ = run("merge", "en.model", *words)  # a Korean list, or asked for
        assert "zqzq" not in Tokenizer.load("m.model").ids
        assert out.splitlines()[-1] == f"said.txt: 0.0% {others}: "


BAD = {
    "no text to train on": "train empty.txt --vocab-size 300 -o x.model",
    "latin1.txt: line 2 is not UTF-8": "train latin1.txt --vocab-size 300 -o x.model",
    "a vocabulary of 262 is too small": "train ok.txt --vocab-size 262 -o x.model",
    "--vocab-size: -5: must be 1 or more": "train ok.txt --vocab-size -5 -o x.model",
    "character coverage 0.0 must be in (0, 1]": (
        "train ok.txt --vocab-size 265 --character-coverage 0 -o x.model"
    ),
    "--max-piece-length: 0: must be 1 or more": (
        "train ok.txt --vocab-size 265 --max-piece-length 0 -o x.model"
    ),
    "missing.txt: no such file": "train missing.txt --vocab-size 300 -o x.model",
    "ok.txt: is a file, must be a folder": "train ok.txt --vocab-size 265 -o ok.txt/x.model",
    "ok.txt: not a SentencePiece .model file": "merge ok.txt ok.txt -o x.model",
    "the base is not a BPE": "merge unigram.model words.txt -o x.model",
    "folder/tokenizer.model: no such tokenizer: copy": "show folder hello",
    "folder: is a folder, must be a file": "merge unigram.model folder -o x.model",
    "x.txt.model is a model; the text comes last": "show ok.txt x.txt.model",
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_gets_one_line_and_status_2(run, message):
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("ok.txt").write_text("abc abd", encoding="utf-8")
    Path("words.txt").write_text("가나", encoding="utf-8")
    Path("latin1.txt").write_bytes("café\n".encode() + "café\n".encode("latin-1"))
    Path("folder").mkdir()
    Path("x.txt.model").touch()
    if "unigram.model" in BAD[message]:
        package_model(ENGLISH, model_type="unigram", vocab_size=300).save("unigram.model")
    before = sorted(os.listdir())
    status, out, err = run(*BAD[message].split())
    assert status in (1, 2) and message in err and err.count("\n") == 1
    assert out == "" and sorted(os.listdir()) == before


def test_ctrl_c_in_training_leaves_the_old_model_and_nothing_half_written(run, monkeypatch):
    Path("text.txt").write_text("abc abd", encoding="utf-8")
    run("train", "text.txt", "--vocab-size", 265, "-o", "x.model")
    old = Path("x.model").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(T, "learn_merges", interrupt)
    status, _, err = run("train", "text.txt", "--vocab-size", 265, "-o", "x.model")
    assert status == 130 and err == "tokenizer.py: interrupted\n"
    assert sorted(os.listdir()) == ["text.txt", "x.model"]
    assert Path("x.model").read_bytes() == old


# --------------------------------------------------------------------------- real text, real models

DATA = Path(os.environ["XLLAVA_DATA"]) if os.environ.get("XLLAVA_DATA") else None
TEXT = {".txt", ".tsv", ".md", ".mdx", ".json", ".jsonl", ".ko", ".en"}
real = pytest.mark.skipif(DATA is None, reason="XLLAVA_DATA is not set")
STEP = int(os.environ.get("XLLAVA_EVERY", 40))  # 1: every line of every text file, two minutes


@pytest.fixture(scope="module")
def llama():
    return Tokenizer.load(DATA / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="module")
def reviews():
    lines = (DATA / "text/nsmc_10mb.tsv").read_text(encoding="utf-8").split("\n")
    return [line.split("\t")[2] for line in lines if line.count("\t") == 2]


@pytest.fixture(scope="module")
def review_model(reviews):
    return T.train(reviews[:60_000], 8000, character_coverage=0.9995)


@pytest.fixture(scope="module")
def llama_ko(llama, review_model):
    return T.merge_vocabularies(llama, review_model)


def real_lines(*patterns):
    paths = sorted(path for pattern in patterns for path in DATA.glob(pattern))
    texts = [path.read_text(encoding="utf-8") for path in paths if path.suffix in TEXT]
    return [line for text in texts for line in text.split("\n")]


def count_tokens(tokenizer, lines):
    return sum(map(len, tokenizer.sp_processor.encode(lines)))


@real
def test_the_real_llama_2_file_is_written_back_byte_for_byte(llama):
    assert llama.to_bytes() == (DATA / "tokenizers/llama2/tokenizer.model").read_bytes()
    assert T.find_unreachable(llama) == []


@real
def test_ids_equal_the_packages_on_real_text_in_three_languages(llama, review_model, llama_ko):
    lines = list(dict.fromkeys(real_lines("**/*")))[::STEP]
    assert len(lines) > 5_000
    for tokenizer in (llama, review_model, llama_ko):
        for line in lines:
            ids = tokenizer.encode_reference(line)
            assert ids == tokenizer.sp_processor.encode(line)
            assert tokenizer.decode(ids) == tokenizer.sp_processor.decode(ids)


@real
def test_on_real_reviews_the_vocabulary_is_the_packages_own(reviews, review_model):
    theirs = package_model(reviews[:60_000], vocab_size=8000, character_coverage=0.9995)
    assert len(review_model.ids.keys() & theirs.ids.keys()) >= 0.99 * 8000
    unseen = reviews[60_000:70_000]
    assert abs(count_tokens(review_model, unseen) / count_tokens(theirs, unseen) - 1) < 0.005


@real
def test_expanded_llama_2_needs_at_most_0_4_times_the_tokens_on_reviews_it_has_not_seen(
    llama, llama_ko, reviews
):
    assert T.find_unreachable(llama_ko) == []
    unseen = reviews[60_000:70_000]
    assert count_tokens(llama_ko, unseen) <= 0.40 * count_tokens(llama, unseen)


@real
def test_english_text_keeps_its_ids_in_expanded_llama_2(llama, llama_ko):
    english = ("text/*/en/**/*", "text/jhe/dev.en", "text/tatoeba/*", "nlvr/*", "instruct/**/*")
    lines = [line for line in real_lines(*english) if not any(T.is_foreign(c) for c in line)]
    assert len(lines) > 5_000
    assert llama.sp_processor.encode(lines) == llama_ko.sp_processor.encode(lines)


@real
def test_merging_a_unigram_model_as_public_scripts_do_gives_their_number_and_what_is_unreachable(
    llama,
):
    chinese = Tokenizer.load(DATA / "tokenizers/chinese_sp/chinese_sp.model")
    options = {"foreign_only": False, "same_normalizer": False, "control": ()}
    kept = T.merge_vocabularies(llama, chinese, unreachable="keep", **options)
    dropped = T.merge_vocabularies(llama, chinese, unreachable="drop", **options)
    lost = T.find_unreachable(kept)
    assert kept.vocab_size == 49_953 and T.find_unreachable(dropped) == []
    assert len(lost) == 49_953 - dropped.vocab_size > 300
    for text in lost[:50]:
        assert kept.sp_processor.encode("\ue000" + text, out_type=str)[-1] != text
