"""What a tokenizer makes of a text: fertility in numbers, the pieces in colours.

Pipeline: called by `python tokenizer.py report` and `show`.
Fertility is the number of tokens that a word (or a character, or a byte) costs.
"""

from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from vocabulary import flags
from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.command import first_few, use_colour
from vocabulary.files import read_lines
from vocabulary.sentencepiece_file import BYTE, NORMAL, UNKNOWN

# Why tokenizer.select_pieces leaves a piece out.
REASONS = {
    "special": "left out that stand for control, bytes or unknown text",
    "known": "there already",
    "english": "left out that plain English could contain (--no-foreign-only takes them)",
    "blocked": "left out with a space or a user-defined piece inside",
    "unreachable": "left out that no merges lead to (--unreachable repair adds what they need)",
}


def labelled_path(text: str) -> tuple[str, str]:
    """ "ko=out/ko.txt" -> ("ko", "out/ko.txt"), "out/ko.txt" -> ("ko.txt", "out/ko.txt")."""
    label, equals, path = text.partition("=")
    path = flags.file(path if equals else text)
    return label if equals else Path(path).name, path


def text_to_show(text: str) -> str:
    """An argparse type: a text to show, not the last of the models with the text forgotten."""
    if text.endswith(".model") and Path(text).is_file():
        raise ArgumentTypeError(f"{text} is a model; the text comes last, in quotes")
    return text


def print_selection(path: str, added: list[str], left_out: dict[str, list], unreachable: str):
    """Print how many pieces of a file are added, and the others by reason: see `select_pieces`."""
    print(f"{path}: {len(added):,} new pieces")
    for reason, names in left_out.items():
        repaired = reason == "unreachable" and unreachable == "repair"
        fate = "made reachable" if repaired else REASONS[reason]
        if names:
            print(f"  {len(names):,} {fate}: {first_few(names)}")


def print_changes(base, merged, path: str | None) -> None:
    """Print how many words of a text, if one is given, have other ids after the merge."""
    if path is None:
        return
    words = Counter(word for line in read_lines([path]) for word in line.split())
    changed = {word: n for word, n in words.items() if base.encode(word) != merged.encode(word)}
    share = sum(changed.values()) / max(1, words.total())
    often = first_few(sorted(changed, key=changed.get, reverse=True))
    print(f"{path}: {share:.1%} of the words have other ids than before: {often}")


def fertility_counts(tokenizer, lines: Iterable[str]) -> tuple[Counter, Counter]:
    """(counts over a text, how often each piece came). The counts:

    tokens, characters, words, bytes, without the ends of lines; byte_tokens: pieces of type BYTE,
    and in a byte-level vocabulary tokens that end inside a character; unknown: characters that no
    other token holds whole.
    """
    pieces, counts = Counter(), Counter()
    for line in lines:
        line = line.rstrip("\r\n")
        if isinstance(tokenizer, ByteLevelTokenizer):
            pieces.update(map(tokenizer.piece, tokenizer.encode(line)))
        else:
            pieces.update(tokenizer.sp_processor.encode(line, out_type=str))
        counts["characters"] += len(line)
        counts["words"] += len(line.split())
        counts["bytes"] += len(line.encode(errors="replace"))

    # By the type of a piece. The package returns unknown characters as they are: not in `ids`.
    for text, n in pieces.items():
        counts["tokens"] += n
        piece_id = tokenizer.ids.get(text)
        piece_type = UNKNOWN if piece_id is None else tokenizer.pieces[piece_id].type
        raw = b"" if piece_id is None else tokenizer.raw_bytes(piece_id) or b""
        whole = raw.decode(errors="ignore")  # its complete characters
        # A character of UTF-8 has one byte that is not 10xxxxxx: its first.
        first_bytes = sum(byte & 0xC0 != 0x80 for byte in raw)
        if piece_type == UNKNOWN:
            counts["unknown"] += n * len(text)
        elif piece_type == BYTE:
            counts["byte_tokens"] += n
            counts["unknown"] += n * first_bytes
        elif whole.encode() != raw:
            counts["byte_tokens"] += n
            counts["unknown"] += n * (first_bytes - len(whole))
    return counts, pieces


def print_report(models: dict, texts: dict[str, str], unreachable: Callable) -> None:
    """Print what each model spends on each text file, and whether the texts use the new pieces.

    models: name -> Tokenizer; new pieces are those that the first one lacks. texts: label -> path.
    unreachable: `tokenizer.find_unreachable`.
    """
    head = ("tokens", "/character", "/word", "/byte", "bytes", "unknown")
    used = {name: set() for name in models}
    for label, path in texts.items():
        print("{:27} {:>9} {:>10} {:>7} {:>7} {:>7} {:>7}".format(label[-27:], *head))
        for name, tokenizer in models.items():
            counts, pieces = fertility_counts(tokenizer, read_lines([path]))
            used[name].update(pieces)
            tokens = counts["tokens"]
            line = f"{name[-27:]:27} {tokens:9,}"
            line += f" {tokens / max(1, counts['characters']):10.3f}"
            line += f" {tokens / max(1, counts['words']):7.2f}"
            line += f" {tokens / max(1, counts['bytes']):7.3f}"
            line += f" {counts['byte_tokens'] / max(1, tokens):7.1%}"
            line += f" {counts['unknown'] / max(1, counts['characters']):7.2%}"
            print(line)

    # What became of the new pieces.
    first, *others = models
    for name in others:
        known = models[first].ids
        new = [p.text for p in models[name].pieces if p.type == NORMAL and p.text not in known]
        lost = unreachable(models[name]) if models[name].is_bpe else []
        names = [models[name].readable(text) for text in lost]
        print(f"\n{name}: {len(new):,} new pieces, {len(lost):,} unreachable {first_few(names)}")
        longest = sorted(new, key=len, reverse=True)[:8]
        print(f"  longest: {', '.join(map(models[name].readable, longest))}")
        idle = [models[name].readable(text) for text in new if text not in used[name]]
        print(f"  never used in these texts: {len(idle):,} {first_few(idle)}")


def show(tokenizer, text: str) -> str:
    """The number of pieces of a text, and the pieces: coloured on a terminal, else between bars."""
    pieces = [tokenizer.readable(tokenizer.piece(i)) for i in tokenizer.encode(text)]
    if not use_colour():
        return f"{len(pieces):4} | " + " | ".join(pieces)
    coloured = [f"\033[30;4{2 + i % 5}m{piece}\033[0m" for i, piece in enumerate(pieces)]
    return f"{len(pieces):4}  " + "".join(coloured)
