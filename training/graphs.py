"""CUDA graphs: a step of a small model as one launch.

In the demo's last stage an H200 computes for 3 ms a step, and Python takes 45 ms to launch that,
kernel by kernel (docs/benchmarks.md). A CUDA graph records the kernels of a function once, with
their addresses; a replay launches all of them.
"""

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels import use_triton
from model import IGNORE_INDEX


class Replay:
    """function(*inputs) on a GPU: the first call with new shapes runs it, the second records it.

    inputs: trees of tensors on any device; what is no tensor must not matter. Gradients are added
    to those that are there: zero them in place. All runs on the current stream: see own_stream."""

    pool = None  # the memory of all graphs: they never run at the same time

    def __init__(self, function, device):
        self.function, self.device, self.graphs = function, device, {}

    def __call__(self, *inputs):
        tensors = find_tensors(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shapes not in self.graphs:
            self.graphs[shapes] = None
            return self.function(*self.copy(inputs))
        if self.graphs[shapes] is None:
            self.graphs[shapes] = self.record(self.copy(inputs))

        graph, places, result = self.graphs[shapes]
        for place, tensor in zip(places, tensors):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return result.clone()

    def copy(self, inputs):
        options = {"device": self.device, "non_blocking": True, "copy": True}
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(**options), inputs)

    def record(self, inputs):
        """-> (graph, its inputs, its result). Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        Replay.pool = Replay.pool or torch.cuda.graph_pool_handle()
        # A weight that autocast has cast before must be cast in the graph, too.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        # The thread that pins memory may go on meanwhile.
        options = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, Replay.pool, **options):
            result = self.function(*inputs)
        torch.set_autocast_cache_enabled(True)
        return graph, find_tensors(inputs), result


def find_tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def round_shapes(batch):
    """A micro-batch of data.collate or PhraseDataset.batch with more padding, so that few graphs
    are needed. The loss is the same."""
    if "offsets" in batch:
        return batch | pad_phrases(batch)
    layout = batch["layout"]
    step = 32 if layout.split_index is None else 512
    longer = (0, -batch["ids"].shape[1] % step)
    ids, targets = pad(batch["ids"], longer), pad(batch["targets"], longer, value=IGNORE_INDEX)
    if layout.split_index is not None:
        split_index = pad_side_by_side(*layout.split_index, longer)
        layout = layout._replace(positions=pad(layout.positions, longer), split_index=split_index)

    # All targets, and an ignored position until their number is a multiple of 512.
    is_ignored = targets.flatten() == IGNORE_INDEX
    positions, ignored = (~is_ignored).nonzero()[:, 0], is_ignored.nonzero()[:1, 0]
    more = -len(positions) % 512 if len(positions) else 512
    layout = layout._replace(loss_positions=torch.cat([positions, ignored.repeat(more)]))
    padded = {"ids": ids, "targets": targets, "layout": layout, "padded_tokens": ids.numel()}
    return batch | padded


def pad_side_by_side(prefixes, groups, merge, longer):
    """The split_index of a Layout with rows of each group that no token reads: the rows of later
    groups have later places then, and merge must name these."""
    padded, end, added = [], prefixes.numel(), torch.zeros_like(merge)
    for own, keys in groups:
        more = -len(own) % 16
        padded.append([pad(index, (0, 0, 0, more)) for index in (own, keys)])
        end += own.numel()
        added += (merge >= end) * more * own.shape[1]
    return prefixes, tuple(padded), pad(merge + added, longer)


def pad_phrases(batch):
    """Phrases that count nowhere: all empty but the last, which takes the ids that are added."""
    ids, offsets = batch["ids"], batch["offsets"]
    more = 64 - len(offsets) % 64
    rows = {name: pad(batch[name], (0, 0, 0, more)) for name in ("is_true", "is_known")}
    offsets = pad(offsets, (0, more), value=len(ids))
    return rows | {"offsets": offsets, "ids": pad(ids, (0, -len(ids) % 512))}


def can_replay(args, process, model):
    """Small models on one GPU: large ones wait for its arithmetic, not for launches. And with the
    Triton kernels: the definition of the loss waits for the GPU, which can't be recorded."""
    if process.device.type != "cuda" or process.world_size > 1:
        return False
    is_small = sum(weight.numel() for weight in model.parameters()) < 50e6
    is_other = args.fsdp or args.pack or args.compile or args.activation_checkpointing
    return is_small and not is_other and use_triton(torch.empty(0, device=process.device))


def use_own_stream(device):
    """The default stream can't be recorded, and gradients are added on the stream of their first
    use: everything must run on this one."""
    torch.cuda.set_stream(torch.cuda.Stream(device))
