"""Tokenizer: train a BPE, open it to a new language, and prove what that did. The pipeline begins here.

X-LLaVA's first step. To an English tokenizer a Korean syllable is three UTF-8 bytes, so three tokens. Train pieces on Korean
text, append them to the English model, and the same sentence becomes three times shorter while English keeps its ids.

    python tokenizer.py train ko.txt --vocab-size 8000 -o ko.model       # BPE from scratch -> a SentencePiece .model
    python tokenizer.py merge llama2.model ko.model -o both.model        # its pieces, then <image> and <pad>
    python tokenizer.py merge llama2.model words.txt -o both.model --dead repair      # from a list of words, one a line
    python tokenizer.py report llama2.model both.model --text ko=ko.txt en=en.txt     # tokens per character, word, byte
    python tokenizer.py show llama2.model both.model "햄버거"             # the pieces, in colours
    python tokenizer.py bench ko.txt --vocab-size 8000                   # time and memory, against the libraries

TRAINING. Text is cut into words at spaces ("▁" is the space, and begins the word after it); words are cut again around
digits and where the script changes ("재밌다!!" -> "▁재밌다", "!!"). Only *distinct* words are kept, with their counts. Then,
again and again: the pair of neighbours with the highest count becomes a piece and is merged wherever it stands. Among equal
counts the shorter piece comes first, then the first by code points: same text, same model, on every machine. Languages
that write no spaces go the same way: a "word" is what stands between signs, and a piece may span several real words.

How that is fast: all words lie in one array, one slot a character. A pair's places are noted once, when it is born. Later
its count can only fall, as a new occurrence would need a new symbol; so an outdated count is an upper bound, and it is
enough to recount the pair at the top of the heap. A merge touches only its own places, and N slots can lose at most N
symbols: all merges together move and sort O(N) places, O(N log N) for N characters of distinct words, in numpy.

ENCODING is the same in small: of all neighbours that form a piece, merge those with the best score, the leftmost first.
The `sentencepiece` package does it for speed; `encode_reference` is the definition, and the tests hold the two together.

MERGING TWO VOCABULARIES. New pieces rank below the base's, and a text without the new language's characters can't hold one,
so it encodes as before. But a BPE only makes a piece that some chain of merges leads to, and base merges may break the
chains of a foreign vocabulary. The exact test: a piece is reachable if and only if encoding its own characters alone gives
that one piece. (Where it appears in a longer text no merge crossed its borders, so inside them the merges ran as they
do alone. And what it becomes alone it also becomes behind a character that is in no piece.)
"""
import argparse
import heapq
import importlib.util
import os
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from itertools import count, islice
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's piece types
SPACE = "▁"  # U+2581
BYTES = [f"<0x{b:02X}>" for b in range(256)]


# ---------------------------------------------------------------------------------------------------------------------
# The .model file is a protobuf message: a run of fields, each a varint (number * 8 + wire type) and a value. Wire type 0 is
# a varint, 1 is 8 bytes, 5 is 4 bytes, 2 is a length and that many bytes, which may be a message again. The fields we use:
#   ModelProto      1 piece, repeated   2 TrainerSpec   3 NormalizerSpec
#   SentencePiece   1 text   2 score, a float   3 type (absent: NORMAL)
#   TrainerSpec     3 model_type (2: BPE)   35 byte_fallback   44 unk_surface
#   NormalizerSpec  1 name   2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces

class Piece(NamedTuple):
    text: str
    score: float
    type: int = NORMAL
    raw: bytes = b""  # as read; written back as it was


def read_varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[i] & 127) << shift
        i, shift = i + 1, shift + 7
        if data[i - 1] < 128:
            return value, i


def write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def read_message(data: bytes) -> list[tuple[int, int, int | bytes]]:
    """Bytes -> [(field number, wire type, value)], in the order of the file. LookupError or ValueError if damaged."""
    fields, i = [], 0
    while i < len(data):
        key, i = read_varint(data, i)
        if key & 7 == 0:
            value, i = read_varint(data, i)
        else:
            size, i = read_varint(data, i) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], i)
            value, i = data[i:i + size], i + size
        if i > len(data) or key < 8:
            raise ValueError("damaged protobuf")
        fields.append((key >> 3, key & 7, value))
    return fields


def write_message(fields) -> bytes:
    out = []
    for number, wire, value in fields:
        out.append(write_varint(number << 3 | wire))
        out.append(write_varint(value) if wire == 0 else (write_varint(len(value)) if wire == 2 else b"") + value)
    return b"".join(out)


