"""Which samples make up which step, and the micro-batches of one rank."""

import atexit
import heapq
import random
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import BadSample, PhraseDataset, Sample, attention_pairs, collate, pack


def pack_into_bins(lengths, budget):
    """Indices of `lengths` in as few groups as a total of `budget` each allows, all about equally full: the longest first, each into the emptiest."""
    number = max(1, -(-sum(lengths) // budget))
    while True:
        groups = [[0, n, []] for n in range(number)]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            heapq.heapreplace(groups, [groups[0][0] + lengths[i], groups[0][1], groups[0][2] + [i]])
        if max(groups)[0] <= budget or number >= len(lengths):
            return [sorted(group) for _, _, group in sorted(groups, key=lambda g: g[1]) if group]
        number += 1


class LengthGroupedSampler:
    """Which samples make up which global batch: a function of (seed, epoch) alone, so that a step number is the whole data position, on any number of ranks.

    Each epoch is a new permutation. Samples of like length are put together (windows of 64 batches sorted by length, then the batches
    shuffled), which leaves little padding. The last batch of an epoch may be short; no sample is left out or seen twice.
    With weights, the files' shares: an epoch is as long, but each file gives its share of it, and goes on in the next epoch where it stopped; within
    a file no sample comes again before all others had their turn."""

    def __init__(self, lengths, batch_size, seed, sizes=None, weights=None):
        self.lengths, self.batch_size, self.seed, self.cache = (
            np.asarray(lengths),
            batch_size,
            seed,
            (None, None, None),
        )
        self.sizes, self.quotas = (
            sizes,
            [max(1, round(len(lengths) * weight / sum(weights))) for weight in weights]
            if weights
            else None,
        )
        self.length = sum(self.quotas) if weights else len(lengths)
        self.per_epoch = -(-self.length // batch_size)

    def draw(self, file, epoch):
        """The samples that a file gives to an epoch: so many of an endless row of its permutations."""
        size, quota, drawn = self.sizes[file], self.quotas[file], []
        while len(drawn) < quota:
            nth, at = divmod(epoch * quota + len(drawn), size)
            order = list(range(sum(self.sizes[:file]), sum(self.sizes[: file + 1])))
            random.Random(f"{self.seed} {file} {nth}").shuffle(order)
            drawn += order[at : at + quota - len(drawn)]
        return drawn

    def __getitem__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        if self.cache[0] != epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = (
                [i for file in range(len(self.quotas)) for i in self.draw(file, epoch)]
                if self.quotas
                else list(range(self.length))
            )
            rng.shuffle(order)
            order, window = np.array(order), 64 * self.batch_size
            for start in range(0, len(order), window):
                near = order[start : start + window]
                order[start : start + window] = near[np.argsort(self.lengths[near], kind="stable")]
            batches = list(range(self.per_epoch))
            rng.shuffle(batches)
            self.cache = (epoch, order, batches)
        _, order, batches = self.cache
        return order[batches[at] * self.batch_size :][: self.batch_size].tolist()


class MicroBatchDataset(Dataset):
    """What one rank gets at each step: a list of micro-batches. Rank r of a step takes every world-th sample of the global batch, beginning with the r-th.

    micro: so many samples at most make a micro-batch, padded to the longest (0: all of them). budget: or as many as fit into so many tokens, end to end without padding.
    A micro-batch also has "samples", their indices; "used", its tokens that are not padding; "squares", the sum of their records' squared lengths; "bad", what was left out."""

    def __init__(
        self,
        data,
        batch_size,
        seed,
        pad_id=0,
        micro=0,
        rank=0,
        world=1,
        steps=None,
        start=0,
        budget=0,
        weights=None,
    ):
        self.data, self.seed, self.pad_id, self.micro, self.rank, self.world, self.budget = (
            data,
            seed,
            pad_id,
            micro,
            rank,
            world,
            budget,
        )
        lengths = (
            np.zeros(len(data), int) if budget else data.lengths
        )  # packed, like need not stand with like
        self.plan = LengthGroupedSampler(lengths, batch_size, seed, data.sizes, weights)
        self.steps, self.start = steps if steps is not None else self.plan.per_epoch, start
        self.parts = (
            -(-batch_size // (world * micro)) if micro else 1
        )  # the same on every rank, in a short last batch too

    def __len__(self):
        return self.steps - self.start

    def __getitem__(self, n):
        step = self.start + n
        if isinstance(self.data, PhraseDataset):
            batch = self.data.batch(self.plan[step], self.rank, self.world, f"{self.seed} {step}")
            return [batch | {"num_tokens": batch["ids"].numel(), "attention_pairs": 0}]
        mine, parts = self.plan[step][self.rank :: self.world], []
        for part in (
            [mine] if self.budget else [mine[micro :: self.parts] for micro in range(self.parts)]
        ):
            samples, indices, bad = [], [], []
            for i in part:
                try:
                    samples.append(self.data.sample(i))
                    indices.append(i)
                except BadSample as error:
                    bad.append(str(error))
            groups = (
                pack_into_bins([len(sample.ids) - 1 for sample in samples], self.budget)
                if self.budget and samples
                else [range(len(samples))]
            )
            for group in groups:
                chosen = [samples[i] for i in group] or [
                    Sample([self.pad_id, self.pad_id], [0, 0], [])
                ]  # nothing to learn from, but every rank takes part in every step
                lengths = [len(samples[i].ids) - 1 for i in group]
                batch = pack(chosen) if self.budget else collate(chosen, self.pad_id)
                parts.append(
                    batch
                    | {
                        "sample_indices": [indices[i] for i in group],
                        "num_tokens": sum(lengths),
                        "attention_pairs": sum(attention_pairs(samples[i]) for i in group),
                        "bad_samples": bad,
                    }
                )
                bad = []
        return parts


def quiet_worker(_):
    """Signals can reach every process of a group; it is for the one that trains to act on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def make_loader(batches, workers=0, pin=False):
    """Iterates over `batches` in order, `workers` processes preparing them ahead (0: in this process)."""
    source = iter(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=quiet_worker,
            pin_memory=pin,
        )
    )
    if workers:
        atexit.register(
            source._shutdown_workers
        )  # as they ignore signals, they have to be told, however this process ends
    return source
