"""The files from which transformers' AutoProcessor builds the same prompt and the same pixels.

They stand in templates/, with null for what depends on the model. The chat template does what
data.encode_chat does; the tokenizer puts the piece in front that begins a sequence.
"""

import base64
import json
from pathlib import Path

from tokenizer import CONTROL, UNKNOWN, ByteLevelTokenizer
from vocabulary.chat_markers import chat_style
from vocabulary.files import read_json

TEMPLATES = Path(__file__).parent / "templates"


def read_template(name):
    return read_json(TEMPLATES / name)


def chat_template(tokenizer):
    """Jinja code for transformers' apply_chat_template. A chat has the ids that a record of these
    messages has in training: data.encode_chat of read_conversation."""
    files = (TEMPLATES / f"{name}.jinja" for name in ("parts", chat_style(tokenizer)))
    template = "\n".join(file.read_text(encoding="utf-8").strip() for file in files)
    template = template.replace("SYSTEM_MESSAGE", json.dumps(tokenizer.system_message))
    template = template.replace("<s>", tokenizer.bos_piece)
    return template.replace("</s>", tokenizer.eos_piece)


def select_strategy(vision):
    """Which of the encoder's outputs LLaVA takes: "default" leaves out the class token."""
    return "default" if vision.is_clip else "full"


def image_processor(config):
    """The settings with which transformers does what vision.preprocess does."""
    size, mode = config.vision.image_size, config.image_aspect_ratio
    mean, std = config.vision.mean_and_std
    square = {"height": size, "width": size}
    if mode.startswith("resize"):
        return {
            "image_processor_type": "SiglipImageProcessor",
            "do_pad": None,
            "size": square,
            "resample": 2 if mode == "resize-bilinear" else 3,
            "do_center_crop": None,
            "crop_size": None,
            "image_mean": mean,
            "image_std": std,
        }
    return {
        # CLIP's crops the centre; LLaVA's can pad with the mean colour first.
        "image_processor_type": "LlavaImageProcessor" if mode == "pad" else "CLIPImageProcessor",
        "do_pad": mode == "pad",
        "size": {"shortest_edge": size},
        "crop_size": square,
        "image_mean": mean,
        "image_std": std,
    }


def special_pieces(tokenizer):
    """{role: piece} of those that the tokenizer has."""
    unk = (
        tokenizer.unk
        if isinstance(tokenizer, ByteLevelTokenizer)
        else tokenizer.piece(tokenizer.unk_id)
    )
    roles = {"bos_token": tokenizer.bos_piece, "eos_token": tokenizer.eos_piece, "unk_token": unk}
    if tokenizer.pad_id is not None:
        roles["pad_token"] = tokenizer.piece(tokenizer.pad_id)
    return {role: piece for role, piece in roles.items() if piece}


def processor_files(config, tokenizer):
    """{file name: JSON value} of the others."""
    roles = special_pieces(tokenizer)
    tokenizer_config = roles | {"model_max_length": config.text.max_position_embeddings}
    if isinstance(tokenizer, ByteLevelTokenizer):
        tokenizer_config["add_bos_token"] = chat_style(tokenizer) == "llava"
        tokenizer_config["system_message"] = tokenizer.system_message
    values = {
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": config.pad_token_id,
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": roles,
        "processor_config.json": {
            "patch_size": config.vision.patch_size,
            "num_additional_image_tokens": int(config.vision.is_clip),
            "vision_feature_select_strategy": select_strategy(config.vision),
        },
        "preprocessor_config.json": image_processor(config),
    }
    return {name: read_template(name) | value for name, value in values.items()}


def tokenizer_json(tokenizer):
    """A BPE in the format of Hugging Face's `tokenizers`. Not for a SentencePiece model with
    user-defined pieces."""
    data = read_template("tokenizer.json")
    # What begins a sequence is put in front, unless it is a part of the chat template.
    begin = tokenizer.bos_piece
    after = data["post_processor"]
    after["special_tokens"] = {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}}
    for steps in (after["single"], after["pair"]):
        steps[0]["SpecialToken"]["id"] = begin
    if isinstance(tokenizer, ByteLevelTokenizer):
        after = after if chat_style(tokenizer) == "llava" else None
        return tokenizer.file_content() | {"post_processor": after}

    # Text never becomes one of these.
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] = [
        {"id": i, "content": piece.text, **flags, "special": True}
        for i, piece in enumerate(tokenizer.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    ]

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
