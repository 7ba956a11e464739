import torch

from generate import Sampling, prefill, sample_tokens


@torch.inference_mode()
def generate(
    model, prompts, pixels=None, max_new_tokens=128, eos_id=2, image_indices=None, **sampling
):
    # The cache has room for 16 tokens, and never grows.
    choice = Sampling(**sampling)
    size = max(map(len, prompts)) + min(max_new_tokens, 16)
    cache, hidden = prefill(model, prompts, pixels, image_indices, size)
    running = [True] * len(prompts)
    for n in range(max_new_tokens):
        new_ids = sample_tokens(model.logits(hidden), choice)
        step = []
        for row, token in enumerate(new_ids.tolist()):
            running[row] = running[row] and token != eos_id
            step.append(token if running[row] else None)
        yield step
        if not any(running) or n + 1 == max_new_tokens:
            return
        hidden = model(new_ids[:, None], cache=cache)[:, 0]
        cache.lengths = cache.lengths + 1
