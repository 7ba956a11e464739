import math


def lr_multiplier(step, total_steps, warmup_ratio, decay_ratio=1.0):
    # The first step has a rate of zero: a batch for nothing.
    warmup_steps = max(1, round(warmup_ratio * total_steps))
    if step < warmup_steps:
        return step / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(angle))
