"""One HTML file with the page and the models in it: no server, no network.

    python -m chat out/demo/instruct --export page.html
    python -m chat out/demo/instruct --export page.html --stages vision align instruct

model.js computes what the Python files compute; local_engine.js runs it in a worker, as the page's
`engine`. scene.js draws scenes of the demo, and asks one stage after the other.
"""

import base64
import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from chat.answers import Answerer
from checkpoint import load_config, load_model, load_tokenizer
from model import parameter_counts
from tokenizer import Tokenizer
from training.pickles import require_plain_metadata
from vocabulary.chat_markers import chat_markers
from vocabulary.files import claim_output, read_json, write_atomically

HERE = Path(__file__).parent
MARK = "<!-- python -m chat --export -->\n"  # the first line of a page, by which it is known
MAX_PARAMETERS = 20_000_000  # a phone holds one stage as float32
# The page can't load or send anything.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 worker-src blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:">"""


def export_page(folder, out, names=()):
    """Writes the page with the model of a folder, or with the stages of its run that are named."""
    claim_output(out, is_page)
    folder = Path(folder).resolve()
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    check_supported(config, tokenizer, folder)
    answerer = Answerer(folder, "cpu")

    names, buffer, tensors = names or [folder.name], bytearray(), {}
    for name in names:
        model, its_tokenizer = load_stage(name, answerer.stages)
        if model.config != config or its_tokenizer.to_bytes() != tokenizer.to_bytes():
            raise ValueError(f"--stages {name}: its shape or tokenizer is not that of {folder}")
        tensors[name] = encode_tensors(model, buffer)

    base = answerer.tokenizers.get("base")
    shown = folder.name if folder.name in names else names[-1]
    settings = {
        "info": answerer.info | {"stages": names, "stage": shown},
        "config": asdict(config),
        "tokenizer": tokenizer_settings(tokenizer),
        "base_size": base.vocab_size if base else 0,
        "chat": chat_markers(tokenizer)._asdict(),
        "tensors": tensors,
        "scene": scene_settings(folder.parent / "data"),
    }
    page = assemble(settings, buffer).encode()
    write_atomically(out, lambda file: file.write(page))
    print(f"{out}: {len(page) / 1e6:.1f} MB with {', '.join(names)}")


def is_page(path):
    return path.read_text(encoding="utf-8").startswith(MARK)


