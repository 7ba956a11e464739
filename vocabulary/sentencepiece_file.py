"""The SentencePiece .model file: its pieces and settings, and the protobuf wire format around them.

Pipeline: below tokenizer.py, whose Tokenizer is such a file that encodes and decodes.

A message is a run of fields. A field is a varint (number * 8 + wire type) and a value. Wire type 0
is a varint, 1 is 8 bytes, 5 is 4 bytes; 2 is a length and that many bytes: a string or a message.
The fields that we use, by number (sentencepiece_model.proto):

    ModelProto      1 piece, repeated   2 TrainerSpec   3 NormalizerSpec
    SentencePiece   1 text   2 score, a float   3 type (absent: NORMAL)
    TrainerSpec     3 model_type (2: BPE)   35 byte_fallback   44 unk_surface
                    41 bos_id   42 eos_id   46 bos_piece   47 eos_piece
    NormalizerSpec  1 name   2 precompiled_charsmap   3 add_dummy_prefix
                    4 remove_extra_whitespaces   5 escape_whitespaces
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vocabulary.files import read_json, write_atomically
from vocabulary.formats import check_format

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
PIECE, TRAINER, NORMALIZER = 1, 2, 3  # field numbers of ModelProto
BOS_PIECE, EOS_PIECE = 46, 47  # field numbers of TrainerSpec; their ids have numbers less by five
MODEL_NAME = "tokenizer.model"  # of the file in a model folder
SPACE = "▁"  # U+2581: a space, in every piece

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # wire types
SIZE = {FIXED_64: 8, FIXED_32: 4}

Field = tuple[int, int, int | bytes]  # field number, wire type, value


class Piece(NamedTuple):
    text: str
    score: float
    type: int = NORMAL
    raw: bytes = b""  # the message it was read from, which is written back unchanged


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """(value, index behind it) of a varint: 7 bits a byte, lowest first, bit 8: more follow."""
    value = shift = 0
    for i in range(start, len(data)):
        value |= (data[i] & 127) << shift
        shift += 7
        if data[i] < 128:
            return value, i + 1
    raise IndexError("varint without an end")


def write_varint(value: int) -> bytes:
    """The inverse of read_varint, for value >= 0."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_message(data: bytes) -> list[Field]:
    """The fields in the order of the file. LookupError or ValueError if the message is damaged."""
    fields, i = [], 0
    while i < len(data):
        key, i = read_varint(data, i)
        number, wire_type = key >> 3, key & 7

        # The value, in the encoding of its wire type.
        if wire_type == VARINT:
            value, i = read_varint(data, i)
        else:
            size, i = read_varint(data, i) if wire_type == BYTES else (SIZE[wire_type], i)
            value = data[i : i + size]
            i += size

        if i > len(data) or number == 0:
            raise ValueError("damaged protobuf")
        fields.append((number, wire_type, value))
    return fields


def write_message(fields: Iterable[Field]) -> bytes:
    """The inverse of read_message."""
    out = bytearray()
    for number, wire_type, value in fields:
        out += write_varint(number << 3 | wire_type)
        if wire_type == VARINT:
            out += write_varint(value)
            continue
        if wire_type == BYTES:
            out += write_varint(len(value))
        out += value
    return bytes(out)


def read_piece(raw: bytes) -> Piece:
    """A SentencePiece message -> Piece."""
    values = {number: value for number, _, value in read_message(raw)}
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return Piece(values[1].decode(), score, values.get(3, NORMAL), raw)


def write_piece(piece: Piece) -> bytes:
    """Piece -> a SentencePiece message: as it was read, or a new one."""
    if piece.raw:
        return piece.raw
    fields = [(1, BYTES, piece.text.encode()), (2, FIXED_32, struct.pack("<f", piece.score))]
    if piece.type != NORMAL:
        fields.append((3, VARINT, piece.type))
    return write_message(fields)


