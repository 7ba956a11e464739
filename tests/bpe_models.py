"""Texts and small models for the tests of tokenizer.py and vocabulary/, made on the spot."""

import io
import random

import sentencepiece

from tokenizer import BYTE, CONTROL, SPACE, UNKNOWN, Piece, Tokenizer
from vocabulary.byte_level import BYTE_OF, ByteLevelTokenizer
from vocabulary.sentencepiece_file import write_message

ENGLISH = [
    "the cat sat on the mat",
    "the dog sat on the log, and the cat ran",
    "a red cat and a blue dog are on the mat!",
] * 4
KOREAN = [
    "고양이가 매트 위에 앉았다",
    "강아지가 통나무 위에 앉았다",
    "빨간 고양이와 파란 강아지가 매트 위에 있다!!",
] * 4
CHINESE = ["猫坐在垫子上。", "狗坐在木头上。", "红色的猫和蓝色的狗在垫子上。"] * 4

ODD = ["  ", " ", "\t", "\n", "\u3000", "\u00a0", SPACE, "0", "!", "é", "e\u0301", "👨‍👩‍👧"]
ODD += ["<s>", "<image>", "<0x41>"]
SYLLABLES = "가나다라마바사아자차카타파하고노도로모보소오조초코토포호"


def random_text(rng, ordinary):
    """Ordinary words, and what else Unicode has: spaces in rows, marks, emoji, other planes."""
    far = [*range(0x300, 0xD800, 97), *range(0xE000, 0x10FFFF, 997)]

    def part():
        kind = rng.randrange(5)
        if kind < 2:
            return rng.choice(ordinary if kind == 0 else ODD)
        return chr(rng.choice((range(0x300), range(0xAC00, 0xD7A4), far)[kind - 2]))

    return "".join(part() for _ in range(rng.randrange(12)))


def zipf_text(seed, lines=3000):
    """Lines of ten words. The n-th of 3,000 words comes 1/n times as often as the first."""
    rng = random.Random(seed)
    frequencies = range(len(SYLLABLES), 0, -1)
    words = [
        "".join(rng.choices(SYLLABLES, frequencies, k=rng.randrange(1, 7))) for _ in range(3000)
    ]
    weights = [1 / (i + 1) for i in range(len(words))]
    ends = [".", "!!", "...", " 2024", ""]
    return [" ".join(rng.choices(words, weights, k=10)) + rng.choice(ends) for _ in range(lines)]


def model(pieces, byte_fallback=True, add_dummy_prefix=1, remove_extra_whitespaces=0):
    """A BPE of hand-made pieces: [(text, score) or (text, score, type), ...].

    Field numbers are those of sentencepiece_model.proto.
    """
    special = [Piece("<unk>", 0.0, UNKNOWN)]
    special += [Piece(text, 0.0, CONTROL) for text in ("<s>", "</s>")]
    special += [Piece(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256) if byte_fallback]
    trainer = write_message([(3, 0, 2), (35, 0, int(byte_fallback))])
    normalizer = write_message([(3, 0, add_dummy_prefix), (4, 0, remove_extra_whitespaces)])
    fields = [(2, 2, trainer), (3, 2, normalizer)]
    return Tokenizer(special + [Piece(*piece) for piece in pieces], fields)


def package_model(lines, **options):
    """A BPE that the sentencepiece package trained."""
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **(defaults | options)
    )
    return Tokenizer.from_bytes(out.getvalue())


def byte_level_split(pattern):
    """The pre_tokenizer of Llama-3 and Qwen2: a regular expression, then bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    after = GPT2 | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split | {"invert": False}, after]}


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As in the tokenizer.json of these models.
PRE_TOKENIZERS = {
    "GPT-2": GPT2,
    "SmolLM2": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2],
    },
    "Llama-3": byte_level_split(WORDS % r"\p{N}{1,3}"),
    "Qwen2": byte_level_split(WORDS % r"\p{N}"),
}


def special_token(token_id, text, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": special}


def byte_level_json(pre_tokenizer="GPT-2", merges=(), special=("<|begin|>", "<|end|>"), **model):
    """A tokenizer.json: the 256 bytes, what the merges make, and special tokens behind them."""
    vocab = {letter: i for i, letter in enumerate(BYTE_OF)}
    for merge in merges:
        vocab.setdefault("".join(merge.split()), len(vocab))
    settings = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    settings |= {"byte_fallback": False, "ignore_merges": False} | model
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(len(vocab) + i, text) for i, text in enumerate(special)],
        "normalizer": {"type": "NFC"} if pre_tokenizer == "Qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre_tokenizer],
        "post_processor": None,
        "decoder": GPT2,
        "model": settings | {"vocab": vocab, "merges": list(merges)},
    }


def byte_level_model(pre_tokenizer="GPT-2", merges=(), **model):
    roles = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    return ByteLevelTokenizer(byte_level_json(pre_tokenizer, merges, **model), roles)
