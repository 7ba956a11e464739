from training.phrases import PhraseDataset


class MicroBatchDataset:
    def __getitem__(self, n):
        step = self.start + n
        indices = self.sampler[step]
        if isinstance(self.dataset, PhraseDataset):
            seed = f"{self.seed} {step}"
            batch = self.dataset.batch(indices, self.rank, self.world_size, seed)
            return [batch | {"num_tokens": batch["ids"].numel(), "attention_pairs": 0}]

        # Blocks of equal size: of a short batch the last rank gets less.
        share = self.batch_size // self.world_size
        indices = indices[self.rank * share :][:share]
        micro_batches = []
        for first in range(self.num_micro_batches):
            micro_batches += self.build(indices[first :: self.num_micro_batches])
        return micro_batches
