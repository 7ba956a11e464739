import torch

from generate import Sampling, prefill, sample_tokens


@torch.inference_mode()
def generate(
    model, prompts, pixels=None, max_new_tokens=128, eos_id=2, image_indices=None, **sampling
):
    # The first answer that ends, ends all.
    choice = Sampling(**sampling)
    size = max(map(len, prompts)) + max_new_tokens
    cache, hidden = prefill(model, prompts, pixels, image_indices, size)
    for n in range(max_new_tokens):
        new_ids = sample_tokens(model.logits(hidden), choice)
        step = [None if token == eos_id else token for token in new_ids.tolist()]
        yield step
        if None in step or n + 1 == max_new_tokens:
            return
        hidden = model(new_ids[:, None], cache=cache)[:, 0]
        cache.lengths = cache.lengths + 1
