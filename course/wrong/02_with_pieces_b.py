from vocabulary.fast_bpe import bpe


class ByteLevelTokenizer:
    def with_pieces(self, pieces):
        # New pieces do not build on each other.
        pieces, merges = list(pieces), []
        for piece in pieces:
            symbols = bpe(piece, self.scores, self.separator)
            if len(symbols) != 2:
                raise ValueError(f"no merge reaches the piece {piece}")
            merges.append(" ".join(symbols))
        return type(self)(self.file_content(pieces, merges), self.config)
