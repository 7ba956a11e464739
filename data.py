"""From files to batches: LLaVA-format conversations, captions and plain text, with the chat template and its loss mask.

Where it stands: `checkpoint → data → generate → train / evaluate`. Three kinds of file, all read as other people write them:

    conversations   LLaVA JSON (a list) or JSON Lines: {"id", "image"?: file or list of files, "conversations": [{"from": "human"|"gpt", "value"}]}
    captions        the same format; the `vision` stage splits each answer at its commas into phrases
    text            UTF-8, one document a line

The chat template is LLaVA-1.5's, and `encode_chat` is the one place that knows it: training samples (ids and loss mask
together) and inference prompts both come from there.

    <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>USER: Where? ASSISTANT: at the top</s>       trained on: a cat</s> … at the top</s>

    python data.py check out/demo/data/instruct.json --model out/demo/align     # every bad sample by name, before a GPU is rented
    python data.py show out/demo/data/instruct.json --model out/demo/align      # what is trained on in green, what is only read in grey

Letters for sizes: B rows, T tokens, P pictures, F phrases.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import vision
from model import IGNORE

MARKER = "<image>"  # in a data file's human turn: a picture stands here. Typed by a user (generate.py) it is plain text
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")


# ---------------------------------------------------------------------------------------------- the chat template
def encode_chat(turns, tokenizer, num_patches):
    """The ids of a conversation and which of them are learnt: (ids, mask), two lists of the same length.

    turns: [(question, answer), …]; a question is a string, or a list of strings between which a picture stands each; an
    answer of None (only in the last turn) ends the ids where the model has to go on: a prompt for inference.
    The mask is 1 for the answer's tokens and its </s>. Texts are encoded apart around every control piece, as LLaVA-1.5 was trained.
    """
    ids, mask = [tokenizer.bos_id], [0]
    for question, answer in turns:
        parts = [question] if isinstance(question, str) else question
        for i, part in enumerate(parts):
            if i:
                ids += [tokenizer.image_id] * num_patches
            text = ("USER: " if i == 0 else "") + part + (" ASSISTANT:" if i == len(parts) - 1 else "")
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
        role, value = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if not isinstance(value, str):
            raise ValueError(f"turn {i}: the value is not a text")
        if role not in (USER, ASSISTANT)[i % 2]:
            raise ValueError(f"turn {i}: from {role!r}, but {(USER, ASSISTANT)[i % 2][0]!r} is due")
        if i % 2 == 0:
            parts = value.split(MARKER)
            parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
            turns.append([parts, None])
        elif not value.strip():
            raise ValueError(f"turn {i}: the answer is empty")
        elif MARKER in value:
            raise ValueError(f"turn {i}: {MARKER} in an answer")
        else:
            turns[-1][1] = value.strip()
    if turns[-1][1] is None:
        raise ValueError("the last question has no answer")
    return turns


def picture_names(record):
    """The record's picture files, in order: none, one, or several."""
    image = record.get("image")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"image is {type(image).__name__}, must be a file name or a list of them")
    return names


def encode_records(records, tokenizer, num_patches, max_length):
    """(ids, mask, names of the pictures) of a conversation, or of several about the same picture, one after the other.

    Raises ValueError with the reason why it can't be trained on."""
    turns, names = [], picture_names(records[0])
    for n, record in enumerate(records):
        more = read_turns(record)
        markers = sum(len(parts) - 1 for parts, _ in more)
        if markers != len(names):
            raise ValueError(f"{markers} {MARKER} marker(s) for {len(names)} picture(s)")
        if n:  # the picture stands there already
            more = [["".join(parts).strip(), answer] for parts, answer in more]
        turns += more
    ids, mask = encode_chat(turns, tokenizer, num_patches)
    if len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens, the limit is {max_length}")
    return ids, mask, names


