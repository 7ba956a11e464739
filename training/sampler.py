"""Which samples make up which step, and the micro-batches of one rank.

The samples of a step depend on seed and step alone, on any number of ranks.
"""

import atexit
import heapq
import math
import random
import re
import signal
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import BadSample, Sample, attention_pairs, collate, select_loss_positions
from model import IGNORE_INDEX, Layout
from training.graphs import round_shapes
from training.phrases import PhraseDataset
from training.resume import STOP_SIGNALS


def split_weights(entries):
    """["a.json:0.7", "b.json:0.3"] -> (["a.json", "b.json"], [0.7, 0.3]), or (…, None)."""
    paths, weights = [], []
    for entry in entries:
        found = re.fullmatch(r"(.+):([-+.\deE]+)", entry)
        if found and not Path(entry).exists():
            entry = found[1]
            weights.append(float(found[2]))
        paths.append(entry)
    is_valid = len(weights) == len(paths) and 0 < min(weights) <= sum(weights) < math.inf
    if weights and not is_valid:
        number = f"{len(weights)} of {len(paths)}"
        raise ValueError(f"--data: {number} files have a weight; all must, above 0, or none")
    return paths, weights or None


class LengthGroupedSampler:
    """sampler[step] -> the sample indices of a global batch.

    An epoch is a permutation in which samples of similar length share a batch: little padding. Its
    last batch may be short. With weights, each file (of `sizes` samples) gives its share of an
    epoch: no sample comes again before all others of its file have come."""

    def __init__(self, sort_keys, batch_size, seed, sizes=None, weights=None):
        self.sort_keys, self.batch_size, self.seed = np.asarray(sort_keys), batch_size, seed
        self.sizes, self.quotas, self.length = sizes, None, len(sort_keys)
        if weights:
            self.quotas = [max(1, round(len(sort_keys) * w / sum(weights))) for w in weights]
            self.length = sum(self.quotas)
        self.per_epoch = -(-self.length // batch_size)

        self.epoch, self.batches = None, None  # the last one that was used

    def __getitem__(self, step):
        epoch, n = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.draw_epoch(epoch)
        return self.batches[n].tolist()

    def draw_epoch(self, epoch):
        """The batches of an epoch, arrays of sample numbers."""
        order = list(range(self.length))
        if self.quotas:
            shares = [self.draw_file_share(file, epoch) for file in range(len(self.quotas))]
            order = [i for share in shares for i in share]
        rng = random.Random(f"{self.seed} {epoch}")
        rng.shuffle(order)

        # Sort by length within windows of 64 batches. Then shuffle the batches.
        order, window = np.array(order), 64 * self.batch_size
        for start in range(0, len(order), window):
            near = order[start : start + window]
            order[start : start + window] = near[np.argsort(self.sort_keys[near], kind="stable")]

        numbers = list(range(self.per_epoch))
        rng.shuffle(numbers)
        return [order[n * self.batch_size :][: self.batch_size] for n in numbers]

    def draw_file_share(self, file, epoch):
        """The samples that a file gives to an epoch: the next ones of its permutations."""
        size, quota, first = self.sizes[file], self.quotas[file], sum(self.sizes[:file])
        drawn = []
        while len(drawn) < quota:
            permutation, at = divmod(epoch * quota + len(drawn), size)
            order = list(range(first, first + size))
            random.Random(f"{self.seed} {file} {permutation}").shuffle(order)
            drawn += order[at : at + quota - len(drawn)]
        return drawn


@dataclass(eq=False)
class MicroBatchDataset(Dataset):
    """batches[n] -> a rank's micro-batches for step start + n: what `collate`, `pack` or
    PhraseDataset.batch return, with sample_indices, the counts of train.StepStats, and bad_samples,
    why samples were left out."""

    dataset: object
    batch_size: int  # of the global batch; rank r has its samples r, r + world_size, …
    seed: int
    _: KW_ONLY
    pad_id: int = 0
    micro_batch_size: int = 0  # samples; 0: all in one micro-batch
    token_budget: int = 0  # or: samples are packed into micro-batches of this many tokens
    rank: int = 0
    world_size: int = 1
    steps: int | None = None  # default: one epoch
    start: int = 0
    weights: list | None = None  # the files' shares
    few_shapes: bool = False  # for CUDA graphs

    def __post_init__(self):
        sort_keys, sizes = self.dataset.sort_keys, self.dataset.sizes
        if self.token_budget:
            sort_keys = np.zeros(len(sort_keys))  # packed samples need no padding
        order = sort_keys, self.batch_size, self.seed
        self.sampler = LengthGroupedSampler(*order, sizes, self.weights)
        if self.steps is None:
            self.steps = self.sampler.per_epoch

        # The same on all ranks, even if the last batch is short.
        share = self.batch_size / self.world_size
        self.num_micro_batches = math.ceil(share / (self.micro_batch_size or share))

    def __len__(self):
        return self.steps - self.start

    def __getitem__(self, n):
        """The micro-batches of step start + n, with few_shapes as round_shapes makes them."""
        micro_batches = self.draw(self.start + n)
        return list(map(round_shapes, micro_batches)) if self.few_shapes else micro_batches

    def draw(self, step):
        """The rank's samples of a step, dealt out to num_micro_batches, and built. Of phrases
        there is one: PhraseDataset.batch takes the samples of all ranks."""
        indices = self.sampler[step]

        # The vision stage contrasts the whole batch at once.
        if isinstance(self.dataset, PhraseDataset):
            seed = f"{self.seed} {step}"
            return [self.dataset.batch(indices, self.rank, self.world_size, seed)]

        indices, micro_batches = indices[self.rank :: self.world_size], []
        for first in range(self.num_micro_batches):
            micro_batches += self.build(indices[first :: self.num_micro_batches])
        return micro_batches

    def build(self, indices):
        """The micro-batch of these samples, or as many as packing takes."""
        # Bad samples are left out. The training loop counts them, or stops.
        samples, usable, bad_samples = [], [], []
        for i in indices:
            try:
                samples.append(self.dataset.sample(i))
                usable.append(i)
            except BadSample as error:
                bad_samples.append(str(error))

        lengths, groups = [len(sample.ids) - 1 for sample in samples], [range(len(samples))]
        if self.token_budget and samples:
            groups = pack_into_bins(lengths, self.token_budget)

        micro_batches = []
        for group in groups:
            # All ranks take part in each step, with a sample without targets if need be.
            chosen = [samples[i] for i in group]
            filled = chosen or [Sample([self.pad_id] * 2, [0, 0], [])]
            batch = pack(filled) if self.token_budget else collate(filled, self.pad_id)
            batch |= {
                "sample_indices": [usable[i] for i in group],
                "num_targets": int((batch["targets"] != IGNORE_INDEX).sum()),
                "num_tokens": sum(lengths[i] for i in group),
                "padded_tokens": batch["ids"].numel(),
                "num_images": len(batch.get("pixels", ())),
                "attention_pairs": sum(map(attention_pairs, chosen)),
                "bad_samples": bad_samples,
            }
            bad_samples = []  # each is named once
            micro_batches.append(batch)
        return micro_batches


def pack_into_bins(lengths, budget):
    """Indices of `lengths` in as few groups of at most `budget` as possible, equally full: the
    longest first, each into the emptiest group."""
    number = max(1, -(-sum(lengths) // budget))
    while True:
        groups = [[0, n, []] for n in range(number)]  # load, number, indices
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            load, n, indices = groups[0]
            heapq.heapreplace(groups, [load + lengths[i], n, indices + [i]])

        if max(groups)[0] <= budget or number >= len(lengths):
            groups.sort(key=lambda group: group[1])
            return [sorted(indices) for _, _, indices in groups if indices]
        number += 1


def pack(samples):
    """Samples -> a batch of one row without padding, (1, T): documents end to end. In each the
    positions restart, and key_ranges let a token attend to its own document, up to itself."""
    parts = [collate([sample], pad_id=0, T=len(sample.ids) - 1) for sample in samples]
    batch = {key: torch.cat([part[key] for part in parts], dim=1) for key in ("ids", "targets")}

    lengths = torch.tensor([part["ids"].shape[1] for part in parts])
    index = torch.arange(int(lengths.sum()))[None]
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)[None]
    batch["layout"] = Layout(
        positions=index - first,
        key_ranges=(first.int(), (index + 1).int()),
        loss_positions=select_loss_positions(batch["targets"]),
    )
    pixels = [part["pixels"] for part in parts if "pixels" in part]
    if pixels:
        batch["pixels"] = torch.cat(pixels)
    return batch


def make_loader(batches, num_workers=0, pin_memory=False):
    """Iterates over `batches` in order. Worker processes prepare them ahead; 0: this process."""
    options = {"num_workers": num_workers, "prefetch_factor": 4 if num_workers else None}
    options |= {"worker_init_fn": ignore_signals, "pin_memory": pin_memory}
    iterator = iter(DataLoader(batches, batch_size=None, **options))
    if num_workers:
        # Workers ignore signals, so they must be stopped however this process ends.
        atexit.register(iterator._shutdown_workers)
    return iterator


def ignore_signals(_):
    """In workers: a signal reaches all processes of a group, only the trainer acts on it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
