"""A model on disk: a folder in Hugging Face's LLaVA layout, that `LlavaForConditionalGeneration.from_pretrained` opens too.

Where it stands: `model → checkpoint → data`. The folder holds

    config.json          shapes, under the names of transformers' LlavaConfig
    model.safetensors    the weights: 8 bytes header length, a JSON header (name → dtype, shape, place), then raw bytes
    tokenizer.model      SentencePiece
    tokenizer_config.json, special_tokens_map.json, processor_config.json, preprocessor_config.json, generation_config.json
                         what AutoProcessor needs to build the same prompt and the same pixels

    python checkpoint.py show out/demo/instruct                                    # config and tensors
    python checkpoint.py expand MODEL --tokenizer merged.model -o OUT              # rows for a new language's pieces (X-LLaVA's first step)
"""

import argparse
import json
import math
import mmap
import os
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from model import DecoderConfig, Model, ModelConfig
from tokenizer import CONTROL, Tokenizer, bpe
from vision import CLIP_MEAN, CLIP_STD, VisionConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


def save_safetensors(tensors, path, metadata=None):
    """Writes {name: tensor} as one safetensors file; tensors are taken one by one, so nothing is held twice."""
    header, at = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the format wants the data aligned to 8 bytes

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    write_atomically(path, write)


def load_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: a tensor's bytes are read when they are first touched.

    Raises ValueError in one line where the header and the file don't agree."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: not safetensors: a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    if not all(type(n) is int and n >= 0 for n in (*entry["shape"], start, end)):
                        raise ValueError("a size that is not a whole number")
                    entries[name] = DTYPES[entry["dtype"]], entry["shape"], start, end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not safetensors: bad header ({type(error).__name__}: {error})") from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors, reached = {}, 0
    for name, (dtype, shape, start, end) in sorted(entries.items(), key=lambda item: item[1][2]):
        count = math.prod(shape)
        if end - start != count * dtype.itemsize or start != reached or end > size - 8 - length:
            raise ValueError(f"{path}: tensor {name}: bytes {start}–{end} don't hold {NAMES[dtype]} {shape}, overlap, leave a gap, or lie outside the file")
        reached = end
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    if reached != size - 8 - length:
        raise ValueError(f"{path}: {size - 8 - length - reached:,} bytes that belong to no tensor")
    return tensors


# ---------------------------------------------------------------------------------------------- names
# ours ↔ Hugging Face's, as pairs of patterns; {} stands for a number. transformers 4.x's layout, which 5.x reads as well.
TABLE = [
    ("vision.class_embed", "vision_tower.vision_model.embeddings.class_embedding"),
    ("vision.patch_embed.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    ("vision.pos_embed", "vision_tower.vision_model.embeddings.position_embedding.weight"),
    ("vision.pre_norm.{w}", "vision_tower.vision_model.pre_layrnorm.{w}"),  # sic
    ("vision.layers.{n}.norm1.{w}", "vision_tower.vision_model.encoder.layers.{n}.layer_norm1.{w}"),
    ("vision.layers.{n}.attn.{p}.{w}", "vision_tower.vision_model.encoder.layers.{n}.self_attn.{p}.{w}"),
    ("vision.layers.{n}.norm2.{w}", "vision_tower.vision_model.encoder.layers.{n}.layer_norm2.{w}"),
    ("vision.layers.{n}.fc{m}.{w}", "vision_tower.vision_model.encoder.layers.{n}.mlp.fc{m}.{w}"),
    ("vision.post_norm.{w}", "vision_tower.vision_model.post_layernorm.{w}"),
    ("projector.0.{w}", "multi_modal_projector.linear_1.{w}"),
    ("projector.2.{w}", "multi_modal_projector.linear_2.{w}"),
    ("decoder.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("decoder.layers.{n}.attn.{p}.weight", "language_model.model.layers.{n}.self_attn.{p}.weight"),
    ("decoder.layers.{n}.mlp.{p}.weight", "language_model.model.layers.{n}.mlp.{p}.weight"),
    ("decoder.layers.{n}.input_norm", "language_model.model.layers.{n}.input_layernorm.weight"),
    ("decoder.layers.{n}.post_norm", "language_model.model.layers.{n}.post_attention_layernorm.weight"),
    ("decoder.norm", "language_model.model.norm.weight"),
    ("decoder.lm_head.weight", "language_model.lm_head.weight"),
]
FIELDS = {"n": r"\d+", "m": r"\d", "w": "weight|bias", "p": "[a-z]+_proj"}


def rename(name, to_ours):
    """One tensor's name in the other's language. Raises KeyError where no row of TABLE fits."""
    for ours, theirs in TABLE:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        pattern = re.sub(r"\\{(\w)\\}", lambda m: f"(?P<{m[1]}>{FIELDS[m[1]]})", re.escape(source))
        if match := re.fullmatch(pattern, name):
            return target.format(**match.groupdict())
    raise KeyError(name)


def config_to_json(config, dtype):
    """Our ModelConfig as transformers' LlavaConfig writes it."""
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
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": config.vision.hidden_size, **asdict(config.vision)},
        "text_config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": config.pad_token_id, **asdict(config.text)},
    }  # fmt: skip