# ---------------------------------------------------------------------------------------------- files
def read_records(path):
    """The records of a LLaVA JSON list or of a JSON Lines file. Raises ValueError in one line: file, line, what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        records = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {i} is {type(record).__name__}, must be an object")
    return records


class Pictures:
    """Reads pictures below `root` as uint8 (3, size, size); keeps what it has read while that fits into `keep` bytes."""

    def __init__(self, root, size, mode, keep=1 << 28):
        self.root, self.size, self.mode = Path(root), size, mode
        self.room, self.kept = keep // (3 * size * size), {}

    def __call__(self, name):
        pixels = self.kept.get(name)
        if pixels is None:
            pixels = vision.preprocess(vision.load_picture(self.root / name), self.size, self.mode)
            if len(self.kept) < self.room:
                self.kept[name] = pixels
        return pixels


class Chats:
    """Conversations of LLaVA files: sample(i) -> (ids, mask, pixels). Bad samples are found when they are due, and named.

    merge: up to so many records about one picture in one language, in random order, make one sample, as LLaVA-1.5 does with its question sets:
    the picture's tokens are paid for once, and each of them is asked more often."""

    def __init__(self, paths, tokenizer, config, max_length, merge=1):
        self.files = [(path, read_records(path)) for path in paths]
        self.samples, together = [], {}
        for f, (_, records) in enumerate(self.files):
            for i, record in enumerate(records):
                alone = merge == 1 or not isinstance(record.get("image"), str)
                group = together.setdefault((f, i) if alone else (f, record["image"], record.get("language")), [])
                group.append(i)
        for key, group in together.items():
            random.Random(repr(key)).shuffle(group)
            self.samples += [(key[0], group[at : at + merge]) for at in range(0, len(group), merge)]
        self.pictures = [Pictures(Path(path).parent, config.vision.image_size, config.picture_mode) for path, _ in self.files]
        self.tokenizer, self.num_patches, self.max_length = tokenizer, config.vision.num_patches, max_length

    def __len__(self):
        return len(self.samples)

    def records(self, i):
        f, indices = self.samples[i]
        return [self.files[f][1][index] for index in indices]

    def record(self, i):
        return self.records(i)[0]

    def length(self, i):
        """A cheap stand-in for the number of tokens, to batch like with like: bytes of text, and a picture as a thousand."""
        records = self.records(i)
        messages = [m for record in records for m in record.get("conversations") or () if isinstance(m, dict)]
        return sum(len(str(m.get("value")).encode()) for m in messages) + 1000 * ("image" in records[0])

    def sample(self, i):
        f, indices = self.samples[i]
        records = self.records(i)
        try:
            ids, mask, names = encode_records(records, self.tokenizer, self.num_patches, self.max_length)
            return ids, mask, [self.pictures[f](name) for name in names]
        except ValueError as error:
            raise BadSample(f"{self.files[f][0]}: record {', '.join(map(str, indices))} (id {records[0].get('id')!r}): {error}") from None


class Texts:
    """Documents of text files, one a line: sample(i) -> (ids, mask of ones, no pictures). A long one goes on in further samples."""

    def __init__(self, paths, tokenizer, max_length):
        self.documents = []
        self.tokenizer = tokenizer
        for path in paths:
            if not Path(path).is_file():
                raise ValueError(f"{path}: no such file")
            for number, line in enumerate(open(path, "rb"), 1):
                try:
                    line = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}: line {number} is not UTF-8: {error.reason}") from None
                if line:
                    ids = [tokenizer.bos_id] + tokenizer.encode(line) + [tokenizer.eos_id]
                    self.documents += [ids[at : at + max_length] for at in range(0, len(ids) - 1, max_length - 1)]

    def __len__(self):
        return len(self.documents)

    def length(self, i):
        return len(self.documents[i])

    def sample(self, i):
        ids = self.documents[i]
        return ids, [0] + [1] * (len(ids) - 1), []


