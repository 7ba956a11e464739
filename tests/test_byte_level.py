"""vocabulary/byte_level.py: by hand, against the textbook, and against the `tokenizers` library."""

import copy
import json
import os
import pickle
import random
import re
import unicodedata
from pathlib import Path

import pytest
from bpe_models import (
    CHINESE,
    ENGLISH,
    KOREAN,
    PRE_TOKENIZERS,
    byte_level_json,
    byte_level_model,
    random_text,
    special_token,
)

import tokenizer as T
from tokenizer import CONTROL, StreamDecoder
from vocabulary import report
from vocabulary.byte_level import ByteLevelTokenizer, to_bytes, to_letters, translate_regex
from vocabulary.extend import learn_pieces
from vocabulary.fast_bpe import bpe

LINES = ENGLISH + KOREAN + CHINESE
DATA = Path(os.environ.get("XLLAVA_DATA", "/nowhere"))


def long_model(pre_tokenizer, **model):
    """A model with merges of all three languages."""
    base = byte_level_model(pre_tokenizer, **model)
    return base.with_pieces(learn_pieces(base, LINES, 140, foreign_only=False))


def odd_texts(seed, n=300):
    """Words, and all that cuts them: signs, digits of other scripts, spaces, long S."""
    rng = random.Random(seed)
    ordinary = [" the", "cat", "고양이", " 猫", "😀", "'s", "'S", "'ſ", "'LL", "we've", "12345"]
    ordinary += ["  ", " \n", "\r\n", "\n\n  ", "\t", "\x1c", "\x85", "²Ⅷ١", "!!\n", "é", "<|end|>"]
    texts = ["".join(rng.choices(ordinary, k=rng.randrange(9))) for _ in range(n)]
    return texts + [random_text(rng, ordinary) for _ in range(n)]


# ------------------------------------------------------------------------------------------ by hand
def test_bytes_have_the_letters_that_gpt2_gave_them():
    assert to_letters(" a\n~가") == "ĠaĊ~ê°Ģ"
    assert to_letters("\0\x7f\u00a0\u00ad") == "ĀġÂłÂŃ"
    assert to_bytes("ĠaĊ~ê°Ģ") == " a\n~가".encode()
    assert len(set(map(to_letters, map(chr, range(128))))) == 128


def test_the_merge_that_comes_first_is_done_first_and_at_the_leftmost_place():
    tokenizer = byte_level_model(merges=["b c", "a b", "a bc", "c c", "a a", "aa aa"])
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("abccc aaaaa")]
    assert pieces == ["abc", "cc", "Ġ", "aaaa", "a"]  # not "ab"
    # "ab" and "c" are pieces, and so is "abc": but no merge joins these two.
    unmerged = byte_level_model(merges=["a b", "b c", "a bc"])
    assert [unmerged.piece(i) for i in unmerged.encode("abc")] == ["ab", "c"]
    assert unmerged.find_unreachable() == ["abc"]
    # Llama-3 takes a word that is a piece as it is.
    whole = byte_level_model(merges=["a b", "b c", "a bc"], ignore_merges=True)
    assert [whole.piece(i) for i in whole.encode("abc abcd")] == ["abc", "Ġ", "ab", "c", "d"]
    assert whole.find_unreachable() == []


@pytest.mark.parametrize("seed", range(10))
def test_the_heap_encodes_as_the_textbook_does(seed):
    rng = random.Random(seed)
    pieces, merges = list("abc"), []
    for _ in range(25):
        a, b = rng.choices(pieces, k=2)
        merges.append(f"{a} {b}")
        pieces.append(a + b)
    scores = {merge: -rank for rank, merge in enumerate(merges)}
    for _ in range(60):
        text = "".join(rng.choices("abcd", k=rng.randrange(30)))
        assert bpe(text, scores, " ") == T.bpe_textbook(text, scores, " ")


