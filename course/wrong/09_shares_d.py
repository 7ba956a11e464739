from training.phrases import PhraseDataset


class MicroBatchDataset:
    def draw(self, step):
        indices = self.sampler[step]
        # Each rank contrasts its own images only.
        indices = indices[self.rank :: self.world_size]
        if isinstance(self.dataset, PhraseDataset):
            seed = f"{self.seed} {step}"
            return [self.dataset.batch(indices, self.rank, self.world_size, seed)]

        micro_batches = []
        for first in range(self.num_micro_batches):
            micro_batches += self.build(indices[first :: self.num_micro_batches])
        return micro_batches
