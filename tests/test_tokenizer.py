"""tokenizer.py against the sentencepiece package, against textbook BPE written here, and against numbers worked by hand."""
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tokenizer as T  # noqa: E402
from tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Piece, StreamDecoder, Tokenizer  # noqa: E402

ENGLISH = ["the cat sat on the mat", "the dog sat on the log, and the cat ran", "a red cat and a blue dog are on the mat!"] * 4
KOREAN = ["고양이가 매트 위에 앉았다", "강아지가 통나무 위에 앉았다", "빨간 고양이와 파란 강아지가 매트 위에 있다!!"] * 4
CHINESE = ["猫坐在垫子上。", "狗坐在木头上。", "红色的猫和蓝色的狗在垫子上。"] * 4


@pytest.fixture(scope="module")
def english():
    return T.train(ENGLISH, 300)


@pytest.fixture(scope="module")
def korean():
    return T.train(KOREAN, 305)


@pytest.fixture(scope="module")
def merged(english, korean):
    return T.merge(english, korean)


def random_text(rng, ordinary):
    """Ordinary words, and whatever Unicode has: spaces in rows, marks, emoji, other planes, control characters."""
    def part():
        return rng.choice([
            lambda: rng.choice(ordinary),
            lambda: rng.choice(["  ", " ", "\t", "\n", "\u3000", "\u00a0", SPACE, "<s>", "<image>", "<0x41>", "👨‍👩‍👧", "é", "e\u0301", "0", "!"]),
            lambda: chr(rng.randrange(0x300)),
            lambda: chr(rng.randrange(0xAC00, 0xD7A4)),
            lambda: chr(rng.choice([*range(0x300, 0xD800, 97), *range(0xE000, 0x10FFFF, 997)]))])()
    return "".join(part() for _ in range(rng.randrange(12)))


def model(pieces, byte_fallback=True, **normalizer):
    """A model of hand-made pieces: [(text, score), ...]. Field numbers are those of sentencepiece_model.proto."""
    special = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    special += [Piece(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256) if byte_fallback]
    trainer = T.write_message([(3, 0, 2), (35, 0, int(byte_fallback))])
    spec = T.write_message([(3, 0, normalizer.get("dummy_prefix", 1)), (4, 0, normalizer.get("trim", 0))])
    return Tokenizer(special + [Piece(*p) for p in pieces], [(2, 2, trainer), (3, 2, spec)])


def package_model(tmp_path, lines, **options):
    """A BPE that the sentencepiece package trained."""
    options = dict(model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
                   remove_extra_whitespaces=False, num_threads=1, minloglevel=2, hard_vocab_limit=False) | options
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options)
    return Tokenizer.from_bytes(out.getvalue())


# ------------------------------------------------------------------------------------------------------------ the file

def test_protobuf_fields_are_written_as_in_protobufs_own_documentation():
    assert T.write_message([(1, 0, 150)]) == bytes.fromhex("089601")
    assert T.write_message([(2, 2, b"testing")]) == bytes.fromhex("120774657374696e67")
    assert T.read_message(bytes.fromhex("089601120774657374696e67")) == [(1, 0, 150), (2, 2, b"testing")]


def test_the_package_reads_the_same_pieces_scores_and_types_from_our_file(merged, tmp_path):
    merged.save(tmp_path / "m.model")
    package = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert package.vocab_size() == merged.vocab_size
    for i, p in enumerate(merged.pieces):
        assert package.id_to_piece(i) == p.text and package.get_score(i) == p.score
        assert (package.is_byte(i), package.is_control(i), package.is_unknown(i)) == (
            p.type == BYTE, p.type == CONTROL, p.type == UNKNOWN)
    assert (package.bos_id(), package.eos_id(), package.pad_id(), package.unk_id()) == (
        merged.bos_id, merged.eos_id, merged.pad_id, merged.unk_id)


def test_fields_that_we_do_not_know_are_kept_byte_for_byte(english):
    odd_piece = T.write_message([(1, 2, "odd".encode()), (2, 5, bytes(4)), (3, 0, NORMAL), (201, 2, b"extension")])
    data = english.to_bytes() + T.write_message([(4, 2, T.write_message([(1, 2, b"self test")])), (999, 1, b"8 bytes!")])
    data = T.write_message([(1, 2, odd_piece)]) + data
    assert Tokenizer.from_bytes(data).to_bytes() == data


