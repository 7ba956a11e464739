"""A model folder: read it, or its config or tokenizer alone; write one."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.config import (
    ALLOWED,
    TEXT_DEFAULTS,
    check_fields,
    drop_nulls,
    get_object,
    llava_config,
    parse_llava_config,
)
from checkpoint.names import HEAD, hf_name, match_tensors, tensor_shapes, tensor_specs
from checkpoint.processor import chat_template, processor_files
from checkpoint.safetensors import describe_folder, load_weights, save_safetensors
from model import XLlava
from tokenizer import ByteLevelTokenizer, Tokenizer, load
from vocabulary.files import read_json, write_atomically, write_json


def read_object(folder, name="config.json"):
    """-> (the JSON object in a file of a model folder, its path). ValueError if there is none."""
    path = Path(folder) / name
    if not path.is_file():
        reason = describe_folder(folder) or f"it has no {name}"
        raise ValueError(f"{folder}: not a model folder: {reason}")
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return data, path


def load_config(folder):
    """The ModelConfig of a LLaVA folder. ValueError if it is not a model that we compute."""
    data, where = read_object(folder)
    # LLaVA as first published is a "llava" too, but its config is Llama's.
    kind = data.get("model_type")
    if kind in TEXT_DEFAULTS or "mm_vision_tower" in data:
        raise ValueError(
            f"{where}: model_type is {kind!r}, not a LLaVA in the layout of transformers: python "
            f"-m checkpoint build --llm {folder} … makes one"
        )
    if kind != "llava":
        raise ValueError(f"{where}: model_type is {kind!r}, supported: 'llava'")
    vision = get_object(data, "vision_config", where)
    ratio = read_aspect_ratio(folder, vision.get("model_type") == "siglip_vision_model")
    config = parse_llava_config(data, where, ratio)
    check_image_processors(folder, config.vision, ratio)
    return config


def image_processors(folder, is_siglip):
    """[(settings, their file)]: how transformers makes pixels. 4 and 5 have files of their own."""
    found, without_class_token = [], {}
    if is_siglip:
        without_class_token["num_additional_image_tokens"] = [0]
        without_class_token["vision_feature_select_strategy"] = ["full"]
    if (Path(folder) / "preprocessor_config.json").is_file():
        found.append(read_object(folder, "preprocessor_config.json"))
    if (Path(folder) / "processor_config.json").is_file():
        processor, where = read_object(folder, "processor_config.json")
        known = {name: processor.get(name) for name in ALLOWED["processor"]}
        check_fields(known, "processor", where, **without_class_token)
        found.append((get_object(processor, "image_processor", where), where))
    return [(settings, where) for settings, where in found if settings]


def read_aspect_ratio(folder, is_siglip=False):
    """How the folder's images become squares (see vision.preprocess). Defaults: LLaVA-1.5's "pad",
    SigLIP's "resize"."""
    if is_siglip:
        filters = [settings.get("resample") for settings, _ in image_processors(folder, is_siglip)]
        return "resize-bilinear" if 2 in filters else "resize"
    given = [settings.get("do_pad") is False for settings, _ in image_processors(folder, is_siglip)]
    if any(value != given[0] for value in given):
        raise ValueError(f"{folder}: do_pad differs between the files of the image processor")
    return "square" if any(given) else "pad"


def check_image_processors(folder, vision, image_aspect_ratio):
    """ValueError if a folder's image processor makes other pixels than vision.preprocess and
    vision.normalise."""
    S, pad = vision.image_size, image_aspect_ratio == "pad"
    square = {"height": S, "width": S}
    # A padded image is square: resizing it to a square is the same, and nothing is cropped.
    allowed = {
        "size": [S, {"shortest_edge": S}, *([square] if pad else [])],
        "crop_size": [S, square],
        "do_center_crop": [True, False] if pad else [True],
    }
    if not vision.is_clip:
        kind = "SiglipImageProcessor"
        allowed = {
            "image_processor_type": [kind, f"{kind}Fast", f"{kind}Pil"],
            "size": [square],
            "do_center_crop": [False],
            "do_pad": [False],
            "resample": [2 if image_aspect_ratio == "resize-bilinear" else 3],
        }
    for settings, where in image_processors(folder, not vision.is_clip):
        for name in ("size", "crop_size"):
            if isinstance(settings.get(name), dict):
                settings[name] = drop_nulls(settings[name])
        check_fields(settings, "image_processor", where, **allowed)

        mean, std = vision.mean_and_std
        numbers = {"image_mean": mean, "image_std": std, "rescale_factor": [1 / 255]}
        for name, wanted in numbers.items():
            given = settings.get(name)
            if given is not None and not is_close(given, wanted):
                only = ", ".join(map(str, wanted))
                raise ValueError(f"{where}: {name} is {given}, supported: {only}")


