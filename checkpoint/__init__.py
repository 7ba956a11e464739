"""Models on disk: a folder in the layout of Hugging Face's LLaVA.

Pipeline: tokenizer → vision → model → **checkpoint** → data → generate → train.
transformers opens the same folder with LlavaForConditionalGeneration and AutoProcessor:

    config.json           the shapes, in the fields of transformers' LlavaConfig
    model.safetensors     the weights; of a large model shards, model-00001-of-00006.safetensors …,
                          and their index
    tokenizer.model       the SentencePiece tokenizer that we read
    tokenizer.json, chat_template.jinja and other .json files
                          for the same prompt and the same pixels in transformers

The files of this package:

    folder.py        load_model, load_config, load_tokenizer, write_model, init_model
    safetensors.py   files of weights
    names.py         names of tensors: ours <-> those of published files
    config.py        config.json <-> ModelConfig
    processor.py     the files for AutoProcessor
    build.py         a model from published parts, with rows for new pieces

    python -m checkpoint show out/demo/instruct         # config and tensors
    python -m checkpoint build --llm Llama-2-13b-hf --vision clip-vit-large-patch14-336 \\
        --tokenizer merged.model -o START               # the start of a run
    python -m checkpoint build --llm llava-1.5-13b-hf -o START      # a published model as it is
    python -m checkpoint build … --dry-run   # from the configs alone, for train.py … --estimate
"""

from checkpoint.folder import (
    init_model,
    load_config,
    load_model,
    load_tokenizer,
    require_fit,
    write_model,
)
from checkpoint.safetensors import load_safetensors
from vocabulary.files import read_json, write_atomically, write_json

__all__ = [
    "init_model",
    "load_config",
    "load_model",
    "load_safetensors",
    "load_tokenizer",
    "read_json",
    "require_fit",
    "write_atomically",
    "write_json",
    "write_model",
]