def test_a_damaged_file_is_refused_in_one_line_or_opens_but_never_crashes(english):
    data, rng = english.to_bytes(), random.Random(0)
    damaged = [data[:n] for n in range(0, len(data), 97)] + [b"\x89PNG\r\n\x1a\n" + bytes(60), b"{}", json.dumps(["a"] * 50).encode()]
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
            assert str(error).startswith("x.model: not a SentencePiece .model file") and "\n" not in str(error)
    assert refused > 20


def test_saving_never_leaves_half_a_file(english, korean, tmp_path, monkeypatch):
    path = tmp_path / "t.model"
    english.save(path)

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        korean.save(path)
    assert os.listdir(tmp_path) == ["t.model"] and path.read_bytes() == english.to_bytes()


def test_a_tokenizer_survives_pickling_to_a_data_loader_worker(merged):
    copy = pickle.loads(pickle.dumps(merged))
    assert copy.encode("the 고양이 <image>") == merged.encode("the 고양이 <image>") and copy.image_id == merged.image_id


# ----------------------------------------------------------------------------------------------- encoding and decoding

def kinds_of_models(tmp_path, english, merged):
    yield english
    yield merged
    lines = ENGLISH + KOREAN
    yield package_model(tmp_path, lines, vocab_size=360)
    yield package_model(tmp_path, lines, vocab_size=100, byte_fallback=False, remove_extra_whitespaces=True)
    yield package_model(tmp_path, lines, vocab_size=380, add_dummy_prefix=False,
                        user_defined_symbols=["ca", "cat", "<image>", "고양", "!!"])
    yield package_model(tmp_path, lines, vocab_size=340, allow_whitespace_only_pieces=True, control_symbols=["<x>"])
    yield model([("aa", 0.0), ("aaa", 0.0), ("ba", 0.0), ("ab", -1.0), ("a", -2.0), ("b", -2.0)])  # ties


def test_ids_equal_the_packages_on_arbitrary_unicode(tmp_path, english, merged):
    rng = random.Random(0)
    for n, tokenizer in enumerate(kinds_of_models(tmp_path, english, merged)):
        ordinary = " ".join(ENGLISH + KOREAN).split(" ") + ["aaaa", "ab", "ba", "cca", "<x>"]
        for _ in range(700):
            text = random_text(rng, ordinary)
            assert tokenizer.encode_reference(text) == tokenizer.package.encode(text), (n, text)


def test_decoding_equals_the_packages_for_any_ids(tmp_path, english, merged):
    rng = random.Random(1)
    for n, tokenizer in enumerate(kinds_of_models(tmp_path, english, merged)):
        hangul = tokenizer.package.encode("고양이 é 😀 ▁ 가")
        for _ in range(700):
            ids = [rng.choice([rng.randrange(tokenizer.vocab_size), rng.randrange(260) % tokenizer.vocab_size, rng.choice(hangul)])
                   for _ in range(rng.randrange(9))]
            assert tokenizer.decode(ids) == tokenizer.package.decode(ids), (n, ids)


def test_text_comes_back_from_its_ids(merged):
    rng = random.Random(2)
    for _ in range(500):
        text = random_text(rng, ["the", " cat", "고양이"]).replace(SPACE, "")  # ▁ itself becomes a space, in every SentencePiece
        assert merged.decode(merged.encode(text, bos=True, eos=True)) == text


def test_control_pieces_typed_as_text_stay_text(merged):
    for control in ("<image>", "<pad>", "<s>", "</s>"):
        ids = merged.encode(f"see {control} here")
        assert merged.id(control) not in ids and merged.decode(ids) == f"see {control} here"
    snowman = T.merge(merged, [], control=["☃"])  # even one character
    assert snowman.encode_reference("☃") == snowman.encode("☃") != [snowman.id("☃")] and snowman.vocab_size > merged.vocab_size
    assert merged.encode("a", bos=True, eos=True) == [merged.bos_id, *merged.encode("a"), merged.eos_id]


def test_half_a_surrogate_pair_becomes_a_replacement_character(merged):
    assert merged.decode(merged.encode("a\ud800b")) == "a\ufffdb"


