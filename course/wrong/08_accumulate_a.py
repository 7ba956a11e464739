import torch

from train import StepStats, count_images
from training.distributed import all_reduce, pad_micro_batches, to_device


def accumulate_gradients(wrapped, micro_batches, process, stop_signals):
    # A mean of means: a target in a short micro-batch counts more.
    micro_batches = pad_micro_batches(micro_batches, process)
    losses, num_targets = [], []
    for micro_batch in micro_batches:
        batch = to_device(micro_batch, process.device)
        use_autocast = process.dtype != torch.float32
        with torch.autocast(process.device.type, process.dtype, enabled=use_autocast):
            loss, count = wrapped(batch)
        (loss / max(count, 1) / len(micro_batches)).backward()
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
    return StepStats(*all_reduce(stats, process)), losses
