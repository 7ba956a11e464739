"""Control pieces: <image>, <pad>, and those that begin and end a sequence. No text becomes one.

Pipeline: below tokenizer.py, which appends them last, and checkpoint/build.py.
"""

import os
from collections.abc import Iterable

from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.command import first_few
from vocabulary.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece


def add_control_pieces(tokenizer, names: Iterable[str], force: bool = False):
    """Append control pieces of these names. A piece that has a name keeps its id and becomes one.

    ValueError if text can become that piece now, unless `force`: then text loses it.
    """
    if isinstance(tokenizer, ByteLevelTokenizer):
        return tokenizer.with_control(names)
    pieces = list(tokenizer.pieces)
    for text in dict.fromkeys(names):
        if text not in tokenizer.ids:
            pieces.append(Piece(text, 0.0, CONTROL))
            continue
        token_id = tokenizer.ids[text]
        if pieces[token_id].type == CONTROL:
            continue
        if pieces[token_id].type in (UNKNOWN, BYTE):
            raise ValueError(f"{text} stands for unknown text or a byte: take another name")
        if is_typable(text, tokenizer) and not force:
            raise ValueError(
                f"{text}, piece {token_id}, is one that typed text becomes: python tokenizer.py "
                "merge BASE -o NEW.model --force-control makes it a control piece with the same id"
            )
        pieces[token_id] = Piece(text, 0.0, CONTROL)
        print(f"{text}: piece {token_id:,} of the base becomes a control piece")
    return type(tokenizer)(pieces, tokenizer.fields)


def is_typable(text: str, tokenizer) -> bool:
    """Whether some text becomes this piece. If so, then also behind a character of no piece.

    `find_unreachable` says why, for a BPE; of a Unigram model the answer is yes for all text.
    """
    if not tokenizer.is_bpe:
        return tokenizer.pieces[tokenizer.id(text)].type in (NORMAL, USER_DEFINED)
    return tokenizer.id(text) in tokenizer.encode("\ue000" + text)


def require_roles(tokenizer, path: str | os.PathLike, added: Iterable[str] = ()) -> None:
    """ValueError unless control pieces begin and end a sequence. added: names still to come."""
    roles = [("begins", "bos", tokenizer.bos_piece), ("ends", "eos", tokenizer.eos_piece)]
    for role, flag, name in roles:
        if name not in tokenizer.ids and name not in added:
            names = [piece.text for piece in tokenizer.pieces if piece.type == CONTROL]
            raise ValueError(
                f"{path}: no control piece {role} a sequence: python tokenizer.py merge {path} "
                f"-o NEW.model --{flag} PIECE names one (it has {first_few(names) or 'none'}), "
                "or adds one"
            )


def require_control_pieces(tokenizer, path: str | os.PathLike) -> None:
    """ValueError unless a model can be trained with the tokenizer: begin, end, <image>, <pad>."""
    require_roles(tokenizer, path)
    if None in (tokenizer.image_id, tokenizer.pad_id):
        names = "<image>" if tokenizer.image_id is None else "<pad>"
        raise ValueError(
            f"{path}: no control piece {names}: python tokenizer.py merge {path} -o NEW.model adds "
            "it (and python -m checkpoint build --tokenizer NEW.model its row to a base)"
        )
