"""Real weights in, Hugging Face out: a model on disk is a folder in LLaVA's layout, which `LlavaForConditionalGeneration` and `AutoProcessor` open too.

Where it stands: `model → checkpoint → data`. The folder holds

    config.json          shapes, under the names of transformers' LlavaConfig
    model.safetensors    the weights: 8 bytes header length, a JSON header (name → dtype, shape, place), then raw bytes; large models lie in
                         shards, model-00001-of-00006.safetensors …, beside model.safetensors.index.json
    tokenizer.model      SentencePiece, for us; tokenizer.json is the same thing for transformers
    tokenizer_config.json, special_tokens_map.json, processor_config.json, preprocessor_config.json, chat_template.jinja, generation_config.json
                         what AutoProcessor needs to build the same prompt and the same pixels

    python checkpoint.py show out/demo/instruct                                                              # config and tensors
    python checkpoint.py build --llm Llama-2-13b-hf --vision clip-vit-large-patch14-336 --tokenizer merged.model -o START   # the start of a run
    python checkpoint.py build --llm llava-1.5-13b-hf -o START                                               # the published model, as it is
    python checkpoint.py build … --dry-run                                                                   # from the configs alone: names, shapes, bytes, memory

Files are mapped, never read as a whole; what is written goes out tensor by tensor. So 13 billion weights pass through the memory of a laptop.
"""

import argparse
import base64
import contextlib
import json
import math
import mmap
import os
import re
import sys
import zipfile
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import torch

from model import DecoderConfig, ModelConfig, Projector, XLlava
from tokenizer import CONTROL, UNKNOWN, Piece, Tokenizer, bpe, merge_vocabularies
from vision import CLIP_MEAN, CLIP_STD, VisionConfig

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_SIZE = 5_000_000_000  # bytes of one file at most, as transformers splits


# ---------------------------------------------------------------------------------------------- safetensors
def write_atomically(path, write):
    """Calls write(file) on a neighbour of `path`, then renames it in place: `path` is the old file or the whole new one, never half."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def safetensors_header(specs):
    """What stands before the data of {name: (dtype, shape)}: (bytes, {name: where its data begins in the file})."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the format wants the data aligned to 8 bytes
    head = len(head).to_bytes(8, "little") + head
    return head, {name: len(head) + header[name]["data_offsets"][0] for name in specs}


def plan_shards(specs, shard_size):
    """{file name: {name: (dtype, shape)}}: the tensors in order, cut where a file would grow beyond `shard_size` bytes."""
    shards, room = [], -1
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = dtype, shape
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
    }


def save_safetensors(specs, tensors, folder, shard_size=SHARD_SIZE, before_rename=lambda: None):
    """Writes model.safetensors, or shards and their index, into `folder`.

    specs: {name: (dtype, shape)} of all; tensors: (name, tensor) pairs in any order, taken one at a time, so that one tensor is all that is held.
    Everything is written beside and renamed in the end: what lay there stays whole if a pair is missing, too many or of another shape
    (ValueError), or if the disk is full."""
    folder, plan, place = Path(folder), plan_shards(specs, shard_size), {}
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(folder / (file + ".tmp"), "wb")) for file in plan]
            for file, shard in zip(files, plan.values()):
                head, starts = safetensors_header(shard)
                file.write(head)
                place |= {name: (file, at) for name, at in starts.items()}
            for name, tensor in tensors:
                if name not in place:
                    raise ValueError(
                        f"{folder}: can't save {name}: no such tensor, or it was saved before"
                    )
                (file, at), (dtype, shape) = place.pop(name), specs[name]
                if tuple(tensor.shape) != tuple(shape):
                    raise ValueError(
                        f"{folder}: can't save {name} {list(tensor.shape)}: it must be {list(shape)}"
                    )
                file.seek(at)
                if tensor.numel():
                    file.write(
                        tensor.detach()
                        .to("cpu", dtype)
                        .contiguous()
                        .reshape(-1)
                        .view(torch.uint8)
                        .numpy()
                    )
            if place:
                raise ValueError(
                    f"{folder}: can't save, {some(f'{name} is missing' for name in place)}"
                )
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        before_rename()
        for file in plan:
            os.replace(folder / (file + ".tmp"), folder / file)
    finally:
        for file in plan:
            (folder / (file + ".tmp")).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):
        if old.name not in plan:
            old.unlink()
    if len(plan) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        where = {name: file for file, shard in plan.items() for name in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": where},
        )


