"""Tokenizer: train a BPE, extend it with a new language, and measure the result.

Reading order: **tokenizer** → vision → model → data → train → generate. To an English tokenizer a
Korean syllable is three UTF-8 bytes, so up to three tokens. Train pieces on Korean text and append
them to the English model: Korean takes a third of the tokens, and English keeps its ids.

    python tokenizer.py train ko.txt --vocab-size 8000 -o ko.model     # text -> a .model file
    python tokenizer.py merge llama2.model ko.model -o both.model      # then <image> and <pad>
    python tokenizer.py extend llama2.model ko.txt --pieces 8000 -o both.model
    python tokenizer.py extend SmolLM2-135M ko.txt --pieces 8000 -o both   # byte-level
    python tokenizer.py report llama2.model both.model --text ko=ko.txt en=en.txt
    python tokenizer.py show llama2.model both.model "햄버거"
    python tokenizer.py bench ko.txt --vocab-size 8000                 # beside the libraries

Training: text is cut into words at spaces. "▁" stands for a space and begins the word after it.
Words are cut again around digits and where the script changes: "재밌다!!" -> "▁재밌다", "!!". Then,
again and again, the most frequent pair of neighbouring symbols becomes a piece. In a language
without spaces a "word" is the text between two signs, so a piece may span several real words.

Encoding: of all neighbours that form a piece, merge those with the best score, the leftmost first.
The textbook's version of both is the definition; vocabulary/fast_bpe.py has the fast versions.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import sentencepiece

from vocabulary import flags, report
from vocabulary.bench import bench
from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.command import Parser, first_few, run_main
from vocabulary.control_pieces import add_control_pieces, require_roles
from vocabulary.extend import add_extend_flags, run_byte_level_merge, run_extend, scores_below
from vocabulary.fast_bpe import bpe, build_symbol_array, count_words, learn_merges
from vocabulary.files import claim_output, read_lines
from vocabulary.scripts import is_foreign, is_latin
from vocabulary.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    bpe_fields,
)
from vocabulary.stream_decoder import StreamDecoder

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


# ---------------- the textbook's BPE
def learn_merges_textbook(words: dict[str, int], n_pieces: int, max_piece_length: int) -> list[str]:
    """The definition of training: {word: count} -> pieces, in the order of their merges.

    The words are what `split_word` in vocabulary/scripts.py cuts text into: "▁재밌다", "!!". Of
    equally frequent pairs comes the shorter piece, then the first by code points.
    """
    words = {tuple(word): n for word, n in words.items()}  # at first each character is a symbol
    pieces = []
    while len(pieces) < n_pieces:
        # A pair counts as often as it would be merged: "a", "a" once in "aaa".
        counts = Counter()
        for symbols, n in words.items():
            for pair in set(zip(symbols, symbols[1:])):
                if len("".join(pair)) <= max_piece_length:
                    counts[pair] += n * (len(symbols) - len(merge_pair(symbols, pair)))
        if not counts:
            break

        # Without ties, so that the same text gives the same pieces on every machine.
        _, _, piece, pair = min((-n, len("".join(p)), "".join(p), p) for p, n in counts.items())
        pieces.append(piece)
        words = {merge_pair(symbols, pair): n for symbols, n in words.items()}
    return pieces


def merge_pair(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join the pair wherever it occurs, from the left: "aaa" -> "aa", "a"."""
    merged, i = [], 0
    while i < len(symbols):
        width = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + width]))
        i += width
    return tuple(merged)


def bpe_textbook(symbols: Iterable[str], scores: dict[str, float], separator="") -> list[str]:
    """The definition of encoding: merge the neighbours with the best score, the leftmost first."""
    symbols = list(symbols)
    while True:
        pairs = enumerate(map(separator.join, zip(symbols, symbols[1:])))
        candidates = [(-scores[pair], i) for i, pair in pairs if pair in scores]
        if not candidates:
            return symbols
        _, i = min(candidates)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


