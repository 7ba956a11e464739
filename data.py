"""From files to batches: the chat template with its loss mask, records, samples, collation.

Reading order: tokenizer → vision → model → **data** → train → generate.
A file of conversations is LLaVA's JSON, a list of records, or JSON Lines, one record per line:

    {"id", "image"?: file or list of files,
     "conversations": [{"from": "human" | "gpt", "value": text}, …]}

The chat template is LLaVA-1.5's. Only `encode_chat` knows it: training samples and prompts for
inference both come from there. The targets of this conversation are "a cat</s>" and "left</s>":

    <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>USER: Where? ASSISTANT: left</s>

    python data.py check out/demo/data/instruct.json --model out/demo/align   # lists bad samples
    python data.py show out/demo/data/instruct.json --model out/demo/align   # targets in green

Data sets of the text and the vision stage: training/texts.py, training/phrases.py.
Dimensions: B samples, T tokens, I images, S image size, R records, U tokens of the longest record.
"""

import random
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import vision
from checkpoint import load_config, load_tokenizer
from model import IGNORE_INDEX, Layout
from vocabulary import flags
from vocabulary.command import Parser, run_main, use_colour
from vocabulary.records import read_record, scan_records

# Marks the place of an image in a record's question. In a question typed by a user it is text.
IMAGE_TOKEN = "<image>"
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")  # what "from" may be


# ------------------------------------------------------------------------------------ chat template
def encode_chat(turns, tokenizer, num_patches):
    """(ids, loss_mask) of a conversation, two lists. The mask is 1 for each answer and its </s>.

    turns: [(question, answer), …]. A question is a string, or a list of strings with an image
    between each two. The last answer may be None: the ids are then a prompt for inference.
    Each part is tokenized by itself and begins with "▁", so the ids are those of LLaVA-1.5."""
    ids, loss_mask = [tokenizer.bos_id], [0]
    for question, answer in turns:
        parts = [question] if isinstance(question, str) else list(question)
        parts[0] = "USER: " + parts[0]
        parts[-1] += " ASSISTANT:"

        # The question is context: no targets.
        for i, part in enumerate(parts):
            if i > 0:
                ids += [tokenizer.image_id] * num_patches
            if part:
                ids += tokenizer.encode(part)
        loss_mask += [0] * (len(ids) - len(loss_mask))

        # The answer is a target, up to its </s>.
        if answer is not None:
            ids += tokenizer.encode(answer) + [tokenizer.eos_id]
            loss_mask += [1] * (len(ids) - len(loss_mask))
    return ids, loss_mask


def read_turns(record):
    """A record's conversation as `encode_chat` takes it. ValueError says why it is not one."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no conversations")

    turns = []
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        role, value = fields.get("from"), fields.get("value")
        expected = (USER, ASSISTANT)[i % 2]
        if not isinstance(value, str):
            raise ValueError(f"message {i}: the value is not a text")
        if role not in expected:
            raise ValueError(f"message {i}: from {role!r}, must be {expected[0]!r}")

        if expected == USER:
            turns.append([split_question(value), None])
        elif not value.strip():
            raise ValueError(f"message {i}: the answer is empty")
        elif IMAGE_TOKEN in value:
            raise ValueError(f"message {i}: {IMAGE_TOKEN} in an answer")
        else:
            turns[-1][1] = value.strip()
    if turns[-1][1] is None:
        raise ValueError("the last question has no answer")
    return turns


def split_question(text):
    """The parts of a question between its images: n + 1 strings for n images."""
    parts = text.split(IMAGE_TOKEN)
    if len(parts) == 2:
        # As in LLaVA-1.5 a single image comes first, wherever the file has it.
        text = "".join(parts).strip()
        parts = ["", "\n" + text if text else ""]
    parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
    return parts


def image_files(record):
    """The image files of a record, in order: none, one, or several."""
    files = record.get("image")
    if files is None:
        return []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"image is {type(files).__name__}, must be a file name or a list of them")
    return files


# ------------------------------------------------------------------------------------ samples
class BadSample(ValueError):
    """A sample that can't be used. The message names file, record, id and reason."""


class Sample(NamedTuple):
    """One training sequence: a conversation, or several about one image. Several share the tokens
    up to the image, and do not attend to each other."""

    ids: list
    loss_mask: list  # 1 where the id is a target
    pixels: list  # its images, uint8 (3, S, S) each
    starts: tuple = (0,)  # where each record's own ids begin, after the shared prefix


