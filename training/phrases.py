"""The data set of the vision stage: images and the phrases that describe them.

Dimensions: B images, S image size, F phrases, W words.
"""

import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import ImageCache
from vocabulary.conversations import read_conversations, record_name
from vocabulary.files import read_lines

DICTIONARY_LINES = 64  # drawn for each step


class DescribedImage(NamedTuple):
    """An image with what the records of all files say about it."""

    path: str
    phrases: dict  # keys: (record type, phrase), in order
    positives: set  # (language, phrase)
    record_types: set  # (language, kind)
    where: str  # its first record


class PhraseDataset:
    """Images and their phrases: the parts of their captions between commas, in all languages.

    A phrase is true of an image if a record of the image has it, and false if a record of the image
    in the phrase's language and kind lacks it. Else it is unknown: no part of the loss."""

    def __init__(self, paths, tokenizer, config, dictionary=None, images_folder=None, cache=None):
        self.paths, self.tokenizer = list(paths), tokenizer
        self.dictionary = read_dictionary(dictionary, tokenizer) if dictionary else []
        self.image_size = config.vision.image_size
        self.load_image = ImageCache(self.image_size, config.image_aspect_ratio, cache)
        self.bad, self.without_image, self.num_dropped = [], 0, 0
        self.phrase_ids = {}  # those that were encoded

        images = {}  # path -> DescribedImage
        for path in self.paths:
            folder = Path(images_folder or Path(path).parent)
            for number, record, conversation in read_conversations(path, self.bad):
                self.add(conversation, folder, images, record_name(path, number, record))

        # What the sampler reads: one file, all lengths equal.
        self.images = list(images.values())
        self.sizes, self.sort_keys = [len(images)], np.zeros(len(images), int)
        # How many images have a record in each language.
        self.languages = [Counter()]
        for image in self.images:
            self.languages[0].update({language for language, _ in image.record_types})

    def add(self, conversation, folder, images, where):
        """Adds a record to its image."""
        self.num_dropped += conversation.dropped
        if len(conversation.images) != 1:
            if count := len(conversation.images):
                self.bad.append(f"{where}: {count} images, the vision stage takes one")
            self.without_image += not count
            return

        # Phrases lie between commas, and have no full stop.
        answers = ",".join(answer for _, answer in conversation.turns).replace("，", ",")
        phrases = [phrase for part in answers.split(",") if (phrase := part.strip(" .。"))]

        path = str(folder / conversation.images[0])
        image = images.setdefault(path, DescribedImage(path, {}, set(), set(), where))
        language, kind = conversation.language, conversation.kind
        image.record_types.add((language, kind))
        image.positives.update((language, phrase) for phrase in phrases)
        image.phrases.update(dict.fromkeys(((language, kind), phrase) for phrase in phrases))

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return self.images[i].path

    def batch(self, indices, rank=0, world_size=1, seed=0, phrases_per_image=6):
        """A rank's part of the global batch `indices`: every world_size-th image.

        pixels, usable      uint8 (B, 3, S, S), bool (B,); False: a blank image
        ids, offsets        F phrases of the usable images, as EmbeddingBag takes them
        is_true, is_known   bool (F, images of rank 0, of rank 1, …)
        images_per_rank     their numbers, 1 for a rank without images
        word_*              with a dictionary, see `draw_words`"""
        per_rank = [indices[r::world_size] or [None] for r in range(world_size)]
        own = per_rank[rank]
        pixels, usable, bad_samples = self.load_images(own)

        phrases = []
        for row in usable.nonzero()[:, 0].tolist():
            described = list(self.images[own[row]].phrases)
            count = min(phrases_per_image, len(described))
            phrases += random.Random(f"{seed} {own[row]}").sample(described, count)

        # The columns are the images of all ranks: negatives for the phrases of this one.
        is_true, is_known = self.label(phrases, [i for part in per_rank for i in part])
        ids, offsets = flatten([self.encode(phrase) for _, phrase in phrases])

        batch = {
            "pixels": pixels,
            "usable": usable,
            "ids": ids,
            "offsets": offsets,
            "is_true": is_true,
            "is_known": is_known,
            "images_per_rank": [len(part) for part in per_rank],
            "sample_indices": [i for i in own if i is not None],
            "bad_samples": bad_samples,
            "num_targets": len(phrases),
            "num_tokens": len(ids),
            "padded_tokens": len(ids),
            "num_images": len(pixels),
            "attention_pairs": 0,
        }
        return batch | self.draw_words(rank, world_size, seed)

    def encode(self, phrase):
        """The ids of a phrase, which are computed once."""
        if phrase not in self.phrase_ids:
            self.phrase_ids[phrase] = self.tokenizer.encode(phrase)
        return self.phrase_ids[phrase]

    def load_images(self, indices):
        """(pixels, usable, errors). Blank: None, and an image that can't be loaded."""
        pixels = torch.zeros(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        usable, errors = torch.zeros(len(indices), dtype=torch.bool), []
        for row, i in enumerate(indices):
            if i is None:
                continue
            try:
                pixels[row] = self.load_image(self.images[i].path)
                usable[row] = True
            except ValueError as error:
                errors.append(f"{self.images[i].where}: {error}")
        return pixels, usable, errors

    def label(self, phrases, indices):
        """(is_true, is_known) of phrases × images, bool. Nothing is known of the image None."""
        spoken = [(language, phrase) for (language, _), phrase in phrases]
        types = [record_type for record_type, _ in phrases]
        is_true = np.zeros((len(phrases), len(indices)), bool)
        is_known = is_true.copy()
        for column, i in enumerate(indices):
            if i is not None:
                image = self.images[i]
                is_true[:, column] = list(map(image.positives.__contains__, spoken))
                is_known[:, column] = list(map(image.record_types.__contains__, types))
        return torch.from_numpy(is_true), torch.from_numpy(is_true | is_known)

    def draw_words(self, rank, world_size, seed):
        """W words of random dictionary lines, the same on all ranks: word_ids, word_offsets. Of all
        pairs, bool (W, W): word_true, both are of one line; word_known, the pair is this rank's and
        of two spellings."""
        if not self.dictionary:
            return {}

        count = min(DICTIONARY_LINES, len(self.dictionary))
        lines = random.Random(f"{seed} dictionary").sample(self.dictionary, count)
        words = [ids for line in lines for ids in line]

        # Each word's line, and the first word of its spelling. In numpy: to compare some 200 words
        # with each other, torch would wake another thread.
        line_of = np.array([n for n, line in enumerate(lines) for _ in line])
        first = {}
        spelling = np.array([first.setdefault(tuple(ids), n) for n, ids in enumerate(words)])

        ids, offsets = flatten(words)
        of_rank = np.arange(len(words)) % world_size == rank
        is_known = of_rank[:, None] & (spelling[:, None] != spelling)
        return {
            "word_ids": ids,
            "word_offsets": offsets,
            "word_true": torch.from_numpy(line_of[:, None] == line_of),
            "word_known": torch.from_numpy(is_known),
        }


def flatten(bags):
    """Lists of ids -> (ids, offsets), int64: all ids, and where each list begins."""
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.long)
    ids = torch.tensor([token for bag in bags for token in bag], dtype=torch.long)
    return ids, lengths.cumsum(0) - lengths


def read_dictionary(path, tokenizer):
    """A text file with lines of one meaning, "cat = 고양이 = 猫" -> [[ids of a word, …], …]."""
    lines = []
    for number, line in enumerate(read_lines([path]), 1):
        words = [word.strip() for word in line.split("=")]
        if len(words) < 2 or not all(words):
            found = " = ".join(words)[:60]
            raise ValueError(f"{path}: line {number}: {found!r} must be WORD = WORD …")
        lines.append([tokenizer.encode(word) for word in words])
    if not lines:
        raise ValueError(f"{path}: nothing to train on")
    return lines
