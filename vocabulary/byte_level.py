"""Byte-level BPE: the tokenizers of GPT-2, SmolLM2, Llama-3 and Qwen, from their `tokenizer.json`.

Pipeline: below tokenizer.py, beside its Tokenizer for SentencePiece; both have the same methods.
Source: GPT-2 (Radford et al. 2019, §2.2). It mirrors https://github.com/huggingface/tokenizers,
which the tests compare the ids with.

    text   cut out added tokens → normalise → split into words → each word's UTF-8 bytes → merges
    ids    the bytes of their pieces, end to end → text

Each byte is written as a letter, so that a piece is a printable string: "A" is A, a space is "Ġ",
and "가", three bytes, is "ê°Ģ". A merge is a line "Ġ t": these two neighbours become one piece.
At each step the merge that comes first in the file is done, at the leftmost place.

A special token never comes from text: "<|im_end|>" typed by a user is a few ordinary tokens.
`tokenizers` does the same with `encode_special_tokens = True`.

The roles (begin and end of sequence, padding, image) are in tokenizer_config.json beside the file.
"""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from vocabulary.fast_bpe import bpe
from vocabulary.files import read_json, write_json
from vocabulary.sentencepiece_file import CONTROL, NORMAL, SPACE, USER_DEFINED, Piece
from vocabulary.stream_decoder import StreamDecoder

# Printable bytes are their own letters. The other 68 get the letters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
LETTER_OF = {byte: chr(byte) for byte in PRINTABLE}
LETTER_OF |= {byte: chr(0x100 + i) for i, byte in enumerate(HIDDEN)}
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# In the Jinja code of a ChatML template: what stands there if a conversation has no system message.
DEFAULT_SYSTEM = re.compile(r"'<\|im_start\|>system(?:\n|\\n)([^'{}]+)<\|im_end\|>")
ROLES = ("bos_token", "eos_token", "pad_token", "image_token")

# The parts of a tokenizer.json, and the values that we compute. An empty tuple: any value.
COMPUTED = {
    "tokenizer.json": {
        "version": (),
        "truncation": (None,),
        "padding": (None,),
        "added_tokens": (),
        "normalizer": (),
        "pre_tokenizer": (),
        "post_processor": (),
        "decoder": (),
        "model": (),
    },
    "model BPE": {
        "dropout": (None, 0),
        "unk_token": (),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "fuse_unk": (False,),
        "byte_fallback": (False,),
        "ignore_merges": (True, False),
        "vocab": (),
        "merges": (),
    },
    "normalizer NFC": {},
    "pre_tokenizer ByteLevel": {
        "add_prefix_space": (False,),
        "trim_offsets": (),
        "use_regex": (True, False),
    },
    "pre_tokenizer Digits": {"individual_digits": (True, False)},
    "pre_tokenizer Split": {"pattern": (), "behavior": ("Isolated",), "invert": (False,)},
    "decoder ByteLevel": {"add_prefix_space": (), "trim_offsets": (), "use_regex": ()},
    # What it puts around the text is the chat template's work here.
    "post_processor ByteLevel": {"add_prefix_space": (), "trim_offsets": (), "use_regex": ()},
    "post_processor TemplateProcessing": {"single": (), "pair": (), "special_tokens": ()},
}


# -------------------------------------------------------------------------------- bytes and letters


def to_letters(text: str) -> str:
    """The UTF-8 bytes of a text, one letter a byte: " a가" -> "Ġaê°Ģ"."""
    return text.encode().decode("latin-1").translate(LETTER_OF)


def to_bytes(letters: str) -> bytes:
    """The inverse, as bytes: a piece may begin or end inside a character."""
    return bytes(BYTE_OF[letter] for letter in letters)


# ----------------------------------------------------------------- the regular expressions of words


@cache
def category_ranges(name: str) -> str:
    r"""The inside of a character class for \p{name}, such as "L" or "Lu", from `unicodedata`."""
    ranges, start = [], None
    for code in range(0x110001):
        inside = code < 0x110000 and unicodedata.category(chr(code)).startswith(name)
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(ranges)


