class StreamDecoder:
    def take_characters(self, final: bool = False) -> str:
        # Each token is decoded by itself: a syllable of three tokens becomes three signs.
        out = self.pending.decode(errors="replace")
        self.pending = b""
        self.started = self.started or bool(out)
        return out