def load_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: a tensor's bytes are read when they are first touched.

    Raises ValueError in one line where the header and the file don't agree."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(
                f"{path}: not safetensors: a header of {length:,} bytes in a file of {size:,}"
            )
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    if not name.isprintable():  # it would break the one line of an error
                        raise ValueError(f"the name {name[:80]!r}")
                    if len(entry["shape"]) > 64 or not all(
                        type(n) is int and 0 <= n < 1 << 48 for n in (*entry["shape"], start, end)
                    ):
                        raise ValueError(
                            f"tensor {name}: a size that is not a whole number below 2^48, or more than 64 of them"
                        )
                    if entry["dtype"] not in DTYPES:
                        raise ValueError(
                            f"tensor {name} is {entry['dtype']!r}, supported: {', '.join(DTYPES)}"
                        )
                    entries[name] = DTYPES[entry["dtype"]], entry["shape"], start, end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not safetensors: bad header ({type(error).__name__}: {error})"
            ) from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors, reached = {}, 0
    for name, (dtype, shape, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        count = math.prod(shape)
        if end - start != count * dtype.itemsize or start != reached or end > size - 8 - length:
            raise ValueError(
                f"{path}: tensor {name}: bytes {start}–{end} don't hold {DTYPE_NAMES[dtype]} {shape}, overlap, leave a gap, or lie outside the file"
            )
        reached = end
        try:
            flat = (
                torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start)
                if count
                else torch.empty(0, dtype=dtype)
            )
            tensors[name] = flat.reshape(shape)
        except (RuntimeError, TypeError, OverflowError):
            raise ValueError(f"{path}: tensor {name}: no tensor has the shape {shape}") from None
    if reached != size - 8 - length:
        raise ValueError(f"{path}: {size - 8 - length - reached:,} bytes that belong to no tensor")
    return tensors


