from training.phrases import PhraseDataset


class MicroBatchDataset:
    def draw(self, step):
        indices = self.sampler[step]
        if isinstance(self.dataset, PhraseDataset):
            seed = f"{self.seed} {step}"
            return [self.dataset.batch(indices, self.rank, self.world_size, seed)]

        # Blocks of equal size: of a short batch the last rank gets less.
        share = self.batch_size // self.world_size
        indices = indices[self.rank * share :][:share]
        micro_batches = []
        for first in range(self.num_micro_batches):
            micro_batches += self.build(indices[first :: self.num_micro_batches])
        return micro_batches