# ---------------- encoding and decoding
class Tokenizer(SentencePieceModel):
    """Text -> ids -> text, with the pieces and settings of a SentencePiece file.

    Unigram models and models that normalise text work too, but without `encode_reference`.
    """

    def __init__(self, pieces: Iterable[Piece], fields: Iterable[tuple] = ()):
        super().__init__(pieces, fields)

        # Merges run through pieces of these types. User-defined ones are never split.
        textual = [piece for piece in self.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]
        self.scores = {piece.text: piece.score for piece in textual}
        self.user_defined = [piece.text for piece in textual if piece.type == USER_DEFINED]
        self.user_defined.sort(key=len, reverse=True)

        # encode_reference has no Unigram models, normalisation rules or unused pieces.
        is_simple = self.is_bpe and not self.charsmap
        self.has_reference = is_simple and all(piece.type != UNUSED for piece in textual)
        self.sp_processor = sentencepiece.SentencePieceProcessor(model_proto=self.to_bytes())

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text never becomes a control piece: "<image>" in it is seven characters."""
        try:
            ids = self.sp_processor.encode(text)
        except (UnicodeEncodeError, RuntimeError):  # half a surrogate pair, as in broken JSON
            ids = self.sp_processor.encode(re.sub("[\ud800-\udfff]", "\ufffd", text))
        start = [self.bos_id] if bos else []
        end = [self.eos_id] if eos else []
        return start + ids + end

    def encode_reference(self, text: str) -> list[int]:
        """What the package computes in `encode`, from scratch. ValueError unless has_reference."""
        if not self.has_reference:
            raise ValueError("encode_reference needs a BPE with the identity normaliser")
        if self.remove_extra_whitespaces:
            text = re.sub(" +", " ", text.strip(" "))
        if not text:
            return []

        # Every word gets its "▁", the first one too.
        text = (SPACE if self.add_dummy_prefix else "") + text.replace(" ", SPACE)
        if self.remove_extra_whitespaces:
            text = text.rstrip(SPACE)

        # User-defined pieces are cut out first, the longest at each position. As the pattern is a
        # group, re.split returns them as the parts with odd numbers.
        parts = [text]
        if self.user_defined:
            parts = re.split("(" + "|".join(map(re.escape, self.user_defined)) + ")", text)
        pieces = []
        for n, part in enumerate(parts):
            pieces += [part] if n % 2 else bpe(part, self.scores)

        # A symbol that is no piece is one character: it becomes its bytes, or unknown.
        ids = []
        for piece in pieces:
            if piece in self.scores:
                ids.append(self.ids[piece])
            elif self.byte_fallback:
                ids += [self.ids[BYTE_PIECES[byte]] for byte in piece.encode()]
            elif ids[-1:] != [self.unk_id]:  # a run of them is one unknown token
                ids.append(self.unk_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Control pieces vanish. Bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()


# ---------------- training
def train(
    lines: Iterable[str],
    vocab_size: int,
    *,
    character_coverage: float = 1.0,
    max_piece_length: int = 16,
    split_digits: bool = True,
    split_scripts: bool = True,
    byte_fallback: bool = True,
    progress: bool = False,
) -> Tokenizer:
    """Lines of text -> a BPE with vocab_size pieces: <unk> <s> </s>, 256 bytes, merges, characters.

    character_coverage: the share of the text whose characters become pieces; the rarest are left
    to the bytes. ValueError if the text is empty, has too few pairs or too many characters."""
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character coverage {character_coverage} must be in (0, 1]")
    if max_piece_length < 1:
        raise ValueError(f"maximum piece length {max_piece_length} must be at least 1")
    words = count_words(lines)
    if not any(words):
        raise ValueError("no text to train on")
    alphabet, symbols, weights = build_symbol_array(
        words, character_coverage, split_digits, split_scripts
    )

    # vocab_size counts the special pieces, the alphabet and, with what is left, the merges.
    special = [Piece("<unk>", 0.0, UNKNOWN)]
    special += [Piece(text, 0.0, CONTROL) for text in ("<s>", "</s>")]
    if byte_fallback:
        special += [Piece(text, 0.0, BYTE) for text in BYTE_PIECES]
    n_merges = vocab_size - len(special) - len(alphabet)
    if n_merges < 0 or len(alphabet) > 60_000:  # learn_merges puts two characters in 32 bits
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small for {len(special)} special pieces and the "
            f"{len(alphabet)} characters of the text: ask for more, or lower the character coverage"
        )
    if max_piece_length == 1:  # nothing to merge: the vocabulary is smaller than asked for
        vocab_size, n_merges = vocab_size - n_merges, 0
    merges = learn_merges(alphabet, symbols, weights, n_merges, max_piece_length, progress)
    if len(merges) < n_merges:
        limit = vocab_size - n_merges + len(merges)
        advice = "ask for fewer, or give more text"
        raise ValueError(f"the text has pairs for {limit} pieces, not for {vocab_size}: {advice}")

    # The earlier a merge, the higher its score: encoding repeats the merges in this order.
    ranked = [Piece(text, -float(rank)) for rank, text in enumerate([*merges, *alphabet])]
    fields = bpe_fields(
        vocab_size, character_coverage, max_piece_length, split_scripts, split_digits, byte_fallback
    )
    return Tokenizer(special + ranked, fields)


# ---------------- merging vocabularies
def find_unreachable(tokenizer: Tokenizer) -> list[str]:
    """The pieces that no text can produce: those that their own characters alone don't encode to.

    A BPE only produces a piece that a chain of merges leads to, and other merges may break the
    chain. Encoding the piece alone is an exact test. If the piece is a token of some longer text,
    no merge crossed its borders there, so the merges inside ran as they do alone.
    """
    if isinstance(tokenizer, ByteLevelTokenizer):
        return tokenizer.find_unreachable()
    normal = [piece.text for piece in tokenizer.pieces if piece.type == NORMAL]
    scores = tokenizer.scores
    return [text for text in normal if is_blocked(text, tokenizer) or len(bpe(text, scores)) > 1]


def is_blocked(piece: str, tokenizer: Tokenizer) -> bool:
    """No merges can make it: before them, spaces become "▁" and user-defined pieces are cut out."""
    return " " in piece or any(text in piece for text in tokenizer.user_defined)


def select_pieces(
    base: Tokenizer,
    new: Tokenizer | Iterable[str],
    *,
    unreachable: str = "drop",
    foreign_only: bool = True,
    same_normalizer: bool = True,
) -> tuple[list[str], dict[str, list[str]]]:
    """-> (pieces to append to `base`, in order; {reason: other pieces of `new`}).

    new: a model's come by id. An empty piece, or one that came before, is left out without reason.
    unreachable: "drop" leaves out the pieces that no merges lead to, "repair" adds what they need,
    too, "keep" appends them as they are. foreign_only: only pieces that plain English can't hold.
    same_normalizer: ValueError if the two models normalise text differently.

    A new piece is reachable if and only if the merges of higher rank leave at most two symbols of
    its text: its own merge joins them. Pieces that are appended later rank lower, change nothing.
    """
    if unreachable not in ("drop", "repair", "keep"):
        raise ValueError(f'unreachable is "drop", "repair" or "keep", not {unreachable!r}')
    left_out = {reason: [] for reason in report.REASONS}
    if isinstance(new, Tokenizer):
        if same_normalizer:
            base.require_same_normalizer(new)
        left_out["special"] = [p.text for p in new.pieces if p.type not in (NORMAL, USER_DEFINED)]
        new = [p.text for p in new.pieces if p.type in (NORMAL, USER_DEFINED)]
    candidates = []
    for text in filter(None, dict.fromkeys(new)):
        if text in base.ids:
            left_out["known"].append(text)
        elif foreign_only and not is_foreign(text):
            left_out["english"].append(text)
        elif unreachable != "keep" and is_blocked(text, base):
            left_out["blocked"].append(text)
        else:
            candidates.append(text)
    if unreachable == "keep":
        return candidates, left_out

    # Passes repeat while they add something, as a piece may need one that comes later in `new`.
    scores, next_scores, added = dict(base.scores), scores_below(base), []
    n_before = -1
    while n_before != len(added):
        n_before = len(added)
        for text in candidates:
            if len(bpe(text, scores)) <= 2:
                added.append(text)
                scores[text] = next(next_scores)  # below all others
        candidates = [text for text in candidates if text not in scores]
    left_out["unreachable"] = candidates

    # Repair: join the first two symbols that may be joined, until one is left: the piece.
    if unreachable == "repair":
        for text in candidates:
            while text not in scores:
                pairs = map("".join, pairwise(bpe(text, scores)))
                added.append(next(pair for pair in pairs if is_foreign(pair) or not foreign_only))
                scores[added[-1]] = next(next_scores)
    return added, left_out


def merge_vocabularies(
    base: Tokenizer,
    new: Tokenizer | Iterable[str],
    control: Iterable[str] = ("<image>", "<pad>"),
    **options,
) -> Tokenizer:
    """Append the pieces of `new` (a model, or strings, "▁" for a space) and `control` to a BPE.

    Base ids stay. New pieces rank below the base's, so text without them encodes as before.
    options: see `select_pieces`."""
    if isinstance(base, ByteLevelTokenizer):
        return base.with_pieces(new).with_control(control)
    added, _ = select_pieces(base, new, **options)
    if added and not base.is_bpe:
        raise ValueError("the base is not a BPE, such as Llama's: pieces can't be appended to it")
    pieces = [Piece(text, score) for text, score in zip(added, scores_below(base))]
    return add_control_pieces(Tokenizer(base.pieces + pieces, base.fields), control)


# ---------------- command line
def load(path: str | Path) -> Tokenizer | ByteLevelTokenizer:
    """From a .model file, a tokenizer.json, or the folder of one of them."""
    path = Path(path)
    has_json = (path / ByteLevelTokenizer.FILE_NAME).is_file()
    if path.suffix == ".json" or has_json and not (path / Tokenizer.FILE_NAME).is_file():
        return ByteLevelTokenizer.load(path)
    return Tokenizer.load(path)


def run_merge(args: argparse.Namespace) -> None:
    if isinstance(load(args.base), ByteLevelTokenizer):
        return run_byte_level_merge(load(args.base), args)
    inputs = [args.base, Path(args.base) / "tokenizer.model", *args.new]
    claim_output(args.out, Tokenizer.load, inputs)
    base = Tokenizer.load(args.base).with_roles(args.bos, args.eos)
    require_roles(base, args.base, added=[args.bos, args.eos])
    control = [base.bos_piece, base.eos_piece, *args.control]

    # Names that are pieces already. They come first: which merges are left depends on them.
    known = [name for name in control if name in base.ids]
    merged = add_control_pieces(base, known, args.force_control)
    for path in args.new:
        if path.endswith(".model"):
            new = Tokenizer.load(path)
        else:
            new = [line.strip().replace(" ", SPACE) for line in read_lines([path])]
        foreign_only = not is_latin(new) if args.foreign_only is None else args.foreign_only
        options = {"foreign_only": foreign_only, "same_normalizer": args.same_normalizer}
        added, left_out = select_pieces(merged, new, unreachable=args.unreachable, **options)
        merged = merge_vocabularies(merged, added, (), unreachable="keep", foreign_only=False)
        report.print_selection(path, added, left_out, args.unreachable)

    # The other control pieces come last, after all vocabularies.
    n_new = merged.vocab_size - base.vocab_size
    merged = add_control_pieces(merged, control, args.force_control)
    merged.save(args.out)
    n_control = merged.vocab_size - base.vocab_size - n_new
    counts = f"{base.vocab_size:,} + {n_new:,} new + {n_control} control"
    lost = find_unreachable(merged) if merged.is_bpe else []
    summary = f"{merged.vocab_size:,} pieces = {counts}; {len(lost):,} unreachable"
    print(f"{args.out}: {summary} {first_few(lost)}".rstrip())
    report.print_changes(base, merged, args.compare)


def run(args: argparse.Namespace) -> None:
    if args.command == "train":
        claim_output(args.out, Tokenizer.load, args.files)
        options = {k: v for k, v in vars(args).items() if k not in ("command", "files", "out")}
        tokenizer = train(read_lines(args.files), progress=sys.stderr.isatty(), **options)
        tokenizer.save(args.out)
        print(f"{args.out}: {tokenizer.vocab_size:,} pieces")
    elif args.command == "merge":
        run_merge(args)
    elif args.command == "extend":
        run_extend(load(args.base), args, merge_vocabularies, find_unreachable)
    elif args.command == "report":
        report.print_report({p: load(p) for p in args.models}, dict(args.text), find_unreachable)
    elif args.command == "show":
        for path in args.models:
            print(f"{path[-28:]:28} {report.show(load(path), args.text)}")
    else:
        bench(args.file, args.vocab_size)


def main() -> None:
    parser = Parser(prog="tokenizer.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    flag = {"action": argparse.BooleanOptionalAction, "default": True}

    add = commands.add_parser("train", help="learn a vocabulary from text files").add_argument
    add("files", nargs="+", type=flags.file, metavar="FILE", help="UTF-8 text")
    add("--vocab-size", type=flags.count, required=True, help="pieces of all types together")
    add("-o", "--out", type=flags.text, required=True, help="the .model to write")
    add("--character-coverage", type=flags.share, default=0.9995, help="of the text")
    add("--max-piece-length", type=flags.count, default=16, help="in characters")
    add("--split-digits", **flag, help="each digit is a piece of its own")
    add("--split-scripts", **flag, help="no piece mixes letters with signs, Hangul with Latin")
    add("--byte-fallback", **flag, help="characters without a piece become their UTF-8 bytes")

    add = commands.add_parser("merge", help="append new pieces to a model").add_argument
    base = ".model, or the model folder that it belongs to; its pieces keep their ids"
    add("base", type=flags.path, metavar="BASE", help=base)
    add("new", nargs="*", type=flags.path, metavar="NEW", help=".model, a piece a line, or .json")
    add("-o", "--out", type=flags.text, required=True, help="the .model to write")
    choices = {"choices": ("drop", "repair", "keep"), "default": "drop"}
    add("--unreachable", **choices, help="pieces that no merges reach")
    add("--foreign-only", **flag | {"default": None}, help="none of English (default: by letters)")
    add("--compare", type=flags.file, metavar="FILE", help="how much of this text gets other ids")
    add("--same-normalizer", **flag, help="refuse a model that normalises differently")
    add("--control", nargs="*", type=flags.text, default=["<image>", "<pad>"], help="appended last")
    add("--force-control", action="store_true", help="take them from text that could become them")
    piece = {"type": flags.text, "metavar": "PIECE"}
    add("--bos", **piece, help="the control piece that begins a sequence (default: the base's)")
    add("--eos", **piece, help="the one that ends it (default: the base's)")

    add_extend_flags(commands.add_parser("extend", help="go on merging a base's pieces"))

    add = commands.add_parser("report", help="tokens per character, word and byte").add_argument
    about = ".model files, or model folders; the base first"
    models = {"nargs": "+", "type": flags.path, "metavar": "MODEL", "help": about}
    add("models", **models)
    text = {"nargs": "+", "type": report.labelled_path, "required": True, "metavar": "[LABEL=]FILE"}
    add("--text", **text, help="UTF-8 text to encode")

    add = commands.add_parser("show", help="print the pieces of a text").add_argument
    add("models", **models)
    add("text", type=report.text_to_show, help="in quotes, after the models")

    add = commands.add_parser("bench", help="time and memory of training").add_argument
    add("file", type=flags.file, help="UTF-8 text for this trainer and others that are installed")
    add("--vocab-size", type=flags.count, default=8000, help="pieces")

    run(parser.parse_args())


if __name__ == "__main__":
    run_main(main, "tokenizer.py")