def load_weights(path):
    """{name: tensor} of a weights file, or of a folder's safetensors or pytorch_model.bin, in one file or in shards: all mapped, nothing read yet."""
    path = Path(path)
    if path.is_dir():
        kinds = [
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ]
        path = next((path / kind for kind in kinds if (path / kind).is_file()), path)
    if path.name.endswith(".index.json"):
        where, tensors = read_json(path.parent, path.name).get("weight_map"), {}
        if not isinstance(where, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in where.values()
        ):
            raise ValueError(
                f"{path}: weight_map must give the name of a file beside it for each tensor"
            )
        shards = sorted(set(where.values()))
        if absent := [file for file in shards if not (path.parent / file).is_file()]:
            raise ValueError(f"{path}: {some(absent)}: shards that are not there")
        for file in shards:
            tensors |= load_weights(path.parent / file)
        if absent := where.keys() - tensors.keys():
            raise ValueError(f"{path}: {some(sorted(absent))}: not in any shard")
        return tensors
    if path.is_dir():
        raise ValueError(
            f"{path}: no weights: neither model.safetensors, pytorch_model.bin, nor an index of shards"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:  # a pickle may run any code; weights_only allows tensors and nothing else
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (
        Exception
    ) as error:  # what torch raises for a damaged or a foreign file is of a dozen kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{path}: can't be read as weights ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise ValueError(f"{path}: not a table of tensors")
    return tensors


# ---------------------------------------------------------------------------------------------- names
# How each family of files begins the names of our five parts; "": nothing stands before them, None: it has no such part. We write the first row.
PARTS = ("vision.", "projector.0.", "projector.2.", "decoder.", "decoder.lm_head.")
LINEAR = ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")
MODEL_LINEAR = ("model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2.")
FAMILIES = {
    "LLaVA, transformers 4": (
        "vision_tower.vision_model.",
        *LINEAR,
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "LLaVA, transformers 5": (
        "vision_tower.",
        *LINEAR,
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "LLaVA, as modules of transformers 4.52": (
        "model.vision_tower.vision_model.",
        *MODEL_LINEAR,
        "model.language_model.",
        "lm_head.",
    ),
    "LLaVA, as modules of transformers 5": (
        "model.vision_tower.",
        *MODEL_LINEAR,
        "model.language_model.",
        "lm_head.",
    ),
    "LLaVA, as first published": (
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.0.",
        "model.mm_projector.2.",
        "model.",
        "lm_head.",
    ),
    "Llama": (None, None, None, "model.", "lm_head."),
    "CLIP": ("vision_model.", None, None, None, None),
    "CLIP's vision tower, transformers 5": ("", None, None, None, None),
    "projector": (None, "mm_projector.0.", "mm_projector.2.", None, None),
}
# Ours, and Hugging Face's behind that beginning. {n} and {m} stand for numbers, {p} for a projection, {w} for weight or bias.
TABLE = [
    ("vision.class_embed", "embeddings.class_embedding"),
    ("vision.patch_embed.weight", "embeddings.patch_embedding.weight"),
    ("vision.pos_embed", "embeddings.position_embedding.weight"),
    ("vision.pre_norm.{w}", "pre_layrnorm.{w}"),  # sic
    ("vision.layers.{n}.norm{m}.{w}", "encoder.layers.{n}.layer_norm{m}.{w}"),
    ("vision.layers.{n}.attn.{p}.{w}", "encoder.layers.{n}.self_attn.{p}.{w}"),
    ("vision.layers.{n}.fc{m}.{w}", "encoder.layers.{n}.mlp.fc{m}.{w}"),
    ("vision.post_norm.{w}", "post_layernorm.{w}"),
    ("projector.{n}.{w}", "{w}"),
    ("decoder.embed_tokens.weight", "embed_tokens.weight"),
    ("decoder.layers.{n}.attn.{p}.weight", "layers.{n}.self_attn.{p}.weight"),
    ("decoder.layers.{n}.mlp.{p}.weight", "layers.{n}.mlp.{p}.weight"),
    ("decoder.layers.{n}.input_norm.weight", "layers.{n}.input_layernorm.weight"),
    ("decoder.layers.{n}.post_norm.weight", "layers.{n}.post_attention_layernorm.weight"),
    ("decoder.norm.weight", "norm.weight"),
    ("decoder.lm_head.weight", "weight"),
]
FIELDS = {"n": r"\d+", "m": r"\d", "w": "weight|bias", "p": "[a-z]+_proj"}
ROWS = [
    (
        re.compile(re.sub(r"\\{(\w)\\}", lambda m: f"(?P<{m[1]}>{FIELDS[m[1]]})", re.escape(ours))),
        theirs,
    )
    for ours, theirs in TABLE
]
NOT_WEIGHTS = re.compile(
    r".*\.rotary_emb\.inv_freq|.*embeddings\.position_ids"
)  # old files hold what the config says anyway
CLIP_TEXT = re.compile(
    r"text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale"
)  # the half of CLIP that LLaVA leaves


@cache
def rename(name, family="LLaVA, transformers 4"):
    """Our name of a tensor as a family of files has it; None: that family has no such part. Raises KeyError where no row of TABLE fits."""
    prefix = FAMILIES[family][
        max(
            (i for i, part in enumerate(PARTS) if name.startswith(part)),
            key=lambda i: len(PARTS[i]),
            default=0,
        )
    ]
    for pattern, theirs in ROWS:
        if match := pattern.fullmatch(name):
            return None if prefix is None else prefix + theirs.format(**match.groupdict())
    raise KeyError(name)


def shapes(config):
    """{our name: shape} of all tensors of a model; a tied head has none of its own."""
    with torch.device("meta"):
        model = XLlava(config)
    return {
        name: tuple(t.shape)
        for name, t in model.state_dict().items()
        if not (config.text.tie_word_embeddings and name == "decoder.lm_head.weight")
    }


def match_names(tensors, wanted, where, aside=NOT_WEIGHTS):
    """{our name: tensor}: tensors with names of whichever family fits best, for `wanted` {our name: shape}.

    Raises ValueError that lists what is missing, of another shape, or left over (but for names that `aside` fits)."""
    family = max(
        FAMILIES, key=lambda family: sum(rename(name, family) in tensors for name in wanted)
    )
    theirs, problems = {name: rename(name, family) or name for name in wanted}, []
    for name, shape in wanted.items():
        tensor = tensors.get(theirs[name])
        if tensor is None:
            problems.append(f"missing {theirs[name]}")
        elif tensor.shape != shape:
            problems.append(f"{theirs[name]} is {list(tensor.shape)}, must be {list(shape)}")
    over = sorted(
        name
        for name in tensors.keys() - set(theirs.values())
        if not NOT_WEIGHTS.fullmatch(name) and not aside.fullmatch(name)
    )
    if (
        "decoder.lm_head.weight" not in wanted and "decoder.embed_tokens.weight" in wanted
    ):  # tied; some files hold the table twice all the same
        head, table = (
            rename("decoder.lm_head.weight", family),
            tensors.get(theirs["decoder.embed_tokens.weight"]),
        )
        if head in over and table is not None and torch.equal(tensors[head], table):
            over.remove(head)
    problems += [f"left over {name}" for name in over]
    if problems:
        raise ValueError(f"{where}: {some(problems, '; ')}")
    return {name: tensors[theirs[name]] for name in wanted}


def some(items, comma=", "):
    """The first eight, and how many more."""
    items = list(items)
    return comma.join(items[:8]) + (f"{comma}and {len(items) - 8} more" if len(items) > 8 else "")


# ---------------------------------------------------------------------------------------------- config
# What transformers takes where a config.json leaves a field out: its own defaults, which are not LLaVA's.
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
CLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def allow(data, where, **supported):
    """Refuses a field whose value we don't compute with; one that is absent or null is transformers' default, the first of the list."""
    for name, values in supported.items():
        if data.get(name) is not None and data[name] not in values:
            raise ValueError(
                f"{where}: {name} is {data[name]!r}, supported: {', '.join(map(repr, values))}"
            )


def take(kind, data, where):
    """The fields of one of our config classes out of a JSON object."""
    values = {f.name: data[f.name] for f in fields(kind) if data.get(f.name) is not None}
    for f in fields(kind):
        value = values.get(f.name, f.default)
        right = (
            isinstance(value, (int, float))
            if type(f.default) is float
            else type(value) is type(f.default)
        )
        if not right or (type(value) in (int, float) and value <= 0):
            raise ValueError(
                f"{where}: {f.name} is {value!r}, must be {type(f.default).__name__}"
                + (" above 0" if right else "")
            )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def section(data, name, where):
    """An object within a JSON object; an empty one where it is absent or null."""
    if not isinstance(data.get(name) or {}, dict):
        raise ValueError(f"{where}: {name} must be an object")
    return data.get(name) or {}


def check_layer(layer, vision, where):
    if (
        type(layer) is not int
        or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers
    ):
        raise ValueError(
            f"{where}: the vision feature layer is {layer!r}, must be one of the {vision.num_hidden_layers} layers"
        )


def read_text_config(data, where):
    """transformers' LlamaConfig as ours, as 4.x writes it (rope_theta, rope_scaling) or 5.x (rope_parameters)."""
    allow(
        data,
        where,
        model_type=["llama"],
        hidden_act=["silu"],
        attention_bias=[False],
        mlp_bias=[False],
    )
    rope = {
        "rope_theta": data.get("rope_theta"),
        **section(data, "rope_scaling", where),
        **section(data, "rope_parameters", where),
    }
    allow(
        {"rope scaling": rope.get("rope_type", rope.get("type"))},
        where,
        **{"rope scaling": ["default"]},
    )
    allow({**data, **rope}, where, partial_rotary_factor=[1.0])
    data = {
        **LLAMA_DEFAULTS,
        **{k: v for k, v in data.items() if v is not None},
        "rope_theta": rope["rope_theta"] or 10000.0,
    }
    sizes = take(
        DecoderConfig, {**data, "num_key_value_heads": 1, "head_dim": 2}, where
    )  # right, before we divide
    return take(
        DecoderConfig,
        {
            "num_key_value_heads": sizes.num_attention_heads,
            "head_dim": sizes.hidden_size // sizes.num_attention_heads,
            **data,
        },
        where,
    )


def read_vision_config(data, where):
    """transformers' CLIPVisionConfig, or the vision half of a CLIPConfig, as ours."""
    if data.get("model_type") == "clip":
        data = {
            **section(data, "vision_config", where),
            **section(data, "vision_config_dict", where),
            "model_type": "clip_vision_model",
        }
    allow(data, where, model_type=["clip_vision_model"], num_channels=[3])
    return take(
        VisionConfig, {**CLIP_DEFAULTS, **{k: v for k, v in data.items() if v is not None}}, where
    )


def read_config(data, where, image_aspect_ratio="pad"):
    """transformers' LlavaConfig as ours."""
    allow(
        data,
        where,
        model_type=["llava"],
        vision_feature_select_strategy=["default"],
        projector_hidden_act=["gelu"],
        multimodal_projector_bias=[True],
    )
    vision, text = section(data, "vision_config", where), section(data, "text_config", where)
    layer, image = (
        data.get("vision_feature_layer"),
        data.get("image_token_index", data.get("image_token_id")),
    )
    pad = data.get("pad_token_id", text.get("pad_token_id"))
    text = read_text_config(
        {
            **text,
            "tie_word_embeddings": bool(
                data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
            ),
        },
        where,
    )
    vision = read_vision_config(vision, where) if vision else VisionConfig()
    layer, image = -2 if layer is None else layer, 32000 if image is None else image
    check_layer(layer, vision, where)
    if type(image) is not int or not 0 <= image < text.vocab_size:
        raise ValueError(
            f"{where}: image_token_index is {image!r}, the vocabulary has {text.vocab_size:,} rows"
        )
    return ModelConfig(vision, text, layer, image_aspect_ratio, image, -1 if pad is None else pad)


def write_config(config, dtype, tokenizer):
    """Our ModelConfig as transformers' LlavaConfig, in words that both 4.x and 5.x read."""
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": config.pad_token_id,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "image_token_id": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "image_seq_length": config.vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": config.vision.hidden_size,
            **asdict(config.vision),
        },
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **ids,
            **asdict(config.text),
            "rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
        },
    }


