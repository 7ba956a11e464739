"""One HTML file with the page and the models in it: no server, no network.

    python -m chat out/demo/instruct --export page.html
    python -m chat out/demo/instruct --export page.html --stages vision align instruct --int8

model.js computes what tokenizer.py, vision.py, model.py, data.py and generate.py compute.
local_engine.js runs it in a worker, and is the page's `engine`. scene.js draws scenes of the demo,
and slides through the stages.
"""

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from chat.answers import FITS, find_base, find_examples, find_stages
from checkpoint import load_config, load_model, load_tokenizer
from model import parameter_counts
from tokenizer import Tokenizer
from vocabulary.chat_markers import chat_markers
from vocabulary.files import claim_output, write_atomically

HERE = Path(__file__).parent
MARK = "<!-- python -m chat --export -->\n"  # the first line of a page, by which it is known
MAX_PARAMETERS = 20_000_000  # a phone holds them as float32
UNUSED = "vision.final_norm."  # LLaVA never calls it


def export_page(folder, out, names=(), int8=False):
    """Writes the page with the model of a folder, or with the stages of its run that are named."""
    claim_output(out, is_page)
    folder = Path(folder).resolve()
    stages, names = find_stages(folder), names or [folder.name]
    if unknown := [name for name in names if name not in stages]:
        raise ValueError(f"{unknown[0]}: no stage of this run; it has {', '.join(stages)}")
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    check_supported(config, tokenizer, folder)

    buffer, tensors = bytearray(), {}
    for name in names:
        same = load_tokenizer(stages[name]).to_bytes() == tokenizer.to_bytes()
        if not same or load_config(stages[name]) != config:
            raise ValueError(f"{stages[name]}: its tokenizer or shape is not that of {folder}")
        tensors[name] = encode_tensors(load_model(stages[name]), buffer, int8)

    base = find_base(folder.parent, tokenizer)
    settings = {
        "info": {
            "stages": list(names),
            "stage": folder.name if folder.name in names else names[-1],
            "fit": FITS[config.image_aspect_ratio],
            "layers": config.text.num_hidden_layers,
            "heads": config.text.num_attention_heads,
            "images": find_examples(folder.parent / "data"),
        },
        "config": asdict(config),
        "tokenizer": tokenizer_spec(tokenizer),
        "base_size": base.vocab_size if base else 0,
        "chat": chat_markers(tokenizer)._asdict(),
        "tensors": tensors,
    }
    page = assemble(settings, bytes(buffer))
    write_atomically(out, lambda file: file.write(page.encode("utf-8")))
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, {', '.join(names)}")


def is_page(path):
    return path.read_text(encoding="utf-8").startswith(MARK)


def check_supported(config, tokenizer, folder):
    """ValueError for a family that model.js does not compute."""
    text, vision = config.text, config.vision
    size = sum(parameter_counts(config).values())
    reasons = {
        f"{size:,} parameters; a page takes {MAX_PARAMETERS:,}": size > MAX_PARAMETERS,
        "a byte-level BPE": not isinstance(tokenizer, Tokenizer),
        "a tokenizer that is Unigram, or normalises": not getattr(tokenizer, "has_reference", True),
        f"the decoder {text.model_type}": text.model_type != "llama",
        "rope_scaling": text.rope_scaling is not None,
        f"the encoder {vision.model_type}": not vision.is_clip,
        f"hidden_act {vision.hidden_act}": vision.hidden_act not in ("quick_gelu", "gelu"),
        f"image_aspect_ratio {config.image_aspect_ratio}": config.image_aspect_ratio != "pad",
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError(f"{folder}: has {found[0]}: --export is for models such as the demo's")


def tokenizer_spec(tokenizer):
    """What model.js's Tokenizer needs."""
    names = ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces", "unk_surface")
    names += ("unk_id", "eos_id", "image_id")
    return {
        **{name: getattr(tokenizer, name) for name in names},
        "pieces": [piece.text for piece in tokenizer.pieces],
        "scores": [piece.score for piece in tokenizer.pieces],
        "types": [piece.type for piece in tokenizer.pieces],
    }


# ------------------------------------------------------------------------------------ weights
def encode_tensors(model, buffer, int8=False):
    """Appends a model's tensors to a buffer -> {name: [kind, shape, offset]}.

    A tensor whose bytes are there already, from a stage that did not train it, is not repeated."""
    index = {}
    for name, tensor in model.state_dict().items():
        tied = name == "decoder.lm_head.weight" and model.config.text.tie_word_embeddings
        if tied or name.startswith(UNUSED):
            continue
        kind = "int8" if int8 and tensor.dim() > 1 else "fp16"
        encoded = encode_int8(tensor) if kind == "int8" else tensor.half().numpy().tobytes()
        offset = buffer.find(encoded)
        if offset < 0:
            buffer += bytes(-len(buffer) % 4)
            offset = len(buffer)
            buffer += encoded
        index[name] = [kind, list(tensor.shape), offset]
    return index


def encode_int8(tensor):
    """A scale for each row, float32, then all rows in whole numbers from −127 to 127."""
    rows = tensor.flatten(1)
    scales = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    whole = (rows / scales).round().to(torch.int8)
    return scales.numpy().tobytes() + whole.numpy().tobytes()


# ------------------------------------------------------------------------------------ the page
def assemble(settings, buffer):
    """The page as one file: its scripts and styles inline, the settings and weights as data."""

    def read(name):
        return (HERE / name).read_text(encoding="utf-8")

    # "<" in data could end the script that holds it.
    data = json.dumps(settings, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    weights = base64.b64encode(buffer).decode()
    blocks = [
        f'<script type="application/json" id="settings">{data}</script>',
        f'<script type="text/plain" id="weights">{weights}</script>',
        f'<script type="text/plain" id="model">\n{read("model.js")}</script>',
        f"<script>\n{read('local_engine.js')}</script>",
    ]

    page = read("page.html")
    styles = f"<style>\n{read('page.css')}</style>"
    for pattern, text in (
        (r'<link rel="stylesheet"[^>]*>', styles),
        (r'<script src="server_engine.js"></script>', "\n".join(blocks)),
        (r'<script src="page.js"></script>', f"<script>\n{read('page.js')}</script>"),
    ):
        page, count = re.subn(pattern, lambda _, text=text: text, page)
        assert count == 1, f"page.html: {pattern} is there {count} times"
    return MARK + page
