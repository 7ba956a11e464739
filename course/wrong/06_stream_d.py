class StreamDecoder:
    def take_characters(self, final: bool = False) -> str:
        # Waits for as many bytes as the first one announces, also where they can't fit.
        out = ""
        while self.pending:
            size = 1 + sum(self.pending[0] >= limit for limit in (0x80, 0xE0, 0xF0))
            try:
                out += self.pending[:size].decode()
                self.pending = self.pending[size:]
            except UnicodeDecodeError:
                follows = all(0x80 <= byte < 0xC0 for byte in self.pending[1:size])
                if len(self.pending) < size and follows and not final:
                    break
                out += "\ufffd"
                self.pending = self.pending[1:]
        self.started = self.started or bool(out)
        return out
