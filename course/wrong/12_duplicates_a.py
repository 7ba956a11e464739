import zlib

import numpy as np

from annotation.filters import letters_and_digits


class DuplicateFilter:
    def find(self, image, place, texts):
        # Only what is equal is found.
        for code, (question, answer) in texts.items():
            pair = (image, code, letters_and_digits(question), letters_and_digits(answer))
            if pair in self.places:
                return f"{code}: as in {self.places[pair]}"
        for code, (question, answer) in texts.items():
            pair = (image, code, letters_and_digits(question), letters_and_digits(answer))
            self.places[pair] = place
        return None

    @staticmethod
    def hash_runs(answer):
        runs = [zlib.crc32(answer[i : i + 5].encode()) for i in range(len(answer) - 4)]
        return np.unique(np.array(runs, dtype=np.uint32))