def encode_records(records, tokenizer, num_patches, max_length):
    """(ids, loss_mask, image files, starts) of one record, or of several that begin with the same
    image and share the prefix "<s>USER: <image> … <image>". ValueError says why a record can't be
    used: it has more than max_length tokens, …"""
    files = image_files(records[0])
    ids, loss_mask, starts = [], [], []
    for record in records:
        try:
            turns = read_turns(record)
            markers = sum(len(parts) - 1 for parts, _ in turns)
            if markers != len(files):
                raise ValueError(f"{markers} {IMAGE_TOKEN} marker(s) for {len(files)} image(s)")
            record_ids, record_mask = encode_chat(turns, tokenizer, num_patches)
            if len(record_ids) > max_length:
                raise ValueError(f"{len(record_ids)} tokens, the limit is {max_length}")
        except ValueError as error:
            if len(records) == 1:
                raise
            others = f"the {len(records) - 1} that share its sample go with it"
            raise ValueError(f"id {record.get('id')!r}: {error}; {others}") from None

        # The prefix ends after the image. Only the first record adds it to the sample.
        prefix = record_ids.index(tokenizer.image_id) + num_patches if len(records) > 1 else 0
        if starts:
            assert record_ids[:prefix] == ids[:prefix], "these records can't share a sample"
            record_ids, record_mask = record_ids[prefix:], record_mask[prefix:]
        starts.append(len(ids) if starts else prefix)
        ids += record_ids
        loss_mask += record_mask
    return ids, loss_mask, files, tuple(starts)


def record_spans(sample):
    """(start, stop) of each record's own input tokens. The last id of a sample is only a target."""
    return list(zip(sample.starts, [*sample.starts[1:], len(sample.ids) - 1]))


def record_lengths(sample):
    """The number of tokens of each record, the shared prefix included."""
    return [sample.starts[0] + stop - start for start, stop in record_spans(sample)]


def attention_pairs(sample):
    """Query-key pairs before the causal mask: the sum of the records' squared lengths. The pairs
    inside the shared prefix count once, though attention computes them for each record."""
    repeated = (len(sample.starts) - 1) * sample.starts[0] ** 2
    return sum(length**2 for length in record_lengths(sample)) - repeated


# ------------------------------------------------------------------------------------ data sets
class ImageCache:
    """Loads images below `root` as uint8 (3, size, size), and keeps those that fit into 64 MiB."""

    def __init__(self, root, size, image_aspect_ratio):
        self.root, self.size, self.image_aspect_ratio = Path(root), size, image_aspect_ratio
        self.images, self.max_images = {}, (1 << 26) // (3 * size * size)

    def __call__(self, file):
        if file in self.images:
            return self.images[file]
        image = vision.load_image(self.root / file)
        pixels = vision.preprocess(image, self.size, self.image_aspect_ratio)
        if len(self.images) < self.max_images:
            self.images[file] = pixels
        return pixels


def shared_image_key(record):
    """(image, "", number of messages): records of one key may share a sample; None:
    the record stays alone. The "" only keeps the order that the key seeds in `scan`. The number of
    messages is there because rows are padded to the longest record of a sample."""
    image, messages = record.get("image"), record.get("conversations")
    if not isinstance(image, str) or not isinstance(messages, list) or not messages:
        return None
    question = messages[0].get("value") if isinstance(messages[0], dict) else None
    if not isinstance(question, str) or question.count(IMAGE_TOKEN) != 1:
        return None
    return image, "", len(messages)


def text_length(record):
    """The characters of a record's messages."""
    messages = record.get("conversations")
    messages = messages if isinstance(messages, list) else []
    return sum(len(str(item.get("value"))) for item in messages if isinstance(item, dict))