def bpe_fields(
    vocab_size: int,
    character_coverage: float,
    max_piece_length: int,
    split_scripts: bool,
    split_digits: bool,
    byte_fallback: bool,
) -> list[Field]:
    """TrainerSpec and NormalizerSpec of a new BPE that leaves the characters of a text alone."""
    trainer = [
        (3, VARINT, 2),  # model_type: BPE
        (4, VARINT, vocab_size),
        (10, FIXED_32, struct.pack("<f", character_coverage)),
        (20, VARINT, max_piece_length),
        (21, VARINT, int(split_scripts)),
        (25, VARINT, int(split_digits)),
        (35, VARINT, int(byte_fallback)),
    ]

    # How text is prepared before it is encoded.
    normalizer = [
        (1, BYTES, b"identity"),
        (3, VARINT, 1),  # add_dummy_prefix: a space before the text
        (4, VARINT, 0),  # remove_extra_whitespaces: keep them
        (5, VARINT, 1),  # escape_whitespaces: a space is "▁"
    ]
    specs = [(TRAINER, trainer), (NORMALIZER, normalizer)]
    return [(number, BYTES, write_message(spec)) for number, spec in specs]


def read_added_tokens(folder: Path) -> tuple[dict[int, str], list[str | None]]:
    """({id: piece}, [begin, end]): what transformers' files in a folder name, or None.

    A LLaVA from Hugging Face has Llama's own .model, and <image> and <pad> only in these files.
    """
    files = [folder / "added_tokens.json", folder / "tokenizer_config.json"]
    old, config = (read_json(file) if file.is_file() else {} for file in files)
    try:
        added = {token_id: text for text, token_id in old.items()}
        tokens = config.get("added_tokens_decoder") or {}
        added |= {int(token_id): token["content"] for token_id, token in tokens.items()}
        roles = [config.get("bos_token"), config.get("eos_token")]
        roles = [token["content"] if isinstance(token, dict) else token for token in roles]
        return dict(sorted(added.items())), roles
    except (AttributeError, LookupError, TypeError, ValueError):
        names = " or ".join(file.name for file in files)
        raise ValueError(f"{folder}: {names} is not as transformers writes it") from None


