"""Token ids -> text, one id at a time: `Tokenizer.decode`, and generate.py's streaming answers."""

from vocabulary.sentencepiece_file import CONTROL, SPACE, UNKNOWN


class StreamDecoder:
    """Ids, one at a time -> text, as soon as it is certain: never half a syllable.

    What push and flush return, joined, is `decode` of all the ids.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pending = b""  # bytes of a character that is not complete yet
        self.started = False  # whether there has been text, so that a "▁" is a space

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often "". IndexError for an unknown id."""
        tokenizer = self.tokenizer
        if not 0 <= token_id < (size := tokenizer.vocab_size):
            raise IndexError(f"token id {token_id} is outside the vocabulary of {size}")
        raw = tokenizer.raw_bytes(token_id)
        if raw is not None:
            self.pending += raw
            return self.take_characters()

        # Any other piece ends a run of bytes.
        out, piece = self.flush(), tokenizer.pieces[token_id]
        if piece.type == CONTROL:
            return out

        if piece.type == UNKNOWN:
            text = tokenizer.unk_surface
        else:
            # Encoding may have put a space before the text, or removed those that were there.
            text = piece.text
            if not self.started and (
                tokenizer.add_dummy_prefix or tokenizer.remove_extra_whitespaces
            ):
                text = text.removeprefix(SPACE)
            text = text.replace(SPACE, " ")
        self.started = bool(text) or not tokenizer.remove_extra_whitespaces
        return out + text

    def take_characters(self, final: bool = False) -> str:
        """Take the complete characters from `pending`; if there are any, text has `started`. A byte
        that can never be part of one becomes U+FFFD at once: b"\\xea\\xb0A" two and an A,
        b"\\xed\\xa0" two."""
        out = ""
        while self.pending:
            # The first byte of a UTF-8 character gives its length.
            size = 1 + sum(self.pending[0] >= limit for limit in (0x80, 0xE0, 0xF0))
            try:
                out += self.pending[:size].decode()
                self.pending = self.pending[size:]
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and not final:
                    break
                out += "\ufffd"
                self.pending = self.pending[1:]
        self.started = self.started or bool(out)
        return out

    def flush(self) -> str:
        """The end of the text, or of a run of bytes: `pending` can't be completed any more."""
        return self.take_characters(final=True)
