"""From files to batches: LLaVA-format conversations, captions and plain text, with the chat template and its loss mask.

Where it stands: `checkpoint → data → generate → train / evaluate`. Three kinds of file, all read as other people write them:

    conversations   LLaVA JSON (a list) or JSON Lines: {"id", "image"?: file or list of files, "conversations": [{"from": "human"|"gpt", "value"}]}
    captions        the same format; the `vision` stage splits each answer at its commas into phrases
    text            UTF-8, one document a line; a dictionary, which `vision` reads beside its captions, is lines of words that mean the same: cat = 고양이 = 猫

The chat template is LLaVA-1.5's, and `encode_chat` is the one place that knows it: training samples (ids and loss mask
together) and inference prompts both come from there.

    <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>USER: Where? ASSISTANT: at the top</s>       trained on: a cat</s> … at the top</s>

    python data.py check out/demo/data/instruct.json --model out/demo/align     # every bad sample by name, before a GPU is rented
    python data.py show out/demo/data/instruct.json --model out/demo/align      # what is trained on in green, what is only read in grey

Letters for sizes: B rows, T tokens, P pictures, F phrases, R records, U tokens of the longest record.
"""

import argparse
import atexit
import hashlib
import heapq
import json
import mmap
import os
import random
import re
import signal
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import vision
from model import IGNORE_INDEX, Layout

IMAGE_TOKEN = "<image>"  # in a data file's human turn: a picture stands here. Typed by a user (generate.py) it is plain text
DICTIONARY_LINES = 64  # a step of the vision stage takes so many
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")


# ---------------------------------------------------------------------------------------------- the chat template
def encode_chat(turns, tokenizer, num_patches):
    """The ids of a conversation and which of them are learnt: (ids, mask), two lists of the same length.

    turns: [(question, answer), …]; a question is a string, or a list of strings between which a picture stands each; an
    answer of None (only in the last turn) ends the ids where the model has to go on: a prompt for inference.
    The mask is 1 for the answer's tokens and its </s>. TextDataset are encoded apart around every control piece, as LLaVA-1.5 was trained.
    """
    ids, mask = [tokenizer.bos_id], [0]
    for question, answer in turns:
        parts = [question] if isinstance(question, str) else question
        for i, part in enumerate(parts):
            if i:
                ids += [tokenizer.image_id] * num_patches
            text = (
                ("USER: " if i == 0 else "") + part + (" ASSISTANT:" if i == len(parts) - 1 else "")
            )
            ids += tokenizer.encode(text) if text else []
        mask += [0] * (len(ids) - len(mask))
        if answer is not None:
            ids += tokenizer.encode(answer) + [tokenizer.eos_id]
            mask += [1] * (len(ids) - len(mask))
    return ids, mask


def read_turns(record):
    """A LLaVA record's conversation as `encode_chat` takes it. Raises ValueError with the reason where it is not one."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no conversations")
    turns = []
    for i, message in enumerate(messages):
        role, value = (
            (message.get("from"), message.get("value"))
            if isinstance(message, dict)
            else (None, None)
        )
        if not isinstance(value, str):
            raise ValueError(f"turn {i}: the value is not a text")
        if role not in (USER, ASSISTANT)[i % 2]:
            raise ValueError(f"turn {i}: from {role!r}, but {(USER, ASSISTANT)[i % 2][0]!r} is due")
        if i % 2 == 0:
            parts = value.split(IMAGE_TOKEN)
            if (
                len(parts) == 2
            ):  # one picture stands first, wherever the file has it, as LLaVA trains
                text = "".join(parts).strip()
                parts = ["", "\n" + text if text else ""]
            parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
            turns.append([parts, None])
        elif not value.strip():
            raise ValueError(f"turn {i}: the answer is empty")
        elif IMAGE_TOKEN in value:
            raise ValueError(f"turn {i}: {IMAGE_TOKEN} in an answer")
        else:
            turns[-1][1] = value.strip()
    if turns[-1][1] is None:
        raise ValueError("the last question has no answer")
    return turns


def image_files(record):
    """The record's picture files, in order: none, one, or several."""
    image = record.get("image")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"image is {type(image).__name__}, must be a file name or a list of them")
    return names


