"""From files to batches: the chat template with its loss mask, records, samples, collation.

Reading order: tokenizer → vision → model → **data** → train → generate.
A file of conversations is LLaVA's JSON, a list of records, or JSON Lines, one record per line:

    {"id", "image"?: file or list of files,
     "conversations": [{"from": "human" | "gpt", "value": text}, …]}

vocabulary/conversations.py reads it, and the other ways in which public sets write the same.

The chat template is LLaVA-1.5's, ChatML or Llama 3's. Only `encode_chat` fills it in: training
samples and prompts for inference come from there. Here the targets are "a cat</s>", "left</s>":

    <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>USER: Where? ASSISTANT: left</s>

    python data.py check out/demo/data/instruct.json --model out/demo/align   # lists bad samples
    python data.py show out/demo/data/instruct.json --model out/demo/align   # targets in green

Data sets of the text and the vision stage: training/texts.py, training/phrases.py.
Dimensions: B samples, T tokens, I images, S image size, R records, U tokens of the longest record.
"""

import math
import random
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import load_config, load_tokenizer, require_fit
from model import IGNORE_INDEX, Layout
from vision import ImageCache
from vocabulary import flags
from vocabulary.chat_markers import chat_markers, encode_answer
from vocabulary.command import Parser, first_few, run_main, use_colour
from vocabulary.conversations import (
    IMAGE_KEYS,
    IMAGE_TOKEN,
    UNANSWERED,
    begins_with_answer,
    raw_messages,
    read_conversation,
    record_name,
)
from vocabulary.formats import shorten
from vocabulary.records import read_records, scan_records
from vocabulary.scripts import guess_language


# ---------------- chat template
def encode_chat(turns, tokenizer, num_patches):
    """(ids, loss_mask) of a conversation, two lists. The mask is 1 for each answer and its </s>.

    turns: [(question, answer), …]. A question is a string, or a list of strings with an image
    between each two. The last answer may be None: the ids are then a prompt for inference.
    Each part is tokenized by itself, as in transformers. Around it: vocabulary/chat_markers.py."""
    chat = chat_markers(tokenizer)
    ids = list(chat.begin)
    loss_mask = [0] * len(ids)
    for n, (question, answer) in enumerate(turns):
        parts = [question] if isinstance(question, str) else list(question)
        parts[0] = (chat.question_prefix if n else chat.first_prefix) + parts[0]
        parts[-1] += chat.question_suffix

        # The question is context: no targets.
        ids += chat.turn
        for i, part in enumerate(parts):
            if i > 0:
                ids += [tokenizer.image_id] * num_patches
            if part:
                ids += tokenizer.encode(part)
        ids += chat.reply
        loss_mask += [0] * (len(ids) - len(loss_mask))

        # The answer is a target, up to its </s>.
        if answer is not None:
            ids += encode_answer(answer, tokenizer)
            loss_mask += [1] * (len(ids) - len(loss_mask))
            ids += chat.next_turn
            loss_mask += [0] * len(chat.next_turn)
    return ids, loss_mask


# ---------------- samples
class BadSample(ValueError):
    """A sample that can't be used. The message names file, record, id and reason."""


class Sample(NamedTuple):
    """One training sequence: a conversation, or several about one image. Several share the tokens
    up to the image, and do not attend to each other."""

    ids: list
    loss_mask: list  # 1 where the id is a target
    pixels: list  # its images, uint8 (3, S, S) each
    starts: tuple = (0,)  # where each record's own ids begin, after the shared prefix


def encode_records(records, tokenizer, config, max_length):
    """(ids, loss_mask, image files, starts) of one record, or of several that begin with the same
    image and share the prefix "<s>USER: <image> … <image>". ValueError says why a record can't be
    used: it has more tokens than max_length or than the model reads, …"""
    num_patches = config.vision.num_patches
    ids, loss_mask, starts = [], [], []
    for record in records:
        try:
            conversation = read_conversation(record)
            record_ids, record_mask = encode_chat(conversation.turns, tokenizer, num_patches)
            check_length(record_ids, config, max_length)
        except ValueError as error:
            if len(records) == 1:
                raise
            others = f"the {len(records) - 1} that share its sample go with it"
            raise ValueError(f"id {shorten(repr(record.get('id')))}: {error}; {others}") from None

        # The prefix ends after the image. Only the first record adds it to the sample.
        prefix = record_ids.index(tokenizer.image_id) + num_patches if len(records) > 1 else 0
        if starts:
            assert record_ids[:prefix] == ids[:prefix], "these records can't share a sample"
            record_ids, record_mask = record_ids[prefix:], record_mask[prefix:]
        starts.append(len(ids) if starts else prefix)
        ids += record_ids
        loss_mask += record_mask
    return ids, loss_mask, conversation.images, tuple(starts)