def read_piece(raw: bytes) -> Piece:
    field = {number: value for number, _, value in read_message(raw)}
    return Piece(field[1].decode(), struct.unpack("<f", field.get(2, bytes(4)))[0], field.get(3, NORMAL), raw)


def write_piece(p: Piece) -> bytes:
    return p.raw or write_message([(1, 2, p.text.encode()), (2, 5, struct.pack("<f", p.score))]
                                  + [(3, 0, p.type)] * (p.type != NORMAL))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding

def bpe(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """Merge neighbours into pieces, best score first, leftmost first among equals, until none is left. O(n log n)."""
    symbols = list(symbols)
    left, right = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))  # neighbours of each symbol
    heap = []

    def propose(i, j):
        if i >= 0 and j < len(symbols) and (text := symbols[i] + symbols[j]) in scores:
            heapq.heappush(heap, (-scores[text], i, j, text))

    for i in range(len(symbols) - 1):
        propose(i, i + 1)
    while heap:
        _, i, j, text = heapq.heappop(heap)
        if not symbols[i] or not symbols[j] or symbols[i] + symbols[j] != text:
            continue  # one of the two has been merged with another neighbour meanwhile
        symbols[i], symbols[j], right[i] = text, "", right[j]
        if right[j] < len(symbols):
            left[right[j]] = i
        propose(left[i], i)
        propose(i, right[i])
    return [s for s in symbols if s]