def test_special_ids_are_none_where_the_model_has_none(english, merged):
    assert english.image_id is None and english.pad_id is None
    assert merged.piece(merged.image_id) == "<image>" and merged.id("<pad>") == merged.pad_id == merged.vocab_size - 1
    assert model([("<image>", 0.0, USER_DEFINED)]).image_id is None  # it could be typed


def test_the_stream_shows_a_character_when_its_last_byte_arrives(english):
    stream = StreamDecoder(english)
    ids = [english.id(f"<0x{b:02X}>") for b in "고 é".encode()]  # EA B3 A0 · 20 · C3 A9
    assert [stream.push(i) for i in ids] == ["", "", "고", " ", "", "é"] and stream.flush() == ""


def test_the_stream_shows_broken_bytes_when_they_can_no_longer_become_whole(english):
    stream, byte = StreamDecoder(english), {b: english.id(f"<0x{b:02X}>") for b in range(256)}
    assert [stream.push(byte[b]) for b in (0xEA, 0xB3)] == ["", ""]
    assert stream.push(english.id("▁cat")) == "\ufffd\ufffd cat"
    assert stream.push(byte[0xFF]) == "\ufffd" and stream.push(byte[0xF0]) == "" and stream.flush() == "\ufffd"
    with pytest.raises(IndexError, match="outside the vocabulary"):
        stream.push(english.vocab_size)


def test_the_stream_is_always_a_prefix_of_the_packages_text(merged):
    rng = random.Random(3)
    for _ in range(300):
        ids = merged.encode(random_text(rng, [" the", "cat", "고양이", "뚫", " 😀"]))
        stream, shown = StreamDecoder(merged), ""
        for i in ids:
            shown += stream.push(i)
            assert merged.package.decode(ids).startswith(shown)
        assert shown + stream.flush() == merged.package.decode(ids)


# ------------------------------------------------------------------------------------------------------------ training

def textbook_merges(lines, n, max_piece_length):
    """BPE as in the textbook: count every pair anew for each merge."""
    words = Counter(SPACE + word for line in lines for word in line.split(" ") if word)
    words = {tuple(word): k for word, k in words.items()}
    found = []

    def places(word, pair):  # from the left, without overlap
        i, out = 0, []
        while i < len(word) - 1:
            hit = word[i:i + 2] == pair
            out += [i] * hit
            i += 1 + hit
        return out

    while len(found) < n:
        pairs = {pair for word in words for pair in zip(word, word[1:]) if len("".join(pair)) <= max_piece_length}
        counts = {pair: sum(k * len(places(word, pair)) for word, k in words.items()) for pair in pairs}
        candidates = [(-k, len("".join(p)), "".join(p), p) for p, k in counts.items() if "".join(p) not in found]
        if not candidates:
            break
        pair = min(candidates)[3]
        found.append("".join(pair))
        merged = Counter()
        for word, k in words.items():
            for i in reversed(places(word, pair)):
                word = word[:i] + ("".join(pair),) + word[i + 2:]
            merged[word] += k
        words = merged
    return found


@pytest.mark.parametrize("seed", range(40))
def test_training_finds_the_merges_of_the_textbook_algorithm(seed):
    rng = random.Random(seed)
    letters = ["ab", "abc", "abcdefgh"][seed % 3]  # two letters: overlaps such as aaa, and ties, everywhere
    lines = [" ".join("".join(rng.choices(letters, k=rng.randrange(1, 12))) for _ in range(8)) for _ in range(4)]
    limit = rng.choice([2, 3, 5, 16])
    expected = textbook_merges(lines, 60, limit)
    alphabet = len(set("".join(lines).replace(" ", ""))) + 1
    tokenizer = T.train(lines, 259 + alphabet + len(expected), max_piece_length=limit)
    assert [p.text for p in tokenizer.pieces[259:-alphabet]] == expected


def test_overlapping_pairs_are_counted_without_overlap():
    # By hand: "aaaaa" holds aa twice, "xy" comes three times; counted with overlap, aa (4) would have come first.
    tokenizer = T.train(["aaaaa", "xy xy xy"], 259 + 4 + 2)
    assert [p.text for p in tokenizer.pieces[259:261]] == ["xy", "▁xy"]


def zipf_text(seed, lines=3000, characters="가나다라마바사아자차카타파하고노도로모보소오조초코토포호"):
    rng = random.Random(seed)
    words = ["".join(rng.choices(characters, weights=range(len(characters), 0, -1), k=rng.randrange(1, 7))) for _ in range(3000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=10)) + rng.choice([".", "!!", "...", " 2024", ""]) for _ in range(lines)]


