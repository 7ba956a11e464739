import torch

from train import StepStats, count_images
from training.distributed import all_reduce, pad_micro_batches, to_device


def accumulate_gradients(wrapped, micro_batches, process, stop_signals):
    # DDP's division by world_size is not undone: two ranks learn half as fast.
    micro_batches = pad_micro_batches(micro_batches, process)
    losses, num_targets = [], []
    for micro_batch in micro_batches:
        batch = to_device(micro_batch, process.device)
        use_autocast = process.dtype != torch.float32
        with torch.autocast(process.device.type, process.dtype, enabled=use_autocast):
            loss, count = wrapped(batch)
        loss.backward()
        losses.append(loss.detach())
        num_targets.append(count)
    stats = StepStats(
        loss_sum=sum(torch.stack(losses).tolist()),
        num_targets=sum(torch.stack(num_targets).tolist()),
        num_tokens=sum(batch["num_tokens"] for batch in micro_batches),
        padded_tokens=sum(batch["ids"].numel() for batch in micro_batches),
        num_images=count_images(micro_batches),
        attention_pairs=sum(batch["attention_pairs"] for batch in micro_batches),
        stop_requests=stop_signals.count,
    )
    stats = StepStats(*all_reduce(stats, process))
    for weight in wrapped.parameters():
        if weight.grad is not None:
            weight.grad /= max(stats.num_targets, 1)
    return stats, losses