# ---------------------------------------------------------------------------------------------- tokenizer and processor
# data.encode_chat in the words of transformers' apply_chat_template. The tokenizer puts <s> before it.
CHAT_TEMPLATE = r"""{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' }}
{%- set pictures = parts | selectattr('type', 'equalto', 'image') | list -%}
{%- for picture in pictures -%}{{ '<image>' }}{%- endfor -%}{{ '\n' if pictures else '' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}
{%- else -%}{{ raise_exception('only user and assistant speak, not ' + message['role']) }}
{%- endif -%}
{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}
{{ '</s>' if message['role'] == 'assistant' else '' }}
{%- endfor -%}
{{ ' ASSISTANT:' if add_generation_prompt else '' }}"""


def tokenizer_json(tokenizer):
    """The SentencePiece model as transformers' tokenizer.json: the same pieces, and each way to join two into a third, best score first."""
    ids, scores = tokenizer.ids, tokenizer.scores
    joins = []
    for text in scores:
        for left, right in ((text[:i], text[i:]) for i in range(1, len(text))):
            if left in scores and right in scores:
                joins.append((-scores[text], ids[left], ids[right], [left, right]))
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    bos = tokenizer.piece(tokenizer.bos_id)
    normal = (
        [
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(tokenizer.charsmap).decode(),
            }
        ]
        if tokenizer.charsmap
        else []
    )
    normal += [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ] * tokenizer.remove_extra_whitespaces
    normal += [{"type": "Prepend", "prepend": "▁"}] * tokenizer.add_dummy_prefix + [
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": p.text, **special}
            for i, p in enumerate(tokenizer.pieces)
            if p.type in (CONTROL, UNKNOWN)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normal},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
            + [{"type": "ByteFallback"}] * tokenizer.byte_fallback
            + [{"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
            * tokenizer.add_dummy_prefix,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": tokenizer.byte_fallback,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [pair for _, _, _, pair in sorted(joins)],
        },
    }


