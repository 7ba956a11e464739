"""Files of weights: safetensors, in one file or in shards, and pytorch_model.bin (read only).

safetensors: 8 bytes with the length of the header, the header, the bytes of the tensors. The header
is JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, offsets from its end.

Files are mapped: bytes are read when a tensor is used. Tensors are written one at a time. So a
laptop can copy 13 billion weights. A file that can't be used is a ValueError of one line.
"""

import contextlib
import json
import math
import mmap
import os
import zipfile
from pathlib import Path

import torch

from vocabulary.command import first_few
from vocabulary.files import read_json, write_json
from vocabulary.formats import check_format

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
SHARD_SIZE = 5_000_000_000  # most bytes of a file, as in transformers
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What people have in place of such files.
OTHER_FILES = {
    "adapter_config.json": "adapters (LoRA) without their base: join them with peft's "
    "merge_and_unload(), and give the folder that save_pretrained() writes",
    "*.gguf": "GGUF is llama.cpp's format: give the folder with the original safetensors",
    "params.json": "Meta's own files: give the -hf folder of the same model",
    "*.msgpack": "weights for JAX: give the folder with safetensors",
    "*.h5": "weights for TensorFlow: give the folder with safetensors",
    "*.onnx": "weights for ONNX: give the folder with safetensors",
}


def num_bytes(dtype, shape):
    return math.prod(shape) * dtype.itemsize


# ------------------------------------------------------------------------------------ writing
def plan_shards(specs):
    """{name: (dtype, shape)} -> {file name: its part of them}, in order, by SHARD_SIZE bytes."""
    shards, free = [{}], SHARD_SIZE
    for name, spec in specs.items():
        size = num_bytes(*spec)
        # A tensor that is larger than a shard has a file of its own.
        if size > free and shards[-1]:
            shards.append({})
            free = SHARD_SIZE
        shards[-1][name] = spec
        free -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    total = len(shards)
    return {f"model-{i:05}-of-{total:05}.safetensors": part for i, part in enumerate(shards, 1)}


def encode_header(specs):
    """{name: (dtype, shape)} -> (the bytes before the data, {name: where its bytes begin})."""
    entries, starts, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, (dtype, shape) in specs.items():
        starts[name], end = end, end + num_bytes(dtype, shape)
        offsets = [starts[name], end]
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()

    # The format aligns the data to 8 bytes.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def save_safetensors(specs, tensors, folder, before_rename=None):
    """Writes model.safetensors, or shards and their index, into `folder`.

    specs: {name: (dtype, shape)} of all tensors. tensors: (name, tensor) in any order, each written
    before the next is taken. before_rename() is called when all is written; up to there the old
    files are untouched, also if the disk is full or a tensor does not fit `specs` (ValueError)."""
    folder, shards = Path(folder), plan_shards(specs)
    temporary = [folder / f"{file}.tmp" for file in shards]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            write_tensors(files, shards.values(), tensors, folder)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if before_rename:
            before_rename()
        for path, file in zip(temporary, shards):
            os.replace(path, folder / file)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)

    # An earlier save may have had other shards.
    for old in folder.glob("model*.safetensors*"):
        if old.name not in shards:
            old.unlink()
    if len(shards) > 1:
        total_size = sum(num_bytes(*spec) for spec in specs.values())
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_tensors(files, shards, tensors, folder):
    """Writes the headers, then each tensor to its place."""
    places = {}
    for file, specs in zip(files, shards):
        header, starts = encode_header(specs)
        file.write(header)
        places |= {name: (file, starts[name], *spec) for name, spec in specs.items()}

    # In the order in which they come. A tensor that is gathered or expanded is freed at once.
    for name, tensor in tensors:
        if name not in places:
            raise ValueError(f"{folder}: can't save {name}: no such tensor, or it was saved before")
        file, start, dtype, shape = places.pop(name)
        found, wanted = list(tensor.shape), list(shape)
        if found != wanted:
            raise ValueError(f"{folder}: can't save {name} {found}: it must be {wanted}")
        file.seek(start)
        if tensor.numel():
            flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())
    if places:
        raise ValueError(f"{folder}: can't save, {len(places)} missing: {first_few(places)}")