class Sample(NamedTuple):
    """What training takes at once: a conversation, or several about the same picture, which share its tokens and don't see each other."""

    ids: list
    loss_mask: list  # 1 where an id is learnt
    pixels: list  # of its pictures, uint8 (3, S, S) each; `encode_records` leaves their names here
    starts: tuple = (
        0,
    )  # where each record's own ids begin; what stands before the first is common to all


def encode_records(records, tokenizer, num_patches, max_length):
    """The Sample of a conversation, or of several that begin with the same picture: "<s>USER: <image> … <image>" stands once, and what each goes on with behind it.

    Raises ValueError with the reason why it can't be trained on."""
    names, ids, mask, starts = image_files(records[0]), [], [], []
    for n, record in enumerate(records):
        try:
            turns = read_turns(record)
            markers = sum(len(parts) - 1 for parts, _ in turns)
            if markers != len(names):
                raise ValueError(f"{markers} {IMAGE_TOKEN} marker(s) for {len(names)} picture(s)")
            own, learnt = encode_chat(turns, tokenizer, num_patches)
            if len(own) > max_length:
                raise ValueError(f"{len(own)} tokens, the limit is {max_length}")
        except ValueError as error:
            others = (
                f"; the {len(records) - 1} that share its sample go with it"
                if len(records) > 1
                else ""
            )
            raise ValueError(
                f"id {record.get('id')!r}: {error}{others}" if others else str(error)
            ) from None
        head = own.index(tokenizer.image_id) + num_patches if len(records) > 1 else 0
        assert own[:head] == ids[:head] or not starts, (
            "share_key put records together that begin differently"
        )
        if starts:
            own, learnt = own[head:], learnt[head:]
        starts.append(len(ids) or head)
        ids, mask = ids + own, mask + learnt
    return Sample(ids, mask, names, tuple(starts))


def record_spans(sample):
    """(start, stop) of each record's own ids in a sample's; the very last id is only ever a target."""
    return list(zip(sample.starts, [*sample.starts[1:], len(sample.ids) - 1]))


def record_lengths(sample):
    """The tokens of each record of a sample as attention sees it: with what is common to all before its own."""
    return [sample.starts[0] + stop - start for start, stop in record_spans(sample)]


def attention_pairs(sample):
    """The sum of its records' squared lengths, with what is common counted once: what attention costs."""
    return (
        sum(n * n for n in record_lengths(sample))
        - (len(sample.starts) - 1) * sample.starts[0] ** 2
    )


# ---------------------------------------------------------------------------------------------- files
def scan_records(path):
    """Yields (start, end, record) for each record of a LLaVA JSON list or of a JSON Lines file: its bytes' place, and a look at it.

    The look is in Latin-1, where a character is a byte: places are exact, a text is as long as its UTF-8, and only letters beyond ASCII are
    wrong; `read_record` reads them right. A list is in memory while it is scanned, of JSON Lines a line.
    Raises ValueError in one line: file, line, what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")

    def checked(start, end, record, number):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: record {number} is {type(record).__name__}, must be an object"
            )
        return start, end, record

    with open(path, "rb") as file:
        number, line, start = 0, 1, 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
        file.seek(start)
        try:
            if file.read(4096).lstrip()[:1] == b"[":
                decode, gap = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                    text = str(raw, "latin-1")
                at = gap(text, gap(text, start).end() + 1).end()
                while text[at : at + 1] != "]":
                    record, end = decode(text, at)
                    yield checked(at, end, record, number)
                    at, number = gap(text, end).end(), number + 1
                    if text[at : at + 1] == ",":
                        at = gap(text, at + 1).end()
                    elif text[at : at + 1] != "]":
                        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                if text[at + 1 :].strip():
                    raise json.JSONDecodeError("Extra data", text, at + 1)
            else:
                file.seek(start)
                for line, raw in enumerate(file, 1):
                    if raw.strip():
                        yield checked(
                            start,
                            start + len(raw),
                            json.loads(raw.rstrip().decode("latin-1")),
                            number,
                        )
                        number += 1
                    start += len(raw)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: not JSON: {error.msg}: line {line + error.lineno - 1} column {error.colno}"
            ) from None


def read_record(path, start, end):
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return json.loads(file.read(end - start))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {start + error.start:,} is not UTF-8: {error.reason}"
            ) from None


def read_records(path):
    """All records of a file, in memory."""
    return [read_record(path, start, end) for start, end, _ in scan_records(path)]


def decode_line(line, path, number):
    """A line of a text file, its bytes -> str without white space around. Raises ValueError with file and line."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8: {error.reason}") from None