def is_close(given, wanted):
    """Whether a list of numbers, or one number for all of them, is what is wanted."""
    given = given if isinstance(given, list) else [given] * len(wanted)
    return len(given) == len(wanted) and all(
        isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=2.5e-3)
        for a, b in zip(given, wanted)
    )


def load_tokenizer(path):
    """The tokenizer of a folder, or of a .model or tokenizer.json file."""
    return load(path)


def require_fit(config, tokenizer, where):
    """ValueError unless each piece has a row of the embeddings, and <image> is the model's own.
    where: the tokenizer's folder or file."""
    rows, size = config.text.vocab_size, tokenizer.vocab_size
    if size > rows or tokenizer.image_id != config.image_token_id:
        raise ValueError(
            f"{where}: {size:,} pieces, <image> is {tokenizer.image_id}; the model has {rows:,} "
            f"embeddings, its <image> is {config.image_token_id}: give its own tokenizer, or make "
            "a model for this one: python -m checkpoint build --llm MODEL --tokenizer …"
        )


def load_model(folder, dtype=torch.float32):
    """The model of a LLaVA folder, on the CPU. dtype None: its weights stay in the mapped files, in
    the dtypes of these, until they are copied: such a model is not for use."""
    config = load_config(folder)
    tensors = match_tensors(load_weights(folder), tensor_shapes(config), folder)
    with torch.device("meta"):
        model = XLlava(config)
    # Copied, because a mapped file may be replaced.
    if dtype:
        tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.text.tie_word_embeddings:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return model


def write_model(config, tensors, tokenizer, folder, dtype=torch.float32):
    """Writes a model folder from (our name, tensor) pairs in any order, each written before the
    next is taken: a model gathered from many ranks is never whole in memory.

    tokenizer: a Tokenizer, or the file of one."""
    folder = Path(folder)
    if not isinstance(tokenizer, (Tokenizer, ByteLevelTokenizer)):
        tokenizer = load_tokenizer(tokenizer)  # before `folder` changes: it may be in there

    def renamed():
        for name, tensor in tensors:
            if not (config.text.tie_word_embeddings and name == HEAD):
                yield hf_name(name), tensor

    # config.json goes before the weights change and comes last: a folder that has one is complete.
    def delete_config():
        (folder / "config.json").unlink(missing_ok=True)

    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensor_specs(config, dtype), renamed(), folder, delete_config)
    write_settings(config, tokenizer, folder, dtype)


def write_settings(config, tokenizer, folder, dtype, **further):
    """Writes all files of a model folder but the weights. further: more fields of config.json."""
    folder = Path(folder)
    files = processor_files(config, tokenizer)
    is_sentencepiece = isinstance(tokenizer, Tokenizer)
    if is_sentencepiece and (tokenizer.user_defined or not tokenizer.is_bpe):
        del files["tokenizer.json"]
        (folder / "tokenizer.json").unlink(missing_ok=True)
        print(
            f"{folder}: without tokenizer.json, which needs a BPE without user-defined pieces; "
            "transformers makes one itself if protobuf is installed",
            file=sys.stderr,
        )

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / tokenizer.FILE_NAME)
    template = chat_template(tokenizer).encode()
    write_atomically(folder / "chat_template.jinja", lambda file: file.write(template))
    for name, value in files.items():
        write_json(folder / name, value, indent=None if name == "tokenizer.json" else 2)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", llava_config(config, dtype_name, tokenizer) | further)


def init_model(preset, tokenizer):
    """A model of a preset's shape, with random weights and the tokenizer's vocabulary."""
    return XLlava(set_vocabulary(preset, tokenizer, tokenizer.vocab_size)).init_weights()


def set_vocabulary(config, tokenizer, vocab_size):
    """A ModelConfig for a tokenizer."""
    text = replace(config.text, vocab_size=vocab_size)
    ids = {"image_token_id": tokenizer.image_id, "pad_token_id": tokenizer.pad_id}
    return replace(config, text=text, **ids)
