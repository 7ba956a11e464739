class StreamDecoder:
    def take_characters(self, final: bool = False) -> str:
        # All or nothing: a complete letter waits for the half syllable behind it.
        try:
            out = self.pending.decode()
        except UnicodeDecodeError:
            if not final:
                return ""
            out = self.pending.decode(errors="replace")
        self.pending = b""
        self.started = self.started or bool(out)
        return out
