"""What the patches of a vision encoder know: a linear probe for kind, colour, size and place.

    python -m evaluation probe --model out/demo/vision --scenes out/demo/data/scenes.json
    python -m evaluation probe --model clip-vit-large-patch14-336 --scenes … --limit 1000

--model: a model folder, a snapshot of one, or a published CLIP encoder. For each thing in the demo
world's images a logistic regression reads the patches where the thing is, and predicts what
scenes.json says of it. It is fitted on the images in train/, and tested on those of each other
folder. What a linear model finds there, the decoder can find, too.

--random adds the same encoder with random weights: what the pixels alone reveal. Chance always says
the most frequent value. Intervals (95%) resample images.

Dimensions: B images, G × G patches, C width, F = 4 · C features, Q things, K classes.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from checkpoint.config import parse_vision_config, require_layer
from checkpoint.folder import load_config, read_aspect_ratio, read_object
from checkpoint.names import find_names, match_tensors, tensor_shapes
from checkpoint.safetensors import load_weights
from data import ImageCache
from evaluation.metrics import bootstrap, make_row, write_results
from evaluation.tables import Table, escape, plain_name, row_number
from kernels.device import DEVICES, pick_device
from model import ModelConfig
from vision import ViT
from vocabulary import flags
from vocabulary.files import read_json

PROPERTIES = ("kind", "colour", "size", "place")
GRID = 3  # places of the demo world, row by row
FIT = "train"  # the folder with the images to fit on
BATCH_SIZE = 64


def load_encoder(folder, random_weights=False):
    """(ViT, its hidden state that counts, image_aspect_ratio) of a model folder, or of a published
    CLIP, read as LLaVA-1.5 reads it."""
    data, where = read_object(folder)
    if data.get("model_type") == "llava":
        config = load_config(folder)
    else:
        config = ModelConfig(
            parse_vision_config(data, where), image_aspect_ratio=read_aspect_ratio(folder)
        )
        require_layer(config.vision_feature_layer, config.vision, where)

    encoder = ViT(config.vision)
    if random_weights:
        torch.manual_seed(0)
        encoder.init_weights()
    else:
        # Of a large model only the encoder is read.
        shapes = {n: s for n, s in tensor_shapes(config).items() if n.startswith("vision.")}
        weights = load_weights(folder)
        names = find_names(shapes, weights).values()
        found = {name: weights[name] for name in names if name in weights}
        state = match_tensors(found, shapes, folder)
        encoder.load_state_dict({n.removeprefix("vision."): t.float() for n, t in state.items()})
    return encoder.eval(), config.vision_feature_layer, config.image_aspect_ratio


class Scenes(NamedTuple):
    """The things of all images of a folder."""

    images: list  # paths
    index: np.ndarray  # (Q,): each thing's image
    values: dict  # {property: [Q values]}


def read_scenes(path, limit):
    """{folder: Scenes} of scenes.json, at most `limit` images of each. ValueError if it is not the
    demo world's, or has no images to fit or to test on."""
    path, scenes, used = Path(path), {}, Counter()
    try:
        for scene in read_json(path):
            image = path.parent / scene["image"]
            split = image.parent.name
            if used[split] == limit:
                continue
            found = scenes.setdefault(split, Scenes([], [], {name: [] for name in PROPERTIES}))
            found.images.append(image)
            for thing in scene["things"]:
                found.index.append(used[split])
                for name in PROPERTIES:
                    found.values[name].append(thing[name])
                if thing["place"] not in range(GRID * GRID):
                    raise ValueError(f"place {thing['place']!r}")
            used[split] += 1
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not the scenes.json of a demo world ({reason})") from None
    if FIT not in scenes or len(scenes) < 2:
        folders = ", ".join(scenes) or "none"
        raise ValueError(f"{path}: images must be in {FIT}/ and in other folders, not in {folders}")
    return {split: own._replace(index=np.array(own.index)) for split, own in scenes.items()}


@torch.inference_mode()
def thing_features(encoder, layer, load, scenes):
    """The patches of each thing's place: float32 (Q, F). Each place is pooled to 2 × 2 patches, so
    that an encoder with many patches has as many features per place as one with few."""
    device, places = encoder.pos_embed.device, torch.tensor(scenes.values["place"])
    num_class_tokens = int(encoder.class_embed is not None)  # SigLIP has none
    batches, features = torch.arange(len(scenes.images)).split(BATCH_SIZE), []
    for batch in tqdm(batches, unit="batch", disable=None, leave=False):
        pixels = torch.stack([load(scenes.images[i]) for i in batch]).to(device)
        patches = encoder(pixels, layer)[:, num_class_tokens:].float().cpu()
        side = round(patches.shape[1] ** 0.5)
        grid = patches.mT.unflatten(2, (side, side))  # (B, G·G, C) -> (B, C, G, G)
        grid = F.adaptive_avg_pool2d(grid, 2 * GRID)
        cells = grid.unflatten(3, (GRID, 2)).unflatten(2, (GRID, 2))  # (B, C, 3, 2, 3, 2)
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, 9, F)
        features.append(cells)

    return torch.cat(features)[torch.from_numpy(scenes.index), places]