class SentencePieceModel:
    """A .model file: its pieces, the ids of its special pieces, its settings. An id is a position.

    bos_id, eos_id, pad_id and image_id are None if the model has no such control piece.
    bos_piece, eos_piece: the names of the pieces that begin and end a sequence.
    """

    FILE_NAME = "tokenizer.model"  # in a model folder
    system_message = ""  # see chat_markers.py; a .model file has no place for one
    separator = ""  # between the two symbols of a merge in `scores`: any two that form the piece

    def __init__(self, pieces: Iterable[Piece], fields: Iterable[Field] = ()):
        self.pieces = list(pieces)
        self.fields = list(fields)  # all of the file but the pieces
        self.ids = {piece.text: i for i, piece in enumerate(self.pieces)}

        # Settings, by the field numbers above.
        trainer, normalizer = self.spec(TRAINER), self.spec(NORMALIZER)
        self.is_bpe = trainer.get(3, 1) == 2
        self.byte_fallback = bool(trainer.get(35, 0))
        self.unk_surface = trainer.get(44, " ⁇ ".encode()).decode()
        self.charsmap = normalizer.get(2, b"")  # empty: text is not normalised
        self.add_dummy_prefix = bool(normalizer.get(3, 1))
        self.remove_extra_whitespaces = bool(normalizer.get(4, 1))

        # Special pieces.
        self.unk_id = [piece.type for piece in self.pieces].index(UNKNOWN)
        self.bos_piece = self.role_piece(BOS_PIECE, "<s>", 1)
        self.eos_piece = self.role_piece(EOS_PIECE, "</s>", 2)
        self.bos_id = self.control_id(self.bos_piece)
        self.eos_id = self.control_id(self.eos_piece)
        self.pad_id = self.control_id("<pad>")
        self.image_id = self.control_id("<image>")

    def spec(self, number: int) -> dict[int, int | bytes]:
        """{field number: value} of the TrainerSpec (number 2) or the NormalizerSpec (3)."""
        messages = [value for field, _, value in self.fields if field == number]
        return {n: value for message in messages for n, _, value in read_message(message)}

    def role_piece(self, number: int, name: str, piece_id: int) -> str:
        """The name of the piece with a role, in TrainerSpec by name or id; else Llama's."""
        trainer = self.spec(TRAINER)
        name = trainer.get(number, name.encode()).decode()
        piece_id = trainer.get(number - 5, piece_id)
        if name not in self.ids and piece_id < len(self.pieces):  # a large one stands for -1: none
            text = self.pieces[piece_id].text
            if self.pieces[piece_id].type == CONTROL and text not in ("<pad>", "<image>"):
                return text
        return name

    def control_id(self, text: str) -> int | None:
        i = self.ids.get(text)
        return i if i is not None and self.pieces[i].type == CONTROL else None

    def with_roles(self, bos: str | None, eos: str | None):
        """The model with other names, in its TrainerSpec, of the pieces that begin and end."""
        names = {number: text for number, text in ((BOS_PIECE, bos), (EOS_PIECE, eos)) if text}
        if not names:
            return self
        specs = [read_message(value) for number, _, value in self.fields if number == TRAINER]
        trainer = [field for spec in specs for field in spec if field[0] not in names]
        trainer += [(number, BYTES, text.encode()) for number, text in names.items()]
        others = [field for field in self.fields if field[0] != TRAINER]
        return type(self)(self.pieces, [(TRAINER, BYTES, write_message(trainer)), *others])

    def to_bytes(self) -> bytes:
        pieces = [(PIECE, BYTES, write_piece(piece)) for piece in self.pieces]
        return write_message(pieces + self.fields)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer"):
        try:
            fields = read_message(data)
            pieces = [read_piece(value) for number, _, value in fields if number == PIECE]
            return cls(pieces, [field for field in fields if field[0] != PIECE])
        except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, struct.error):
            message = f"{name}: not a SentencePiece .model file, or a damaged one"
            raise ValueError(message) from None

    @classmethod
    def load(cls, path: str | os.PathLike):
        """A .model file, or a folder's tokenizer.model with what transformers' files add to it.

        Raises OSError if the file can't be read, ValueError (one line) if it is no .model.
        """
        path = Path(path)
        if path.is_dir():
            path /= MODEL_NAME
            if not path.is_file():
                reason = "copy the SentencePiece .model of these weights there"
                raise ValueError(f"{path}: no such tokenizer: {reason}")
        data = path.read_bytes()
        check_format(data, path)
        model = cls.from_bytes(data, str(path))
        if path.name != MODEL_NAME:
            return model

        # Pieces that are only in transformers' files, and other names of begin and end.
        added, roles = read_added_tokens(path.parent)
        pieces, size = model.pieces, model.vocab_size
        for token_id, text in added.items():
            if token_id == len(pieces):
                pieces = [*pieces, Piece(text, 0.0, CONTROL)]
            elif token_id > len(pieces) or pieces[token_id].text != text:
                reason = f"which does not fit the {size:,} pieces of {MODEL_NAME}"
                raise ValueError(f"{path.parent}: {text} is number {token_id}, {reason}")
        known = {piece.text for piece in pieces}
        for text in filter(None, roles):
            if text not in known:
                where = path.with_name("tokenizer_config.json")
                raise ValueError(f"{where}: {text!r} is no piece of {MODEL_NAME}")
        given = (model.bos_piece, model.eos_piece)
        changed = [new if new != old else None for new, old in zip(roles, given)]
        return cls(pieces, model.fields).with_roles(*changed)

    def save(self, path: str | os.PathLike) -> None:
        write_atomically(path, lambda file: file.write(self.to_bytes()))

    def __reduce__(self):
        """A pickle, for a data loader's worker, holds the bytes of the file."""
        return type(self).from_bytes, (self.to_bytes(),)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def piece(self, token_id: int) -> str:
        return self.pieces[token_id].text

    def id(self, piece: str) -> int:
        """KeyError if there is no such piece."""
        return self.ids[piece]

    def readable(self, piece: str) -> str:
        """A piece for people: as it is."""
        return piece

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The byte of a piece such as <0xEA>; None of any other piece."""
        piece = self.pieces[token_id]
        return bytes([int(piece.text[3:5], 16)]) if piece.type == BYTE else None

    def require_same_normalizer(self, other: "SentencePieceModel") -> None:
        """ValueError if the two models change text differently before they encode it."""
        models = (self, other)
        rules = [(m.charsmap, m.remove_extra_whitespaces, m.add_dummy_prefix) for m in models]
        if rules[0] != rules[1]:
            names = " and ".join(m.spec(NORMALIZER).get(1, b"unnamed").decode() for m in models)
            raise ValueError(
                f"the models normalise text differently, {names}: some new pieces may never match; "
                "--no-same-normalizer merges them all the same"
            )
