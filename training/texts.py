"""The data set of the text stage: documents, cut into samples."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np

from checkpoint import write_atomically
from data import Sample
from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.formats import decode_line, file_version, find_file, open_text


class TextDataset:
    """Documents of UTF-8 text files, one a line: sample(i) -> Sample, all tokens but <s> are
    targets. A long document continues in further samples."""

    def __init__(self, paths, tokenizer, max_length, cache):
        self.paths, self.languages = list(paths), [{}] * len(paths)  # languages are unknown
        self.ids = [read_tokens(path, tokenizer, cache) for path in self.paths]
        ends = tokenizer.bos_id, tokenizer.eos_id
        spans = [cut_documents(ids, *ends, max_length) for ids in self.ids]
        self.sizes = [len(of_file) for of_file in spans]
        self.spans = np.concatenate(spans)
        self.sort_keys = self.spans[:, 1] - self.spans[:, 0]

    def __len__(self):
        return len(self.spans)

    def locate(self, i):
        """(index of the file, start, stop) of sample i."""
        return int(np.searchsorted(np.cumsum(self.sizes), i, side="right")), *self.spans[i]

    def name(self, i):
        f, start, stop = self.locate(i)
        return f"{self.paths[f]}: tokens {start:,} – {stop:,} of {len(self.ids[f]):,}"

    def sample(self, i):
        f, start, stop = self.locate(i)
        ids = self.ids[f][start:stop].tolist()
        return Sample(ids, [0] + [1] * (len(ids) - 1), [])


def cut_documents(ids, bos_id, eos_id, max_length):
    """The (start, stop) of each sample, int64 (n, 2). ids: documents from bos_id to eos_id."""
    # In blocks: a mask for all ids may not fit into memory.
    block, starts = 1 << 26, [np.zeros(0, int)]
    for at in range(0, len(ids), block):
        starts.append(np.flatnonzero(ids[at : at + block] == bos_id) + at)
    starts = np.concatenate(starts)
    if bos_id == eos_id:  # one piece, as in GPT-2: every second one is an end
        starts = starts[::2]
    ends = np.append(starts[1:], len(ids))[: len(starts)]

    # A further sample begins with the last token of the one before, so that each token but the
    # first of a document is a target once.
    step = max_length - 1
    counts = -(-(ends - starts - 1) // step)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    sample_starts = np.repeat(starts, counts) + nth * step
    sample_ends = np.minimum(sample_starts + max_length, np.repeat(ends, counts))
    return np.stack([sample_starts, sample_ends], axis=1)


class MappedIds(np.memmap):
    """An array in a file. A worker process maps the file again; the array is not sent to it."""

    def __reduce__(self):
        return MappedIds, (self.filename, self.dtype, "r")


def read_tokens(path, tokenizer, cache):
    """The ids of a text file, documents end to end, each from <s> to </s>: MappedIds of a file in
    the folder `cache`, whose name depends on text and tokenizer."""
    path = find_file(path)
    open_text(path).close()  # ValueError now if it is no text
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    key = hashlib.sha256(tokenizer.to_bytes() + repr(file_version(path)).encode()).hexdigest()
    file = Path(cache) / f"{path.stem}-{key[:16]}.{dtype.__name__}"

    # The first process of a machine writes. If it fails, torchrun ends the others.
    while not file.exists() and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(0.1)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda out: write_tokens(path, tokenizer, dtype, out))
    return MappedIds(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def write_tokens(path, tokenizer, dtype, out):
    """Tokenizes a text file on all cores, 4 MiB of lines at a time, and writes the ids to `out`."""
    count = 0
    with open_text(path) as file:
        while lines := file.readlines(1 << 22):
            texts = [decode_line(line, path, count + n).strip() for n, line in enumerate(lines, 1)]
            texts = [text for text in texts if text]
            for ids in encode_all(texts, tokenizer):
                out.write(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype).tobytes())
            count += len(lines)


def encode_all(texts, tokenizer):
    """The ids of each text; SentencePiece's on all cores."""
    if isinstance(tokenizer, ByteLevelTokenizer):
        return map(tokenizer.encode, texts)
    return tokenizer.sp_processor.encode(texts, num_threads=os.cpu_count())
