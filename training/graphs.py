"""CUDA graphs: a step of a small model as one launch.

In the demo's last stage an H200 computes for 3 ms a step, and Python takes 45 to 75 ms to launch
that, kernel by kernel (docs/benchmarks.md). A CUDA graph captures the kernels of a function once,
with their addresses; a replay launches all of them.
"""

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map_only

from data import select_loss_positions
from kernels import INTERPRET, use_triton
from model import IGNORE_INDEX

MAX_GRAPHS = 256  # of a function; further shapes are launched kernel by kernel


class Replay:
    """function(*inputs) on a GPU: the first call with new shapes runs it, the second captures it.

    inputs: trees of tensors on any device. The shapes choose the graph: other values must not
    change what is launched. A graph adds to the p.grad that were there at its capture: zero them in
    place. All calls must run on one stream that is not the default: see use_own_stream."""

    pool = None  # the memory of all graphs: they never run at the same time

    def __init__(self, function, device):
        self.function, self.device, self.seen, self.graphs = function, device, set(), {}

    def __call__(self, *inputs):
        tensors = find_tensors(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shapes not in self.graphs:
            if shapes not in self.seen or len(self.graphs) == MAX_GRAPHS:
                self.seen.add(shapes)
                return self.function(*self.copy(inputs))
            self.graphs[shapes] = self.capture(self.copy(inputs))

        graph, static_inputs, result = self.graphs[shapes]
        for static, tensor in zip(static_inputs, tensors):
            static.copy_(tensor, non_blocking=True)
        graph.replay()
        return result.clone()

    def copy(self, inputs):
        """On the GPU, in memory of their own even if they were there before: a graph keeps it."""
        options = {"device": self.device, "non_blocking": True, "copy": True}
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(**options), inputs)

    def capture(self, inputs):
        """-> (graph, its input tensors, its result). Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        Replay.pool = Replay.pool or torch.cuda.graph_pool_handle()
        # Without autocast's cache, so that each replay casts the weights as they are then.
        torch.set_autocast_cache_enabled(False)
        # thread_local: the DataLoader's thread that pins memory may call CUDA meanwhile.
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
        padded = pad_phrases(batch, "ids", "offsets", "is_true", "is_known")
        padded["padded_tokens"] = len(padded["ids"])
        if "word_ids" in batch:
            padded |= pad_phrases(batch, "word_ids", "word_offsets", "word_true", "word_known")
            more = len(padded["word_true"]) - len(batch["word_true"])
            padded |= {name: pad(padded[name], (0, more)) for name in ("word_true", "word_known")}
        return batch | padded

    layout = batch["layout"]
    step = 32 if layout.split_index is None else 512
    longer = (0, -batch["ids"].shape[1] % step)
    ids, targets = pad(batch["ids"], longer), pad(batch["targets"], longer, value=IGNORE_INDEX)
    if layout.split_index is not None:
        split_index = pad_side_by_side(*layout.split_index, longer)
        layout = layout._replace(positions=pad(layout.positions, longer), split_index=split_index)
    layout = layout._replace(loss_positions=select_loss_positions(targets, 512))
    padded = {"ids": ids, "targets": targets, "layout": layout, "padded_tokens": ids.numel()}
    return batch | padded


def pad_side_by_side(prefixes, groups, merge, longer):
    """The split_index of a Layout with rows that no token reads in each group. They shift the rows
    of later groups, and what merge says of these."""
    padded, end, added = [], prefixes.numel(), torch.zeros_like(merge)
    for own, keys in groups:
        more = -len(own) % 16
        padded.append([pad(index, (0, 0, 0, more)) for index in (own, keys)])
        end += own.numel()
        added += (merge >= end) * more * own.shape[1]
    return prefixes, tuple(padded), pad(merge + added, longer)


def pad_phrases(batch, ids, offsets, *labels):
    """Adds phrases without labels: all are empty but the last, which gets the added ids."""
    more = 64 - len(batch[offsets]) % 64
    rows = {name: pad(batch[name], (0, 0, 0, more)) for name in labels}
    longer = pad(batch[ids], (0, -len(batch[ids]) % 512))
    return rows | {ids: longer, offsets: pad(batch[offsets], (0, more), value=len(batch[ids]))}


def can_replay(args, process, model):
    """Small models on one GPU: large ones wait for the GPU's arithmetic, not for launches. And with
    the Triton kernels: the definition of the loss waits for the GPU, which can't be captured."""
    if process.device.type != "cuda" or process.world_size > 1 or INTERPRET:
        return False
    is_small = sum(weight.numel() for weight in model.parameters()) < 50e6
    is_excluded = args.fsdp or args.pack or args.compile or args.activation_checkpointing
    return is_small and not is_excluded and use_triton(torch.empty(0, device=process.device))


def use_own_stream(device):
    """The default stream can't be captured, and gradients are added on the stream of their first
    use: everything must run on this one."""
    torch.cuda.set_stream(torch.cuda.Stream(device))