class ConversationDataset:
    """Conversations of LLaVA files: sample(i) -> Sample, or BadSample is raised. In memory is only
    where each record lies, about 36 bytes a record.

    records_per_sample: up to this many records of one image, in random order, make one sample with
    one image. LLaVA-1.5 makes them one conversation, in which a model can copy an answer that an
    earlier turn already gave. So here they stay apart (docs/experiments.md)."""

    def __init__(self, paths, tokenizer, config, max_length, records_per_sample=1, images=None):
        self.paths, self.tokenizer = list(paths), tokenizer
        self.num_patches, self.max_length = config.vision.num_patches, max_length
        self.records_per_sample = records_per_sample
        size, ratio = config.vision.image_size, config.image_aspect_ratio
        self.images = [ImageCache(images or Path(p).parent, size, ratio) for p in self.paths]
        # Of each file: byte ranges of its records (n, 2); number of samples; Counter of languages.
        self.spans, self.sizes, self.languages = [], [], []

        # The records of sample i are members[ends[i − 1] : ends[i]].
        members, ends, sort_keys = array("q"), array("q"), array("q")
        for f in range(len(self.paths)):
            for record_numbers, sort_key in self.scan(f):
                members.extend(record_numbers)
                ends.append(len(members))
                sort_keys.append(sort_key)
            self.sizes.append(len(ends) - sum(self.sizes))

        self.members, self.ends = np.array(members, np.int32), np.array(ends)
        self.sort_keys = np.array(sort_keys)  # the sampler puts similar ones into one batch

    def scan(self, f):
        """Notes where the records of file f are. Yields (record numbers, sort key) per sample."""
        spans, text_lengths, has_image = array("q"), array("q"), array("b")
        languages, groups = Counter(), {}
        for i, (start, end, record) in enumerate(scan_records(self.paths[f])):
            spans.extend((start, end))
            text_lengths.append(text_length(record))
            has_image.append("image" in record)
            languages[str(record.get("language", "?"))] += 1
            if self.records_per_sample > 1:
                groups.setdefault(shared_image_key(record) or i, []).append(i)
        self.spans.append(np.array(spans).reshape(-1, 2))
        self.languages.append(languages)

        alone = ((i, [i]) for i in range(len(has_image)))
        pairs = groups.items() or alone
        for key, group in pairs:
            if len(group) > 1:
                random.Random(f"{f} {key}").shuffle(group)
            # Sort key: the number of messages first, then the characters, a cheap stand-in for the
            # number of tokens. An image counts as 1,000 characters.
            num_messages = key[2] if isinstance(key, tuple) else 0
            for at in range(0, len(group), self.records_per_sample):
                numbers = group[at : at + self.records_per_sample]
                length = sum(text_lengths[i] for i in numbers) + 1000 * has_image[numbers[0]]
                yield numbers, num_messages * 2**32 + length

    def __len__(self):
        return len(self.ends)

    def locate(self, i):
        """(index of the file, numbers of its records) of sample i."""
        start = self.ends[i - 1] if i > 0 else 0
        f = int(np.searchsorted(np.cumsum(self.sizes), i, side="right"))
        return f, self.members[start : self.ends[i]].tolist()

    def records(self, i):
        f, numbers = self.locate(i)
        return [read_record(self.paths[f], *self.spans[f][n].tolist()) for n in numbers]

    def record(self, i):
        """The first record of sample i."""
        return self.records(i)[0]

    def name(self, i):
        f, numbers = self.locate(i)
        name = f"{self.paths[f]}: record {', '.join(map(str, numbers))}"
        try:
            return f"{name} (id {self.record(i).get('id')!r})"
        except ValueError:  # the record is not UTF-8
            return name

    def sample(self, i):
        f, _ = self.locate(i)
        try:
            ids, loss_mask, files, starts = encode_records(
                self.records(i), self.tokenizer, self.num_patches, self.max_length
            )
            pixels = [self.images[f](file) for file in files]
        except ValueError as error:
            raise BadSample(f"{self.name(i)}: {error}") from None
        return Sample(ids, loss_mask, pixels, starts)


# ------------------------------------------------------------------------------------ batches
def collate(samples, pad_id, T=None):
    """Samples -> a batch: ids and targets (B, T), padded on the right; layout; pixels
    (I, 3, S, S) if there are images. A target is the id that follows, or IGNORE_INDEX where the
    loss mask is 0. T: default the longest sample, rounded up. training/sampler.py adds counts."""
    T = T or round_up_length(max(len(sample.ids) for sample in samples) - 1)
    ids = torch.full((len(samples), T), pad_id)
    targets = torch.full((len(samples), T), IGNORE_INDEX)
    for row, sample in enumerate(samples):
        n = len(sample.ids) - 1  # the last id is only a target
        sample_ids, mask = torch.tensor(sample.ids), torch.tensor(sample.loss_mask)
        ids[row, :n] = sample_ids[:-1]
        targets[row, :n] = sample_ids[1:].masked_fill(mask[1:] == 0, IGNORE_INDEX)

    # Several records in a sample must not attend to each other.
    layout = Layout()
    if any(len(sample.starts) > 1 for sample in samples):
        layout = side_by_side(samples, T)
    layout = layout._replace(loss_positions=select_loss_positions(targets))

    batch = {"ids": ids, "targets": targets, "layout": layout}
    pixels = [image for sample in samples for image in sample.pixels]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    return batch


