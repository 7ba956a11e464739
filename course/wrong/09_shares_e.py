class MicroBatchDataset:
    def __getitem__(self, n):
        # As many shapes as there are batches: each would need a CUDA graph of its own.
        return self.draw(self.start + n)
