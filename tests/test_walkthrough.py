"""docs/walkthrough.md follows one sample through the functions that touch it. Here it goes the same
way through a tiny model, and every shape that the page states is the one that comes out."""

import importlib
import re
from functools import wraps
from pathlib import Path

import pytest
import torch

import data
import generate
import model as model_module
from model import XLlava

PAGE = (Path(__file__).parent.parent / "docs" / "walkthrough.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w.]+)` \| .* \|(?: `(.*)`)? ?\|$", re.MULTILINE)
STATED = ROW.findall(PAGE)  # (dotted name, shape or "")
# Functions that others import by name: where the call that the page means finds them.
CALLED_AS = {
    "kernels.rms_norm.rms_norm": "model.rms_norm",
    "kernels.rope.rope": "model.apply_rope",
    "kernels.attention.attention": "model.attention",
    "kernels.attention.attention_with_kvcache": "model.attention_with_kvcache",
    "kernels.swiglu.swiglu": "model.swiglu",
    "kernels.cross_entropy.linear_cross_entropy": "model.linear_cross_entropy",
}


def resolve(dotted):
    """(owner, name, value) of "module.function" or "module.Class.method"."""
    parts, owner = dotted.split("."), None
    for n in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:n]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[n:-1]:
        owner = getattr(owner, part)
    return owner, parts[-1], getattr(owner, parts[-1])


def main_tensor(result):
    """What the page gives the shape of: of several results the first, of a batch its ids."""
    if isinstance(result, dict):
        return result["ids"]
    if isinstance(result, generate.KVCache):
        return result.k
    if isinstance(result, tuple) and isinstance(result[0], generate.KVCache):
        return result[1]  # prefill: (cache, hidden)
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def seen(monkeypatch):
    """{dotted name of the page: shape of the first result}, filled while the code runs."""
    shapes = {}

    def record(dotted, function):
        @wraps(function)
        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            value = main_tensor(result)
            shape = tuple(value.shape) if hasattr(value, "shape") else (len(value),)
            shapes.setdefault(dotted, shape)
            return result

        return recorded

    for dotted, shape in STATED:
        if shape and dotted != "model.KVCache":
            owner, name, function = resolve(CALLED_AS.get(dotted, dotted))
            monkeypatch.setattr(owner, name, record(dotted, function))

    class RecordedCache(model_module.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            shapes.setdefault("model.KVCache", tuple(self.k.shape))

    monkeypatch.setattr(generate, "KVCache", RecordedCache)
    return shapes


def test_every_function_of_the_page_is_there():
    assert len(STATED) > 30
    for dotted, _ in STATED:
        resolve(dotted)


def test_every_file_of_the_page_is_there():
    root = Path(__file__).parent.parent
    files = re.findall(r"`([\w/]+\.py)\b", PAGE)
    assert len(files) > 10
    for file in files:
        assert (root / file).is_file(), file


def test_the_shapes_of_the_page_come_out(seen, config, tokenizer, world):
    dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    sample = dataset.sample(0)
    assert len(sample.pixels) == 1

    # A training sample, as train.py runs it.
    batch = data.collate([sample], tokenizer.pad_id)
    torch.manual_seed(0)
    model = XLlava(config).init_weights().train()
    model.loss(
        batch["ids"], batch["targets"], torch.stack(sample.pixels), batch["layout"]
    ).backward()
    of_training = dict(seen)

    # The question as a prompt, and the first tokens of an answer.
    conversation = data.read_conversation(dataset.record(0))
    prompt, _ = data.encode_chat([(conversation.turns[0][0], None)], tokenizer, 4)
    options = {"max_new_tokens": 16, "eos_id": -1}
    list(generate.generate(model.eval(), [prompt], torch.stack(sample.pixels), **options))

    text, image = config.text, config.vision
    letters = {
        "S": image.image_size,
        "N": image.num_patches,
        "E": image.hidden_size,
        "C": text.hidden_size,
        "H": text.num_attention_heads,
        "K": text.num_key_value_heads,
        "D": text.head_dim,
        "F": text.intermediate_size,
        "L": text.num_hidden_layers,
        "V": text.vocab_size,
        "T": len(sample.ids) - 1,
        "n": 64,
        "P": len(prompt),
        "M": len(prompt) + 16,
    }
    stated = {dotted: shape for dotted, shape in STATED if shape}
    assert len(stated) == 22 and set(of_training) < set(stated)
    for dotted, shape in stated.items():
        assert seen[dotted] == eval(shape, {}, letters), f"{dotted}: {shape}"


def test_the_numbers_of_the_presets_are_right():
    columns = {"tiny": 0, "x-llava-13b": 1}
    rows = dict(
        re.findall(r"^\| (\w(?:, \w)*) \| [^|]* \| ([^|]* \| [^|]*) \|$", PAGE, re.MULTILINE)
    )
    for preset, column in columns.items():
        config = model_module.PRESETS[preset]
        text, image = config.text, config.vision
        want = {
            "S": [image.image_size],
            "N": [image.num_patches],
            "E": [image.hidden_size],
            "C": [text.hidden_size],
            "H, K, D": [text.num_attention_heads, text.num_key_value_heads, text.head_dim],
            "F": [text.intermediate_size],
            "L": [text.num_hidden_layers],
        }
        for letter, numbers in want.items():
            cell = rows[letter].split(" | ")[column]
            assert cell == ", ".join(f"{number:,}" for number in numbers), (preset, letter)