def load_tokenizer(path):
    """The tokenizer of a folder, or a .model file, with the control pieces that transformers keeps in tokenizer_config.json beside it
    (a LLaVA from Hugging Face has Llama's own .model, and <image> and <pad> only there)."""
    path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such tokenizer; only SentencePiece models are read: put the one beside it that the model was made with"
        )
    tokenizer, beside = Tokenizer.load(path), path.with_name("tokenizer_config.json")
    added = (
        section(read_json(path.parent, beside.name), "added_tokens_decoder", beside)
        if beside.is_file()
        else {}
    )
    for id, token in sorted((int(id), token["content"]) for id, token in added.items()):
        if id == tokenizer.vocab_size:
            tokenizer = Tokenizer([*tokenizer.pieces, Piece(token, 0.0, CONTROL)], tokenizer.fields)
        elif id > tokenizer.vocab_size or tokenizer.piece(id) != token:
            raise ValueError(
                f"{beside}: {token} is number {id}, which does not fit the {tokenizer.vocab_size:,} pieces of {path.name}"
            )
    return tokenizer


def processor_files(config, tokenizer):
    """{file name: JSON} of what AutoProcessor builds the same prompt and the same pixels from."""
    S, pad = config.vision.image_size, config.image_aspect_ratio == "pad"
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        **({"pad_token": "<pad>"} if tokenizer.pad_id is not None else {}),
    }
    return {
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": config.pad_token_id,
            "do_sample": False,
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.text.max_position_embeddings,
            "padding_side": "left",
            **names,
            "model_input_names": ["input_ids", "attention_mask"],
            "image_token": "<image>",
            "processor_class": "LlavaProcessor",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": True,
            "add_eos_token": False,
        },
        "special_tokens_map.json": names,
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": config.vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        # CLIPImageProcessor cuts the centre out; LlavaImageProcessor can pad with the mean colour first, as LLaVA-1.5 was trained
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": pad,
            "do_resize": True,
            "size": {"shortest_edge": S},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": S, "width": S},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    }