def read_complete_lines(path):
    """The lines, as bytes, of a file that lines of JSON are appended to; [] if there is none. One that a crash cut off is taken out of the file.

    Of a str, splitlines would also split at U+2028 and the like, which JSON leaves inside a text as they are."""
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    return lines


def read_tokens(path, tokenizer, cache):
    """The ids of a text file's documents, one a line, each from <s> to </s>, end to end: an array that is mapped from a file in `cache`.

    Tokenized once, on all cores; the file's name says of which text and which tokenizer it is. It is written beside and renamed, so that there is all of it or none.
    Of several processes on a machine the first does the work."""
    path, dtype = Path(path), np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    about = path.stat()
    key = hashlib.sha256(
        tokenizer.sp_processor.serialized_model_proto()
        + repr((str(path.resolve()), about.st_size, about.st_mtime_ns)).encode()
    ).hexdigest()[:16]
    file = Path(cache) / f"{path.stem}-{key}.{np.dtype(dtype).name}"
    while not file.exists() and int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(0.1)  # if the first process fails, torchrun ends this one too
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside, number = file.with_name(f"{file.name}.{os.getpid()}.tmp"), 0
        try:
            with open(path, "rb") as source, open(beside, "wb") as out:
                while lines := source.readlines(1 << 22):
                    lines = [decode_line(line, path, number + n) for n, line in enumerate(lines, 1)]
                    number += len(lines)
                    for ids in tokenizer.sp_processor.encode(
                        [line for line in lines if line], num_threads=os.cpu_count()
                    ):
                        out.write(
                            np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype).tobytes()
                        )
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


class ImageCache:
    """Reads pictures below `root` as uint8 (3, size, size); keeps what it has read while that fits into `keep` bytes."""

    def __init__(self, root, size, mode, keep=1 << 26):
        self.root, self.size, self.mode = Path(root), size, mode
        self.room, self.kept = keep // (3 * size * size), {}

    def __call__(self, name):
        pixels = self.kept.get(name)
        if pixels is None:
            pixels = vision.preprocess(vision.load_image(self.root / name), self.size, self.mode)
            if len(self.kept) < self.room:
                self.kept[name] = pixels
        return pixels


def share_key(record):
    """What the records that can share a sample have in common: the picture, what stands before it ("": `read_turns` puts one first), and the number of messages, as
    attention pads to the longest. None: nothing."""
    said = record.get("conversations")
    first = (
        said[0].get("value")
        if isinstance(said, list) and said and isinstance(said[0], dict)
        else None
    )
    return (
        (record["image"], "", len(said))
        if isinstance(record.get("image"), str)
        and isinstance(first, str)
        and first.count(IMAGE_TOKEN) == 1
        else None
    )