class Tokenizer:
    """A SentencePiece model. An id is a position in `pieces`; bos_id, eos_id, pad_id, image_id are None if it has none.

    Pickles as the bytes of its file. Models that are no BPE, or change characters, work too, but without the definition."""

    def __init__(self, pieces: list[Piece], fields=()):
        self.pieces, self.fields = list(pieces), list(fields)  # fields: all of the file but the pieces
        self.ids = {p.text: i for i, p in enumerate(self.pieces)}
        trainer, normalizer = self.spec(2), self.spec(3)
        self.is_bpe = trainer.get(3, 1) == 2
        self.byte_fallback = bool(trainer.get(35, 0))
        self.unk_surface = trainer.get(44, " ⁇ ".encode()).decode()
        self.add_dummy_prefix, self.remove_extra_whitespaces = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
        self.charsmap = normalizer.get(2, b"")  # compiled normalisation rules; empty: identity
        self.unk_id = [p.type for p in self.pieces].index(UNKNOWN)
        self.bos_id, self.eos_id, self.pad_id, self.image_id = map(self.control_id, ("<s>", "</s>", "<pad>", "<image>"))
        self.scores = {p.text: p.score for p in self.pieces if p.type in (NORMAL, USER_DEFINED, UNUSED)}  # text can become
        self.user_defined = sorted((p.text for p in self.pieces if p.type == USER_DEFINED), key=len, reverse=True)
        self.has_reference = self.is_bpe and not self.charsmap and all(p.type != UNUSED for p in self.pieces)
        self.sp_processor = sentencepiece.SentencePieceProcessor(model_proto=self.to_bytes())

    def spec(self, number: int) -> dict[int, int | bytes]:
        return {n: v for f, _, value in self.fields if f == number for n, _, v in read_message(value)}

    def control_id(self, text: str) -> int | None:
        i = self.ids.get(text)
        return i if i is not None and self.pieces[i].type == CONTROL else None

    def to_bytes(self) -> bytes:
        return write_message([(1, 2, write_piece(p)) for p in self.pieces] + self.fields)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer") -> "Tokenizer":
        try:
            fields = read_message(data)
            pieces = [read_piece(value) for number, wire, value in fields if number == 1]
            return cls(pieces, [f for f in fields if f[0] != 1])
        except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, struct.error):
            raise ValueError(f"{name}: not a SentencePiece .model file, or a damaged one") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Raises OSError if the file can't be read, ValueError (one line) if it is not a .model."""
        with open(path, "rb") as f:
            return cls.from_bytes(f.read(), str(path))

    def save(self, path: str | os.PathLike) -> None:
        """Written beside and renamed, so that the file is never half there."""
        tmp = f"{path}.tmp"
        try:
            with open(tmp, "wb") as f:
                f.write(self.to_bytes())
            os.replace(tmp, path)
        finally:
            if os.path.exists(tmp):
                os.remove(tmp)

    def __reduce__(self):
        return Tokenizer.from_bytes, (self.to_bytes(),)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def piece(self, id: int) -> str:
        return self.pieces[id].text

    def id(self, piece: str) -> int:
        """KeyError if there is no such piece."""
        return self.ids[piece]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text never becomes a control piece: "<image>" in it is seven characters."""
        try:
            ids = self.sp_processor.encode(text)
        except (UnicodeEncodeError, RuntimeError):  # half a surrogate pair, as broken JSON has it
            ids = self.sp_processor.encode(re.sub("[\ud800-\udfff]", "\ufffd", text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_reference(self, text: str) -> list[int]:
        """What `encode` computes, from scratch."""
        if not self.has_reference:
            raise ValueError("only a BPE with the identity normaliser is defined here")
        if self.remove_extra_whitespaces:
            text = re.sub(" +", " ", text.strip(" "))
        if not text:
            return []
        text = (SPACE if self.add_dummy_prefix else "") + text.replace(" ", SPACE)
        if self.remove_extra_whitespaces:
            text = text.rstrip(SPACE)
        # User-defined pieces are cut out first, the longest at each place; they are the parts at odd positions.
        parts = re.split("(" + "|".join(map(re.escape, self.user_defined)) + ")", text) if self.user_defined else [text]
        ids = []
        for n, part in enumerate(parts):
            for piece in [part] if n % 2 else bpe(list(part), self.scores):
                if piece in self.scores:
                    ids.append(self.ids[piece])
                elif self.byte_fallback:
                    ids += [self.ids[BYTES[b]] for b in piece.encode()]
                elif not ids or ids[-1] != self.unk_id:  # a run of unknown characters is one unknown
                    ids.append(self.unk_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Control pieces vanish, bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()


class StreamDecoder:
    """Ids one at a time -> text as soon as it is certain. What push and flush return, joined, is `decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.bytes, self.started = tokenizer, b"", False

    def push(self, id: int) -> str:
        """The text that this token makes certain, "" while a character is incomplete. IndexError for an unknown id."""
        if not 0 <= id < self.tokenizer.vocab_size:
            raise IndexError(f"token id {id} is outside the vocabulary of {self.tokenizer.vocab_size}")
        piece = self.tokenizer.pieces[id]
        if piece.type == BYTE:
            self.bytes += bytes([int(piece.text[3:5], 16)])
            return self.complete()
        out = self.flush()
        if piece.type == CONTROL:
            return out
        text = self.tokenizer.unk_surface if piece.type == UNKNOWN else piece.text
        if not self.started and piece.type != UNKNOWN and (self.tokenizer.add_dummy_prefix or self.tokenizer.remove_extra_whitespaces):
            text = text.removeprefix(SPACE)  # the space that encoding put before the text
        self.started = bool(text) or not self.tokenizer.remove_extra_whitespaces
        return out + text.replace(SPACE, " ")

    def complete(self, final: bool = False) -> str:
        """Takes what is whole from the held-back bytes; what can no longer become a character is U+FFFD, one per byte."""
        out = ""
        while self.bytes:
            first = self.bytes[0]
            size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            try:
                out, self.bytes = out + self.bytes[:size].decode(), self.bytes[size:]
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and not final:
                    break
                out, self.bytes = out + "\ufffd", self.bytes[1:]
        self.started = self.started or bool(out)
        return out

    def flush(self) -> str:
        """The end of the text, or of a run of bytes: what is held back will not become whole any more."""
        return self.complete(final=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def script(char: str) -> str:
    """The writing system of a character, by its Unicode name: "HANGUL", "LATIN", ...; "COMMON" for what is not a letter."""
    name = unicodedata.name(char, "") if unicodedata.category(char)[0] in "LM" else ""
    first = re.split("[ -]", name)[0]
    if first in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC"):
        return "CJK"  # Japanese words mix the three
    return "COMMON" if first in ("", "VARIATION", "COMBINING", "MODIFIER") else first


def count_words(lines: Iterable[str]) -> Counter:
    """How often each word occurs; "" is a space that no word follows. In batches, so that memory grows with the words."""
    counts, lines = Counter(), filter(None, (line.rstrip("\r\n") for line in lines))
    while batch := list(islice(lines, 10_000)):
        counts.update(re.sub(f"[\r\n{SPACE}]", " ", " ".join(batch)).split(" "))
    return counts


def lay_out(words: Counter, character_coverage: float, split_digits: bool, split_scripts: bool):
    """-> alphabet (str, most frequent first), symbols (N,) int32, weights (N,) of their words. Empties `words`.

    All words in a row, one slot a character. Symbol 0 is a border that no piece crosses, symbol i + 1 is alphabet[i]."""
    codes = np.frombuffer((SPACE + SPACE.join(words)).encode("utf-32-le", "replace"), np.uint32)  # ▁ begins every word
    word_counts = np.fromiter(words.values(), np.int64, len(words))
    if word_counts.max() < 2**31:
        word_counts = word_counts.astype(np.int32)
    words.clear()
    starts_word = codes == ord(SPACE)
    weights = word_counts[np.cumsum(starts_word, dtype=np.int32) - 1]
    counts = np.zeros(0x110000)
    for i in range(0, len(codes), 1 << 20):
        counts += np.bincount(codes[i:i + (1 << 20)], weights[i:i + (1 << 20)], len(counts))
    found = np.flatnonzero(counts)
    found = found[np.lexsort((found, -counts[found]))]
    before = np.cumsum(counts[found]) - counts[found]
    found = found[(before < character_coverage * counts.sum()) & (found != 0)]
    alphabet = "".join(map(chr, found))
    symbol_of = np.zeros(len(counts), np.int32)
    symbol_of[found] = np.arange(1, len(found) + 1)
    symbols = symbol_of[codes]
    # Borders: before a word, where the script changes, around a digit.
    names = {name: i for i, name in enumerate(sorted({script(c) for c in alphabet}))}
    digit = len(names)
    kind_of = np.array([digit] + [digit if split_digits and c.isdecimal() else names[script(c)] if split_scripts else 0
                                  for c in alphabet], np.int16)
    kind = kind_of[symbols]
    border = starts_word.copy()
    border[1:] |= (kind[1:] != kind[:-1]) & ~starts_word[:-1] | (kind[1:] == digit)
    del codes, kind
    slots = np.ones(len(symbols) + np.count_nonzero(border) + 1, bool)  # False: a border
    slots[np.flatnonzero(border) + np.arange(len(slots) - 1 - len(symbols))] = slots[-1] = False
    spread = [np.zeros(len(slots), array.dtype) for array in (symbols, weights)]
    spread[0][slots], spread[1][slots] = symbols, weights
    return alphabet, *spread


def learn_merges(alphabet: str, starts: np.ndarray, weights: np.ndarray, n_pieces: int, max_piece_length: int,
                 progress: bool = False) -> list[str]:
    """The first n_pieces merges in order, fewer if the text has no more pairs. Overwrites `starts`.

    The heap holds (-count, length, piece, serial, (slots, a, b)) for a pair of symbols a, b, and, with length 0, many pairs
    at once. It yields the highest count first, then the shorter piece, then the first by code points."""
    text = ["", *alphabet]  # of each symbol
    size = np.ones(len(text) + min(n_pieces, len(starts)), np.int32)  # its characters = its slots
    ends = starts.copy()  # starts[i]: the symbol that begins at slot i, -1 inside one; ends[i]: the symbol that ends there
    heap, taken, pieces, serial = [], set(text), [], count(1)

    def add_pairs(keys, at):
        """Pairs are born: one begins at each slot `at`, equal keys are equal pairs. One heap entry holds them all, the most
        frequent first, because most pairs never come up."""
        if len(at) == 0:
            return
        keys = keys.astype(np.uint64)  # key and slot in one number, so that one sort groups the pairs, slots ascending
        keys <<= np.uint64(32)
        keys |= at.astype(np.uint64)
        keys.sort()
        at = keys.astype(np.uint32).astype(np.int32)
        keys >>= np.uint64(32)
        first = np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)
        last = np.append(first[1:], len(at))
        counts = np.add.reduceat(weights[at], first, dtype=np.int64)
        order = np.argsort(-counts, kind="stable")
        first, last, counts = first[order], last[order], counts[order]
        a = starts[at[first]]
        b = starts[at[first] + size[a]]
        heapq.heappush(heap, (-int(counts[0]), 0, "", next(serial), (at, first, last, counts, a, b)))

    at = np.flatnonzero((starts[:-1] > 0) & (starts[1:] > 0)).astype(np.int32)
    keys = starts[at].astype(np.uint64) * np.uint64(len(text))
    keys += starts[at + 1].astype(np.uint64)
    if max_piece_length > 1:
        add_pairs(keys, at)
    del at, keys

    bar = tqdm(total=n_pieces, desc="merges", unit="", disable=not progress)
    while heap and len(pieces) < n_pieces:
        minus, length, piece, _, pair = heapq.heappop(heap)
        if length == 0:  # many pairs in one entry: those with the highest count become entries of their own
            at, first, last, counts, a, b = pair
            k = int(np.searchsorted(-counts, minus, "right"))
            for i in range(k):
                piece = text[a[i]] + text[b[i]]
                entry = at[first[i]:last[i]], int(a[i]), int(b[i])
                heapq.heappush(heap, (minus, len(piece), piece, next(serial), entry))
            if k < len(counts):
                heapq.heappush(heap, (-int(counts[k]), 0, "", next(serial), (at, *(x[k:] for x in pair[1:]))))
            continue
        if piece in taken:
            continue  # (c, c) is born twice below. No piece has two spellings: inside it, merges always run the same way
        at, a, b = pair
        size_a = int(size[a])
        at = at[(starts[at] == a) & (starts[at + size_a] == b)]
        places = leftmost(at, size_a) if a == b else at
        now = int(weights[places].sum(dtype=np.int64))
        if now < -minus:  # outdated; back with the true count
            if now:
                heapq.heappush(heap, (-now, length, piece, next(serial), (at, a, b)))
            continue
        c = len(text)
        text.append(piece), taken.add(piece), pieces.append(piece)
        size[c] = length
        starts[places], starts[places + size_a], ends[places + length - 1] = c, -1, c
        before, after = ends[places - 1], starts[places + length]
        fits = (before > 0) & (size[before] + length <= max_piece_length)
        add_pairs(before[fits], places[fits] - size[before[fits]])
        fits = (after > 0) & (size[after] + length <= max_piece_length)
        add_pairs(after[fits], places[fits])
        bar.update()
    bar.close()
    return pieces


def leftmost(at: np.ndarray, size: int) -> np.ndarray:
    """Of overlapping places (the two "aa" in "aaa") every second one, from the left. `at` is sorted."""
    index = np.arange(len(at))
    run = np.maximum.accumulate(np.where(np.diff(at, prepend=-size - 1) != size, index, 0))
    return at[(index - run) % 2 == 0]


def train(lines: Iterable[str], vocab_size: int, *, character_coverage: float = 1.0, max_piece_length: int = 16,
          split_digits: bool = True, split_scripts: bool = True, byte_fallback: bool = True,
          progress: bool = False) -> Tokenizer:
    """Lines of text -> a BPE with vocab_size pieces: <unk> <s> </s>, 256 bytes, merges, characters.

    character_coverage: the share of the text whose characters become pieces; the rarest are left to the bytes.
    ValueError if the text is empty, has too few pairs, or its alphabet alone is more than vocab_size."""
    if not 0 < character_coverage <= 1 or max_piece_length < 1:
        raise ValueError(f"character coverage {character_coverage} must be in (0, 1], "
                         f"maximum piece length {max_piece_length} at least 1")
    words = count_words(lines)
    if not any(words):
        raise ValueError("no text to train on")
    alphabet, symbols, weights = lay_out(words, character_coverage, split_digits, split_scripts)
    del words
    special = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    special += [Piece(b, 0.0, BYTE) for b in BYTES if byte_fallback]
    n_merges = vocab_size - len(special) - len(alphabet)
    if n_merges < 0 or len(alphabet) > 60_000:  # two symbols of the alphabet fill one 32-bit key
        raise ValueError(f"a vocabulary of {vocab_size} is too small for {len(special)} special pieces and the "
                         f"{len(alphabet)} characters of the text: ask for more, or lower the character coverage")
    merges = learn_merges(alphabet, symbols, weights, n_merges, max_piece_length, progress)
    if len(merges) < n_merges:
        raise ValueError(f"the text has pairs for {vocab_size - n_merges + len(merges)} pieces, not for {vocab_size}: "
                         "ask for fewer, or give more text")
    pieces = special + [Piece(text, -float(rank)) for rank, text in enumerate([*merges, *alphabet])]
    trainer = [(3, 0, 2), (4, 0, vocab_size), (10, 5, struct.pack("<f", character_coverage)), (20, 0, max_piece_length),
               (21, 0, int(split_scripts)), (25, 0, int(split_digits)), (35, 0, int(byte_fallback))]
    normalizer = [(1, 2, b"identity"), (3, 0, 1), (4, 0, 0), (5, 0, 1)]  # dummy prefix, keep spaces, space as ▁
    return Tokenizer(pieces, [(2, 2, write_message(trainer)), (3, 2, write_message(normalizer))])


# ---------------------------------------------------------------------------------------------------------------------
# Merging

def is_foreign(piece: str) -> bool:
    """Has a letter or mark outside ASCII, an emoji or a full-width sign, so that plain English can't contain it ("“", "©" and "…" it can)."""
    return any(c > "\x7f" and unicodedata.category(c)[0] in "LM" or c >= "\u2600" and unicodedata.category(c) == "So"
               or unicodedata.east_asian_width(c) in "WF" for c in piece)


def unreachable(tokenizer: Tokenizer) -> list[str]:
    """The pieces that no text can produce: exactly those, see the top of the file."""
    return [p.text for p in tokenizer.pieces if p.type == NORMAL and (
        blocked(p.text, tokenizer) or len(bpe(list(p.text), tokenizer.scores)) > 1)]


def blocked(piece: str, tokenizer: Tokenizer) -> bool:
    """No merges can make it: spaces become "▁" before, and user-defined pieces are cut out before."""
    return " " in piece or any(w in piece for w in tokenizer.user_defined)


def select_pieces(base: Tokenizer, new: Tokenizer | Iterable[str], *, dead: str = "drop", foreign_only: bool = True,
                  same_normalizer: bool = True) -> tuple[list[str], list[str]]:
    """-> (pieces to append to `base`, in order; pieces of `new` that would be dead there). Options as in `merge`.

    A piece can be reached if and only if the other pieces leave at most two symbols of it, and what is appended later, with
    lower scores, can't change that. Passes repeat as long as they add something, because a piece may need a later one."""
    if dead not in ("drop", "repair", "keep"):
        raise ValueError(f'dead is "drop", "repair" or "keep", not {dead!r}')
    if isinstance(new, Tokenizer):
        ours, theirs = [(t.charsmap, t.remove_extra_whitespaces, t.add_dummy_prefix) for t in (base, new)]
        if same_normalizer and ours != theirs:
            names = " and ".join(t.spec(3).get(1, b"unnamed").decode() for t in (base, new))
            raise ValueError(f"the models normalise text differently, {names}, so that some new pieces may never match; "
                             "--no-same-normalizer merges them all the same")
        new = [p.text for p in new.pieces if p.type in (NORMAL, USER_DEFINED)]
    waiting = [t for t in dict.fromkeys(new) if t and t not in base.ids and (is_foreign(t) or not foreign_only)]
    if dead == "keep":
        return waiting, []
    hopeless = [t for t in waiting if blocked(t, base)]
    waiting = [t for t in waiting if not blocked(t, base)]
    scores, falling, added = dict(base.scores), scores_below(base), []

    def append(text):
        added.append(text)
        scores[text] = next(falling)

    n = -1
    while n != len(added):
        n, retry = len(added), []
        for text in waiting:
            (append if len(bpe(list(text), scores)) <= 2 else retry.append)(text)
        waiting = retry
    for text in waiting if dead == "repair" else []:
        while text not in scores:  # join its first two symbols until one is left, which is the piece
            symbols = bpe(list(text), scores)
            append(symbols[0] + symbols[1])
    return added, waiting + hopeless


def scores_below(tokenizer: Tokenizer) -> Iterator[float]:
    """Falling scores for new pieces, below those of all base pieces that merge anything but spaces: Llama-2 has its runs of
    spaces at -1e9, so that "   cat" is "▁▁", "▁cat", and new words shall win over them too."""
    score = np.float32(min((s for text, s in tokenizer.scores.items() if len(text) > 1 and text.strip(SPACE)), default=0.0))
    while True:  # one less, or where float32 can't tell that apart, the next number
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        yield float(score)


def merge_vocabularies(base: Tokenizer, new: Tokenizer | Iterable[str], *, dead: str = "drop", foreign_only: bool = True,
          same_normalizer: bool = True, control: Iterable[str] = ("<image>", "<pad>")) -> Tokenizer:
    """Append the pieces of `new` (a model, or strings, "▁" for a space) to a BPE, then control pieces. Base ids stay.

    dead: what becomes of pieces that no chain of merges leads to: "drop" leaves them out, "repair" adds the pieces on the
    way to them, "keep" appends them as they are. foreign_only: take only pieces that plain English can't contain, so that
    English keeps its ids. same_normalizer: ValueError if the two models normalise text differently."""
    if not base.is_bpe:
        raise ValueError("the base model is not a BPE")
    if wrong := [t for t in control if t in base.scores]:
        raise ValueError(f"{wrong[0]} is an ordinary piece of the base model: typed text would become it")
    added, _ = select_pieces(base, new, dead=dead, foreign_only=foreign_only, same_normalizer=same_normalizer)
    pieces = base.pieces + [Piece(text, score) for text, score in zip(added, scores_below(base))]
    pieces += [Piece(text, 0.0, CONTROL) for text in control if text not in base.ids]
    return Tokenizer(pieces, base.fields)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it

def measure(tokenizer: Tokenizer, lines: Iterable[str]) -> dict:
    """Counts over a text: tokens, characters, words, bytes, byte_tokens, unknown (characters without a piece), pieces."""
    pieces, n = Counter(), Counter()
    for line in lines:
        line = line.rstrip("\r\n")
        pieces.update(tokenizer.sp_processor.encode(line, out_type=str))
        n.update(characters=len(line), words=len(line.split()), bytes=len(line.encode(errors="replace")))
    for text, k in pieces.items():
        type = tokenizer.pieces[tokenizer.ids[text]].type if text in tokenizer.ids else UNKNOWN  # text: what was unknown
        n.update(tokens=k, byte_tokens=k * (type == BYTE))
        first_byte = type == BYTE and int(text[3:5], 16) & 0xC0 != 0x80
        n.update(unknown=k * (len(text) if type == UNKNOWN else first_byte))
    return dict(n, pieces=pieces)


def report(models: dict[str, Tokenizer], texts: dict[str, str]) -> None:
    """Prints what each model spends on each text file, and what became of the pieces that the first model has not."""
    print(f"{'text':12} {'model':28} {'tokens':>9} {'/character':>10} {'/word':>7} {'/byte':>7} {'bytes':>7} {'unknown':>8}")
    used = {name: set() for name in models}
    for label, path in texts.items():
        for name, tokenizer in models.items():
            n = Counter(measure(tokenizer, read_lines([path])))
            used[name].update(n["pieces"])
            per = [n["tokens"] / max(1, n[unit]) for unit in ("characters", "words", "bytes")]
            shares = n["byte_tokens"] / max(1, n["tokens"]), n["unknown"] / max(1, n["characters"])
            print(f"{label[-12:]:12} {name[-28:]:28} {n['tokens']:9,} {per[0]:10.3f} {per[1]:7.2f} {per[2]:7.3f} "
                  f"{shares[0]:7.1%} {shares[1]:8.2%}")
    first, *others = models
    for name in others:
        new = [p.text for p in models[name].pieces if p.type == NORMAL and p.text not in models[first].ids]
        idle = [t for t in new if t not in used[name]]
        dead = unreachable(models[name]) if models[name].is_bpe else []
        print(f"\n{name}: {len(new):,} new pieces, {len(dead)} unreachable {' '.join(dead[:10])}")
        print(f"  longest: {' '.join(sorted(new, key=len, reverse=True)[:8])}")
        print(f"  never used in these texts: {len(idle):,} {' '.join(idle[:12])}")


def show(tokenizer: Tokenizer, text: str) -> str:
    """The pieces of a text, coloured on a terminal, between bars elsewhere."""
    pieces = [tokenizer.piece(i) for i in tokenizer.encode(text)]
    if not sys.stdout.isatty():
        return f"{len(pieces):4} | " + " | ".join(pieces)
    return f"{len(pieces):4}  " + "".join(f"\033[30;4{2 + i % 5}m{piece}\033[0m" for i, piece in enumerate(pieces))


PEERS = {"sentencepiece": """import sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=file, model_prefix=out, vocab_size=size, model_type="bpe", character_coverage=0.9995, split_digits=True,
    byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1)""",
         "tokenizers": """from tokenizers import Tokenizer, models, pre_tokenizers as pre, trainers
tokenizer = Tokenizer(models.BPE(byte_fallback=True))
tokenizer.pre_tokenizer = pre.Sequence([pre.Metaspace(), pre.Digits(individual_digits=True)])
tokenizer.train([file], trainers.BpeTrainer(vocab_size=size, max_token_length=16, show_progress=False))"""}


def bench(file: str, vocab_size: int) -> None:
    """Trains on the same text here and with the libraries that are installed: one thread each, one after the other."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", RAYON_NUM_THREADS="1")
    print(f"{os.path.getsize(file) / 1e6:.1f} MB of text, {vocab_size:,} pieces")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "bench")
        commands = {"tokenizer.py": [__file__, "train", file, "--vocab-size", str(vocab_size), "-o", out]}
        settings = f"file, size, out = {file!r}, {vocab_size}, {out!r}\n"
        commands |= {name: ["-c", settings + code] for name, code in PEERS.items()}
        for name, command in commands.items():
            if name in PEERS and importlib.util.find_spec(name) is None:
                print(f"{name:14} not installed, skipped")
                continue
            process = subprocess.Popen([sys.executable, *command], env=environment, stdout=-3, stderr=-3)
            _, status, usage = os.wait4(process.pid, 0)
            memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
            print(f"{name:14} {usage.ru_utime + usage.ru_stime:6.1f} CPU-seconds, {memory:5.0f} MB at most"
                  + ", FAILED" * (status != 0))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def read_lines(paths: Iterable[str]):
    """Lines of UTF-8 text files. ValueError names the file and the line that is not UTF-8."""
    for path in paths:
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {n}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None


def run_train(args) -> None:
    if not os.path.isdir(os.path.dirname(args.out) or "."):  # said now, not after an hour of training
        raise ValueError(f"{args.out}: the folder does not exist")
    options = {k: v for k, v in vars(args).items() if k not in ("command", "files", "vocab_size", "out")}
    tokenizer = train(read_lines(args.files), args.vocab_size, progress=sys.stderr.isatty(), **options)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} pieces")


def run_merge(args) -> None:
    base = merged = Tokenizer.load(args.base)
    for path in args.new:
        new = Tokenizer.load(path) if path.endswith(".model") else [
            line.strip().replace(" ", SPACE) for line in read_lines([path])]
        added, dead = select_pieces(merged, new, dead=args.dead, foreign_only=args.foreign_only,
                                    same_normalizer=args.same_normalizer)
        merged = merge_vocabularies(merged, added, dead="keep", foreign_only=False, control=())
        print(f"{path}: {len(added):,} new pieces, {len(dead)} dead ones "
              f"{'made reachable' if args.dead == 'repair' else 'left out'} {' '.join(dead)}")
    added = merged.vocab_size - base.vocab_size
    merged = merge_vocabularies(merged, [], control=args.control)
    merged.save(args.out)
    never = unreachable(merged)
    print(f"{args.out}: {merged.vocab_size:,} pieces = {base.vocab_size:,} + {added:,} new + "
          f"{merged.vocab_size - base.vocab_size - added} control; {len(never)} unreachable {' '.join(never)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    flag = argparse.BooleanOptionalAction

    p = commands.add_parser("train", help="learn a vocabulary from text files, one document a line")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--vocab-size", type=int, required=True, help="all pieces: special ones, bytes, characters, merges")
    p.add_argument("-o", "--out", required=True)
    p.add_argument("--character-coverage", type=float, default=0.9995, help="the rest of the text is left to the bytes")
    p.add_argument("--max-piece-length", type=int, default=16, help="in characters, ▁ included")
    p.add_argument("--split-digits", action=flag, default=True, help="each digit is a piece of its own")
    p.add_argument("--split-scripts", action=flag, default=True, help="no piece mixes letters with signs, Hangul with Latin")
    p.add_argument("--byte-fallback", action=flag, default=True, help="characters without a piece become their UTF-8 bytes")

    p = commands.add_parser("merge", help="append other models' pieces, or lists of words, one a line")
    p.add_argument("base", metavar="BASE.model")
    p.add_argument("new", nargs="*", metavar="NEW", help="a .model, or a text file; there ▁ marks the beginning of a word")
    p.add_argument("-o", "--out", required=True)
    p.add_argument("--dead", choices=("drop", "repair", "keep"), default="drop", help="pieces that no merges lead to")
    p.add_argument("--foreign-only", action=flag, default=True, help="no piece that plain English could contain")
    p.add_argument("--same-normalizer", action=flag, default=True, help="refuse a model that normalises differently")
    p.add_argument("--control", nargs="*", default=["<image>", "<pad>"], help="control pieces, appended last")

    p = commands.add_parser("report", help="tokens per character, word and byte, models side by side")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--text", nargs="+", required=True, metavar="[LABEL=]FILE")

    p = commands.add_parser("show", help="print the pieces of a text")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("text")

    p = commands.add_parser("bench", help="time and memory of training, against the libraries")
    p.add_argument("file")
    p.add_argument("--vocab-size", type=int, default=8000)

    args = parser.parse_args()
    try:
        if args.command == "train":
            run_train(args)
        elif args.command == "merge":
            run_merge(args)
        elif args.command == "bench":
            bench(args.file, args.vocab_size)
        elif args.command == "show":
            for path in args.models:
                print(f"{path[-28:]:28} {show(Tokenizer.load(path), args.text)}")
        else:
            texts = dict(t.split("=", 1) if "=" in t else (os.path.basename(t), t) for t in args.text)
            report({path: Tokenizer.load(path) for path in args.models}, texts)
    except KeyboardInterrupt:
        print("tokenizer.py: interrupted, nothing written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"tokenizer.py: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
