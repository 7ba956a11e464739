import torch

from train import StepStats, gradients
from training.distributed import all_reduce, pad_micro_batches, to_device


def accumulate_gradients(wrapped, micro_batches, process, stop_signals):
    # A mean of means: a target in a short micro-batch counts more.
    micro_batches, losses = pad_micro_batches(micro_batches, process), []
    device, use_autocast = process.device, process.dtype != torch.float32
    # Autocast keeps its bf16 copies of trained weights until it ends: one cast a weight and step.
    with torch.autocast(device.type, process.dtype, enabled=use_autocast):
        for i, micro_batch in enumerate(micro_batches):
            # DDP averages the gradients of the ranks in the last backward only. FSDP2 does it in
            # each: keeping them would take the memory of the whole model.
            wrapped.require_backward_grad_sync = i == len(micro_batches) - 1

            loss = wrapped(to_device(micro_batch, device))
            with torch.autocast(device.type, enabled=False):
                mean = loss / max(micro_batch["num_targets"], 1)
                (mean / len(micro_batches)).backward()
            losses.append(loss.detach())

    # The counts are known on the CPU.
    counts = [sum(batch[name] for batch in micro_batches) for name in StepStats._fields[:-1]]
    stats = StepStats(*all_reduce([*counts, stop_signals.count], process))

    torch._foreach_mul_(gradients(wrapped), process.world_size)
    return stats, losses