class ConversationDataset:
    """Conversations of LLaVA files: sample(i) -> Sample. Bad samples are found when they are due, and named.

    In memory, in this process and in each worker, is only where each record lies: about 30 bytes for each, in arrays.
    merge: up to so many records about one picture, in random order, make one sample: the picture's tokens are paid for once. LLaVA-1.5 makes one conversation
    of its question sets; here they stand side by side, for an answer that a turn before gives away teaches nobody to look (docs/experiments.md)."""

    def __init__(self, paths, tokenizer, config, max_length, merge=1):
        self.paths, self.places, self.sizes, self.languages = (
            list(paths),
            [],
            [],
            [],
        )  # places: (records, 2), first byte and the one behind the last
        lengths, members, ends = (
            array("q"),
            array("q"),
            array("q"),
        )  # of samples; a sample's records are members[ends[i - 1] : ends[i]]
        for f, path in enumerate(self.paths):
            places, sizes, pictured, together, languages = (
                array("q"),
                array("q"),
                array("b"),
                {},
                Counter(),
            )
            for i, (start, end, record) in enumerate(scan_records(path)):
                places.extend((start, end))
                said = record.get("conversations")
                sizes.append(
                    sum(len(str(m.get("value"))) for m in said if isinstance(m, dict))
                    if isinstance(said, list)
                    else 0
                )
                pictured.append("image" in record)
                languages[str(record.get("language", "?"))] += 1
                if merge > 1:
                    together.setdefault(share_key(record) or i, []).append(i)
            before = len(lengths)
            for key, group in (
                together.items() if merge > 1 else ((None, (i,)) for i in range(len(sizes)))
            ):
                if len(group) > 1:
                    random.Random(f"{f} {key}").shuffle(group)
                for at in range(0, len(group), merge):
                    part = group[at : at + merge]
                    members.extend(part)
                    ends.append(len(members))
                    # a cheap stand-in for tokens, to batch like with like: as many turns (attention pads to the longest record), then as much text
                    turns = key[2] if isinstance(key, tuple) else 0
                    lengths.append(
                        (turns << 32) + sum(sizes[i] for i in part) + 1000 * pictured[part[0]]
                    )
            self.places.append(np.array(places).reshape(-1, 2))
            self.sizes.append(len(lengths) - before)
            self.languages.append(languages)
        self.lengths, self.members, self.ends = (
            np.array(lengths),
            np.array(members, np.int32),
            np.array(ends),
        )
        self.pictures = [
            ImageCache(Path(path).parent, config.vision.image_size, config.image_aspect_ratio)
            for path in self.paths
        ]
        self.tokenizer, self.num_patches, self.max_length = (
            tokenizer,
            config.vision.num_patches,
            max_length,
        )

    def __len__(self):
        return len(self.ends)

    def where(self, i):
        """(file, indices of the records in it) of sample i."""
        f = int(np.searchsorted(np.cumsum(self.sizes), i, side="right"))
        return f, self.members[self.ends[i - 1] if i else 0 : self.ends[i]].tolist()

    def records(self, i):
        f, indices = self.where(i)
        return [read_record(self.paths[f], *self.places[f][index].tolist()) for index in indices]

    def record(self, i):
        return self.records(i)[0]

    def name(self, i):
        f, indices = self.where(i)
        try:
            id = f" (id {self.record(i).get('id')!r})"
        except ValueError:  # it can't be read
            id = ""
        return f"{self.paths[f]}: record {', '.join(map(str, indices))}{id}"

    def sample(self, i):
        try:
            sample, (f, _) = (
                encode_records(self.records(i), self.tokenizer, self.num_patches, self.max_length),
                self.where(i),
            )
            return sample._replace(pixels=[self.pictures[f](name) for name in sample.pixels])
        except ValueError as error:
            raise BadSample(f"{self.name(i)}: {error}") from None


