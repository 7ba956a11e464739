class MicroBatchDataset:
    def __getitem__(self, n):
        # The step at which a resumed run begins is forgotten.
        indices = self.sampler[n][self.rank :: self.world_size]
        micro_batches = []
        for first in range(self.num_micro_batches):
            micro_batches += self.build(indices[first :: self.num_micro_batches])
        return micro_batches
