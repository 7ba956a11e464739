"""Samples in batches on the model's device."""

from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

import data
from checkpoint import load_config
from evaluation.questions import read_file
from kernels.device import DEVICES, PRECISIONS, pick_device, pick_precision
from vocabulary import flags
from vocabulary.identity import describe_files, describe_images, describe_model


def add_model_arguments(parser, needs_data=True):
    """The arguments of every command that runs a model."""
    add = parser.add_argument
    folder = {"type": flags.folder, "metavar": "FOLDER"}
    file = {"type": flags.file, "metavar": "FILE"}
    add("--model", **folder, required=True, help="the model's")
    about = "each is a split"
    add("--data", nargs="+", **file, required=needs_data, default=[], help=about)
    add("--images", **folder, help="the images' (default: that of the data file)")
    about = "a record that can't be used: stop before anything is asked, or leave it out"
    add("--bad-samples", choices=["error", "skip"], default="error", help=about)
    add("-o", "--out", type=flags.text, metavar="FILE", help="JSON with the results")
    add("--fresh", action="store_true", help="set aside what another run left in -o")
    about = "default: what memory holds, at most 512"
    add("--batch-size", type=flags.count, metavar="N", help=about)
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 where it is faster")
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")


def add_question_arguments(parser):
    """The arguments that change what is asked."""
    about = "VQAv2: ten answers per question"
    parser.add_argument("--annotations", type=flags.file, metavar="FILE", help=about)
    example = 'after each question: "Answer the question using a single word or phrase."'
    parser.add_argument("--suffix", default="", help=example)


def question_options(args):
    """What read_questions takes from the command line."""
    names = ("images", "annotations", "suffix", "bad_samples")
    return {name: getattr(args, name) for name in names}


def model_identity(args):
    """What the results of a command that runs a model depend on."""
    load_config(args.model)  # a folder that is none is refused first
    annotations = getattr(args, "annotations", None)
    # A bad record is reported when the questions are asked.
    questions = [q for path in args.data for q in read_file(path, args.images, annotations, [])]
    dtype = pick_precision(args.precision, pick_device(args.device))
    # The name of a file is that of its split.
    data_files = describe_files([*args.data, *getattr(args, "text", [])])
    splits = [[path, f"{Path(path).stem} {content}"] for path, content in data_files]
    names = ("max_new_tokens", "suffix", "blind", "max_images", "pool", "seed")
    return {
        **{name: value for name, value in vars(args).items() if name in names},
        "precision": str(dtype).removeprefix("torch."),
        "files": {
            "model": describe_model(args.model),
            "data": sorted(splits, key=itemgetter(1)),  # their order is free
            "annotations": describe_files([annotations] if annotations else []),
            "images": describe_images(path for q in questions for path in q.image_paths),
        },
    }


class Batcher:
    """Cuts samples into batches. longest: tokens of the longest, with its answer."""

    def __init__(self, model, precision, batch_size, longest):
        self.device, config = model.device, model.config
        self.dtype = pick_precision(precision, self.device)
        self.images = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
        self.batch_size = batch_size or self.default_batch_size(config.text, longest)

    def default_batch_size(self, text, longest):
        """As many as have their KV cache in half of the GPU's free memory, or in 1 GiB."""
        # Keys and values of all layers, per token.
        values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        memory = 1 << 30
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0] // 2
        return max(1, min(512, memory // (longest * values * self.dtype.itemsize)))

    def batches(self, lengths, image_paths):
        """Lists of indices: samples of similar length together, and those of one image."""
        # Finer steps of length would separate the samples of an image.
        keys = [(length // 8, paths, length) for length, paths in zip(lengths, image_paths)]
        order = sorted(range(len(keys)), key=keys.__getitem__)

        starts = range(0, len(order), self.batch_size)
        batches = [order[start : start + self.batch_size] for start in starts]
        return tqdm(batches, unit="batch", disable=None)

    def load_images(self, image_paths):
        """Each sample's image paths -> the different images, uint8 (P, 3, S, S) or None, and each
        sample's indices of them."""
        # Many questions share an image: it is loaded and encoded once.
        unique = list(dict.fromkeys(sum(image_paths, [])))
        indices = [[unique.index(path) for path in paths] for paths in image_paths]
        if not unique:
            return None, indices
        return torch.stack([self.images(path) for path in unique]).to(self.device), indices

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
