import random

import numpy as np


class LengthGroupedSampler:
    def draw_epoch(self, epoch):
        # One generator for the whole run: what it gives depends on what it gave before.
        if not hasattr(self, "rng"):
            self.rng = random.Random(f"{self.seed}")
        order = list(range(self.length))
        if self.quotas:
            shares = [self.draw_file_share(file, epoch) for file in range(len(self.quotas))]
            order = [i for share in shares for i in share]
        self.rng.shuffle(order)
        order, window = np.array(order), 64 * self.batch_size
        for start in range(0, len(order), window):
            near = order[start : start + window]
            order[start : start + window] = near[np.argsort(self.sort_keys[near], kind="stable")]
        numbers = list(range(self.per_epoch))
        self.rng.shuffle(numbers)
        return [order[n * self.batch_size :][: self.batch_size] for n in numbers]
