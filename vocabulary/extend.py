"""New pieces for a new language: go on merging where the base's vocabulary stopped.

Pipeline: called by `python tokenizer.py extend`, for SentencePiece and for byte-level vocabularies.
Source: X-LLaVA (arXiv 2403.11399, §3.1) appends a vocabulary of the new language. To continue the
base's own merges instead is from arXiv 2512.03989.

Of a vocabulary that was trained apart and then appended, no text can produce some pieces: the
base's merges come first, and leave other symbols than the new merges expect. So we first encode the
new language's text with the base, and learn merges from there. They rank below the base's: a word
is merged as far as the base does it, and then further.

    base "햄버거" -> 햄 버 거      learned: 버 거 -> 버거, 햄 버거 -> 햄버거      now -> 햄버거

Each new piece holds a letter of the new language, so text without one keeps its ids.
"""

import argparse
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from vocabulary import flags
from vocabulary.byte_level import ByteLevelTokenizer, to_bytes
from vocabulary.fast_bpe import bpe, count_words, learn_merges
from vocabulary.files import claim_output, read_lines
from vocabulary.scripts import is_foreign, is_latin, split_word
from vocabulary.sentencepiece_file import NORMAL, SPACE

MAX_SYMBOLS = 60_000  # learn_merges puts two of them in 32 bits


def learn_pieces(
    base,
    lines: Iterable[str],
    n_pieces: int,
    *,
    character_coverage: float = 0.9995,
    max_piece_length: int = 16,
    foreign_only: bool = True,
    progress: bool = False,
) -> list[str]:
    """n_pieces that continue the merges of `base`, to be appended below its own in this order.

    base: a ByteLevelTokenizer, or tokenizer.py's Tokenizer. character_coverage: for the latter, the
    share of the text whose characters become pieces first; the others are left to the bytes.
    max_piece_length: in characters. foreign_only: only pieces that plain English can't contain.
    ValueError if the base is no BPE that we compute, or the text has too few pairs.
    """
    if not isinstance(base, ByteLevelTokenizer) and not base.has_reference:
        raise ValueError("only a BPE with the identity normaliser can be extended")
    words = base_words(base, lines)
    characters = missing_characters(base, words, character_coverage)
    if foreign_only:
        words = {word: n for word, n in words.items() if is_new(base, word)}
        characters = [char for char in characters if is_foreign(char)]
    n_merges = n_pieces - len(characters)
    if n_merges < 0:
        raise ValueError(
            f"{n_pieces} pieces are too few for the {len(characters)} new characters of the text: "
            "ask for more, or lower the character coverage"
        )

    # A piece is accepted if the merges above it leave two symbols of it: their merge is the piece.
    # Later merges rank lower and can't change that, so every accepted piece is reachable.
    taken, scores, next_scores = {*base.ids, *characters}, dict(base.scores), scores_below(base)

    def accept(piece: str) -> bool:
        if piece in taken or foreign_only and not is_new(base, piece):
            return False
        if count_characters(base, piece) > max_piece_length or not fits_in_a_word(base, piece):
            return False
        symbols = bpe(piece, scores, base.separator)
        if len(symbols) == 2:
            taken.add(piece)
            scores[base.separator.join(symbols)] = next(next_scores)
        return len(symbols) == 2

    arrays = build_base_symbols(base, words, characters)
    longest = max_piece_length * (4 if isinstance(base, ByteLevelTokenizer) else 1)  # in letters
    merges = learn_merges(*arrays, n_merges, longest, progress, accept)
    if len(merges) < n_merges:
        most, advice = len(characters) + len(merges), "ask for fewer, or give more text"
        raise ValueError(f"the text has pairs for {most} new pieces, not for {n_pieces}: {advice}")
    return characters + merges