# ---------------------------------------------------------------------------------------------- folders
def load_json(path):
    """What a JSON file holds. Raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_json(folder, name):
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder: it has no {name}")
    data = load_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return data


def write_json(path, data, indent=2):
    write_atomically(
        path,
        lambda file: file.write(
            (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode()
        ),
    )


def load_config(folder):
    """The config of a LLaVA folder. Where its preprocessing says nothing of padding, LLaVA-1.5's is taken: that is what the weights were trained with."""
    data, where = read_json(folder, "config.json"), Path(folder) / "config.json"
    if "mm_vision_tower" in data or data.get("model_type") != "llava":
        wanted = f"this wants a LLaVA folder in transformers' layout: python checkpoint.py build --llm {folder} … makes one"
        raise ValueError(f"{where}: model_type is {data.get('model_type')!r}, {wanted}")
    picture = {}
    if (Path(folder) / "preprocessor_config.json").is_file():
        picture = read_json(folder, "preprocessor_config.json")
    elif (Path(folder) / "processor_config.json").is_file():  # transformers 5
        picture = read_json(folder, "processor_config.json").get("image_processor") or {}
    for name, clip in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        given = picture.get(name) or list(clip)
        if (
            not isinstance(given, list)
            or len(given) != 3
            or max(abs(a - b) for a, b in zip(given, clip)) > 1e-4
        ):
            raise ValueError(
                f"{folder}: its pictures have {name} {given}, only CLIP's {list(clip)} is supported"
            )
    return read_config(data, where, "square" if picture.get("do_pad") is False else "pad")


def load_model(folder, dtype=torch.float32):
    """The model of a LLaVA folder, on the CPU. Raises ValueError that lists the tensors which are missing, left over or of another shape."""
    config = load_config(folder)
    found = match_names(load_weights(folder), shapes(config), folder)
    with torch.device("meta"):
        model = XLlava(config)
    model.load_state_dict(
        {name: found[name].to(dtype, copy=True) for name in found}, strict=False, assign=True
    )
    if config.text.tie_word_embeddings:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return model


def write_model(config, tensors, tokenizer, folder, dtype=torch.float32, shard_size=SHARD_SIZE):
    """Writes a model folder from (our name, tensor) pairs in any order, each taken, written and let go: a model that is gathered from many
    processes, or streamed from other files, is never whole in memory. tokenizer: a Tokenizer, or the file of one.

    config.json goes before anything is replaced and comes back last: a folder that has one is whole."""
    folder = Path(folder)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)  # may be the one in `folder`
    files, wanted = processor_files(config, tokenizer), shapes(config)
    if tokenizer.user_defined or not tokenizer.is_bpe:
        print(
            f"{folder}: without tokenizer.json, which is written for a BPE without user-defined pieces: "
            "transformers makes one itself if protobuf is installed",
            file=sys.stderr,
        )
        del files["tokenizer.json"]
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(
        {rename(name): (dtype, shape) for name, shape in wanted.items()},
        (
            (rename(name), tensor)
            for name, tensor in tensors
            if name in wanted or name != "decoder.lm_head.weight"
        ),
        folder,
        shard_size,
        before_rename=lambda: (folder / "config.json").unlink(missing_ok=True),
    )
    tokenizer.save(folder / "tokenizer.model")
    write_atomically(
        folder / "chat_template.jinja", lambda file: file.write(CHAT_TEMPLATE.encode())
    )
    for name, data in files.items():
        write_json(folder / name, data, None if name == "tokenizer.json" else 2)
    write_json(
        folder / "config.json", write_config(config, str(dtype).removeprefix("torch."), tokenizer)
    )


def save_model(model, tokenizer_file, folder, dtype=torch.float32, shard_size=SHARD_SIZE):
    """Writes the model into `folder`."""
    write_model(model.config, model.state_dict().items(), tokenizer_file, folder, dtype, shard_size)


def init_model(preset, tokenizer):
    """A model with random weights, its vocabulary set to the tokenizer's."""
    text = replace(preset.text, vocab_size=tokenizer.vocab_size)
    return XLlava(
        replace(preset, text=text, image_token_id=tokenizer.image_id, pad_token_id=tokenizer.pad_id)
    ).init_weights()


# ---------------------------------------------------------------------------------------------- building
TABLES = ("decoder.embed_tokens.weight", "decoder.lm_head.weight")  # a row for each piece


