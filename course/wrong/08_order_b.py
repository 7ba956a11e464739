import random

import numpy as np


class LengthGroupedSampler:
    def draw_epoch(self, epoch):
        # Shuffled, and nothing else: half of a batch is padding.
        order = list(range(self.length))
        if self.quotas:
            shares = [self.draw_file_share(file, epoch) for file in range(len(self.quotas))]
            order = [i for share in shares for i in share]
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        order = np.array(order)
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]