def build_base_symbols(
    base, words: dict[str, int], characters: list[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The words as the base's symbols -> alphabet, symbols (N,), weights (N,) for learn_merges.

    Symbol i + 1 is alphabet[i]. Symbol 0, a border, is between words, and what is no piece.
    """
    usable = {piece.text for piece in base.pieces if piece.type == NORMAL} | {*characters}
    numbers, symbols, weights = {}, array("i", [0]), array("q", [0])
    for word, n in words.items():
        pieces = [piece if piece in usable else "" for piece in split_by_base(base, word)]
        symbols.extend(numbers.setdefault(x, len(numbers) + 1) if x else 0 for x in pieces)
        symbols.append(0)
        weights.extend([n] * (len(pieces) + 1))
    if len(numbers) > MAX_SYMBOLS:
        raise ValueError(f"the text has {len(numbers):,} of the base's pieces: give less text")
    return list(numbers), np.array(symbols, np.int32), np.array(weights)


def scores_below(base) -> Iterator[float]:
    """Falling scores for new pieces, below all base pieces but runs of spaces.

    Llama-2 has those at -1e9, so that "  cat" is "▁▁", "▁cat". New words must rank above them.
    """
    merged = [s for text, s in base.scores.items() if len(text) > 1 and text.strip(SPACE)]
    score = np.float32(min(merged, default=0.0))
    while True:  # one less, or where float32 can't tell that apart, the next number
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        yield float(score)


# ------------------------------------------------------------------- what differs between the kinds


def base_words(base, lines: Iterable[str]) -> Counter:
    """{word: count}: no merge of the base crosses their borders."""
    if isinstance(base, ByteLevelTokenizer):
        return base.count_words(lines)
    return Counter({SPACE + word: n for word, n in count_words(lines).items()})


def split_by_base(base, word: str) -> list[str]:
    """The symbols that the base's merges leave of a word."""
    if isinstance(base, ByteLevelTokenizer):
        return base.split_word(word)
    return bpe(word, base.scores)


def missing_characters(base, words: Counter, character_coverage: float) -> list[str]:
    """The characters that a SentencePiece base lacks, the most frequent first, among those that
    make up this share of the text. A byte-level base lacks none."""
    if isinstance(base, ByteLevelTokenizer):
        return []
    counts = Counter()
    for word, n in words.items():
        for char in word:
            counts[char] += n

    covered, total, found = 0, counts.total(), []
    for char, n in sorted(counts.items(), key=count_then_code):
        if covered >= character_coverage * total:
            break
        covered += n
        if char not in base.ids:
            found.append(char)
    return found


def count_then_code(item: tuple[str, int]) -> tuple[int, str]:
    """Sort key of {character: count}: the most frequent first, among equals by code point."""
    char, n = item
    return -n, char


def count_characters(base, piece: str) -> int:
    """Characters that begin in the piece."""
    if not isinstance(base, ByteLevelTokenizer):
        return len(piece)
    return sum(byte & 0xC0 != 0x80 for byte in to_bytes(piece))


def fits_in_a_word(base, piece: str) -> bool:
    """Whether text is never cut inside the piece before it is merged."""
    if not isinstance(base, ByteLevelTokenizer):
        blocked = " " in piece or any(text in piece for text in base.user_defined)
        return not blocked and len(split_word(piece)) == 1

    # A piece from the middle of a character could be a part of any language's.
    if to_bytes(piece)[0] & 0xC0 == 0x80:
        return False
    try:
        text = to_bytes(piece).decode()
    except UnicodeDecodeError:  # it ends inside a character
        return True
    return base.split_words(text) == [text]


def is_new(base, piece: str) -> bool:
    """Whether plain English can't contain the piece (see `is_foreign`)."""
    if not isinstance(base, ByteLevelTokenizer):
        return is_foreign(piece)
    raw = to_bytes(piece)
    text = raw.decode(errors="ignore")
    return is_foreign(text) or begins_foreign(raw[len(text.encode()) :])


@cache
def begins_foreign(raw: bytes) -> bool:
    """Whether all characters whose UTF-8 begins with these bytes, but has more, are foreign.

    0xEA 0xB0 begins "가" … "갿". 0xE2 0x80 begins "“", so it may be English.
    """
    if not raw or raw[0] < 0xC2:
        return False
    length = 2 + (raw[0] >= 0xE0) + (raw[0] >= 0xF0)
    code = raw[0] & (0x7F >> length)
    for byte in raw[1:]:
        code = code << 6 | byte & 0x3F

    rest = 6 * (length - len(raw))
    chars = map(chr, range(code << rest, min(code + 1 << rest, 0x110000)))
    assigned = [char for char in chars if unicodedata.category(char) not in ("Cn", "Cs", "Co")]
    return bool(assigned) and all(map(is_foreign, assigned))


# ------------------------------------------------------------------------------------ command line
def add_extend_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    base = "a .model, a tokenizer.json, or the folder of one"
    add("base", type=flags.path, metavar="BASE", help=base)
    text = "UTF-8 text of the new language"
    add("files", nargs="+", type=flags.file, metavar="TEXT", help=text)
    add("--pieces", type=flags.count, required=True, help="how many to append")
    out = "like BASE: a .model, or a folder for a tokenizer.json"
    add("-o", "--out", type=flags.text, required=True, help=out)
    coverage = "for SentencePiece: the share of the text's characters that become pieces"
    add("--character-coverage", type=flags.share, default=0.9995, help=coverage)
    add("--max-piece-length", type=flags.count, default=16, help="in characters")
    foreign = "no piece that plain English could contain"
    add("--foreign-only", action=argparse.BooleanOptionalAction, default=True, help=foreign)
    control = {"nargs": "*", "type": flags.text, "default": ["<image>", "<pad>"]}
    add("--control", **control, help="control pieces, appended last")


def run_extend(base, args: argparse.Namespace, append: Callable, find_unreachable: Callable):
    """append, find_unreachable: tokenizer.py's merge_vocabularies and find_unreachable."""
    out = claim_tokenizer(base, args.out, [args.base, *args.files])
    pieces = learn_pieces(
        base,
        read_lines(args.files),
        args.pieces,
        character_coverage=args.character_coverage,
        max_piece_length=args.max_piece_length,
        foreign_only=args.foreign_only,
        progress=sys.stderr.isatty(),
    )
    longer = append(base, pieces, args.control, unreachable="keep", foreign_only=False)
    save_and_count(base, longer, out, len(pieces), find_unreachable(longer))


def run_byte_level_merge(base: ByteLevelTokenizer, args: argparse.Namespace) -> None:
    """`python tokenizer.py merge` for tokenizer.json files."""
    out = claim_tokenizer(base, args.out, [args.base, *args.new])
    if args.unreachable == "repair":
        raise ValueError(
            "--unreachable repair is for SentencePiece; here, extend reaches all pieces"
        )
    longer = base = base.with_roles(args.bos, args.eos)
    for path in args.new:
        if not (Path(path).is_dir() or path.endswith(".json")):
            raise ValueError(
                f"{path}: a byte-level base takes pieces and merges from a tokenizer.json only; "
                f"`tokenizer.py extend {args.base} TEXT` learns them from a text"
            )
        other = ByteLevelTokenizer.load(path)
        pieces = [p.text for p in other.pieces if p.type == NORMAL and p.text not in longer.ids]
        foreign_only = args.foreign_only
        if foreign_only is None:
            foreign_only = not is_latin(map(other.readable, pieces))
        if foreign_only:
            pieces = [text for text in pieces if is_new(base, text)]
        if args.unreachable == "drop":
            lost = {*longer.with_vocabulary(other, pieces).find_unreachable()}
            print(f"{path}: {len(lost & {*pieces}):,} unreachable pieces left out")
            pieces = [text for text in pieces if text not in lost]
        longer = longer.with_vocabulary(other, pieces)
    n_new, longer = longer.vocab_size - base.vocab_size, longer.with_control(args.control)
    save_and_count(base, longer, out, n_new, longer.find_unreachable())


def claim_tokenizer(base, out: str, inputs: list[str]) -> Path:
    """The file to write: OUT, or for a byte-level base OUT/tokenizer.json."""
    path = Path(out)
    if isinstance(base, ByteLevelTokenizer) and path.suffix != ".json":
        path /= base.FILE_NAME
    inputs = [Path(source) for source in inputs]
    inputs += [source / base.FILE_NAME for source in inputs if source.is_dir()]
    claim_output(path, base.load, [source for source in inputs if source.is_file()])
    return path


def save_and_count(base, longer, out: Path, n_new: int, unreachable: list[str]) -> None:
    """Save a longer vocabulary, and print what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    longer.save(out)
    n_control = longer.vocab_size - base.vocab_size - n_new
    counts = f"{base.vocab_size:,} + {n_new:,} new + {n_control} control"
    lost = [text for text in unreachable if text not in base.ids]
    print(
        f"{out}: {longer.vocab_size:,} pieces = {counts}; "
        f"{len(lost)} of the new unreachable {' '.join(map(longer.readable, lost[:20]))}"
    )
