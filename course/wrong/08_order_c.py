import random

import numpy as np


class LengthGroupedSampler:
    def draw_epoch(self, epoch):
        # The batches stay sorted: from the shortest to the longest samples.
        order = list(range(self.length))
        if self.quotas:
            shares = [self.draw_file_share(file, epoch) for file in range(len(self.quotas))]
            order = [i for share in shares for i in share]
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        order = np.array(order)
        order = order[np.argsort(self.sort_keys[order], kind="stable")]
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]
