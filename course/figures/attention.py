"""Where each token of an answer looks: attention over the image, averaged over layers and heads."""

import json

import torch

from course.figures._shapes import GREY, picture, svg, text

ENDING = ".svg"
SIDE, MARGIN = 84, 12
LANGUAGES = ("en", "ko", "zh")


def read_questions(run):
    """One question of a few words per language, all about one image, and the file's name."""
    path = run / "data" / "unseen_images.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --run a finished demo")
    by_image = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        if record["kind"] == "object":
            by_image.setdefault(record["image"], {}).setdefault(record["language"], record)
    image, records = next(item for item in by_image.items() if len(item[1]) == len(LANGUAGES))
    return image, [records[language]["conversations"][0]["value"] for language in LANGUAGES]


@torch.inference_mode()
def watch_answer(model, tokenizer, question, pixels, most=6):
    """[(token, attention over the patches (N,))] of the first tokens of an answer."""
    import data
    import model as model_module
    from generate import question_parts
    from kernels.attention import attention_reference

    parts = question_parts(question.replace("<image>", "").strip(), 1)
    ids, _ = data.encode_chat([(parts, None)], tokenizer, model.config.vision.num_patches)
    is_image = torch.tensor(ids) == tokenizer.image_id
    seen = []

    def watch(q, k, v, causal=True, key_ranges=None):
        """Attention that notes the weights of the last query: values of one and zero show them."""
        keys = k.shape[1]
        ones = torch.eye(keys)[None, :, None].expand(1, keys, k.shape[2], keys)
        weights = attention_reference(q[:, -1:], k, ones)[0, 0]  # (H, Tk)
        seen.append(weights.mean(dim=0)[: len(is_image)][is_image])
        return attention_reference(q, k, v, causal, key_ranges)

    old, model_module.attention = model_module.attention, watch
    try:
        found = []
        for _ in range(most):
            seen.clear()
            hidden = model(torch.tensor([ids]), pixels)
            token = int(model.logits(hidden[0, -1]).argmax())
            found.append((token, torch.stack(seen).mean(dim=0)))
            if token == tokenizer.eos_id:
                break
            ids.append(token)
        return found
    finally:
        model_module.attention = old


def draw(run):
    from PIL import Image

    import vision
    from evaluation.heatmap import paint
    from generate import load_for_inference

    model, tokenizer = load_for_inference(run / "instruct", "cpu")
    file, questions = read_questions(run)
    config = model.config
    image = vision.load_image(run / "data" / file)
    pixels = vision.preprocess(image, config.vision.image_size, config.image_aspect_ratio)
    shown = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    parts, y, widest = [picture(MARGIN, MARGIN + 20, shown)], MARGIN, 0
    for question in questions:
        left = 2 * MARGIN + SIDE
        parts.append(text(left, y + 12, question.replace("<image>", "").strip()))
        answer = watch_answer(model, tokenizer, question, pixels[None])
        for n, (token, weights) in enumerate(answer):
            x = left + n * (SIDE + MARGIN)
            heat = ((weights - weights.min()) / (weights.max() - weights.min())).numpy()
            parts.append(picture(x, y + 20, paint(shown, heat, Image.Resampling.NEAREST)))
            name = f"{tokenizer.readable(tokenizer.piece(token))}  {weights.sum():.0%}"
            parts.append(text(x, y + SIDE + 34, name, GREY))
        widest = max(widest, len(answer))
        y += SIDE + 60
    note = "orange: most attention · percent: how much of it goes to the image at all"
    parts.append(text(MARGIN, y + 8, note, GREY))
    return svg(2 * MARGIN + SIDE + widest * (SIDE + MARGIN), y + 24, parts)
