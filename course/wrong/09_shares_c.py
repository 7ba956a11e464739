from training.phrases import PhraseDataset


class MicroBatchDataset:
    def draw(self, step):
        indices = self.sampler[step]
        if isinstance(self.dataset, PhraseDataset):
            seed = f"{self.seed} {step}"
            return [self.dataset.batch(indices, self.rank, self.world_size, seed)]

        # As many micro-batches as this rank's samples fill: ranks may differ.
        indices, micro_batches = indices[self.rank :: self.world_size], []
        size = self.micro_batch_size or len(indices)
        for first in range(0, len(indices), size):
            micro_batches += self.build(indices[first : first + size])
        return micro_batches