class TextDataset:
    """Documents of text files, one a line: sample(i) -> Sample, of which everything is learnt. A long one goes on in further samples."""

    def __init__(self, paths, tokenizer, max_length, cache):
        self.paths, self.ids, self.starts, self.stops, self.sizes, self.languages = (
            list(paths),
            [],
            [],
            [],
            [],
            [{}] * len(paths),
        )
        step = max_length - 1  # a further sample begins with the last token of the one before
        for path in self.paths:
            ids, block = read_tokens(path, tokenizer, cache), 1 << 26
            first = np.concatenate(
                [
                    np.flatnonzero(ids[at : at + block] == tokenizer.bos_id) + at
                    for at in range(0, len(ids), block)
                ]
                or [np.zeros(0, int)]
            )
            behind = np.append(first[1:], len(ids))[: len(first)]
            parts = -(-(behind - first - 1) // step)
            nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
            self.ids.append(ids)
            self.starts.append(np.repeat(first, parts) + nth * step)
            self.stops.append(np.minimum(self.starts[-1] + max_length, np.repeat(behind, parts)))
            self.sizes.append(len(nth))
        self.lengths = np.concatenate(self.stops) - np.concatenate(self.starts)

    def __len__(self):
        return len(self.lengths)

    def where(self, i):
        f = int(np.searchsorted(np.cumsum(self.sizes), i, side="right"))
        return f, i - sum(self.sizes[:f])

    def name(self, i):
        f, n = self.where(i)
        ids = self.ids[f]
        return (
            f"{self.paths[f]}: tokens {self.starts[f][n]:,} – {self.stops[f][n]:,} of {len(ids):,}"
        )

    def sample(self, i):
        f, n = self.where(i)
        ids = self.ids[f][self.starts[f][n] : self.stops[f][n]].tolist()
        return Sample(ids, [0] + [1] * (len(ids) - 1), [])


class PhraseDataset:
    """Pictures with all the phrases that are said of them, for the contrast of the `vision` stage.

    A picture's phrases are its captions' parts between commas, in every language; what several records say of one picture
    is put together, so that a phrase which two pictures of a batch share counts as true of both. A picture that no record of a language and
    a kind describes says nothing about those records' phrases: if no other record says them of it, they are neither true nor false.

    dictionary: a text file of words that mean the same, a line "cat = 고양이 = 猫" each. Of them, too, each step gets some."""

    def __init__(self, paths, tokenizer, config, dictionary=None):
        self.dictionary = read_dictionary(dictionary, tokenizer) if dictionary else []
        self.tokenizer, self.pictures, self.phrases, self.true, self.spoken = (
            tokenizer,
            [],
            [],
            [],
            [],
        )
        self.size, self.without_picture, self.bad, where = config.vision.image_size, 0, [], {}
        for path in paths:
            pictures = ImageCache(
                Path(path).parent, config.vision.image_size, config.image_aspect_ratio
            )
            for index, record in enumerate(read_records(path)):
                try:
                    names = image_files(record)
                    if len(names) > 1:
                        raise ValueError(f"{len(names)} pictures: the contrast takes one")
                    if not names:
                        self.without_picture += 1  # nothing to contrast; train.py says how many
                        continue
                    name = names[0]
                    said = [
                        part.strip(" .。")
                        for _, answer in read_turns(record)
                        for part in answer.replace("，", ",").split(",")
                    ]
                except ValueError as error:
                    self.bad.append(f"{path}: record {index} (id {record.get('id')!r}): {error}")
                    continue
                key = (pictures.root, name)
                if key not in where:
                    where[key] = len(self.pictures)
                    self.pictures.append((pictures, name))
                    self.phrases.append({})  # as drawn from: (language, kind), phrase
                    self.true.append(set())  # language, phrase
                    self.spoken.append(set())  # language, kind
                about = record.get("language", "?"), record.get("kind", "?")
                self.spoken[where[key]].add(about)
                self.true[where[key]].update((about[0], phrase) for phrase in said)
                self.phrases[where[key]].update(
                    dict.fromkeys((about, phrase) for phrase in said if phrase)
                )  # a dict keeps the order: same phrases every run
        self.ids, self.lengths, self.sizes = (
            {},
            np.zeros(len(self.pictures), int),
            [len(self.pictures)],
        )
        self.languages = [
            Counter(
                language
                for spoken in self.spoken
                for language in {language for language, _ in spoken}
            )
        ]

    def __len__(self):
        return len(self.pictures)

    def name(self, i):
        pictures, name = self.pictures[i]
        return str(pictures.root / name)

    def batch(self, step, rank=0, world=1, seed=0, per_picture=6):
        """`step`: the indices of a global batch, of which this rank has every world-th. Its pixels (B, 3, S, S) and which of them can be used, bool (B,);
        ids and offsets, as EmbeddingBag takes them, of F phrases, drawn from what is said of its pictures; is_true and is_known bool
        (F, pictures of rank 0, of rank 1, …); pictures: their numbers; bad: why those that can't be used can't. With a dictionary also word_ids and
        word_offsets of W of its words, the same for all ranks, word_true and word_known bool (W, W): which mean the same, and which pairs are
        asked about by this rank (a word spelt alike may have several meanings, and none with itself).

        All ranks have to count on the same number of pictures: one that can't be used keeps its place, empty, and a rank that got none gets an empty one."""
        everyone = [step[r::world] or [None] for r in range(world)]
        pixels, usable, chosen, bad = [], [], [], []
        for i in everyone[rank]:
            picture, said = None, []
            if i is not None:
                pictures, name = self.pictures[i]
                try:
                    picture, said = pictures(name), list(self.phrases[i])
                except ValueError as error:
                    bad.append(str(error))
            chosen += random.Random(f"{seed} {i}").sample(said, min(per_picture, len(said)))
            usable.append(picture is not None)
            pixels.append(
                torch.zeros(3, self.size, self.size, dtype=torch.uint8)
                if picture is None
                else picture
            )
        ids, offsets = [], []
        for _, phrase in chosen:
            if phrase not in self.ids:
                self.ids[phrase] = self.tokenizer.encode(phrase)
            offsets.append(len(ids))
            ids += self.ids[phrase]
        words = {}
        if self.dictionary:
            drawn = random.Random(f"{seed} dictionary").sample(
                self.dictionary, min(DICTIONARY_LINES, len(self.dictionary))
            )
            spelt = [ids for line in drawn for ids in line]
            line, number = torch.tensor([n for n, line in enumerate(drawn) for _ in line]), {}
            spelling = torch.tensor([number.setdefault(tuple(ids), len(number)) for ids in spelt])
            mine, ends = (
                torch.arange(len(spelt)) % world == rank,
                torch.tensor(list(map(len, spelt))).cumsum(0),
            )
            words = {
                "word_ids": torch.tensor([id for ids in spelt for id in ids]),
                "word_offsets": nn.functional.pad(ends[:-1], (1, 0)),
                "word_true": line[:, None] == line,
                "word_known": mine[:, None] & (spelling[:, None] != spelling),
            }
        columns = [i for theirs in everyone for i in theirs]
        is_true = torch.from_numpy(
            np.array(
                [
                    [i is not None and (about[0], phrase) in self.true[i] for i in columns]
                    for about, phrase in chosen
                ],
                bool,
            )
        )
        is_known = is_true | torch.from_numpy(
            np.array(
                [
                    [i is not None and about in self.spoken[i] for i in columns]
                    for about, _ in chosen
                ],
                bool,
            )
        )
        return {
            "pixels": torch.stack(pixels),
            "usable": torch.tensor(usable),
            "ids": torch.tensor(ids, dtype=torch.long),
            "offsets": torch.tensor(offsets, dtype=torch.long),
            "is_true": is_true.view(-1, len(columns)),
            "is_known": is_known.view(-1, len(columns)),
            "images_per_rank": list(map(len, everyone)),
            "sample_indices": [i for i in everyone[rank] if i is not None],
            "bad_samples": bad,
        } | words


def read_dictionary(path, tokenizer):
    """Lines "cat = 고양이 = 猫" of a text file -> [[ids of a word, …], …]. Raises ValueError where a line is something else."""
    path, lines = Path(path), []
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        words = [word.strip() for word in decode_line(line, path, number).split("=")]
        if len(words) < 2 or not all(words):
            raise ValueError(
                f"{path}: line {number}: words that mean the same are wanted, with = between them: {' = '.join(words)[:60]!r}"
            )
        lines.append([tokenizer.encode(word) for word in words])
    if not lines:
        raise ValueError(f"{path}: nothing to train on")
    return lines


class BadSample(ValueError):
    """A sample that can't be used; the message names file, record, id and reason."""


# ---------------------------------------------------------------------------------------------- batches
def collate(samples, pad_id, T=None):
    """Samples -> {"ids" (B, T), "targets" (B, T), "wanted" (n,), "pixels" (P, 3, S, S)?}: padded on the right to the longest.

    targets[b, t] is the id that follows ids[b, t] where that one is learnt, IGNORE_INDEX elsewhere; wanted: where those are, b·T + t, and some that aren't.
    Where samples hold several records, also what `side_by_side` gives."""
    T = T or round_up_length(max(len(sample.ids) for sample in samples) - 1)
    batch = {
        "ids": torch.full((len(samples), T), pad_id),
        "targets": torch.full((len(samples), T), IGNORE_INDEX),
    }
    for row, (ids, mask, *_) in enumerate(samples):
        n = len(ids) - 1
        batch["ids"][row, :n] = torch.tensor(ids[:-1])
        batch["targets"][row, :n] = torch.tensor(
            [id if learnt else IGNORE_INDEX for id, learnt in zip(ids[1:], mask[1:])]
        )
    pixels = [picture for sample in samples for picture in sample.pixels]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    layout = (
        side_by_side(samples, T) if any(len(sample.starts) > 1 for sample in samples) else Layout()
    )
    return batch | {
        "layout": layout._replace(loss_positions=select_loss_positions(batch["targets"]))
    }


def side_by_side(samples, T):
    """How records that share a picture are kept apart. For attention each of the R records gets a row of its own, the picture's tokens before it:

        ids of a sample   ▁USER : ▪ ▪ ▪ What ? cat Where ? left      there   ▁USER : ▪ ▪ ▪ What ? cat
        positions             0 1 2 3 4    5 6   7     5 6    7              ▁USER : ▪ ▪ ▪ Where ? left

    positions (B, T), which go on from the picture in each record; there (R, U): the flat place b·T + t of what stands at each place of a row;
    back (B, T): the flat place r·U + u in those rows of each token (of what is common in the last of its rows: they are all the same)."""
    positions, rows, back = torch.zeros(len(samples), T, dtype=torch.long), [], []
    for b, sample in enumerate(samples):
        for start, stop in record_spans(sample):
            here = torch.cat([torch.arange(sample.starts[0]), torch.arange(start, stop)])
            positions[b, here] = torch.arange(len(here))
            rows.append(b * T + here)
    there = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    there = nn.functional.pad(
        there, (0, round_up_length(there.shape[1]) - there.shape[1])
    )  # behind a row's end place 0 stands, which nobody looks at
    back = torch.zeros(len(samples) * T, dtype=torch.long)
    for r, row in enumerate(rows):
        back[row] = r * there.shape[1] + torch.arange(len(row))
    return Layout(positions=positions, split_index=(there, back.view(-1, T)))


def round_up_length(length):
    """A length up to a multiple of 16, but for short ones: each new shape costs a CPU a new matrix product to plan and to keep, and torch.compile a new graph."""
    return length + (-length % 16 if length > 64 else 0)


def select_loss_positions(targets):
    """The flat places of targets to be learnt, and so often one that is not that they are a multiple of 64, for the reason of `rounded`; at least one."""
    flat = targets.flatten()
    wanted, spare = (flat != IGNORE_INDEX).nonzero()[:, 0], (flat == IGNORE_INDEX).nonzero()[:1, 0]
    return torch.cat([wanted, spare.repeat(-len(wanted) % 64 or 64 * (not len(wanted)))])


def pack(samples):
    """The same in one row without padding, (1, T): the documents end to end, with "positions" (1, T) that restart in each,
    and "rows" 2 × (1, T), the first key that a token sees and the one after the last: those of its own document up to itself (kernels.attention)."""
    assert all(len(sample.starts) == 1 for sample in samples), (
        "records side by side can't be packed"
    )
    parts = [collate([sample], 0, len(sample.ids) - 1) for sample in samples]
    batch = {key: torch.cat([part[key] for part in parts], dim=1) for key in ("ids", "targets")}
    lengths = torch.tensor([part["ids"].shape[1] for part in parts])
    at = torch.arange(int(lengths.sum()))[None]
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)[None]
    batch |= {
        "layout": Layout(
            at - first, (first.int(), (at + 1).int()), None, select_loss_positions(batch["targets"])
        )
    }
    pixels = [part["pixels"] for part in parts if "pixels" in part]
    return batch | ({"pixels": torch.cat(pixels)} if pixels else {})


