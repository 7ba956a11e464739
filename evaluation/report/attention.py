"""Images with a heat map: where the decoder attends while it answers."""

import random

import numpy as np
import torch

import data
from evaluation.answer import image_path
from evaluation.heatmap import paint
from evaluation.questions import image_names
from evaluation.report.gallery import card, div, image_tag, preprocessed, verdict
from generate import load_for_inference

GLOBAL_SKILLS = ("mood", "background")  # about the whole image: no place to attend to


@torch.inference_mode()
def attention_over_patches(model, tokenizer, prompt, answer, path):
    """How much the answer attends to each patch: float32 (N,), the mean over layers, heads and
    answer tokens. The rest, up to 1, goes to text."""
    config = model.config
    load = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
    ids = torch.tensor([prompt + tokenizer.encode(answer)], device=model.device)
    is_patch = ids[0] == config.image_token_id

    # The decoder, layer by layer
    x = model.embed_inputs(ids, load(path)[None].to(model.device))
    rope = (*model.decoder.rope_cos_sin(ids.shape[1], model.device), None)
    total = 0
    for block in model.decoder.layers:
        weights = attention_weights(block.attn, block.attn_norm(x), rope)
        # The first answer token is predicted at the last token of the prompt.
        total = total + weights[:, len(prompt) - 1 :, is_patch].mean((0, 1))
        x = block(x, rope)
    return (total / len(model.decoder.layers)).cpu().numpy()


def attention_weights(module, x, rope):
    """Causal attention weights, which kernels never store: x (1, T, C) -> (H, T, T)."""
    q, k, _ = module.project(x, rope)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("thd,shd->hts", q[0].float(), k[0].float()) / module.head_dim**0.5
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def heat_map(image, weights):
    """The image in pale grey, orange where the weights (N,) are large."""
    return paint(image, (weights - weights.min()) / max(float(np.ptp(weights)), 1e-9))


def attention_gallery(folder, header, questions, seed, count):
    """Right answers and captions, drawn by seed: each image beside its heat map."""
    model, tokenizer = load_for_inference(folder)
    pool = [q for q in questions if q.turn == 0 and len(image_names(q)) == 1]
    pool = [question for question in pool if question.skill not in GLOBAL_SKILLS]
    pool = [question for question in pool if verdict(question) != "wrong"]
    cards = ""
    for question in random.Random(seed + 1).sample(pool, min(count, len(pool))):
        path = image_path(header, question)
        if not path:
            continue
        turns = [(["", "\n" + question.question], None)]
        prompt, _ = data.encode_chat(turns, tokenizer, model.config.vision.num_patches)
        weights = attention_over_patches(model, tokenizer, prompt, question.full, path)

        image = preprocessed(path, model.config.image_aspect_ratio)
        tags = image_tag(image) + image_tag(heat_map(image, weights), "attention")
        note = f" · {100 * weights.sum():.0f}% of the attention is on the image"
        cards += card(question, div("pair", tags), note=note)
    return div("gallery wide", cards)