def fit_linear(x, y, num_classes, decay=1e-3, steps=200):
    """Logistic regression with weight decay: x (Q, F), y (Q,) -> weight (K, F), bias (K,)."""
    weight = torch.zeros(num_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + decay * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def probe(features, scenes):
    """Rows {"split", "property", "n", "accuracy", "low", "high", "chance"}.

    features: {split: (Q, F)}, scenes: {split: Scenes}."""
    mean, std = features[FIT].mean(dim=0), features[FIT].std(dim=0) + 1e-6
    scaled = {split: (x - mean) / std for split, x in features.items()}

    rows = []
    for name in PROPERTIES:
        classes = sorted(set(scenes[FIT].values[name]))
        y = torch.tensor([classes.index(value) for value in scenes[FIT].values[name]])
        weight, bias = fit_linear(scaled[FIT], y, len(classes))
        most_frequent = classes[int(y.bincount().argmax())]
        for split in scenes.keys() - {FIT}:
            truth = scenes[split].values[name]
            predicted = F.linear(scaled[split], weight, bias).argmax(dim=1).tolist()
            right = [classes[i] == value for i, value in zip(predicted, truth)]

            # An image's things are not independent: its right ones, and how many it has.
            index = scenes[split].index
            columns = np.stack([np.bincount(index, right), np.bincount(index)], axis=1)
            row = make_row(bootstrap(columns), len(truth), "accuracy", split=split, property=name)
            rows.append(row | {"chance": truth.count(most_frequent) / len(truth)})
    order = list(scenes)
    return sorted(rows, key=lambda row: order.index(row["split"]))


def probe_tables(rows):
    """A table per split: a line per property, a column per encoder."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    tables = []
    for split in dict.fromkeys(row["split"] for row in rows):
        lines = []
        for name in PROPERTIES:
            own = [row for row in rows if (row["split"], row["property"]) == (split, name)]
            cells = [escape(name), f"{own[0]['n']:,}", f"{100 * own[0]['chance']:.1f}"]
            lines.append(("", cells + [row_number(row) for row in own]))
        head = ["", "things", "chance %", *(f"{escape(encoder)} % (95%)" for encoder in encoders)]
        tables.append(Table(plain_name(split), head, lines))
    return tables


def add_arguments(parser):
    add = parser.add_argument
    folder = {"type": flags.folder, "metavar": "FOLDER"}
    add("--model", **folder, required=True, help="the model's, or that of a CLIP vision encoder")
    about = "scenes.json of the demo world, beside its images"
    add("--scenes", type=flags.file, metavar="FILE", required=True, help=about)
    add("--limit", type=flags.count, default=2000, metavar="N", help="images per folder")
    layer = {"type": flags.at_least(-1000, most=1000), "metavar": "N"}
    add("--layer", **layer, help="hidden state of the ViT (default: the model's; CLIP: -2)")
    add("--random", action="store_true", help="also probe random weights of the same shape")
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")
    add("-o", "--out", type=flags.text, metavar="FILE", help="JSON with the results")


def run(args):
    device, scenes, rows = pick_device(args.device), read_scenes(args.scenes, args.limit), []
    for name in ("probe", "random")[: 1 + args.random]:
        encoder, layer, aspect_ratio = load_encoder(args.model, name == "random")
        layer = layer if args.layer is None else args.layer
        require_layer(layer, encoder.config, "--layer")
        load = ImageCache(encoder.config.image_size, aspect_ratio)
        encoder = encoder.to(device)
        features = {split: thing_features(encoder, layer, load, s) for split, s in scenes.items()}
        rows += [{"encoder": name, **row} for row in probe(features, scenes)]

    count = len(scenes[FIT].images)
    print(f"hidden state {layer} of {args.model}, fitted on {count:,} images")
    print("\n".join(table.as_text() for table in probe_tables(rows)))
    if args.out:
        write_results(args.out, {"model": args.model, "layer": layer, "probe": rows})