def check_supported(config, tokenizer, folder):
    """ValueError for a family that model.js does not compute."""
    text, vision, ratio = config.text, config.vision, config.image_aspect_ratio
    size = sum(parameter_counts(config).values())
    reasons = {
        f"{size:,} parameters, more than {MAX_PARAMETERS:,}": size > MAX_PARAMETERS,
        "a byte-level BPE": not isinstance(tokenizer, Tokenizer),
        "a tokenizer that is no plain BPE": not getattr(tokenizer, "has_reference", True),
        f"a decoder like {text.model_type}": text.model_type != "llama",
        "rope_scaling": text.rope_scaling is not None,
        f"a {vision.model_type}": not vision.is_clip,
        f"hidden_act {vision.hidden_act}": vision.hidden_act not in ("quick_gelu", "gelu"),
        f"image_aspect_ratio {ratio}": ratio != "pad",
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError(f"{folder}: has {found[0]}; --export takes models such as the demo's")


def load_stage(name, stages):
    """(model, tokenizer) of a stage, or of one of its checkpoints: "instruct/step-00002400"."""
    stage, _, step = name.partition("/")
    if stage not in stages:
        raise ValueError(f"--stages {name}: this run has {', '.join(stages)}")
    model, folder = load_model(stages[stage]), stages[stage] / "checkpoints"
    if not step:
        return model, load_tokenizer(stages[stage])

    import torch.distributed.checkpoint as dcp  # takes a second to import

    # A checkpoint has what this stage trains. The rest is as in the finished model.
    if step not in (found := sorted(path.name for path in folder.glob("step-*[0-9]"))):
        raise ValueError(f"--stages {name}: {folder} has {', '.join(found) or 'none'}")
    require_plain_metadata(folder / step)
    saved = dcp.FileSystemReader(folder / step).read_metadata().state_dict_metadata
    weights = {f"weight.model.{key}": tensor for key, tensor in model.state_dict().items()}
    trained = [key for key in saved if key.startswith("weight.")]
    if not set(trained) <= set(weights):
        raise ValueError(f"--stages {name}: LoRA's weights are not read")
    with warnings.catch_warnings():  # it warns about a single process
        warnings.simplefilter("ignore")
        dcp.load({key: weights[key] for key in trained}, checkpoint_id=folder / step, no_dist=True)
    return model, load_tokenizer(stages[stage])


def tokenizer_settings(tokenizer):
    """What model.js's Tokenizer needs."""
    names = "byte_fallback add_dummy_prefix remove_extra_whitespaces unk_surface"
    names = f"{names} unk_id eos_id image_id".split()
    return {name: getattr(tokenizer, name) for name in names} | {
        "pieces": [piece.text for piece in tokenizer.pieces],
        "scores": [piece.score for piece in tokenizer.pieces],
        "types": [piece.type for piece in tokenizer.pieces],
    }


# ------------------------------------------------------------------------------------ weights
def encode_tensors(model, buffer):
    """Appends a model's tensors to a buffer -> {name: [shape, offset]}.

    A tensor whose bytes are there already, from a stage that did not train it, is not repeated."""
    index = {}
    for name, tensor in model.state_dict().items():
        is_tied = name == "decoder.lm_head.weight" and model.config.text.tie_word_embeddings
        if is_tied or name.startswith("vision.final_norm."):  # LLaVA never calls it
            continue
        encoded = encode_int8(tensor) if tensor.dim() > 1 else tensor.numpy().tobytes()
        offset = buffer.find(encoded)
        if offset < 0:
            offset = len(buffer)
            buffer += encoded
        index[name] = [list(tensor.shape), offset]
    return index


def encode_int8(tensor):
    """A scale for each row, float32, then all rows in whole numbers from −127 to 127."""
    rows = tensor.flatten(1)
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    whole = (rows / scales).round().to(torch.int8)
    return scales.numpy().tobytes() + whole.numpy().tobytes()


# ------------------------------------------------------------------------------------ the page
def scene_settings(folder):
    """What scene.js needs to draw scenes of the demo; None if a run has other data."""
    if not (folder / "world.json").is_file():
        return None
    from demo import atlas, backgrounds, drawing, world
    from demo.words import WORDS, fill, word_forms

    def draw(name):
        return data_url(backgrounds.draw_background(name, world.random_for("page", name)))

    def ask(code, colour):
        return fill(code, WORDS[code]["ask"]["what"][0], **word_forms(code, "colour", colour))

    codes = [code for code in WORDS if (folder / "text" / f"{code}.txt").is_file()]
    tables = ("kind", "colour", "size", "background")
    sheet = data_url(Image.open(atlas.ATLAS))
    return {
        "held_out": read_json(folder / "world.json")["held_out"],  # {kind: colour}
        "colours": world.COLOURS,
        "sizes": world.SIZES,
        "jitter": drawing.JITTER,
        "side": backgrounds.SIDE,
        "atlas": {"tile": atlas.TILE, "columns": atlas.COLUMNS, "url": sheet},
        "backgrounds": {name: draw(name) for name in backgrounds.BACKGROUND},
        "words": {code: {name: WORDS[code][name] for name in tables} for code in codes},
        "questions": {colour: [ask(code, colour) for code in codes] for colour in world.COLOURS},
    }


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def assemble(settings, buffer):
    """The page as one file: its scripts and styles inline, the settings and weights as data."""

    def script(text, attributes=""):
        return f"<script{attributes}>{text}</script>"

    def read(name):
        return "\n" + (HERE / name).read_text(encoding="utf-8")

    # "<" in data could end the script that holds it.
    data = json.dumps(settings, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    engine = script(data, ' type="application/json" id="settings"')
    engine += script(base64.b64encode(buffer).decode(), ' type="text/plain" id="weights"')
    engine += script(read("model.js"), ' type="text/plain" id="model"')
    page = MARK + read("page.html").strip()
    for tag, replacement in {
        '<meta charset="utf-8">': '<meta charset="utf-8">\n' + POLICY,
        '<link rel="stylesheet" href="page.css">': f"<style>{read('page.css')}</style>",
        '<script src="server_engine.js"></script>': engine + script(read("local_engine.js")),
        '<script src="page.js"></script>': script(read("page.js")) + script(read("scene.js")),
    }.items():
        before, tag, after = page.partition(tag)
        assert tag, "page.html has other links or scripts than export.py knows"
        page = before + replacement + after
    return page