class Phrases:
    """Pictures with all the phrases that are said of them, for the contrast of the `vision` stage.

    A picture's phrases are its captions' parts between commas, in every language; what several records say of one picture
    is put together, so that a phrase which two pictures of a batch share counts as true of both. A picture that nobody described in
    a language says nothing about that language's phrases: they are neither true nor false of it."""

    def __init__(self, paths, tokenizer, config):
        self.tokenizer, self.names, self.phrases, self.languages = tokenizer, [], [], []
        self.without_picture, where = 0, {}
        for path in paths:
            pictures = Pictures(Path(path).parent, config.vision.image_size, config.picture_mode)
            for index, record in enumerate(read_records(path)):
                try:
                    names = picture_names(record)
                    if len(names) > 1:
                        raise ValueError(f"{len(names)} pictures: the contrast takes one")
                    if not names:
                        self.without_picture += 1  # nothing to contrast; train.py says how many
                        continue
                    name = names[0]
                    said = [part.strip(" .。") for _, answer in read_turns(record) for part in answer.replace("，", ",").split(",")]
                except ValueError as error:
                    raise BadSample(f"{path}: record {index} (id {record.get('id')!r}): {error}") from None
                key = (pictures.root, name)
                if key not in where:
                    where[key] = len(self.names)
                    self.names.append((pictures, name))
                    self.phrases.append({})
                    self.languages.append(set())
                language = record.get("language", "?")
                self.languages[where[key]].add(language)
                self.phrases[where[key]].update(dict.fromkeys((language, phrase) for phrase in said if phrase))  # a dict keeps the order: same phrases every run
        self.ids = {}

    def __len__(self):
        return len(self.names)

    def batch(self, step, rank=0, world=1, seed=0, per_picture=6):
        """`step`: the indices of a global batch, of which this rank has every world-th. Its pixels (B, 3, S, S); ids and offsets, as EmbeddingBag
        takes them, of F phrases, drawn from what is said of its pictures; is_true and is_known bool (F, pictures of rank 0, of rank 1, …);
        pictures: their numbers."""
        chosen = []
        for i in step[rank::world]:
            said = list(self.phrases[i])
            chosen += random.Random(f"{seed} {i}").sample(said, min(per_picture, len(said)))
        ids, offsets = [], []
        for language, phrase in chosen:
            if phrase not in self.ids:
                self.ids[phrase] = self.tokenizer.encode(phrase)
            offsets.append(len(ids))
            ids += self.ids[phrase]
        pixels = []
        for i in step[rank::world]:
            pictures, name = self.names[i]
            try:
                pixels.append(pictures(name))
            except ValueError as error:
                raise BadSample(str(error)) from None
        everyone = [step[r::world] for r in range(world)]
        columns = [i for theirs in everyone for i in theirs]
        is_true = torch.tensor([[phrase in self.phrases[i] for i in columns] for phrase in chosen])
        is_known = torch.tensor([[language in self.languages[i] for i in columns] for language, _ in chosen])
        return {"pixels": torch.stack(pixels), "ids": torch.tensor(ids), "offsets": torch.tensor(offsets), "is_true": is_true, "is_known": is_known, "pictures": list(map(len, everyone))}


class BadSample(ValueError):
    """A sample that can't be used; the message names file, record, id and reason."""


# ---------------------------------------------------------------------------------------------- batches
def collate(samples, pad_id):
    """[(ids, mask, pixels)] -> {"ids" (B, T), "targets" (B, T), "pixels" (P, 3, S, S)?}: padded on the right to the longest.

    targets[b, t] is the id that follows ids[b, t] where that one is learnt, IGNORE elsewhere."""
    T = max(len(ids) for ids, _, _ in samples) - 1
    batch = {"ids": torch.full((len(samples), T), pad_id), "targets": torch.full((len(samples), T), IGNORE)}
    for row, (ids, mask, _) in enumerate(samples):
        n = len(ids) - 1
        batch["ids"][row, :n] = torch.tensor(ids[:-1])
        batch["targets"][row, :n] = torch.tensor([id if learnt else IGNORE for id, learnt in zip(ids[1:], mask[1:])])
    pixels = [picture for _, _, pictures in samples for picture in pictures]
    if pixels:
        batch["pixels"] = torch.stack(pixels)
    return batch