def config_from_json(data, picture_mode="pad"):
    """transformers' LlavaConfig as ours; fields that neither names keep LLaVA-1.5's values."""

    def take(kind, source):
        return kind(**{f.name: source[f.name] for f in fields(kind) if f.name in source})

    return ModelConfig(
        take(VisionConfig, data.get("vision_config", {})), take(DecoderConfig, data.get("text_config", {})),
        data.get("vision_feature_layer", -2), picture_mode, data.get("image_token_id", data.get("image_token_index", -1)), data.get("pad_token_id", -1),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- folders
def save_model(model, tokenizer_file, folder, dtype=torch.float32):
    """Writes the model into `folder`. config.json goes first and comes back last: a folder that has one is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    config = model.config
    tokenizer_bytes = Path(tokenizer_file).read_bytes()  # may be the one in `folder`
    tied = config.text.tie_word_embeddings
    state = {rename(n, to_ours=False): t.to(dtype) for n, t in model.state_dict().items() if not (tied and n == "decoder.lm_head.weight")}
    save_safetensors(state, folder / "model.safetensors")
    write_atomically(folder / "tokenizer.model", lambda file: file.write(tokenizer_bytes))
    S = config.vision.image_size
    texts = {
        "config": config_to_json(config, str(dtype).removeprefix("torch.")),
        "generation_config": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": config.pad_token_id, "do_sample": False},
        "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
                             "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<image>", "processor_class": "LlavaProcessor", "clean_up_tokenization_spaces": False},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "processor_config": {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": config.vision.patch_size,
                             "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        "preprocessor_config": {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "picture_mode": config.picture_mode,
                                "do_convert_rgb": True, "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255,
                                "size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    }  # fmt: skip
    for name, data in reversed(texts.items()):
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))


def read_json(folder, name):
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder: it has no {name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def load_config(folder):
    mode = read_json(folder, "preprocessor_config.json").get("picture_mode", "pad")
    return config_from_json(read_json(folder, "config.json"), mode)


def load_tokenizer(folder):
    return Tokenizer.load(Path(folder) / "tokenizer.model")


def load_model(folder, dtype=torch.float32):
    """The model of a folder, on the CPU. Raises ValueError that lists the tensors which are missing, left over or of another shape."""
    config = load_config(folder)
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: it has no model.safetensors")
    with torch.device("meta"):
        model = Model(config)
    wanted, found, problems = model.state_dict(), {}, []
    for name, tensor in load_safetensors(file).items():
        try:
            found[rename(name, to_ours=True)] = tensor
        except KeyError:
            problems.append(f"unknown {name}")
    if config.text.tie_word_embeddings:
        found["decoder.lm_head.weight"] = found.get("decoder.embed_tokens.weight")
    for name, tensor in wanted.items():
        if found.get(name) is None:
            problems.append(f"missing {name}")
        elif found[name].shape != tensor.shape:
            problems.append(f"{name} is {list(found[name].shape)}, must be {list(tensor.shape)}")
    problems += [f"left over {name}" for name in found.keys() - wanted.keys()]
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""))
    model.load_state_dict({name: found[name].to(dtype, copy=True) for name in wanted}, assign=True)
    if config.text.tie_word_embeddings:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return model


def fresh_model(preset, tokenizer):
    """A model with random weights, its vocabulary set to the tokenizer's."""
    text = replace(preset.text, vocab_size=tokenizer.vocab_size)
    return Model(replace(preset, text=text, image_token_id=tokenizer.image_id, pad_token_id=tokenizer.pad_id)).init_weights()


def expand_vocabulary(model, old, new, init="mean", generator=None):
    """The model with rows for the pieces that `new` has beyond `old`, in the input and output embeddings; old rows are kept to the bit.

    init `mean`: a new piece's row is the average of the rows of the base pieces that it used to be split into, so that it starts where its
    spelling stood; `random` (X-LLaVA §3.1): drawn from a normal distribution as wide as the old rows. Control pieces, which had no
    spelling, start at the mean of all rows. Raises ValueError where `new` does not begin with the pieces of `old`."""
    n, m = old.vocab_size, new.vocab_size
    if m < n or any(old.piece(i) != new.piece(i) for i in range(n)):
        raise ValueError(f"the new tokenizer ({m:,} pieces) is not the old one ({n:,} pieces) with pieces appended")
    if model.config.text.vocab_size != n:
        raise ValueError(f"the model has {model.config.text.vocab_size:,} rows, its tokenizer {n:,} pieces")
    if init not in ("mean", "random"):
        raise ValueError(f"init {init!r}: must be mean or random")

    def spelling(piece):
        ids = []
        for part in bpe(list(piece), old.scores):
            ids += [old.id(part)] if part in old.ids else [old.id(f"<0x{byte:02X}>") for byte in part.encode()] if old.byte_fallback else [old.unk_id]
        return ids

    config = replace(model.config, text=replace(model.config.text, vocab_size=m), image_token_id=new.image_id if new.image_id is not None else -1, pad_token_id=new.pad_id if new.pad_id is not None else -1)
    with torch.device("meta"):
        bigger = Model(config)
    state = model.state_dict()
    for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
        rows = state[name]
        added = torch.empty(m - n, rows.shape[1], dtype=rows.dtype)
        if init == "random":
            added.normal_(0, rows.float().std().item(), generator=generator)
        for i in range(n, m):
            if new.pieces[i].type == CONTROL:
                added[i - n] = rows.float().mean(dim=0)
            elif init == "mean":
                added[i - n] = rows[spelling(new.piece(i))].float().mean(dim=0)
        state[name] = torch.cat([rows, added])
    bigger.load_state_dict(state, assign=True)
    if config.text.tie_word_embeddings:
        bigger.decoder.lm_head.weight = bigger.decoder.embed_tokens.weight
    return bigger


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["show", "expand"])
    parser.add_argument("folder")
    parser.add_argument("--tokenizer", help="expand: the merged .model, which begins with the folder's own pieces")
    parser.add_argument("--init", choices=["mean", "random"], default="mean", help="expand: how new rows start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", help="expand: the new folder")
    args = parser.parse_args()
    if args.command == "expand":
        if not (args.tokenizer and args.out):
            parser.error("expand wants --tokenizer and -o")
        model, new = load_model(args.folder), Tokenizer.load(args.tokenizer)
        model = expand_vocabulary(model, load_tokenizer(args.folder), new, args.init, torch.Generator().manual_seed(args.seed))
        save_model(model, args.tokenizer, args.out)
        return print(f"{args.out}: {new.vocab_size:,} rows, the new ones {args.init}")
    config = load_config(args.folder)
    print(json.dumps(asdict(config), indent=2))
    for name, tensor in load_safetensors(Path(args.folder) / "model.safetensors").items():
        print(f"{name:70} {NAMES[tensor.dtype]:5} {list(tensor.shape)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint.py: {error}")
