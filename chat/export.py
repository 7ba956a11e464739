"""One HTML file with the page and the models in it: no server, no network.

    python -m chat out/demo/instruct --export page.html
    python -m chat out/demo/instruct --export page.html --int8 --stages vision align instruct
    python -m chat out/demo/instruct --export page.html --stages instruct/step-00001000 instruct

model.js computes what tokenizer.py, vision.py, model.py, data.py and generate.py compute.
local_engine.js runs it in a worker, and is the page's `engine`. scene.js draws scenes of the demo,
and goes through the stages for one question.
"""

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from chat.answers import Answerer
from checkpoint import load_config, load_model, load_tokenizer
from model import parameter_counts
from tokenizer import Tokenizer
from vocabulary.chat_markers import chat_markers
from vocabulary.files import claim_output, read_json, write_atomically

HERE = Path(__file__).parent
MARK = "<!-- python -m chat --export -->\n"  # the first line of a page, by which it is known
MAX_PARAMETERS = 20_000_000  # a phone holds one stage as float32
UNUSED = "vision.final_norm."  # LLaVA never calls it
CHARSET = '<meta charset="utf-8">'
# The page can't load or send anything.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' blob:; worker-src blob:"
)


def export_page(folder, out, names=(), int8=False):
    """Writes the page with the model of a folder, or with the stages of its run that are named.
    A name may be a checkpoint's: instruct/step-00001000."""
    claim_output(out, is_page)
    folder = Path(folder).resolve()
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    check_supported(config, tokenizer, folder)
    answerer = Answerer(folder, "cpu")
    names, buffer, tensors = names or [folder.name], bytearray(), {}
    for name in names:
        model = load_stage(name, answerer.stages)
        stage = answerer.stages[name.partition("/")[0]]
        if model.config != config or load_tokenizer(stage).to_bytes() != tokenizer.to_bytes():
            raise ValueError(f"{stage}: its shape or tokenizer is not that of {folder}")
        tensors[name] = encode_tensors(model, buffer, int8)

    base, shown = answerer.tokenizers.get("base"), folder.name
    settings = {
        "info": answerer.info
        | {"stages": list(names), "stage": shown if shown in names else names[-1]},
        "config": asdict(config),
        "tokenizer": tokenizer_spec(tokenizer),
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
    text, vision = config.text, config.vision
    size = sum(parameter_counts(config).values())
    reasons = {
        f"{size:,} parameters, more than {MAX_PARAMETERS:,}": size > MAX_PARAMETERS,
        "a byte-level BPE": not isinstance(tokenizer, Tokenizer),
        "a tokenizer that is no plain BPE": not getattr(tokenizer, "has_reference", True),
        f"the decoder {text.model_type}": text.model_type != "llama",
        "rope_scaling": text.rope_scaling is not None,
        f"the encoder {vision.model_type}": not vision.is_clip,
        f"hidden_act {vision.hidden_act}": vision.hidden_act not in ("quick_gelu", "gelu"),
        f"image_aspect_ratio {config.image_aspect_ratio}": config.image_aspect_ratio != "pad",
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError(f"{folder}: has {found[0]}; --export takes models such as the demo's")


def load_stage(name, stages):
    """The model of a stage, or of one of its checkpoints: "instruct/step-00001000"."""
    stage, _, step = name.partition("/")
    if stage not in stages:
        raise ValueError(f"--stages {name}: this run has {', '.join(stages)}")
    model = load_model(stages[stage])
    if not step:
        return model

    # A checkpoint has what this stage trains; the rest is as in the finished model.
    import torch.distributed.checkpoint as dcp  # takes a second to import

    from training.resume import no_warnings

    folder = stages[stage] / "checkpoints"
    if step not in (found := sorted(path.name for path in folder.glob("step-*[0-9]"))):
        raise ValueError(f"--stages {name}: {folder} has {', '.join(found) or 'none'}")
    saved = dcp.FileSystemReader(folder / step).read_metadata().state_dict_metadata
    ours = {f"weight.model.{key}": tensor for key, tensor in model.state_dict().items()}
    trained = {key for key in saved if key.startswith("weight.")}
    if not trained <= set(ours):
        raise ValueError(f"{folder / step}: its weights are not those of the model, but LoRA's")
    with no_warnings():
        dcp.load({key: ours[key] for key in trained}, checkpoint_id=folder / step, no_dist=True)
    return model


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
        is_tied = name == "decoder.lm_head.weight" and model.config.text.tie_word_embeddings
        if is_tied or name.startswith(UNUSED):
            continue
        kind = "int8" if int8 and tensor.dim() > 1 else "fp16"
        encoded = encode_int8(tensor) if kind == "int8" else tensor.half().numpy().tobytes()
        offset = buffer.find(encoded)
        if offset < 0:
            offset = len(buffer)
            buffer += encoded
        index[name] = [kind, list(tensor.shape), offset]
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
    from demo.atlas import ATLAS, COLUMNS, TILE
    from demo.backgrounds import BACKGROUND, SIDE, draw_background
    from demo.drawing import JITTER
    from demo.words import WORDS
    from demo.world import COLOURS, SIZES, random_for

    tables = ("kind", "colour", "size", "background")
    languages = [code for code in WORDS if (folder / "text" / f"{code}.txt").is_file()]
    backgrounds = {name: draw_background(name, random_for("page", name)) for name in BACKGROUND}
    return {
        "held_out": read_json(folder / "world.json")["held_out"],  # {kind: colour}
        "colours": COLOURS,
        "sizes": SIZES,
        "jitter": JITTER,
        "side": SIDE,
        "atlas": {"tile": TILE, "columns": COLUMNS, "url": data_url(Image.open(ATLAS))},
        "backgrounds": {name: data_url(image) for name, image in backgrounds.items()},
        "words": {code: {name: WORDS[code][name] for name in tables} for code in languages},
        "questions": {code: example_questions(code) for code in languages},
    }


def example_questions(language):
    """{kind or colour: a question about the thing}: what is red? Where is the cat?"""
    from demo.words import WORDS, fill, word_forms
    from demo.world import COLOURS, KINDS

    ask, questions = WORDS[language]["ask"], {}
    for colour in COLOURS:
        forms = word_forms(language, "colour", colour)
        questions[colour] = fill(language, ask["what"][0], **forms)
    for kind in KINDS:
        forms = word_forms(language, "kind", kind)
        it = fill(language, WORDS[language]["it"]["kind"], **forms)
        questions[kind] = fill(language, ask["where"][0], it=it, **forms)
    return questions


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def assemble(settings, buffer):
    """The page as one file: its scripts and styles inline, the settings and weights as data."""

    def inline(name):
        return "\n" + (HERE / name).read_text(encoding="utf-8")

    # "<" in data could end the script that holds it.
    data = json.dumps(settings, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    engine = [
        f'<script type="application/json" id="settings">{data}</script>',
        f'<script type="text/plain" id="weights">{base64.b64encode(buffer).decode()}</script>',
        f'<script type="text/plain" id="model">{inline("model.js")}</script>',
        f"<script>{inline('local_engine.js')}</script>",
    ]
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    parts = {
        CHARSET: f"{CHARSET}\n{policy}",
        '<link rel="stylesheet" href="page.css">': f"<style>{inline('page.css')}</style>",
        '<script src="server_engine.js"></script>': "\n".join(engine),
        '<script src="page.js"></script>': f"<script>{inline('page.js')}</script>\n"
        f"<script>{inline('scene.js')}</script>",
    }
    page = MARK + (HERE / "page.html").read_text(encoding="utf-8")
    for tag, replacement in parts.items():
        before, tag, after = page.partition(tag)
        assert tag, "page.html has another link or script than export.py replaces"
        page = before + replacement + after
    return page
