"""The files from which transformers' AutoProcessor builds the same prompt and the same pixels.

They stand in templates/, with null for what depends on the model. The chat template does what
data.encode_chat does; the tokenizer puts the piece in front that begins a sequence.
"""

import base64
from pathlib import Path

from tokenizer import CONTROL, UNKNOWN
from vision import CLIP_MEAN, CLIP_STD
from vocabulary.files import read_json

TEMPLATES = Path(__file__).parent / "templates"


def read_template(name):
    return read_json(TEMPLATES / name)


def chat_template(tokenizer):
    """Jinja code for transformers' apply_chat_template."""
    template = (TEMPLATES / "chat_template.jinja").read_text(encoding="utf-8").strip()
    return template.replace("</s>", tokenizer.eos_piece)


def processor_files(config, tokenizer):
    """{file name: JSON value} of the others."""
    size, pad = config.vision.image_size, config.image_aspect_ratio == "pad"
    names = {
        "bos_token": tokenizer.bos_piece,
        "eos_token": tokenizer.eos_piece,
        "unk_token": tokenizer.piece(tokenizer.unk_id),
    }
    values = {
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": config.pad_token_id,
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": names | {"model_max_length": config.text.max_position_embeddings},
        "special_tokens_map.json": names,
        "processor_config.json": {"patch_size": config.vision.patch_size},
        "preprocessor_config.json": {
            # CLIP's crops the centre; LLaVA's can pad with the mean colour first.
            "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
            "do_pad": pad,
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    }

    files = {name: read_template(name) | value for name, value in values.items()}
    if tokenizer.pad_id is None:
        del files["tokenizer_config.json"]["pad_token"]
        del files["special_tokens_map.json"]["pad_token"]
    return files


def tokenizer_json(tokenizer):
    """A SentencePiece BPE in the format of Hugging Face's `tokenizers`. Not for one with
    user-defined pieces."""
    data = read_template("tokenizer.json")
    # Text never becomes one of these.
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] = [
        {"id": i, "content": piece.text, **flags, "special": True}
        for i, piece in enumerate(tokenizer.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    ]
    begin = tokenizer.bos_piece
    after = data["post_processor"]
    after["special_tokens"] = {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}}
    for steps in (after["single"], after["pair"]):
        steps[0]["SpecialToken"]["id"] = begin

    # The template has all steps before and after BPE. Keep those that the tokenizer takes.
    charsmap, prefix = tokenizer.charsmap, tokenizer.add_dummy_prefix
    trim = tokenizer.remove_extra_whitespaces
    before, after = data["normalizer"], data["decoder"]
    before["normalizers"][0]["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    keep = (charsmap, trim, trim, prefix, True)
    before["normalizers"] = [step for step, kept in zip(before["normalizers"], keep) if kept]
    keep = (True, tokenizer.byte_fallback, True, prefix)
    after["decoders"] = [step for step, kept in zip(after["decoders"], keep) if kept]

    data["model"] |= {
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "byte_fallback": tokenizer.byte_fallback,
        "vocab": tokenizer.ids,
        "merges": merge_rules(tokenizer),
    }
    return data


def merge_rules(tokenizer):
    """[[left, right]]: each way to join two pieces into a third, the best score first."""
    ids, scores = tokenizer.ids, tokenizer.scores
    rules = []
    for text, score in scores.items():
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in scores and right in scores:
                rules.append((-score, ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(rules)]