@torch.no_grad()
def expand_rows(rows, old, new, init="mean", generator=None, dtype=None):
    """rows (V, C) of the pieces of `old`, with rows for what `new` has beyond them: (V', C); old rows are kept to the bit.

    init `mean`: a new piece's row is the average of the rows of the base pieces that it used to be split into, so that it starts where its
    spelling stood; `random` (X-LLaVA §3.1): drawn from a normal distribution as wide as the old rows. Control pieces, which had no
    spelling, start at the mean of all rows. Rows beyond the pieces of `old` are padding (LLaVA has 62): new pieces take their places."""
    n, m = old.vocab_size, new.vocab_size
    if m < n or any(old.piece(i) != new.piece(i) for i in range(n)):
        raise ValueError(
            f"the new tokenizer ({m:,} pieces) is not the old one ({n:,} pieces) with pieces appended"
        )
    if len(rows) < n:
        raise ValueError(f"the model has {len(rows):,} rows, its tokenizer {n:,} pieces")
    out = torch.empty(max(m, len(rows)), rows.shape[1], dtype=dtype or rows.dtype)
    out[: len(rows)] = rows
    total = square = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows[:n].split(128):  # never the whole table in another type
        total, square = total + part.double().sum(dim=0), square + part.double().square().sum(dim=0)
    mean, std = total / n, (square.mean() / n - (total.mean() / n) ** 2).sqrt().item()

    def spelling(piece):
        ids = []
        for part in bpe(list(piece), old.scores):
            ids += (
                [old.id(part)]
                if part in old.ids
                else [old.id(f"<0x{byte:02X}>") for byte in part.encode()]
                if old.byte_fallback
                else [old.unk_id]
            )
        return ids

    for i in range(n, m):
        if new.pieces[i].type == CONTROL:
            out[i] = mean
        elif init == "mean":
            out[i] = rows[spelling(new.piece(i))].float().mean(dim=0)
        else:
            out[i].normal_(0, std, generator=generator)
    return out


def find_parts(llm, vision=None, projector=None):
    """(config, {part: the folder or file it comes from}) of a model to build, from the config.json files alone; a projector that is in neither is to be made."""
    data, where, parts = read_json(llm, "config.json"), Path(llm) / "config.json", {"decoder": llm}
    if "mm_vision_tower" in data:  # LLaVA as first published: Llama's config, and a few names more
        allow(
            data,
            where,
            mm_projector_type=["mlp2x_gelu"],
            mm_vision_select_feature=["patch"],
            mm_use_im_start_end=[False],
        )
        mode = "pad" if data.get("image_aspect_ratio", "pad") == "pad" else "square"
        text = read_text_config({**data, "model_type": "llama"}, where)
        config = ModelConfig(
            text=text,
            vision_feature_layer=data.get("mm_vision_select_layer", -2),
            image_aspect_ratio=mode,
        )
        parts["projector"] = llm
    elif data.get("model_type") == "llava":
        config = load_config(llm)
        parts |= {"projector": llm, "vision": llm}
    else:
        config = ModelConfig(text=read_text_config(data, where))
    for part, given in (("vision", vision), ("projector", projector)):
        if given and part in parts:
            raise ValueError(f"{llm}: it brings its own {part}: leave out --{part}")
        if given:
            parts[part] = given
    if "vision" not in parts:
        elsewhere = (
            f" (mm_vision_tower: {data['mm_vision_tower']})" if "mm_vision_tower" in data else ""
        )
        raise ValueError(
            f"{llm}: its vision tower is not there{elsewhere}: give CLIP's folder with --vision"
        )
    if vision:
        config = replace(
            config,
            vision=read_vision_config(
                read_json(vision, "config.json"), Path(vision) / "config.json"
            ),
        )
        check_layer(config.vision_feature_layer, config.vision, where)
    return config, parts