# \s is Unicode's White_Space. Python's own \s has U+001C … U+001F, too.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
REGEX_PART = re.compile(
    r"\\p\{[LMNPSZC][a-z]?\}"  # a category
    r"|\\[sSrnt]|\(\?i?:|\(\?!|\)|\[\^?|\]|\{\d+(?:,\d*)?\}|[|?*+]"
    r"|[^\\()\[\]{}|?*+.^$&]"  # a character that means itself
)


def translate_regex(pattern: str) -> str:
    r"""An Oniguruma pattern, as tokenizer.json has them -> one for Python's `re`.

    \p{L} and \s become character classes. ValueError for what the two may read differently.
    """
    parts = REGEX_PART.findall(pattern)
    strange = re.search(r"[?*+]\+|\d}\+", pattern)  # possessive: Python has it from 3.11 on
    if strange or "".join(parts) != pattern:
        raise ValueError(f"the regular expression {pattern!r} is not one that we translate")

    out, in_class = [], False
    for part in parts:
        inside = None
        if part.startswith(r"\p"):
            inside = category_ranges(part[3:-1])
        elif part == r"\s":
            inside = WHITE_SPACE
        elif in_class and (part[0] == "[" or part == r"\S"):
            raise ValueError(f"the regular expression {pattern!r} has {part} in a class")

        if inside:
            part = inside if in_class else f"[{inside}]"
        elif part == r"\S":
            part = f"[^{WHITE_SPACE}]"
        elif part[0] in "[]":
            in_class = part != "]"
        out.append(part)
    return "".join(out)


# ------------------------------------------------------------------------------------ the settings


def require_computed(kind: str, settings: dict) -> None:
    """ValueError that names a setting which we do not compute."""
    known = COMPUTED.get(kind)
    if known is None:
        raise ValueError(f"{kind} is not computed here")
    for name, value in settings.items():
        if name != "type" and name not in known:
            raise ValueError(f"{kind}: {name} is not computed here")
        if known.get(name) and value not in known[name]:
            wanted = " or ".join(json.dumps(value) for value in known[name])
            raise ValueError(f"{kind}: {name} is {json.dumps(value)}, computed is {wanted}")


def read_steps(data: dict, name: str) -> list[dict]:
    """The steps of the normalizer, pre_tokenizer … : a sequence, one step, or none."""
    step = data.get(name)
    if step is None:
        return []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    inner |= {"post_processor": "processors", "decoder": "decoders"}
    steps = step[inner[name]] if step.get("type") == "Sequence" else [step]
    for step in steps:
        require_computed(f"{name} {step.get('type')}", step)
    return steps


def word_splitters(data: dict) -> list[re.Pattern]:
    """One pattern per step of the pre_tokenizer. Its matches, and what is between, become words."""
    steps = read_steps(data, "pre_tokenizer")
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise ValueError("pre_tokenizer without ByteLevel: this is not a byte-level tokenizer")

    patterns = []
    for step in steps:
        if step["type"] == "Split" and "Regex" not in step["pattern"]:
            raise ValueError(f"pre_tokenizer Split: the pattern {step['pattern']} is no Regex")
        if step["type"] == "Split":
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("use_regex", True):
            patterns.append(GPT2_WORDS)
    return [re.compile(f"({translate_regex(pattern)})") for pattern in patterns]


def read_added_tokens(data: dict) -> list[Piece]:
    """The added tokens by id: control pieces if special, else pieces that are cut out of text."""
    normalised = bool(read_steps(data, "normalizer"))
    added = {}
    for token in data.get("added_tokens") or []:
        text, is_special = token["content"], token.get("special", False)
        flags = ["single_word", "lstrip", "rstrip", *["normalized"][: int(normalised)]]
        strange = [name for name in flags if token.get(name)]
        if strange and not is_special:
            raise ValueError(f"added token {text!r}: {strange[0]} is not computed here")
        added[token["id"]] = Piece(text, 0.0, CONTROL if is_special else USER_DEFINED)
    return added


