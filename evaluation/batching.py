"""Samples in batches on the model's device, for the commands that run a model."""

import torch

import vision
from training.device import DEVICES, PRECISIONS, pick_precision


def add_model_arguments(parser, needs_data=True):
    """The arguments that the commands have in common."""
    parser.add_argument("--model", required=True, help="its folder")
    parser.add_argument(
        "--data", nargs="+", required=needs_data, default=[], help="each file is a split"
    )
    parser.add_argument("--images", help="the images' folder (default: the data file's)")
    parser.add_argument("-o", "--out", help="JSON with the results")
    parser.add_argument("--batch-size", type=int, help="default: what memory holds, at most 512")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 where it is faster"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one"
    )


def add_question_arguments(parser):
    """The arguments that change what is asked."""
    parser.add_argument("--annotations", help="VQAv2: the file with ten answers per question")
    parser.add_argument(
        "--suffix",
        default="",
        help='after each question: "Answer the question using a single word or phrase."',
    )


class Batcher:
    """Cuts samples into batches. longest: tokens of the longest, with its answer."""

    def __init__(self, model, precision, batch_size, longest):
        self.device, self.config = model.device, model.config
        self.dtype = pick_precision(precision, self.device)
        self.batch_size = batch_size or self.default_batch_size(longest)

    def default_batch_size(self, longest):
        """As many as have their KV cache in half of the GPU's free memory, or in 1 GiB."""
        text = self.config.text
        values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        memory = 1 << 30
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0] // 2
        return max(1, min(512, memory // (longest * values * self.dtype.itemsize)))

    def batches(self, lengths, image_paths):
        """Lists of indices: samples of similar length together, and those of one image."""

        def sort_key(i):
            # Finer steps of length would separate the samples of an image.
            return lengths[i] // 8, image_paths[i], lengths[i]

        order = sorted(range(len(lengths)), key=sort_key)
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]

    def load_images(self, image_paths):
        """The image paths of each sample -> the different images, uint8 (P, 3, S, S) or None, and
        for each sample the indices of its own."""
        unique = list(dict.fromkeys(path for paths in image_paths for path in paths))
        indices = [[unique.index(path) for path in paths] for paths in image_paths]
        if not unique:
            return None, indices

        size, aspect_ratio = self.config.vision.image_size, self.config.image_aspect_ratio
        images = [vision.preprocess(vision.load_image(path), size, aspect_ratio) for path in unique]
        return torch.stack(images).to(self.device), indices

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
