class MicroBatchDataset:
    def __getitem__(self, n):
        indices = self.sampler[self.start + n][self.rank :: self.world_size]
        size = self.micro_batch_size or len(indices)

        # As many micro-batches as this rank's samples fill: ranks may differ.
        micro_batches = []
        for first in range(0, len(indices), size):
            micro_batches += self.build(indices[first : first + size])
        return micro_batches