# ---------------------------------------------------------------------------------------------- command line
def check(paths, tokenizer, config, max_length, show=20):
    """Prints what training would stumble on in each file; returns the number of bad samples."""
    total = 0
    for path in paths:
        data, reasons, languages, kinds, tokens, learnt, pictures = (
            ConversationDataset([path], tokenizer, config, max_length),
            [],
            Counter(),
            Counter(),
            0,
            0,
            0,
        )
        for i in range(len(data)):
            try:
                ids, mask, pixels, _ = data.sample(i)
            except BadSample as error:
                reasons.append(str(error))
                continue
            record, tokens, learnt, pictures = (
                data.record(i),
                tokens + len(ids),
                learnt + sum(mask),
                pictures + len(pixels),
            )
            languages[record.get("language", "?")] += 1
            kinds[record.get("kind", "?")] += 1
        for reason in reasons[:show]:
            print(reason)
        if len(reasons) > show:
            print(f"… and {len(reasons) - show} more")
        mix = lambda counter: ", ".join(f"{name} {n:,}" for name, n in counter.most_common())
        print(
            f"{path}: {len(data):,} records, {len(reasons):,} bad; {pictures:,} pictures; {tokens:,} tokens, {learnt:,} of them learnt; languages {mix(languages)}; kinds {mix(kinds)}"
        )
        total += len(reasons)
    return total


def show(path, tokenizer, config, max_length, count=3):
    """Prints the first records as the model reads them: learnt tokens green, read ones grey, a run of <image> as one."""
    data = ConversationDataset([path], tokenizer, config, max_length)
    for i in range(min(count, len(data))):
        ids, mask, *_ = data.sample(i)
        line, previous = "", None
        for id, learnt in zip(ids, mask):
            if not (id == previous == tokenizer.image_id):
                line += f"\033[{'32' if learnt else '90'}m{tokenizer.piece(id)}\033[0m "
            previous = id
        print(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check", "show"])
    parser.add_argument("files", nargs="+")
    parser.add_argument(
        "--model", required=True, help="a model folder: its tokenizer and picture size are used"
    )
    parser.add_argument("--max-length", type=int, default=2048)
    args = parser.parse_args()
    import checkpoint

    config, tokenizer = checkpoint.load_config(args.model), checkpoint.load_tokenizer(args.model)
    if args.command == "check":
        sys.exit(1 if check(args.files, tokenizer, config, args.max_length) else 0)
    for path in args.files:
        show(path, tokenizer, config, args.max_length)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
