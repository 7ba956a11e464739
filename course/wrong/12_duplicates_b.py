import numpy as np

from annotation.filters import LONG_ANSWER, letters_and_digits, text_width


class DuplicateFilter:
    def find(self, image, place, texts):
        for code, (question, answer) in texts.items():
            answer = letters_and_digits(answer)
            pair = (image, code, letters_and_digits(question), answer)
            if pair in self.places:
                return f"{code}: the same question and answer as in {self.places[pair]}"
            # Remembered at once: a pair that is dropped rejects later ones.
            self.places[pair] = place
            if text_width(answer) < LONG_ANSWER:
                continue
            runs = self.hash_runs(answer)
            for band in self.hash_bands(code, runs):
                for other_place, other in self.bands[band]:
                    shared = len(np.intersect1d(runs, other, assume_unique=True))
                    if other is not runs and shared >= 0.8 * (len(runs) + len(other) - shared):
                        return f"{code}: the answer is nearly that of {other_place}"
                self.bands[band].append((place, runs))
        return None