TEXT = "It'S  12345!\r\n\n 가나2a ²x"
WORDS_BY_HAND = {
    "GPT-2": ["It", "'", "S", " ", " 12345", "!", "\r\n\n", " 가나", "2", "a", " ²", "x"],
    "SmolLM2": "It|'|S|  |1|2|3|4|5|!|\r\n\n| 가나|2|a| |²|x".split("|"),
    "Llama-3": ["It", "'S", " ", " ", "123", "45", "!\r\n\n", " 가나", "2", "a", " ", "²", "x"],
    "Qwen2": "It|'S| | |1|2|3|4|5|!\r\n\n| 가나|2|a| |²|x".split("|"),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_by_hand(name):
    assert byte_level_model(name).split_words(TEXT) == WORDS_BY_HAND[name]


def test_without_a_begin_the_end_is_both_as_in_gpt2():
    tokenizer = ByteLevelTokenizer(byte_level_json(), {"eos_token": "<|end|>"})
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.ids["<|end|>"]


def test_nfc_joins_a_letter_and_its_mark_for_qwen_only():
    qwen, gpt2 = byte_level_model("Qwen2"), byte_level_model()
    assert qwen.encode("e\u0301") == qwen.encode("é") and len(qwen.encode("é")) == 2
    assert len(gpt2.encode("e\u0301")) == 3


def test_special_tokens_never_come_from_text_and_other_added_tokens_always():
    data = byte_level_json(special=("<|begin|>",))
    data["added_tokens"] += [special_token(257, "<tool>", False), special_token(258, "<to", False)]
    tokenizer = ByteLevelTokenizer(data)
    assert tokenizer.pieces[256].type == CONTROL
    assert 256 not in tokenizer.encode("<|begin|>") and len(tokenizer.encode("<|begin|>")) == 9
    assert tokenizer.encode("<tool><tooo") == [257, 258, *tokenizer.encode("oo")]
    assert tokenizer.decode([256, 257, 256]) == "<tool>"
    # Also where a word that is a piece is taken as it is.
    data["model"] |= {"ignore_merges": True, "vocab": data["model"]["vocab"] | {"<|begin|>": 256}}
    data["pre_tokenizer"] = dict(data["pre_tokenizer"], use_regex=False)
    assert 256 not in ByteLevelTokenizer(data).encode("<|begin|>")


def test_a_byte_without_a_piece_is_unknown_or_nothing():
    data = byte_level_json()
    del data["model"]["vocab"]["b"], data["added_tokens"][:]
    data["model"]["vocab"] = {text: i for i, text in enumerate(data["model"]["vocab"])}
    tokenizer = ByteLevelTokenizer(data)
    assert tokenizer.decode(tokenizer.encode("abbc")) == "ac"
    data["model"]["unk_token"] = "?"
    assert ByteLevelTokenizer(data).encode("abbc") == tokenizer.encode("a??c")


def test_half_a_surrogate_pair_is_a_replacement_character():
    tokenizer = byte_level_model()
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


# ------------------------------------------------------------------------------- roles, files, ends
def test_roles_are_in_tokenizer_config_and_new_ones_are_added_once(tmp_path):
    tokenizer = byte_level_model(merges=["a b"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (257, 258)
    assert (tokenizer.pad_id, tokenizer.image_id) == (None, None)
    assert tokenizer.encode("ab", bos=True, eos=True) == [257, 256, 258]
    longer = tokenizer.with_control(["<image>", "<pad>"])
    assert (longer.image_id, longer.pad_id, longer.vocab_size) == (259, 260, 261)
    assert longer.piece(259) == "<image>" and 259 not in longer.encode("<image>")
    assert longer.with_control(["<image>", "<pad>"]).to_bytes() == longer.to_bytes()
    padded = ByteLevelTokenizer(byte_level_json(), {"pad_token": "<|end|>"})
    assert padded.with_control(["<image>", "<pad>"]).pad_id == padded.pad_id == 257
    with pytest.raises(ValueError, match="eos_token '<nowhere>' is not in the vocabulary"):
        ByteLevelTokenizer(byte_level_json(), {"eos_token": "<nowhere>"})


def test_a_tokenizer_survives_the_disk_and_a_pickle(tmp_path):
    tokenizer = long_model("Qwen2").with_control(["<image>", "<pad>"])
    tokenizer.save(tmp_path / "tokenizer.json")
    again = ByteLevelTokenizer.load(tmp_path)
    for copied in (again, pickle.loads(pickle.dumps(tokenizer)), T.load(tmp_path)):
        assert copied.to_bytes() == tokenizer.to_bytes()
        assert copied.pieces == tokenizer.pieces and copied.image_id == tokenizer.image_id
        assert copied.encode(TEXT) == tokenizer.encode(TEXT)


def test_both_formats_of_merges_are_read():
    pairs = byte_level_json(merges=["a b", "ab c"])
    pairs["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    assert ByteLevelTokenizer(pairs).merges == ["a b", "ab c"]


def edit(path, value):
    """byte_level_json with one value changed: "model dropout" -> data["model"]["dropout"]."""
    data = copy.deepcopy(byte_level_json(merges=["a b"]))
    *parents, last = path.split()
    inside = data
    for name in parents:
        inside = inside[name]
    inside[last] = value
    return data


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
REFUSED = {
    "model WordPiece is not computed here": ("model type", "WordPiece"),
    "model BPE: dropout is 0.1, computed is null or 0": ("model dropout", 0.1),
    "model BPE: end_of_word_suffix is \"</w>\"": ("model end_of_word_suffix", "</w>"),
    "a SentencePiece vocabulary: copy the tokenizer.model": ("model byte_fallback", True),
    "model BPE: novelty is not computed here": ("model novelty", 1),
    "normalizer NFKC is not computed here": ("normalizer", {"type": "NFKC"}),
    "tokenizer.json: truncation is": ("truncation", {"max_length": 3}),
    "pre_tokenizer Metaspace is not computed": ("pre_tokenizer", {"type": "Metaspace"}),
    "pre_tokenizer without ByteLevel": ("pre_tokenizer", None),
    "pre_tokenizer ByteLevel: add_prefix_space is true": (
        "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
    "pre_tokenizer Split: behavior is \"Removed\"": (
        "pre_tokenizer", SPLIT | {"behavior": "Removed", "pattern": {"Regex": "a"}}),
    "the pattern {'String': 'a'} is no Regex": (
        "pre_tokenizer",
        {"type": "Sequence",
         "pretokenizers": [SPLIT | {"pattern": {"String": "a"}}, {"type": "ByteLevel"}]}),
    "the decoder is not ByteLevel alone": ("decoder", None),
    "post_processor RobertaProcessing is not": ("post_processor", {"type": "RobertaProcessing"}),
    "the merge 'a b c' is not two pieces": ("model merges", ["a b c"]),
    "the vocabulary lacks a piece of the merge 'a z'": ("model merges", ["a z"]),
    "unk_token '<unk>' is not in the vocabulary": ("model unk_token", "<unk>"),
    "the ids of the 2 pieces are not 0, 1, 2": ("model vocab", {"a": 0}),
    "added token 'x': lstrip is not computed": (
        "added_tokens", [special_token(257, "x", False) | {"lstrip": True}]),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_computed_is_refused_by_name(message, tmp_path):
    data = edit(*REFUSED[message])
    if "ids" in message:
        data["added_tokens"] = [special_token(5, "x")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json: ") as error:
        ByteLevelTokenizer.load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["[]", "{}", '{"model": 3}', '{"model": {"vocab": []}}', "x"])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    (tmp_path / "tokenizer.json").write_text(damage, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json: ") as error:
        ByteLevelTokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [r"a++", r"\p{L}{1,3}+", r"\d", r"\P{L}", "a.", "(a)", "^a"])
def test_a_pattern_that_may_mean_something_else_in_python_is_refused(pattern):
    with pytest.raises(ValueError, match="not one that we translate"):
        translate_regex(pattern)
    for nested in (r"[\S]", "[a[b]]"):
        with pytest.raises(ValueError, match="in a class"):
            translate_regex(nested)


def test_classes_are_those_of_unicode():
    letter = re.compile(translate_regex(r"\p{Lu}|\p{Nd}|\s"))
    assert [c for c in "AaÄ가1²١ \x1c\x85\u200b\u3000_" if letter.fullmatch(c)] == list(
        "AÄ1١ \x85\u3000"
    )


# ------------------------------------------------------------------------------ decoding, reporting
def test_the_stream_shows_whole_characters_as_soon_as_they_are_there():
    tokenizer = byte_level_model(merges=["ê °", "Ģ Ġ"])  # 가: EA B0 80
    stream = StreamDecoder(tokenizer)
    ids = [tokenizer.id(piece) for piece in ("ê°", "Ģ", "a", "ê°", "ĢĠ", "Ã", "ê", "<|end|>", "Ģ")]
    shown = ["", "가", "a", "", "가 ", "", "\ufffd", "\ufffd", "\ufffd"]
    assert [stream.push(i) for i in ids] == shown and stream.flush() == ""
    with pytest.raises(IndexError, match="outside the vocabulary"):
        stream.push(tokenizer.vocab_size)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_decoding_gives_the_text_back(name):
    tokenizer = long_model(name)
    for text in odd_texts(1):
        expected = unicodedata.normalize("NFC", text) if name == "Qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_the_report_counts_what_one_counts_by_hand():
    # "a가 é": a, EA B0, 80, Ġ, C3 A9 (one piece): 5 tokens, 2 that are no whole characters.
    tokenizer = byte_level_model(merges=["ê °", "Ã ©"])
    counts, pieces = report.fertility_counts(tokenizer, ["a가 é\n"])
    assert (counts["tokens"], counts["byte_tokens"], counts["unknown"]) == (5, 2, 1)
    assert (counts["characters"], counts["bytes"], pieces["ê°"]) == (4, 7, 1)
    assert report.show(tokenizer, "a가 é").split(" | ")[1:] == ["a", "ê°", "Ģ", "▁", "é"]


# ------------------------------------------------------------------------- the `tokenizers` library
def library_model(data):
    """The library's tokenizer; special tokens typed as text stay text, as here."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_library_gives_the_same_ids_and_text(name, whole_words):
    ours = long_model(name, ignore_merges=whole_words)
    theirs = library_model(ours.with_control(["<image>"]).file_content())
    for text in odd_texts(2) + LINES:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_file_that_the_library_trained_and_wrote_gives_the_same_ids(name):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    like = library_model(byte_level_json(name))
    theirs.normalizer, theirs.decoder = like.normalizer, like.decoder
    theirs.pre_tokenizer, theirs.encode_special_tokens = like.pre_tokenizer, True
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|begin|>", "<|end|>"], show_progress=False
    )
    theirs.train_from_iterator(LINES, trainer)
    ours = ByteLevelTokenizer(json.loads(theirs.to_str()))
    assert len(ours.merges) > 100
    for text in odd_texts(3) + LINES:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"\p{N}+", r"\s+", r"[^\s\p{L}\p{N}]+"])
def test_a_class_has_the_characters_that_the_library_knows_too(pattern):
    tokenizers = pytest.importorskip("tokenizers")

    def split(by, behaviour, text):
        step = tokenizers.pre_tokenizers.Split(tokenizers.Regex(by), behaviour)
        return [part for part, _ in step.pre_tokenize_str(text)]

    every = (chr(code) for code in range(0x110000))
    text = "".join(c for c in every if unicodedata.category(c) not in ("Cn", "Cs"))
    text = "".join(split(r"\p{Cn}+", "removed", text))
    assert len(text) > 250_000
    ours = re.split(f"({translate_regex(pattern)})", text)
    assert [part for part in ours if part] == split(pattern, "isolated", text)


@pytest.mark.skipif(not (DATA / "text").is_dir(), reason="set XLLAVA_DATA to a folder with text")
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_real_text_has_the_librarys_ids(name):
    ours = long_model(name)
    theirs = library_model(ours.file_content())
    n = 0
    for path in sorted((DATA / "text").rglob("*.*")):
        if path.suffix in (".tsv", ".mdx", ".md", ".txt"):
            for text in path.read_text(encoding="utf-8").split("\n")[::100]:
                assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
                n += 1
    assert n > 2000
