class DuplicateFilter:
    def hash_bands(self, code, runs):
        # One band for all answers: right, and each is compared with every other.
        return [(code, 0, b"")]