def test_the_vocabulary_is_the_one_that_the_packages_trainer_finds(tmp_path):
    lines = zipf_text(0)
    ours, theirs = T.train(lines, 1200), package_model(tmp_path, lines, vocab_size=1200, character_coverage=1.0)
    mine, other = ({p.text for p in t.pieces} for t in (ours, theirs))
    assert ours.vocab_size == theirs.vocab_size == 1200 and len(mine & other) >= 0.99 * 1200
    tokens = [sum(len(t.package.encode(line)) for line in zipf_text(1)) for t in (ours, theirs)]
    assert abs(tokens[0] / tokens[1] - 1) < 0.005


def test_the_same_text_gives_the_same_model_in_any_order_and_from_any_iterable():
    lines = zipf_text(2, 300)
    first = T.train(lines, 500).to_bytes()
    assert T.train(iter(reversed(lines)), 500).to_bytes() == first
    assert T.train(["\n".join(lines) + "\r\n"], 500).to_bytes() == first


def test_pieces_respect_spaces_scripts_digits_and_length():
    lines = zipf_text(3, 300) + ["재밌다!! abc가나 다2024년 3kg :)"] * 50
    for p in T.train(lines, 700, max_piece_length=5).pieces[259:]:
        body = p.text.removeprefix(SPACE)
        assert SPACE not in body and len(p.text) <= 5
        assert not any(c.isdigit() for c in p.text) or len(p.text) == 1
        assert len({"hangul" if "가" <= c <= "힣" else "latin" if c.isalpha() else "sign" for c in body}) <= 1
    loose = {p.text for p in T.train(lines, 700, split_scripts=False, split_digits=False).pieces}
    assert {"▁재밌다!!", "2024년"} <= loose | {"▁다2024년"} and "▁재밌다!!" in loose


def test_character_coverage_leaves_the_rarest_characters_to_the_bytes():
    lines = ["가나다라 " * 100 + "뷁"]
    assert "뷁" in T.train(lines, 270).ids
    covered = T.train(lines, 268, character_coverage=0.99)
    assert "뷁" not in covered.ids and len(covered.encode("뷁")) == 1 + 3 and covered.decode(covered.encode("뷁")) == "뷁"
    assert T.train(lines, 10, character_coverage=0.99, byte_fallback=False).encode("뷁뷁")[-1] == 0


