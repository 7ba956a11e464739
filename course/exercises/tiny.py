"""A tiny model, a tiny tokenizer and random tensors for the checks of lessons 5 to 8.

Everything is made from fixed seeds in well under a second. The student's modules are imported
inside the functions: a check runs in the folder of the student's copy.
"""

import functools

import torch

LINES = [
    "What colour is the cat? red",
    "USER: ASSISTANT: the blue dog is left of a big red cat",
    "고양이는 무슨 색인가요? 빨간색",
    "猫是什么颜色？红色",
]


def randn(*shape, seed=0, dtype=torch.float32):
    """Normally distributed numbers, the same on each call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def near(got, want, what, tolerance=1e-4):
    """AssertionError in plain words if two tensors differ in shape or values."""
    assert got is not None, f"{what}: the function returned None"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, must be {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tolerance, f"{what}: wrong by up to {error:.2g}"


def attend_by_loops(q, k, v, sees):
    """The definition in float64, one query after the other. sees(b, i, j): is key j visible?"""
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    out = torch.zeros(B, Tq, H, D, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(B):
        for h in range(H):
            g = h // (H // K)  # neighbours share a key head
            for i in range(Tq):
                keys = [j for j in range(Tk) if sees(b, i, j)]
                if keys:
                    weights = (k[b, keys, g] @ q[b, i, h] / D**0.5).softmax(0)
                    out[b, i, h] = weights @ v[b, keys, g]
    return out


def config(model_type="llama", layer=-2):
    """16-pixel images of 4 patches, 64 pieces, 4 query heads and 2 key heads of 8 channels."""
    from model import DecoderConfig, ModelConfig
    from vision import VisionConfig

    return ModelConfig(
        VisionConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        DecoderConfig(64, 32, 48, 2, 4, 2, 8, max_position_embeddings=128, model_type=model_type),
        vision_feature_layer=layer,
        image_token_id=60,
        pad_token_id=61,
    )


def model(**options):
    """The model of `config` with random weights, for inference."""
    from model import XLlava

    torch.manual_seed(0)
    tiny = XLlava(config(**options)).init_weights().eval()
    for name, weight in tiny.named_parameters():
        if "norm" in name:  # weights of one would hide a norm that forgets them
            weight.data += 0.3 * randn(*weight.shape, seed=len(name))
    return tiny


def images(count, seed=0):
    """uint8 (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


@functools.cache
def tokenizer():
    """A SentencePiece vocabulary of 350 pieces and the two control pieces."""
    import tokenizer as module

    return module.merge_vocabularies(module.train(LINES * 50, 350), [])
