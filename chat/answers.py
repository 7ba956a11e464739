"""Answers token by token, each with its probability and its attention to the image.

generate.py computes the answers. Hooks note what the model computes on the way. The kernels never
store attention weights: the newest query's are computed again, from the keys in the cache.

Dimensions: L layers, H query heads, K key-value heads, D head dim, N patches, T tokens so far.
"""

import base64
import io
import json
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch

import data
import vision
from checkpoint import load_config, load_tokenizer
from checkpoint.safetensors import is_dry_run
from evaluation.heatmap import heat, word_scores
from generate import load_for_inference, stream_tokens
from vocabulary.conversations import read_conversations

MAX_MODELS = 2  # in memory
MAX_WEIGHTS = 1 << 14  # per token; of a larger model only the mean over layers and heads is sent
NUM_EXAMPLES = 12  # images to try
FITS = {"pad": "contain", "square": "cover"}  # CSS for what vision.preprocess does


class Answerer:
    """The stages of a run. One call at a time: the caller holds a lock."""

    def __init__(self, folder, device="auto"):
        folder = Path(folder).resolve()
        load_config(folder)  # what is no model is refused by name
        self.models, self.device = {}, device
        self.stages = find_stages(folder)
        model, tokenizer = self.load(folder.name)
        self.tokenizers = {"expanded": tokenizer}
        if base := find_base(folder.parent, tokenizer):
            self.tokenizers = {"base": base, "expanded": tokenizer}

        text, has_maps = model.config.text, sends_maps(model.config)
        self.info = {
            "stages": list(self.stages),
            "stage": folder.name,
            "fit": FITS.get(model.config.image_aspect_ratio, "fill"),
            "layers": text.num_hidden_layers if has_maps else 0,
            "heads": text.num_attention_heads if has_maps else 0,
            "images": find_examples(folder.parent / "data"),
        }

    def load(self, stage):
        """(model, tokenizer). The stage that was not asked for longest leaves the memory."""
        loaded = self.models.pop(stage, None)
        if not loaded:
            for other in list(self.models)[: 1 - MAX_MODELS]:
                del self.models[other]
            loaded = load_for_inference(self.stages[stage], self.device)
        self.models[stage] = loaded
        return loaded

    def answer(self, request):
        """Yields {"text", "token"} per token, with details; at the end {"text", "finish", "usage"}.
        ValueError before the first if the request can't be answered."""
        model, tokenizer = self.load(request.stage)
        config = model.config
        prompt, _ = data.encode_chat(request.turns, tokenizer, config.vision.num_patches)
        data.check_length([*prompt, None], config)  # before an image is unpacked
        pixels = [read_pixels(image, config) for image in request.images]
        pixels = torch.stack(pixels).to(model.device) if pixels else None
        generator = torch.Generator(model.device)
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        options = request.options | {"generator": generator}

        count, sent, held = 0, "", ""
        with Recorder(model, tokenizer, prompt if request.details else []) as recorder:
            for token, text in stream_tokens(model, tokenizer, prompt, pixels, **options):
                text, held, stopped = split_at_stop(held + text, request.stop)
                is_last = token in (tokenizer.eos_id, None)
                text = text + held if is_last and not stopped else text
                text = text if sent else text.lstrip()
                sent, count = sent + text, count + (not is_last)
                if is_last or stopped:
                    break
                yield {"text": text, "token": request.details and recorder.describe(token)}

        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        usage["total_tokens"] = len(prompt) + count
        finish = "stop" if stopped or token is not None else "length"
        yield {"text": text, "token": None, "finish": finish, "usage": usage}

    def pieces(self, text):
        """What each tokenizer makes of a text."""
        cut = {name: (each, each.encode(text)) for name, each in self.tokenizers.items()}
        return [
            {"tokenizer": name, "pieces": [piece_name(tokenizer, token) for token in ids]}
            for name, (tokenizer, ids) in cut.items()
        ]

    def heat(self, stage, word, image):
        """How well a word fits each patch, 0 … 1 (evaluation/heatmap.py)."""
        model, tokenizer = self.load(stage)
        if not tokenizer.encode(word):
            raise ValueError("an empty word has no place")
        scores = word_scores(model, tokenizer, read_pixels(image, model.config), [word])
        return {"grid": grid(model.config), "scores": rounded(torch.tensor(heat(scores)[0]))}


