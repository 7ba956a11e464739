class ByteLevelTokenizer:
    def with_pieces(self, pieces):
        # All but the last letter, and the last: not what the merges leave.
        pieces = list(pieces)
        known = {*self.ids}
        merges = []
        for piece in pieces:
            if piece[:-1] not in known:
                raise ValueError(f"no merge reaches the piece {piece}")
            known.add(piece)
            merges.append(f"{piece[:-1]} {piece[-1]}")
        return type(self)(self.file_content(pieces, merges), self.config)