def build(
    llm,
    out,
    vision=None,
    projector=None,
    tokenizer=None,
    init="mean",
    dtype=None,
    shard_size=SHARD_SIZE,
    seed=0,
    dry_run=False,
):
    """Assembles a model folder from published parts, tensor by tensor, and says what came from where.

    llm: a Llama folder, or a LLaVA in transformers' layout or in the one first published; vision: CLIP's folder, where llm brings no tower;
    projector: a file with one, as LLaVA publishes it after its first stage; tokenizer: a .model that begins with the pieces of llm's.
    dry_run reads configs and tokenizers, no weights."""
    config, parts = find_parts(llm, vision, projector)
    new = Tokenizer.load(tokenizer) if tokenizer else merge_vocabularies(load_tokenizer(llm), [])
    if None in (new.image_id, new.pad_id):
        raise ValueError(
            f"{tokenizer}: it has no <image> or no <pad>: python tokenizer.py merge adds them"
        )
    data, where = read_json(llm, "config.json"), Path(llm) / "config.json"
    dtype = (
        dtype
        or data.get("dtype")
        or data.get("torch_dtype")
        or section(data, "text_config", where).get("torch_dtype")
        or "float32"
    )
    allow({"dtype": dtype}, where, dtype=["float32", "float16", "bfloat16"])
    dtype = getattr(torch, dtype)
    wanted, rows = shapes(config), config.text.vocab_size
    config = replace(
        config,
        text=replace(config.text, vocab_size=max(rows, new.vocab_size)),
        image_token_id=new.image_id,
        pad_token_id=new.pad_id,
    )
    specs = {rename(name): (dtype, shape) for name, shape in shapes(config).items()}
    fresh = "projector" not in parts
    peak = max(math.prod(shape) for _, shape in specs.values()) * dtype.itemsize
    peak += (
        fresh
        * 4
        * sum(math.prod(shape) for name, shape in wanted.items() if name.startswith("projector."))
    )
    print_tensors(specs)
    print(
        f"{len(plan_shards(specs, shard_size))} file(s) · memory for tensors at most {peak / 1e9:.3f} GB beyond the mapped files "
        f"(the largest tensor{', a fresh projector in float32' * fresh}); some 0.2 GB for the tokenizers"
    )
    for part in ("decoder", "projector", "vision"):
        print(f"{part}: {parts.get(part, 'fresh')}")
    print(
        f"vocabulary: {rows:,} rows → {config.text.vocab_size:,} for {new.vocab_size:,} pieces; pictures: {config.image_aspect_ratio}; {str(dtype).removeprefix('torch.')}"
    )
    if dry_run:
        return
    old, weights, found = (
        load_tokenizer(llm),
        {source: load_weights(source) for source in set(parts.values())},
        {},
    )
    if parts["vision"] == vision and any(
        name.startswith("model.vision_tower.") for name in weights[llm]
    ):
        print(
            f"vision: the weights are those in {llm}, which may have been tuned; {vision} gives the shapes"
        )
        parts["vision"] = llm
    for source in dict.fromkeys(parts.values()):
        here = {
            name: shape
            for name, shape in wanted.items()
            if parts.get(name.partition(".")[0]) == source
        }
        found |= match_names(
            weights[source], here, source, CLIP_TEXT if source == vision else NOT_WEIGHTS
        )
    if fresh:
        torch.manual_seed(seed)
        made = Projector(config.vision.hidden_size, config.text.hidden_size)
        made.init_weights()
        found |= {f"projector.{name}": tensor for name, tensor in made.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    pairs = (
        (name, expand_rows(t, old, new, init, generator, dtype) if name in TABLES else t)
        for name, t in found.items()
    )
    write_model(config, pairs, new, out, dtype, shard_size)
    print(f"→ {out}")


def print_tensors(specs):
    """A line for each tensor of {name: (dtype, shape)}, and one for those that differ in the number of the layer only; then the sum."""
    alike = {}
    for name, (dtype, shape) in specs.items():
        alike.setdefault(
            (re.sub(r"\.layers\.\d+\.", ".layers.*.", name), dtype, tuple(shape)), []
        ).append(math.prod(shape))
    for (name, dtype, shape), counts in alike.items():
        print(
            f"{name:76} {len(counts):3} × {list(shape)!s:19} {DTYPE_NAMES[dtype]:4} {sum(counts) * dtype.itemsize:16,} bytes"
        )
    print(
        f"{len(specs):,} tensors, {sum(sum(c) for c in alike.values()):,} parameters, {sum(sum(c) * key[1].itemsize for key, c in alike.items()):,} bytes"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="config and tensors of a model folder")
    show.add_argument("folder")
    make = commands.add_parser("build", help="a model folder from published parts")
    make.add_argument("--llm", required=True, help="Llama's folder, or LLaVA's in either layout")
    make.add_argument("--vision", help="CLIP's folder, if --llm brings no vision tower")
    make.add_argument(
        "--projector",
        help="a file with a trained projector; else it is fresh, unless --llm brings one",
    )
    make.add_argument(
        "--tokenizer",
        help="the merged .model, which begins with the pieces of --llm; else its own and <image>, <pad>",
    )
    make.add_argument(
        "--init",
        choices=["mean", "random"],
        default="mean",
        help="how the rows of new pieces start",
    )
    make.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the weights written; else as in --llm",
    )
    make.add_argument(
        "--shard-size", type=float, default=SHARD_SIZE / 1e9, help="GB of one file at most"
    )
    make.add_argument("--seed", type=int, default=0)
    make.add_argument(
        "--dry-run", action="store_true", help="say what would be written; needs no weights"
    )
    make.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    if args.command == "build" and args.shard_size <= 0:
        parser.error("--shard-size must be above 0")
    if args.command == "build":
        return build(
            args.llm,
            args.out,
            args.vision,
            args.projector,
            args.tokenizer,
            args.init,
            args.dtype,
            int(args.shard_size * 1e9),
            args.seed,
            args.dry_run,
        )
    print(json.dumps(asdict(load_config(args.folder)), indent=2))
    print_tensors(
        {name: (tensor.dtype, tensor.shape) for name, tensor in load_weights(args.folder).items()}
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint.py: {error}")