def check_length(ids, config, max_length=math.inf):
    """ValueError if a sample has too many tokens."""
    limit = config.text.max_position_embeddings
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens, longer than the model reads: the limit is {limit}")
    if len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens, the limit is {max_length}")


def record_spans(sample):
    """(start, stop) of each record's own input tokens. The last id of a sample is only a target."""
    return list(zip(sample.starts, [*sample.starts[1:], len(sample.ids) - 1]))


def record_lengths(sample):
    """The number of tokens of each record, the shared prefix included."""
    return [sample.starts[0] + stop - start for start, stop in record_spans(sample)]


def attention_pairs(sample):
    """Query-key pairs before the causal mask: the sum of the records' squared lengths. The pairs
    inside the shared prefix count once."""
    repeated = (len(sample.starts) - 1) * sample.starts[0] ** 2
    return sum(length**2 for length in record_lengths(sample)) - repeated


# ---------------- data sets
def shared_image_key(record, messages):
    """(image, "", number of messages): records of one key may share a sample; None: the record is
    alone. Conversations and single questions don't mix. `scan` seeds its shuffle with the key: the
    "" keeps the order that models were trained with."""
    found = [record[key] for key in IMAGE_KEYS if record.get(key)]
    image = found[0] if len(found) == 1 else None
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    question = messages[0][1] if messages else None
    if not isinstance(image, str) or not isinstance(question, str):
        return None
    return (image, "", len(messages)) if question.count(IMAGE_TOKEN) == 1 else None


def record_language(record, messages):
    """The language that a record names, or that of its first turn's script."""
    language = record.get("language")
    if language or not messages:
        return str(language or "?")
    contents = [str(content) for role, content in messages if role != "system"]
    text = "".join(contents[:2])
    try:  # `scan_records` reads bytes as latin-1, which is quick
        return guess_language(text.encode("latin-1").decode())
    except ValueError:  # the file has escapes such as \\uac00: these are right already
        return guess_language(text)


class ConversationDataset:
    """Conversations of LLaVA files: sample(i) -> Sample, or BadSample is raised. In memory is only
    where each record lies, about 36 bytes a record.

    records_per_sample: up to this many records of one image, in random order, make one sample with
    one image. LLaVA-1.5 makes them one conversation, in which a model can copy an answer that an
    earlier turn already gave. So here they stay apart (docs/experiments.md)."""

    def __init__(
        self, paths, tokenizer, config, max_length, records_per_sample=1, images=None, cache=None
    ):
        self.paths, self.tokenizer = list(paths), tokenizer
        self.config, self.max_length = config, max_length
        self.records_per_sample = records_per_sample
        self.load_image = ImageCache(config.vision.image_size, config.image_aspect_ratio, cache)
        self.image_folders = [Path(images or Path(path).parent) for path in self.paths]
        # Of each file: byte ranges of its records (n, 2); number of samples; Counter of languages.
        self.spans, self.sizes, self.languages = [], [], []
        self.num_dropped = 0  # records that begin with a turn of the model, which is left out
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
            # What is wrong with a record is found in `sample`.
            record, messages = record if isinstance(record, dict) else {}, raw_messages(record)
            spans.extend((start, end))
            text_lengths.append(sum(len(str(content)) for _, content in messages))
            has_image.append(any(key in record for key in IMAGE_KEYS))
            languages[record_language(record, messages)] += 1
            self.num_dropped += begins_with_answer(messages)
            if self.records_per_sample > 1:
                groups.setdefault(shared_image_key(record, messages) or i, []).append(i)
        self.spans.append(np.array(spans).reshape(-1, 2))
        self.languages.append(languages)
        # With one record a sample there are no groups, which would take memory.
        single_records = ((i, [i]) for i in range(len(has_image)))
        for key, group in groups.items() or single_records:
            if len(group) > 1:
                random.Random(f"{f} {key}").shuffle(group)
            # Sort key: the number of messages first, then the characters, a cheap stand-in for the
            # number of tokens. An image counts as 1,000 characters.
            num_messages = key[2] if isinstance(key, tuple) else 0
            for first in range(0, len(group), self.records_per_sample):
                numbers = group[first : first + self.records_per_sample]
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
        return read_records(self.paths[f], self.spans[f][numbers].tolist())

    def record(self, i):
        """The first record of sample i."""
        return self.records(i)[0]

    def name(self, i):
        f, numbers = self.locate(i)
        try:
            record = self.record(i)
        except ValueError:  # it is not UTF-8
            record = None
        return record_name(self.paths[f], ", ".join(map(str, numbers)), record)

    def sample(self, i):
        f, _ = self.locate(i)
        try:
            ids, loss_mask, files, starts = encode_records(
                self.records(i), self.tokenizer, self.config, self.max_length
            )
            pixels = [self.load_image(self.image_folders[f] / file) for file in files]
        except ValueError as error:
            raise BadSample(f"{self.name(i)}: {error}") from None
        return Sample(ids, loss_mask, pixels, starts)