def read_merges(model: dict) -> list[str]:
    """The merges as lines "a b", from either format."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    for merge in merges:
        if merge.count(" ") != 1:
            raise ValueError(f"the merge {merge!r} is not two pieces")
    return merges


# ------------------------------------------------------------------------------------ the tokenizer


class ByteLevelTokenizer:
    """Text -> ids -> text, with the vocabulary and settings of a byte-level `tokenizer.json`.

    bos_id, eos_id, pad_id and image_id are None if no piece has that role. Where the file names no
    begin of sequence, the end is both, as in GPT-2.
    """

    FILE_NAME = "tokenizer.json"  # in a model folder
    is_bpe = True
    separator = " "  # between the two symbols of a merge in `scores`

    def __init__(self, data: dict, config: dict | None = None):
        """data: a tokenizer.json. config: a tokenizer_config.json. ValueError, LookupError,
        TypeError or AttributeError if they are damaged or not computed here."""
        require_computed("tokenizer.json", data)
        model = data["model"]
        if model.get("byte_fallback"):  # transformers 5 saves no tokenizer.model
            raise ValueError(
                "a SentencePiece vocabulary: copy the tokenizer.model of these weights, or of what "
                "they were trained from, beside it"
            )
        require_computed(f"model {model.get('type', 'BPE')}", model)
        if [step["type"] for step in read_steps(data, "decoder")] != ["ByteLevel"]:
            raise ValueError("the decoder is not ByteLevel alone")
        read_steps(data, "post_processor")
        self.data, self.config = data, dict(config or {})

        # The pieces by id. Added tokens may be a part of the vocabulary, or follow it.
        vocab, added = model["vocab"], read_added_tokens(data)
        by_id = {i: Piece(text, 0.0) for text, i in vocab.items()} | added
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError(f"the ids of the {len(by_id):,} pieces are not 0, 1, 2 …")
        self.pieces = [by_id[i] for i in range(len(by_id))]
        self.ids = {piece.text: i for i, piece in enumerate(self.pieces)}
        self.user_defined = [p.text for p in self.pieces if p.type == USER_DEFINED]
        self.user_defined.sort(key=len, reverse=True)
        roles = map(self.role_piece, ROLES)
        self.bos_piece, self.eos_piece, self.pad_piece, self.image_piece = roles
        self.bos_piece = self.bos_piece or self.eos_piece
        self.system_message = self.config.get("system_message")  # see chat_markers.py
        if self.system_message is None:
            found = DEFAULT_SYSTEM.search(str(self.config.get("chat_template")))
            self.system_message = found[1] if found else ""
        self.bos_id, self.eos_id = self.ids.get(self.bos_piece), self.ids.get(self.eos_piece)
        self.pad_id, self.image_id = self.ids.get(self.pad_piece), self.ids.get(self.image_piece)

        # The earlier a merge, the higher its score, as in a SentencePiece model.
        self.merges = read_merges(model)
        self.scores = {merge: -rank for rank, merge in enumerate(self.merges)}
        for merge in self.merges:
            if not {*merge.split(), merge.replace(" ", "")} <= vocab.keys():
                raise ValueError(f"the vocabulary lacks a piece of the merge {merge!r}")
        self.unk = model.get("unk_token") or ""
        if self.unk not in {"", *self.ids}:
            raise ValueError(f"unk_token {self.unk!r} is not in the vocabulary")

        # From text to words.
        self.form = "NFC" if read_steps(data, "normalizer") else None
        self.splitters = word_splitters(data)
        self.added = re.compile("(" + "|".join(map(re.escape, self.user_defined)) + ")")
        self.whole_words = bool(model.get("ignore_merges"))
        self.cache = {}  # word -> its ids

    def role_piece(self, role: str) -> str | None:
        """The piece of a role in tokenizer_config.json, where a token is a string or an object."""
        token = self.config.get(role)
        if isinstance(token, dict):
            token = token["content"]
        if token is not None and token not in self.ids:
            raise ValueError(f"{role} {token!r} is not in the vocabulary")
        return token

    # ---------------------------------------------------------------------- encoding and decoding

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text never becomes a control piece: "<|im_end|>" in it is ten characters.

        A byte that the vocabulary lacks becomes its unk_token, or nothing, as in `tokenizers`:
        SmolLM2 lacks some control characters, and the planes that Unicode has not filled.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # half a surrogate pair, of broken JSON
        ids = [self.bos_id] if bos else []

        # As the pattern is a group, re.split returns the added tokens as parts with odd numbers.
        parts = self.added.split(text) if self.user_defined else [text]
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self.ids[part])
                continue
            for word in self.split_words(part):
                if word not in self.cache:
                    if len(self.cache) >= 1 << 18:
                        self.cache.clear()
                    symbols = self.split_word(to_letters(word))
                    self.cache[word] = [self.ids[symbol] for symbol in symbols]
                ids += self.cache[word]
        return ids + ([self.eos_id] if eos else [])

    def split_words(self, text: str) -> list[str]:
        """Normalise, then cut with each pattern in turn what the ones before have left."""
        words = [unicodedata.normalize(self.form, text) if self.form else text]
        for pattern in self.splitters:
            words = [word for part in words for word in pattern.split(part) if word]
        return words

    def split_word(self, letters: str) -> list[str]:
        """The pieces of one word, given in letters."""
        if self.whole_words and letters in self.ids and self.is_normal(letters):
            return [letters]
        symbols = [letter if letter in self.ids else self.unk for letter in letters]
        return bpe(filter(None, symbols), self.scores, self.separator)

    def is_normal(self, piece: str) -> bool:
        return self.pieces[self.ids[piece]].type == NORMAL

    def decode(self, ids: Iterable[int]) -> str:
        """Control pieces vanish. Bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token; None if it is a control piece."""
        text, _, kind, _ = self.pieces[token_id]
        if kind == CONTROL:
            return None
        is_letters = kind == NORMAL and all(letter in BYTE_OF for letter in text)
        return to_bytes(text) if is_letters else text.encode()

    def readable(self, piece: str) -> str:
        """A piece for people: "Ġê°Ģ" -> "▁가". What is not whole characters stays in letters."""
        raw = self.raw_bytes(self.ids[piece])
        try:
            return piece if raw is None else raw.decode().replace(" ", SPACE)
        except UnicodeDecodeError:
            return piece

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def piece(self, token_id: int) -> str:
        return self.pieces[token_id].text

    def id(self, piece: str) -> int:
        """KeyError if there is no such piece."""
        return self.ids[piece]

    # ------------------------------------------------------------------------------ longer versions

    def count_words(self, lines: Iterable[str]) -> Counter:
        """How often each word occurs in a text, in letters."""
        counts = Counter()
        for line in lines:
            counts.update(self.split_words(line.rstrip("\r\n").encode(errors="replace").decode()))
        return Counter({to_letters(word): n for word, n in counts.items()})

    def is_reachable(self, piece: str) -> bool:
        """Whether a text can produce the piece: the merges lead to it, and it lies in one word.

        What begins or ends inside a character is no text, so for it only the merges count.
        """
        if self.split_word(piece) != [piece]:
            return False
        try:
            text = to_bytes(piece).decode()
        except (UnicodeDecodeError, KeyError):
            return True
        return self.split_words(text) == [text]

    def find_unreachable(self) -> list[str]:
        """The pieces that no text can produce (see tokenizer.find_unreachable)."""
        normal = [piece.text for piece in self.pieces if piece.type == NORMAL]
        return [text for text in normal if not self.is_reachable(text)]

    def with_pieces(self, pieces: Iterable[str]) -> "ByteLevelTokenizer":
        """Append pieces, in letters, and below all others the merges that make them.

        The merge of a piece joins the two symbols that the merges above it leave. ValueError if
        they leave more: no merge would reach the piece.
        """
        pieces, merges, scores = list(pieces), [], dict(self.scores)
        for piece in pieces:
            symbols = bpe(piece, scores, self.separator)
            if len(symbols) != 2:
                raise ValueError(f"no merge reaches the piece {piece}: {' '.join(symbols)}")
            merges.append(" ".join(symbols))
            scores[merges[-1]] = -len(scores)
        return type(self)(self.file_content(pieces, merges), self.config)

    def with_vocabulary(self, other: "ByteLevelTokenizer", pieces: Iterable[str]):
        """Append pieces of another vocabulary, with its merges, as makers do. Text can't produce
        some of them, because this vocabulary's merges come first (see extend.py)."""
        known = {*self.ids, *pieces}
        merges = [merge for merge in other.merges if merge not in self.scores]
        merges = [m for m in merges if {*m.split(), m.replace(" ", "")} <= known]
        return type(self)(self.file_content(pieces, merges), self.config)

    def with_control(self, texts: Iterable[str]) -> "ByteLevelTokenizer":
        """Append control pieces. "<image>" and "<pad>" take these roles if no piece has them."""
        data, config = self.file_content(), dict(self.config)
        for text in texts:
            role = f"{text.strip('<>')}_token"
            if role in ROLES and config.get(role) is not None:
                continue
            if text not in self.ids:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                token = {"id": len(data["model"]["vocab"]), "content": text, **flags}
                data["added_tokens"].append(token | {"special": True})
                data["model"]["vocab"][text] = token["id"]
            if role in ROLES:
                config[role] = text
        return type(self)(data, config)

    def with_roles(self, bos: str | None, eos: str | None) -> "ByteLevelTokenizer":
        """The tokenizer with other pieces that begin and end a sequence; new ones are appended."""
        roles = {role: text for role, text in (("bos_token", bos), ("eos_token", eos)) if text}
        longer = self.with_control(roles.values())
        return type(self)(longer.data, longer.config | roles)

    # ------------------------------------------------------------------------------------ the files

    def model_vocab(self) -> dict[str, int]:
        """All pieces, added tokens too: if `tokenizers` does not find those in the vocabulary, it
        numbers them behind it, and they would move whenever pieces are appended."""
        return {piece.text: i for i, piece in enumerate(self.pieces)}

    def file_content(self, pieces: Iterable[str] = (), merges: Iterable[str] = ()) -> dict:
        """The tokenizer.json with further pieces and merges."""
        vocab = self.model_vocab()
        vocab |= {text: i for i, text in enumerate(pieces, len(vocab))}
        all_merges = [merge.split() for merge in [*self.merges, *merges]]
        model = self.data["model"] | {"vocab": vocab, "merges": all_merges}
        return self.data | {
            "added_tokens": list(self.data.get("added_tokens") or []),
            "model": model,
        }

    def to_bytes(self) -> bytes:
        """The same bytes mean the same ids: of all that is computed here, and of nothing else."""
        content = {name: x for name, x in self.file_content().items() if name != "post_processor"}
        roles = [self.bos_piece, self.eos_piece, self.pad_piece, self.image_piece]
        return json.dumps([content, roles, self.system_message], ensure_ascii=False).encode()

    def __reduce__(self):
        """A pickle, for a data loader's worker."""
        return type(self), (self.data, self.config)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ByteLevelTokenizer":
        """From a tokenizer.json, or the folder of one, with the roles in the tokenizer_config.json
        beside it. ValueError (one line) if it can't be used."""
        path = Path(path)
        if path.is_dir():
            path /= cls.FILE_NAME
        beside = path.with_name("tokenizer_config.json")
        template = path.with_name("chat_template.jinja")  # newer folders have it here
        config = read_json(beside) if beside.is_file() else {}
        if template.is_file() and isinstance(config, dict):
            config.setdefault("chat_template", template.read_text(encoding="utf-8"))
        try:
            return cls(read_json(path), config)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json, and tokenizer_config.json beside it."""
        # Its list of added tokens would be an older one than that in tokenizer.json.
        config = {name: x for name, x in self.config.items() if name != "added_tokens_decoder"}
        write_json(path, self.file_content(), indent=None)
        write_json(Path(path).with_name("tokenizer_config.json"), config)
