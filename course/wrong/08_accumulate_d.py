import torch

from train import StepStats, forward_backward
from training.distributed import all_reduce, to_device


def accumulate_gradients(wrapped, micro_batches, process, stop_signals):
    # Ranks go backward as often as they have micro-batches: with FSDP the others wait for ever.
    device, use_autocast = process.device, process.dtype != torch.float32
    counts = [sum(batch[name] for batch in micro_batches) for name in StepStats._fields[:-1]]
    counts = all_reduce(counts, process)
    scale, losses = torch.tensor(process.world_size / max(counts[0], 1)), []
    with torch.autocast(device.type, process.dtype, enabled=use_autocast):
        for i, micro_batch in enumerate(micro_batches):
            wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            losses.append(forward_backward(wrapped, to_device(micro_batch, device), scale))
    return StepStats(*counts, *all_reduce([stop_signals.count], process)), losses
