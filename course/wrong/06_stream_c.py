class StreamDecoder:
    def take_characters(self, final: bool = False) -> str:
        # A byte that fits nowhere blocks everything after it.
        out = ""
        while self.pending:
            size = 1 + sum(self.pending[0] >= limit for limit in (0x80, 0xE0, 0xF0))
            try:
                out += self.pending[:size].decode()
            except UnicodeDecodeError:
                if not final:
                    break
                out += "\ufffd"
                size = 1
            self.pending = self.pending[size:]
        self.started = self.started or bool(out)
        return out