# ------------------------------------------------------------------------------------ reading
def load_safetensors(path):
    """{name: tensor} of a safetensors file."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return parse_safetensors(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not safetensors, or damaged ({reason})") from None


def parse_safetensors(data):
    """The bytes of a file -> {name: tensor}. One of the errors above if they are damaged."""
    length = int.from_bytes(data[:8], "little")
    data_start = 8 + length
    data_size = len(data) - data_start
    if data_size < 0 or length > 100_000_000:
        raise ValueError(f"a header of {length:,} bytes in a file of {len(data):,}")
    header = json.loads(data[8:data_start])
    header.pop("__metadata__", None)

    # The tensors must cover the data, byte for byte.
    tensors, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype_name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not name.isprintable():  # a line break would cut the error message in two
            raise ValueError(f"the name {name[:80]!r}")
        if dtype_name not in DTYPES:
            raise ValueError(f"{name} is {dtype_name!r}, supported: {', '.join(DTYPES)}")
        sizes = [*shape, start, end]
        if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes):
            raise ValueError(f"{name}: a size is not a whole number below 2^48, or more than 64")

        dtype, count = DTYPES[dtype_name], math.prod(shape)
        if start != reached or end > data_size or end - start != count * dtype.itemsize:
            raise ValueError(
                f"{name}: bytes {start}–{end} don't hold {dtype_name} {shape}, overlap, "
                "leave a gap, or lie outside the file"
            )
        reached = end

        flat = torch.empty(0, dtype=dtype)
        if count:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=data_start + start)
        try:
            tensors[name] = flat.reshape(shape)
        except (RuntimeError, OverflowError):
            raise ValueError(f"{name}: no tensor has the shape {shape}") from None
    if reached != data_size:
        raise ValueError(f"{data_size - reached:,} bytes that belong to no tensor")
    return tensors


def load_weights(path):
    """{name: tensor} of a file of weights, or of a folder's, in one file or in shards."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in WEIGHTS_FILES if (path / name).is_file()]
        if not found:
            files = WEIGHTS_FILES[1::2] if next(path.glob("*-of-*"), None) else WEIGHTS_FILES
            reason = describe_folder(path) or f"none of {', '.join(files)}"
            raise ValueError(f"{path}: no weights: {reason}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        check_format(file.read(64), path)
    if path.name.endswith(".index.json"):
        return load_shards(path)
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)


def describe_folder(path):
    """What a path is that has no weights, or no config.json, for us; "" if nothing tells."""
    path = Path(path)
    if is_dry_run(path):
        return "build --dry-run wrote it, for --estimate only: build it without --dry-run"
    for pattern, reason in OTHER_FILES.items():
        if next(path.glob(pattern), None) if path.is_dir() else path.match(pattern):
            return reason
    return "it is a file, not the folder with config.json" if path.is_file() else ""


def is_dry_run(folder):
    """Whether `build --dry-run` wrote a folder: config and tokenizer, without weights."""
    file = Path(folder) / "config.json"
    content = read_json(file) if file.is_file() else None
    return isinstance(content, dict) and content.get("is_dry_run") is True


def load_shards(index):
    """{name: tensor} of all the files that an index names."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    # A path must not lead out of the folder: others wrote the index.
    # An index in an index could name itself.
    names = [file for file in files if isinstance(file, str) and not file.endswith(".index.json")]
    if len(names) < len(files) or not all(file == Path(file).name for file in names):
        raise ValueError(f"{index}: weight_map must name a file beside it for each tensor")

    files, tensors = sorted(set(files)), {}
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        count = f"{len(missing)} of {len(files)} files are missing"
        raise ValueError(f"{index}: {count}, copy them there: {first_few(missing)}")
    for file in files:
        tensors |= load_weights(index.parent / file)
    return tensors


def load_pickle(path):
    """{name: tensor} of a file that torch.save wrote."""
    try:
        # A pickle could run any code; weights_only allows tensors only. PyTorch maps zip files.
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file raises one of a dozen types
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        raise ValueError(f"{path}: can't be read as weights ({reason})") from None
    values = tensors.values() if isinstance(tensors, dict) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise ValueError(f"{path}: not a table of tensors")
    return tensors