# ---------------- batches
def collate(samples, pad_id, T=None):
    """Samples -> a batch: ids and targets (B, T), padded on the right; layout; pixels
    (I, 3, S, S) if there are images. A target is the id that follows, or IGNORE_INDEX where the
    loss mask is 0. T: default the longest sample, rounded up. training/sampler.py adds counts.
    Samples of several records lie end to end in one row (1, T), without padding between them."""
    lengths = np.array([len(sample.ids) - 1 for sample in samples])  # the last id is only a target
    is_shared = any(len(sample.starts) > 1 for sample in samples)
    T = -(-int(lengths.sum()) // 64) * 64 if is_shared else T or round_up_length(lengths.max())
    # The place of each sample's first token among all tokens.
    firsts = lengths.cumsum() - lengths if is_shared else np.arange(len(samples)) * T

    size = T if is_shared else T * len(samples)
    ids, targets = np.full(size, pad_id), np.full(size, IGNORE_INDEX)
    for sample, first, n in zip(samples, firsts, lengths):
        ids[first : first + n] = sample.ids[:-1]
        is_target = np.array(sample.loss_mask[1:], bool)
        targets[first : first + n] = np.where(is_target, sample.ids[1:], IGNORE_INDEX)
    ids, targets = (torch.from_numpy(flat).view(-1, T) for flat in (ids, targets))

    layout = side_by_side(samples, firsts, lengths, T) if is_shared else Layout()
    layout = layout._replace(loss_positions=select_loss_positions(targets))
    batch = {"ids": ids, "targets": targets, "layout": layout}
    pixels = [image for sample in samples for image in sample.pixels]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    return batch


def side_by_side(samples, firsts, lengths, T):
    """The Layout of samples that hold several records. All T tokens lie in one row. For attention
    they stand in rows of two kinds: each sample's prefix, the P tokens that all of its records
    begin with, and each record's own tokens, whose keys are the prefix and themselves:

        ids (simplified)  ▁USER : ▪ ▪ ▪ What ? cat Where ? left     keys  ▁USER : ▪ ▪ ▪ What ? cat
        positions             0 1 2 3 4    5 6   7     5 6    7           ▁USER : ▪ ▪ ▪ Where ? left

    firsts, lengths (B,): each sample's first place in the row, and how many input ids it has.
    split_index: prefixes (B, P) and groups of records of similar length, each own (R, U) and keys
    (R, P + U), hold places in the row. merge (T,): each token's place in prefixes, then in owns."""
    merge, positions, size = np.zeros(T, np.int64), np.zeros(T, np.int64), 0

    def rows(starts, stops, width, position):
        """(R, width): the places from each start to its stop, then 0, whose output isn't used.
        Notes in `merge` and `positions` where these tokens stand."""
        nonlocal size
        index = starts[:, None] + np.arange(width)
        is_token = index < stops[:, None]
        merge[index[is_token]] = size + np.flatnonzero(is_token)
        positions[index[is_token]] = position + is_token.nonzero()[1]
        size += index.size
        return index * is_token

    # The prefix is the template's and the image's: as long in each sample. In a sample of a single
    # record, where starts[0] is 0, any P tokens will do.
    P = max(sample.starts[0] for sample in samples)
    assert all(sample.starts[0] in (0, P) for sample in samples)
    prefixes = rows(firsts, firsts + lengths, P, 0)
    spans = [(b, *span) for b, sample in enumerate(samples) for span in record_spans(sample)]
    b, starts, stops = np.array([span for span in spans if span[2] > P]).T
    starts, stops = starts.clip(P) + firsts[b], stops + firsts[b]

    # Rows grow by 32, 64, 128 … keys: little padding in few shapes. A CPU's softmax takes two to
    # four times as long where the number of keys is not a multiple of 32.
    more = -(-(P + stops - starts) // 32) - P // 32
    widths = 32 * (P // 32 + 2 ** np.ceil(np.log2(more)).astype(int))
    groups = []
    for width in np.unique(widths).tolist():
        of_width = widths == width
        own = rows(starts[of_width], stops[of_width], width - P, P)
        keys = np.concatenate([prefixes[b[of_width]], own], axis=1)
        groups.append((torch.from_numpy(own), torch.from_numpy(keys)))

    split_index = torch.from_numpy(prefixes), tuple(groups), torch.from_numpy(merge)
    return Layout(positions=torch.from_numpy(positions)[None], split_index=split_index)


def round_up_length(length):
    """Round up to a multiple of 16 (above 64), so that few shapes occur: for each new one a CPU
    makes a plan, and torch.compile a graph."""
    return int(length + (-length % 16 if length > 64 else 0))


def select_loss_positions(targets, multiple=64):
    """Flat indices of the targets. An ignored position is added until there are `multiple` of
    them, or twice, three times … that: few shapes occur, and the list is never empty."""
    flat = targets.flatten()
    trained = (flat != IGNORE_INDEX).nonzero()[:, 0]
    ignored = (flat == IGNORE_INDEX).nonzero()[:1, 0]
    more = -len(trained) % multiple if len(trained) else multiple
    return torch.cat([trained, ignored.repeat(more)])


# ---------------- command line
def check(path, tokenizer, config, max_length, images=None):
    """Prints the bad samples of a file, and what it holds. Returns whether all is well."""
    dataset = ConversationDataset([path], tokenizer, config, max_length, images=images)
    count, languages, kinds = Counter(), Counter(), Counter()
    for i in range(len(dataset)):
        try:
            sample = dataset.sample(i)
        except BadSample as error:
            count["bad"] += 1
            count["unanswered"] += str(error).endswith(UNANSWERED)
            print(error)
            continue
        conversation, targets = read_conversation(dataset.record(i)), sum(sample.loss_mask)
        count.update(images=len(sample.pixels), tokens=len(sample.ids), targets=targets)
        count["dropped"] += conversation.dropped
        languages[conversation.language] += 1
        kinds[conversation.kind] += 1

    mix = [first_few(f"{name} {n:,}" for name, n in c.most_common()) for c in (languages, kinds)]
    line = (
        f"{path}: {len(dataset):,} records, {count['bad']:,} bad; {count['images']:,} images; "
        f"{count['tokens']:,} tokens, {count['targets']:,} of them targets; "
        f"languages {mix[0]}; kinds {mix[1]}"
    )
    if count["dropped"]:
        line += f"; {count['dropped']:,} first turns of the model are left out, as in LLaVA"
    print(line)

    # Questions without answers can still be asked (generate.py --batch).
    if count["bad"] == len(dataset):
        what = "questions without answers: " if count["unanswered"] else ""
        print(f"{path}: {what}nothing to train on")
    return count["bad"] == 0 < len(dataset)


def show(path, tokenizer, config, max_length, images=None, count=3):
    """Prints the first samples, an image as one token: targets green, or in brackets where there
    are no colours, other tokens grey."""
    dataset = ConversationDataset([path], tokenizer, config, max_length, images=images)
    styles = ("\033[90m{}\033[0m ", "\033[32m{}\033[0m ") if use_colour() else ("{} ", "[{}] ")
    for i in range(min(count, len(dataset))):
        sample, conversation = dataset.sample(i), read_conversation(dataset.record(i))
        files = ", ".join(conversation.images) or "none"
        print(f"{dataset.name(i)}: image {files}; language {conversation.language}")
        line, previous = "", None
        for token, is_target in zip(sample.ids, sample.loss_mask):
            if not (token == previous == tokenizer.image_id):
                piece = tokenizer.readable(tokenizer.piece(token))
                line += styles[is_target].format(piece)
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
    require_fit(config, tokenizer, args.model)
    command = check if args.command == "check" else show
    options = (tokenizer, config, args.max_length, args.images)
    results = [command(path, *options) for path in args.files]
    return 1 if False in results else 0


if __name__ == "__main__":
    run_main(main, "data.py")