def side_by_side(samples, T):
    """The Layout of samples with several records. In attention each record has a row of its own:

        ids (simplified)  ▁USER : ▪ ▪ ▪ What ? cat Where ? left     rows  ▁USER : ▪ ▪ ▪ What ? cat
        positions             0 1 2 3 4    5 6   7     5 6    7           ▁USER : ▪ ▪ ▪ Where ? left

    positions (B, T) continue from the prefix in each record. split_index: gather (R, U), the flat
    index b·T + t of each token of a row, and scatter (B, T), the flat index r·U + u of each
    token's output. All rows have the same output for the prefix; scatter takes the last."""
    positions, rows = torch.zeros(len(samples), T, dtype=torch.long), []
    for b, sample in enumerate(samples):
        for start, stop in record_spans(sample):
            tokens = torch.cat([torch.arange(sample.starts[0]), torch.arange(start, stop)])
            positions[b, tokens] = torch.arange(len(tokens))
            rows.append(b * T + tokens)

    # Rows are padded with index 0. The output there is not used.
    gather = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    U = round_up_length(gather.shape[1])
    gather = torch.nn.functional.pad(gather, (0, U - gather.shape[1]))
    scatter = torch.zeros(len(samples) * T, dtype=torch.long)
    for r, row in enumerate(rows):
        scatter[row] = r * U + torch.arange(len(row))
    return Layout(positions=positions, split_index=(gather, scatter.view(-1, T)))


def round_up_length(length):
    """Round up to a multiple of 16 (above 64), so that few shapes occur: for each new one a CPU
    makes a plan, and torch.compile a graph."""
    return length + (-length % 16 if length > 64 else 0)


def select_loss_positions(targets):
    """Flat indices of the targets. An ignored position is added until their number is a multiple
    of 64, at least 64, so that few shapes occur and the list is never empty."""
    flat = targets.flatten()
    trained = (flat != IGNORE_INDEX).nonzero()[:, 0]
    ignored = (flat == IGNORE_INDEX).nonzero()[:1, 0]
    return torch.cat([trained, ignored.repeat(-len(trained) % 64 if len(trained) else 64)])


# ------------------------------------------------------------------------------------ command line
def check(path, tokenizer, config, max_length, images=None, limit=20):
    """Prints the first bad samples of a file, and what it holds. Returns the number of bad ones."""
    dataset = ConversationDataset([path], tokenizer, config, max_length, images=images)
    count, languages, kinds = Counter(), Counter(), Counter()
    for i in range(len(dataset)):
        try:
            sample = dataset.sample(i)
        except BadSample as error:
            count["bad"] += 1
            if count["bad"] <= limit:
                print(error)
            continue
        record, targets = dataset.record(i), sum(sample.loss_mask)
        count.update(images=len(sample.pixels), tokens=len(sample.ids), targets=targets)
        languages[record.get("language", "?")] += 1
        kinds[record.get("kind", "?")] += 1

    if count["bad"] > limit:
        print(f"… and {count['bad'] - limit} more")
    mix = [", ".join(f"{name} {n:,}" for name, n in c.most_common()) for c in (languages, kinds)]
    print(
        f"{path}: {len(dataset):,} records, {count['bad']:,} bad; {count['images']:,} images; "
        f"{count['tokens']:,} tokens, {count['targets']:,} of them targets; "
        f"languages {mix[0]}; kinds {mix[1]}"
    )
    return count["bad"]


def show(path, tokenizer, config, max_length, images=None, count=3):
    """Prints the first samples, an image as one token: targets green, or in brackets where there
    are no colours, other tokens grey."""
    dataset = ConversationDataset([path], tokenizer, config, max_length, images=images)
    styles = ("\033[90m{}\033[0m ", "\033[32m{}\033[0m ") if use_colour() else ("{} ", "[{}] ")
    for i in range(min(count, len(dataset))):
        sample, record = dataset.sample(i), dataset.record(i)
        files = ", ".join(image_files(record)) or "none"
        print(f"{dataset.name(i)}: image {files}; language {record.get('language', '?')}")
        line, previous = "", None
        for token, is_target in zip(sample.ids, sample.loss_mask):
            if not (token == previous == tokenizer.image_id):
                line += styles[is_target].format(tokenizer.piece(token))
            previous = token
        print(line)


def main():
    parser = Parser(description=__doc__)
    add, folder = parser.add_argument, {"type": flags.folder, "metavar": "FOLDER"}
    add("command", choices=["check", "show"], help="all samples in numbers, or the first ones")
    add("files", nargs="+", type=flags.file, metavar="FILE", help="conversations, LLaVA JSON")
    add("--model", required=True, **folder, help="its tokenizer and image size count")
    add("--images", **folder, help="the images' folder (default: that of each file)")
    add("--max-length", type=flags.at_least(2), default=2048, help="tokens of a record")
    args = parser.parse_args()
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    command = check if args.command == "check" else show
    bad = [command(path, tokenizer, config, args.max_length, args.images) for path in args.files]
    sys.exit(1 if any(bad) else 0)


if __name__ == "__main__":
    run_main(main, "data.py")