class Plan:
    """Which samples make up which global batch: a function of (seed, epoch) alone, so that a step number is the whole data position.

    Each epoch is a new permutation. Samples of like length are put together (windows of 64 batches sorted by length, then the batches
    shuffled), which leaves little padding. The last batch of an epoch may be short; no sample is left out or seen twice."""

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed, self.cache = lengths, batch_size, seed, (None, None)
        self.per_epoch = -(-len(lengths) // batch_size)

    def __getitem__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        if self.cache[0] != epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = list(range(len(self.lengths)))
            rng.shuffle(order)
            window = 64 * self.batch_size
            batches = []
            for start in range(0, len(order), window):
                near = sorted(order[start : start + window], key=lambda i: self.lengths[i])
                batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
            rng.shuffle(batches)
            self.cache = (epoch, batches)
        return self.cache[1][at]


class Batches(Dataset):
    """What one rank gets at each micro-step: item n is micro-batch n % accumulate of step n // accumulate.

    Rank r of a step takes every world-th sample of the global batch, beginning with the r-th, cut into `accumulate` parts."""

    def __init__(self, data, batch_size, seed, pad_id=0, accumulate=1, rank=0, world=1, steps=None, start=0, bad_samples="error"):
        self.data, self.pad_id, self.seed = data, pad_id, seed
        self.accumulate, self.rank, self.world, self.bad_samples = accumulate, rank, world, bad_samples
        lengths = [0] * len(data) if isinstance(data, Phrases) else [data.length(i) for i in range(len(data))]
        self.plan = Plan(lengths, batch_size, seed)
        self.steps, self.start = steps if steps is not None else self.plan.per_epoch, start

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __getitem__(self, n):
        step, micro = divmod(self.start * self.accumulate + n, self.accumulate)
        if isinstance(self.data, Phrases):
            return self.data.batch(self.plan[step], self.rank, self.world, f"{self.seed} {step}") | {"bad": []}
        mine = self.plan[step][self.rank :: self.world][micro :: self.accumulate]
        samples, bad = [], []
        for i in mine:
            try:
                samples.append(self.data.sample(i))
            except BadSample as error:
                if self.bad_samples == "error":
                    raise
                bad.append(str(error))
        if not samples:  # nothing to learn from here, but every rank takes part in every step
            samples = [([self.pad_id, self.pad_id], [0, 0], [])]
        return collate(samples, self.pad_id) | {"bad": bad}


def loader(batches, workers=0):
    """Iterates over `batches` in order, `workers` processes preparing them ahead (0: in this process)."""
    return DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)


# ---------------------------------------------------------------------------------------------- command line
def check(paths, tokenizer, config, max_length, show=20):
    """Prints what training would stumble on in each file; returns the number of bad samples."""
    total = 0
    for path in paths:
        data, reasons, languages, kinds, tokens, learnt, pictures = Chats([path], tokenizer, config, max_length), [], Counter(), Counter(), 0, 0, 0
        for i in range(len(data)):
            record = data.record(i)
            try:
                ids, mask, pixels = data.sample(i)
            except BadSample as error:
                reasons.append(str(error))
                continue
            tokens, learnt, pictures = tokens + len(ids), learnt + sum(mask), pictures + len(pixels)
            languages[record.get("language", "?")] += 1
            kinds[record.get("kind", "?")] += 1
        for reason in reasons[:show]:
            print(reason)
        if len(reasons) > show:
            print(f"… and {len(reasons) - show} more")
        mix = lambda counter: ", ".join(f"{name} {n:,}" for name, n in counter.most_common())
        print(f"{path}: {len(data):,} records, {len(reasons):,} bad; {pictures:,} pictures; {tokens:,} tokens, {learnt:,} of them learnt; languages {mix(languages)}; kinds {mix(kinds)}")
        total += len(reasons)
    return total


def show(path, tokenizer, config, max_length, count=3):
    """Prints the first records as the model reads them: learnt tokens green, read ones grey, a run of <image> as one."""
    data = Chats([path], tokenizer, config, max_length)
    for i in range(min(count, len(data))):
        ids, mask, _ = data.sample(i)
        line, previous = "", None
        for id, learnt in zip(ids, mask):
            if not (id == previous == tokenizer.image_id):
                line += f"\033[{'32' if learnt else '90'}m{tokenizer.piece(id)}\033[0m "
            previous = id
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "show"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", required=True, help="a model folder: its tokenizer and picture size are used")
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
