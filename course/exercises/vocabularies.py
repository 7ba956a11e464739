"""Small tokenizers for the checks of lessons 1 and 2. They import the project inside."""


def sentencepiece_model(pieces, byte_fallback=False):
    """A BPE of pieces: [(text, score) or (text, score, type)], behind <unk>, <s> and </s>."""
    from tokenizer import BYTE, CONTROL, UNKNOWN, Piece, Tokenizer
    from vocabulary.sentencepiece_file import bpe_fields

    special = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL)]
    special.append(Piece("</s>", 0.0, CONTROL))
    if byte_fallback:
        special += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    every = special + [Piece(*piece) for piece in pieces]
    return Tokenizer(every, bpe_fields(len(every), 1.0, 16, False, False, byte_fallback))


def byte_level_model(merges=()):
    """A tokenizer as GPT-2's: the 256 bytes, and what the merges ("a b") make."""
    from vocabulary.byte_level import BYTE_OF, ByteLevelTokenizer

    vocab = {letter: i for i, letter in enumerate(BYTE_OF)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return ByteLevelTokenizer(
        {
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)},
        }
    )
