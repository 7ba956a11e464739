"""A model folder: read it, or its config or tokenizer alone; write one."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.config import get_object, llava_config, parse_llava_config
from checkpoint.names import HEAD, hf_name, match_tensors, tensor_shapes, tensor_specs
from checkpoint.processor import chat_template, processor_files
from checkpoint.safetensors import load_weights, save_safetensors
from model import XLlava
from tokenizer import Tokenizer
from vision import CLIP_MEAN, CLIP_STD
from vocabulary.files import read_json, write_atomically, write_json


def read_object(folder, name="config.json"):
    """-> (the JSON object in a file of a model folder, its path). ValueError if there is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder: it has no {name}")
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return data, path


def load_config(folder):
    """The ModelConfig of a LLaVA folder. ValueError if it is not a model that we compute."""
    data, where = read_object(folder)
    # LLaVA as first published is a "llava" too, but its config is Llama's.
    if "mm_vision_tower" in data or data.get("model_type") != "llava":
        raise ValueError(
            f"{where}: model_type is {data.get('model_type')!r}, not a LLaVA in the layout of "
            f"transformers: python -m checkpoint build --llm {folder} … makes one"
        )
    return parse_llava_config(data, where, read_aspect_ratio(folder))


def read_aspect_ratio(folder):
    """The folder's "pad" or "square" (see vision.preprocess). The default is LLaVA-1.5's, "pad".

    ValueError if pixels are normalised otherwise than by CLIP."""
    folder, settings = Path(folder), {}
    if (folder / "preprocessor_config.json").is_file():
        settings, _ = read_object(folder, "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():  # transformers 5
        processor, where = read_object(folder, "processor_config.json")
        settings = get_object(processor, "image_processor", where)

    for name, clip in (("image_mean", list(CLIP_MEAN)), ("image_std", list(CLIP_STD))):
        given = settings.get(name) or clip
        fits = isinstance(given, list) and len(given) == 3
        if not fits or max(abs(a - b) for a, b in zip(given, clip)) > 1e-4:
            raise ValueError(f"{folder}: {name} is {given}, only CLIP's {clip} is supported")
    return "square" if settings.get("do_pad") is False else "pad"


def load_tokenizer(path):
    """The tokenizer of a folder, or of a .model file."""
    return Tokenizer.load(path)


def load_model(folder, dtype=torch.float32):
    """The model of a LLaVA folder, on the CPU. ValueError lists tensors that do not fit."""
    config = load_config(folder)
    tensors = match_tensors(load_weights(folder), tensor_shapes(config), folder)
    with torch.device("meta"):
        model = XLlava(config)
    # Copied, because a mapped file may be replaced.
    state = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    if config.text.tie_word_embeddings:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return model


def write_model(config, tensors, tokenizer, folder, dtype=torch.float32):
    """Writes a model folder from (our name, tensor) pairs in any order, each written before the
    next is taken: a model gathered from many ranks is never whole in memory.

    tokenizer: a Tokenizer, or the file of one."""
    folder = Path(folder)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)  # before `folder` changes: it may be in there
    files = processor_files(config, tokenizer)
    if tokenizer.user_defined or not tokenizer.is_bpe:
        del files["tokenizer.json"]
        print(
            f"{folder}: without tokenizer.json, which needs a BPE without user-defined pieces; "
            "transformers makes one itself if protobuf is installed",
            file=sys.stderr,
        )

    def renamed():
        for name, tensor in tensors:
            if not (config.text.tie_word_embeddings and name == HEAD):
                yield hf_name(name), tensor

    # config.json goes before the weights change and comes last: a folder that has one is complete.
    def delete_config():
        (folder / "config.json").unlink(missing_ok=True)

    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensor_specs(config, dtype), renamed(), folder, delete_config)
    tokenizer.save(folder / "tokenizer.model")
    template = chat_template(tokenizer).encode()
    write_atomically(folder / "chat_template.jinja", lambda file: file.write(template))
    for name, value in files.items():
        write_json(folder / name, value, indent=None if name == "tokenizer.json" else 2)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", llava_config(config, dtype_name, tokenizer))


def init_model(preset, tokenizer):
    """A model of a preset's shape, with random weights and the tokenizer's vocabulary."""
    return XLlava(set_vocabulary(preset, tokenizer, tokenizer.vocab_size)).init_weights()


def set_vocabulary(config, tokenizer, vocab_size):
    """A ModelConfig for a tokenizer."""
    text = replace(config.text, vocab_size=vocab_size)
    ids = {"image_token_id": tokenizer.image_id, "pad_token_id": tokenizer.pad_id}
    return replace(config, text=text, **ids)