class Recorder:
    """Notes what a model computes for the newest token of an answer. An empty prompt: nothing."""

    def __init__(self, model, tokenizer, prompt):
        self.model, self.tokenizer, self.maps, self.hooks = model, tokenizer, {}, []
        # Of the first image, if there are several.
        image = [i for i, token in enumerate(prompt) if token == model.config.image_token_id]
        self.patches = image[: model.config.vision.num_patches]
        if prompt:
            self.hooks = [model.decoder.lm_head.register_forward_hook(self.note_logits)]
        for i, block in enumerate(model.decoder.layers if self.patches else []):
            self.hooks.append(block.attn.register_forward_hook(partial(self.note_attention, i)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def note_logits(self, head, inputs, logits):
        self.probabilities = logits[0].float().softmax(-1)

    def note_attention(self, layer, attn, inputs, _):
        """The weights of the last query: x (1, T, C) -> (H, N)."""
        x, (cos, sin, positions), _, (k_cache, _, lengths) = inputs
        q, _, _ = attn.project(x[:, -1:], (cos, sin, positions[:, -1:]))

        # Each group of query heads shares a key head: (T, K, D) -> (T, H, D).
        keys = k_cache[0, : int(lengths[0]) + x.shape[1]].float()
        keys = keys.repeat_interleave(q.shape[2] // keys.shape[1], dim=1)
        scores = torch.einsum("hd,thd->ht", q[0, 0].float(), keys) / attn.head_dim**0.5
        self.maps[layer] = scores.softmax(-1)[:, self.patches].cpu()

    def describe(self, token):
        """The newest token as JSON: its probability, the next four, its attention (N,). That is the
        mean over layers and heads of `maps` (L, H, N)."""
        top = self.probabilities.topk(min(5, len(self.probabilities)))
        found = {
            "piece": piece_name(self.tokenizer, token),
            "probability": float(self.probabilities[token]),
            "alternatives": [
                {"text": piece_name(self.tokenizer, other), "probability": probability}
                for probability, other in zip(top.values.tolist(), top.indices.tolist())
                if other != token
            ][:4],
            "attention": None,
        }
        if self.patches:
            maps = torch.stack(list(self.maps.values()))
            found |= {"grid": grid(self.model.config), "attention": rounded(maps.mean((0, 1)))}
            found["maps"] = rounded(maps) if sends_maps(self.model.config) else []
        return found


def rounded(weights):
    return (weights.double() * 1e5).round().div(1e5).tolist()


def sends_maps(config):
    """Whether the weights of each layer and head are few enough to send."""
    size = config.text.num_hidden_layers * config.text.num_attention_heads
    return size * config.vision.num_patches <= MAX_WEIGHTS


def grid(config):
    """[rows, columns] of patches."""
    return [config.vision.image_size // config.vision.patch_size] * 2


def piece_name(tokenizer, token):
    return tokenizer.readable(tokenizer.piece(token))


def read_pixels(image, config):
    """The bytes of an image file -> uint8 (3, S, S)."""
    image = vision.read_image(io.BytesIO(image), "the image")
    return vision.preprocess(image, config.vision.image_size, config.image_aspect_ratio)


def split_at_stop(text, stops):
    """(what can be sent, what may begin a stop text, whether a stop text was in it)."""
    if found := [text.index(stop) for stop in stops if stop in text]:
        return text[: min(found)], "", True
    ends = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    at = len(text) - max(ends, default=0)
    return text[:at], text[at:], False


# ------------------------------------------------------------------------------------ a run's files
def find_stages(folder):
    """{name: folder} of the models beside a model folder, in the order of their training."""
    started = {}
    for path in sorted(folder.parent.iterdir()):
        runs = path / "runs.jsonl"  # a published model has none
        try:
            if is_dry_run(path):  # it has no weights
                continue
            load_config(path)
            line = runs.read_text(encoding="utf-8").partition("\n")[0] if runs.exists() else ""
            started[path.name] = str(json.loads(line)["time"]) if line else ""
        except (OSError, ValueError, LookupError, TypeError):  # it is something else
            continue
    return {name: folder.parent / name for name in sorted(started, key=started.get)}


def find_base(folder, tokenizer):
    """The largest .model in a folder whose pieces are the first ones of a tokenizer, or None."""
    found = []
    for path in sorted(folder.glob("*.model")):
        try:
            base = load_tokenizer(path)
        except (OSError, ValueError):  # it is something else
            continue
        size = base.vocab_size
        if size < tokenizer.vocab_size:
            same = all(base.piece(i) == tokenizer.piece(i) for i in range(size))
            found += [(size, base)] if same else []
    return max(found, key=itemgetter(0), default=(0, None))[1]


def find_examples(folder):
    """Some of the demo's images that no stage has trained on, each with three questions."""
    path, questions = folder / "unseen_images.json", {}
    for _, _, conversation in read_conversations(path, []) if path.exists() else []:
        if len(conversation.images) != 1:
            continue
        (name,) = conversation.images
        if name not in questions and len(questions) == NUM_EXAMPLES:
            break
        questions.setdefault(name, []).append(conversation.turns[0][0][-1].strip())

    examples = []
    for i, (name, asked) in enumerate(questions.items()):
        # Others may have written the records: only images of this folder go into a page.
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: {name} leads out of its folder")
        vision.load_image(folder / name)
        url = "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
        # Other kinds, and languages, for each image.
        few = {asked[(i + k * len(asked) // 3) % len(asked)]: None for k in range(3)}
        examples.append({"name": Path(name).name, "url": url, "questions": list(few)})
    return examples
