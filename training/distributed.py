"""Several processes: joining torchrun's, DDP and FSDP2, sums over all ranks."""

import atexit
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from kernels.device import pick_device, pick_precision
from model import IGNORE_INDEX


class Process(NamedTuple):
    """This process, one of world_size, and what it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products
    replay: object = None  # runs a micro-batch as a CUDA graph (training/graphs.py)


def init_distributed(device_name="auto", precision="auto"):
    """-> Process. Joins torchrun's processes, if there are any."""
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dtype = pick_precision(precision, device)
    if "RANK" not in os.environ:
        return Process(0, 1, device, dtype)

    # Tensors on a GPU go by nccl, counts on the CPU by gloo, which does not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device, dtype)


def close_distributed():
    """Leaves the process group and ends the process, after all ranks are done."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()

    # A thread of gloo that wakes while the interpreter ends would abort a finished process.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_rank0():
    """Rank 0 writes the files, and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def print_rank0(text):
    """Prints on stderr, above the progress bar."""
    if is_rank0():
        tqdm.write(text, file=sys.stderr)


def wrap_distributed(objective, process, fsdp):
    """The objective on its device, as all ranks train it. DDP: each rank has a copy. FSDP2: each
    has a shard of every tensor, and a block is gathered when it runs."""
    # DDP.
    if not fsdp:
        objective.to(process.device)
        if process.world_size == 1:
            return objective
        ids = [process.device.index] if process.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)

    # FSDP2, one unit per block of the ViT and the decoder.
    policy = MixedPrecisionPolicy(
        param_dtype=None if process.dtype == torch.float32 else process.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's cos and sin stay float32
    )
    # float() reads one block of a mapped model folder; of it, a rank keeps its shard.
    for block in (*objective.model.vision.layers, *objective.model.decoder.layers):
        fully_shard(block.float(), mp_policy=policy)
    return fully_shard(objective.float(), mp_policy=policy)


def all_reduce(values, process, op=dist.ReduceOp.SUM):
    """Numbers, each reduced over all ranks, in float64."""
    if process.world_size == 1:
        return values
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op)
    return reduced.tolist()


def pad_micro_batches(micro_batches, process):
    """As many micro-batches as the rank with the most has (with --pack they may differ), because
    with FSDP2 all take part in each backward. The last one is repeated without targets."""
    (largest,) = all_reduce([len(micro_batches)], process, dist.ReduceOp.MAX)
    missing = int(largest) - len(micro_batches)
    if not missing:
        return micro_batches

    last = micro_batches[-1]
    counts = dict.fromkeys(("num_targets", "num_tokens", "num_images", "attention_pairs"), 0)
    empty = last | counts | {"targets": torch.full_like(last["targets"], IGNORE_INDEX)}
    return micro_batches + [empty] * missing


def full_tensor(tensor):
    """A sharded tensor, gathered on all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_device(batch, device):
    """A batch with all its tensors on `device`. From pinned memory they are copied while the GPU
    computes."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