def test_counting_words_streams_the_text():
    tracemalloc.start()
    counts = T.count_words(f"고양이 {i % 50} cat" for i in range(100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["cat"] == 100_000 and counts["7"] == 2_000 and len(counts) == 52
    assert peak < 6e6  # the lines alone would be ten


@pytest.mark.parametrize("lines, size, words", [
    ([], 300, "no text"), (["", "  "], 300, "no text"), (["abc"], 262, "too small .* 259 special pieces and the 4 characters"),
    (["abc"], 300, "pairs for 266 pieces, not for 300")])
def test_impossible_vocabularies_are_refused_with_the_numbers(lines, size, words):
    with pytest.raises(ValueError, match=words):
        T.train(lines, size)


SENTENCES = {
    "thai": ["แมวสีแดงนั่งอยู่บนเสื่อ", "สุนัขสีฟ้านั่งอยู่บนเสื่อ"], "arabic": ["القطة الحمراء على السجادة", "الكلب الأزرق على السجادة"],
    "japanese": ["赤い猫がマットの上にいる。", "青い犬がマットの上にいる。", "マットの上"], "chinese": CHINESE, "emoji": ["👨‍👩‍👧 ❤️ 👍🏽", "👨‍👩‍👧👨‍👩‍👧 👍🏽❤️"],
    "hindi": ["लाल बिल्ली चटाई पर है", "नीला कुत्ता चटाई पर है"]}


@pytest.mark.parametrize("language", SENTENCES)
def test_any_language_opens_with_the_same_calls(english, language):
    lines = SENTENCES[language] * 5
    alphabet = len(set("".join(lines).replace(" ", ""))) + 1
    merged = T.merge(english, T.train(lines, 259 + alphabet + 8))
    assert T.unreachable(merged) == [] and merged.vocab_size > english.vocab_size
    for line in lines:
        ids = merged.encode(line)
        assert merged.decode(ids) == line and len(ids) < len(english.encode(line)) / 2
        assert all(merged.pieces[i].type != BYTE for i in ids) or line[-1] == "。"  # a full stop is no foreign letter


def test_an_emoji_of_several_code_points_becomes_one_piece():
    assert {"▁👨‍👩‍👧", "▁👍🏽"} <= set(T.train(SENTENCES["emoji"] * 5, 279).ids)


def test_chinese_pieces_glue_words_across_grammar_unless_a_word_list_says_what_a_word_is(english):
    trained, short = ([p.text for p in T.train(CHINESE, size, max_piece_length=n).pieces[259:]] for size, n in [(294, 16), (284, 2)])
    assert "色的" in trained and max(map(len, trained)) > 4 and max(map(len, short)) == 2
    listed = T.merge(english, ["红", "色", "的", "猫", "在", "垫", "子", "红色", "垫子", "在垫子上"], dead="drop")
    assert listed.package.encode("红色的猫在垫子", out_type=str) == ["▁", "红色", "的", "猫", "在", "垫子"]


# ------------------------------------------------------------------------------------------------------------- merging

def test_merging_changes_no_base_id_and_appends_control_pieces_last(english, korean, merged):
    assert merged.pieces[:english.vocab_size] == english.pieces
    assert [p.text for p in merged.pieces[-2:]] == ["<image>", "<pad>"]
    assert all(p.type == CONTROL for p in merged.pieces[-2:])
    new = merged.pieces[english.vocab_size:-2]
    assert {p.text for p in new} < {p.text for p in korean.pieces} and "▁고양이" in {p.text for p in new}
    assert len({p.text for p in merged.pieces}) == merged.vocab_size
    assert T.merge(merged, korean).pieces == merged.pieces  # nothing left to add


def test_english_encodes_as_before_even_when_the_new_text_had_english_words(english):
    mixed = T.train(KOREAN + ["the OK dog runs :-) ... (the end)"] * 9, 345)
    merged, rng = T.merge(english, mixed), random.Random(4)
    words = [p.text.replace(SPACE, " ") for p in mixed.pieces[259:] if p.text.isascii() or p.text[0] == SPACE]
    for _ in range(500):
        text = "".join(c for c in "".join(rng.choices(words, k=8)) if c.isascii())
        assert merged.package.encode(text) == english.package.encode(text)
    changed = T.merge(english, mixed, foreign_only=False)
    assert changed.encode("the OK dog :-)") != english.encode("the OK dog :-)")


def test_new_pieces_rank_below_base_words_but_above_runs_of_spaces_and_never_tie():
    base = model([("ca", -1.0), ("▁ca", -2.0), ("▁▁", -1e9), ("▁", -3e9), ("c", -4.0), ("a", -4.0)])  # as Llama-2 has them
    merged = T.merge(base, ["가나", "▁가나", "▁가나다"], control=())
    assert [p.score for p in merged.pieces[-3:]] == [-3.0, -4.0, -5.0]
    assert merged.package.encode("  ca  가나", out_type=str) == ["▁▁", "▁ca", "▁", "▁가나"]
    crowded = T.merge(model([("ca", -1e9)]), ["가나", "▁가나", "▁가나다"], control=())
    assert len({crowded.package.get_score(i) for i in range(crowded.vocab_size - 4, crowded.vocab_size)}) == 4  # float32


def test_signs_that_english_uses_are_not_foreign_and_letters_marks_and_emoji_are():
    assert not any(map(T.is_foreign, ["the", "▁", "▁“", "…", "©", "▁°", "€", "—", "½", "™", "→", "2024"]))
    assert all(map(T.is_foreign, ["가", "▁x가", "猫", "ー", "ก", "ั", "ع", "é", "😀", "❤️", "ㅋㅋ", "々"]))


def produced(tokenizer, letters, longest):
    """Every piece that the package produces for any text of these letters, by trying all texts."""
    found = set()
    for n in range(1, longest + 1):
        for text in itertools.product(letters, repeat=n):
            found.update(tokenizer.package.encode("\ue000" + "".join(text), out_type=str))
    return found


@pytest.mark.parametrize("seed", range(25))
def test_unreachable_pieces_are_exactly_those_that_no_text_produces(seed):
    rng = random.Random(seed)
    texts = {"".join(rng.choices("abc", k=rng.choice([2, 2, 3, 3, 4, 5]))) for _ in range(14)}
    scores = rng.sample(range(-50, 0), len(texts)) if seed % 4 else [-rng.randrange(3) for _ in texts]  # with ties
    tokenizer = model([("a", -90.0), ("b", -91.0), ("c", -92.0), *zip(sorted(texts), map(float, scores))])
    assert set(T.unreachable(tokenizer)) == texts - produced(tokenizer, "abc", 7)


@pytest.mark.parametrize("seed", range(25))
def test_a_merge_leaves_out_or_repairs_exactly_the_dead_pieces(seed):
    rng = random.Random(seed)
    base = model([("ab", -1.0), ("ca", -2.0), ("a", -8.0), ("b", -8.0), ("c", -8.0)])
    new = list(dict.fromkeys("".join(rng.choices("abcde", k=rng.choice([2, 2, 3, 3, 4, 6]))) for _ in range(20)))
    options = dict(foreign_only=False, control=())
    kept = T.merge(base, new, dead="keep", **options)
    dropped = T.merge(base, new, dead="drop", **options)
    repaired = T.merge(base, new, dead="repair", **options)
    assert set(kept.ids) == set(base.ids) | set(new) and set(dropped.ids) <= set(kept.ids) <= set(repaired.ids)
    assert T.unreachable(dropped) == T.unreachable(repaired) == []
    for tokenizer in (dropped, repaired):
        for p in tokenizer.pieces[259:]:
            assert tokenizer.package.encode("\ue000" + p.text, out_type=str)[-1] == p.text
    added, dead = T.select_pieces(base, new, foreign_only=False)
    assert sorted(added + dead) == sorted(set(new) - set(base.ids))
    for text in dead:  # even as the very next piece it could not be produced
        assert text in T.unreachable(T.merge(dropped, [text], dead="keep", **options))


def test_a_word_without_its_parts_is_dead_and_repair_adds_the_parts():
    base = model([(c, -1.0) for c in "해바라기"])
    assert T.select_pieces(base, ["해바라기"]) == ([], ["해바라기"])
    assert T.select_pieces(base, ["해바라기"], dead="repair") == (["해바", "해바라", "해바라기"], ["해바라기"])
    assert T.select_pieces(base, ["해바라", "바라", "해바라기"]) == (["바라", "해바라", "해바라기"], [])  # a later piece saves it
    assert T.select_pieces(base, ["hey", "바 라", "해바라"], dead="drop") == ([], ["해바라", "바 라"])


def test_a_piece_that_holds_a_user_defined_one_is_dead():
    base = model([("바", 0.0, USER_DEFINED), ("해", -1.0), ("라", -1.0)])
    kept = T.merge(base, ["해바", "해라"], dead="keep", control=())
    assert T.unreachable(kept) == ["해바"] and "해바" not in produced(kept, "해바라", 4)
    assert T.select_pieces(base, ["해바", "해라"], dead="repair") == (["해라"], ["해바"])


def test_a_control_piece_that_the_base_has_as_text_is_refused():
    with pytest.raises(ValueError, match="<pad> is an ordinary piece of the base"):
        T.merge(model([("<pad>", -1.0)]), [])


def test_models_with_different_normalisers_are_refused(english, tmp_path):
    other = package_model(tmp_path, KOREAN, vocab_size=320, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match="normalise text differently, identity and nmt_nfkc"):
        T.merge(english, other)
    assert T.merge(english, other, same_normalizer=False).vocab_size > english.vocab_size


# ---------------------------------------------------------------------------------------------------- the command line

def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", *map(str, args)])
    status = 0
    try:
        T.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_train_merge_report_and_show_run_as_the_docstring_says(monkeypatch, capsys, tmp_path):
    for name, lines in {"en.txt": ENGLISH, "ko.txt": KOREAN, "words.txt": ["▁빨간", "고양이", "", "파란 강아지"], "zh.txt": CHINESE}.items():
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, capsys, "train", "en.txt", "--vocab-size", 300, "-o", "en.model")[0] == 0
    assert run(monkeypatch, capsys, "train", "ko.txt", "--vocab-size", 305, "-o", "ko.model")[0] == 0
    status, out, _ = run(monkeypatch, capsys, "merge", "en.model", "ko.model", "-o", "both.model")
    both = Tokenizer.load("both.model")
    assert status == 0 and f"{both.vocab_size} pieces = 300 + {both.vocab_size - 302} new + 2 control; 0 unreachable" in out
    assert run(monkeypatch, capsys, "train", "zh.txt", "--vocab-size", 290, "-o", "zh.model")[0] == 0
    assert run(monkeypatch, capsys, "merge", "en.model", "ko.model", "zh.model", "-o", "three.model")[0] == 0
    three = Tokenizer.load("three.model")
    assert three.pieces[:both.vocab_size - 2] == both.pieces[:-2] and three.pad_id == three.vocab_size - 1 and "猫" in three.ids
    status, out, _ = run(monkeypatch, capsys, "merge", "en.model", "words.txt", "-o", "w.model", "--dead", "repair")
    assert "3 dead ones made reachable ▁빨간 고양이 파란▁강아지" in out
    assert {"▁빨간", "고양이", "파란▁강아지"} <= set(Tokenizer.load("w.model").package.encode("x빨간 빨간고양이파란 강아지", out_type=str))
    status, out, _ = run(monkeypatch, capsys, "report", "en.model", "both.model", "--text", "ko=ko.txt", "en.txt")
    assert status == 0 and out.count("\nko ") == 2 and out.count("\nen.txt ") == 2 and "0 unreachable" in out
    status, out, _ = run(monkeypatch, capsys, "show", "en.model", "both.model", "the 고양이")
    assert "| ▁the | ▁ | <0xEA> | <0xB3> | <0xA0>" in out and "| ▁the | ▁고양이" in out
    assert len(os.listdir()) == 4 + 6 and not [name for name in os.listdir() if name.endswith(".tmp")]


def test_the_report_counts_what_one_counts_by_hand(english):
    # "the 고": ▁the ▁ EA B3 A0 -> 5 tokens, 3 of them bytes, 5 characters, one of them without a piece, 2 words, 7 bytes.
    n = T.measure(english, ["the 고\n", "the\n"])
    assert (n["tokens"], n["byte_tokens"], n["characters"], n["unknown"], n["words"], n["bytes"]) == (6, 3, 8, 1, 3, 10)
    no_bytes = model([("▁", -1.0), ("a", -2.0)], byte_fallback=False)
    assert T.measure(no_bytes, ["a뷁뷁"])["unknown"] == 2


BAD = [
    (["train", "empty.txt", "--vocab-size", "300", "-o", "x.model"], "no text to train on"),
    (["train", "latin1.txt", "--vocab-size", "300", "-o", "x.model"], "latin1.txt, line 2: not UTF-8"),
    (["train", "ok.txt", "--vocab-size", "262", "-o", "x.model"], "a vocabulary of 262 is too small"),
    (["train", "ok.txt", "--vocab-size", "-5", "-o", "x.model"], "a vocabulary of -5 is too small"),
    (["train", "ok.txt", "--vocab-size", "265", "--character-coverage", "0", "-o", "x.model"], "must be in (0, 1]"),
    (["train", "missing.txt", "--vocab-size", "300", "-o", "x.model"], "missing.txt: No such file"),
    (["train", "ok.txt", "--vocab-size", "265", "-o", "nowhere/x.model"], "nowhere/x.model: the folder does not exist"),
    (["merge", "ok.txt", "ok.txt", "-o", "x.model"], "ok.txt: not a SentencePiece .model file"),
    (["merge", "unigram.model", "words.txt", "-o", "x.model"], "the base model is not a BPE"),
    (["show", "folder", "hello"], "folder: Is a directory"),
]


@pytest.mark.parametrize("args, words", BAD, ids=[words for _, words in BAD])
def test_a_mistake_gets_one_line_and_status_2(monkeypatch, capsys, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("ok.txt").write_text("abc abd")
    Path("words.txt").write_text("가나")
    Path("latin1.txt").write_bytes("café\n".encode() + "café\n".encode("latin-1"))
    Path("folder").mkdir()
    if args[1] == "unigram.model":
        Path("unigram.model").write_bytes(package_model(tmp_path, ENGLISH, model_type="unigram", vocab_size=300).to_bytes())
    before = sorted(os.listdir())
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 2 and words in err and err.count("\n") == 1 and out == "" and sorted(os.listdir()) == before


def test_ctrl_c_in_training_leaves_the_old_model_and_nothing_half_written(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abc abd")
    Path("x.model").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(T, "learn_merges", interrupt)
    status, _, err = run(monkeypatch, capsys, "train", "text.txt", "--vocab-size", "265", "-o", "x.model")
    assert status == 130 and err == "tokenizer.py: interrupted, nothing written\n"
    assert sorted(os.listdir()) == ["text.txt", "x.model"] and Path("x.model").read_text() == "old"


def test_bench_names_every_peer_and_skips_what_is_not_installed(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(zipf_text(5, 400)), encoding="utf-8")
    hide = ("import importlib.util as u, runpy, sys; find = u.find_spec; "
            "u.find_spec = lambda name, *a: None if name == 'tokenizers' else find(name, *a); "
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    out = subprocess.run([sys.executable, "-c", hide, str(ROOT / "tokenizer.py"), "bench", str(tmp_path / "text.txt"),
                          "--vocab-size", "500"], capture_output=True, text=True, check=True).stdout
    assert out.count("CPU-seconds") == 2 and "FAILED" not in out and "tokenizers     not installed, skipped" in out


# ------------------------------------------------------------------------------------------------------ real text, real models

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
    return T.merge(llama, review_model)


def real_lines(*patterns):
    paths = sorted(path for pattern in patterns for path in DATA.glob(pattern))
    return [line for path in paths if path.suffix in TEXT for line in path.read_text(encoding="utf-8").split("\n")]


@real
def test_the_real_llama_2_file_is_written_back_byte_for_byte(llama):
    assert llama.to_bytes() == (DATA / "tokenizers/llama2/tokenizer.model").read_bytes()
    assert T.unreachable(llama) == []


@real
def test_ids_equal_the_packages_on_real_text_in_three_languages(llama, review_model, llama_ko):
    lines = list(dict.fromkeys(real_lines("**/*")))[::STEP]
    assert len(lines) > 5_000
    for tokenizer in (llama, review_model, llama_ko):
        for line in lines:
            ids = tokenizer.encode_reference(line)
            assert ids == tokenizer.package.encode(line) and tokenizer.decode(ids) == tokenizer.package.decode(ids)


@real
def test_on_real_reviews_the_vocabulary_is_the_packages_own(reviews, review_model, tmp_path):
    theirs = package_model(tmp_path, reviews[:60_000], vocab_size=8000, character_coverage=0.9995)
    common = {p.text for p in review_model.pieces} & {p.text for p in theirs.pieces}
    assert len(common) >= 0.99 * 8000
    ours, other = (sum(map(len, t.package.encode(reviews[60_000:70_000]))) for t in (review_model, theirs))
    assert abs(ours / other - 1) < 0.005


@real
def test_expanded_llama_2_needs_at_most_0_4_times_the_tokens_on_reviews_it_has_not_seen(llama, llama_ko, reviews):
    assert T.unreachable(llama_ko) == []
    before, after = (sum(map(len, t.package.encode(reviews[60_000:70_000]))) for t in (llama, llama_ko))
    assert after <= 0.40 * before


@real
def test_english_text_keeps_its_ids_in_expanded_llama_2(llama, llama_ko):
    lines = [line for line in real_lines("text/*/en/**/*", "text/jhe/dev.en", "text/tatoeba/*", "nlvr/*", "instruct/**/*")
             if not any(T.is_foreign(c) for c in line)]
    assert len(lines) > 5_000 and llama.package.encode(lines) == llama_ko.package.encode(lines)


@real
def test_merging_a_foreign_unigram_model_as_the_public_scripts_do_gives_their_number_and_names_the_dead(llama):
    chinese = Tokenizer.load(DATA / "tokenizers/chinese_sp/chinese_sp.model")
    options = dict(foreign_only=False, same_normalizer=False, control=())
    kept, dropped = (T.merge(llama, chinese, dead=dead, **options) for dead in ("keep", "drop"))
    dead = T.unreachable(kept)
    assert kept.vocab_size == 49_953 and len(dead) == 49_953 - dropped.vocab_size > 300 and T.unreachable(dropped) == []
    for text in dead[:50]:
        assert kept.package.encode("\ue000" + text, out_type=str)[-1] != text
