"""What is the same run? One answer for all that goes on where it stopped.

Pipeline: below everything. Training, batch answers, evaluation, judge, annotation and the demo note
the identity of a run beside its results, and compare it before they go on: the settings that change
results, and {flag: [[file, digest], …]} in "files". A file is known by its contents, whatever its
path and time:

    records, texts   a hash of all bytes, about a second a GB. Their names of images count, but not
                     the images: training would look at 600,000 files at each start
    a model folder   weights, config, tokenizer, image settings. Of weights above 1 GiB a hash of
                     the size, the first MiB (the header) and 4 KiB of every 4 MiB: training changes
                     a tensor everywhere, and 26 GB take a second
    images           where there is an answer for each: name, size and time, without reading them

Device, number of processes, workers and what is saved how often don't count.
"""

import hashlib
import json
import os
from pathlib import Path

from vocabulary.command import first_few
from vocabulary.files import (
    claim_output,
    lock_file,
    read_json,
    set_aside,
    sibling,
    write_atomically,
    write_json,
)
from vocabulary.formats import find_file

LARGE, HEAD, BLOCK, STRIDE = 1 << 30, 1 << 20, 1 << 12, 1 << 22  # bytes
MODEL_FILES = (
    *("config.json", "tokenizer*", "*processor_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
)


def digest(path, may_sample=False):
    """A short hash of a file's bytes; with may_sample of some of them, if it is large."""
    size, total = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        if not may_sample or size <= LARGE:
            while block := file.read(HEAD):
                total.update(block)
        else:
            total.update(b"%d" % size + file.read(HEAD))
            for start in range(STRIDE, size, STRIDE):
                file.seek(start)
                total.update(file.read(BLOCK))
            file.seek(size - BLOCK)
            total.update(file.read())
    return total.hexdigest()[:16]


def digest_text(value):
    """A short hash of a value that JSON can hold, such as the words of prompts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def describe_files(paths, may_sample=False):
    """[[path, digest]] of files. ValueError if one is not there."""
    paths = list(map(find_file, paths))
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    return [[str(path), digest(path, may_sample)] for path in paths]


def describe_model(folder):
    """The same of the files that make a model folder's model; or of one file, a tokenizer."""
    found = {path for pattern in MODEL_FILES for path in Path(folder).glob(pattern)}
    files = sorted(path for path in {Path(folder), *found} if path.is_file())
    return describe_files(files, may_sample=True)


def describe_images(paths):
    """[[path, name, size and time]] of those images that are there, each once."""
    entries = []
    for path in sorted(set(map(find_file, paths))):
        if path.is_file():
            stat = path.stat()
            entries.append([str(path), f"{path.name} {stat.st_size} {stat.st_mtime_ns}"])
    return entries


def file_difference(old, new):
    """How two lists of files differ, in words. None if the contents are the same, in this order."""
    old_contents, new_contents = ([entry[1] for entry in entries] for entries in (old, new))
    if old_contents == new_contents:
        return None
    gone = [name for name, content in old if content not in set(new_contents)]
    added = [name for name, content in new if content not in set(old_contents)]
    if gone and gone == added:
        return f"{first_few(gone, 3)} changed"
    if not gone and not added:  # another order, or one of them twice
        gone, added = ([name for name, _ in entries] for entries in (old, new))
    return f"{first_few(gone, 3) or 'nothing'} → {first_few(added, 3) or 'nothing'}"


def require_same(where, saved, now, advice):
    """ValueError that names what two identities differ in. What an earlier version did not note is
    not compared."""
    changed = []
    for name, value in now.items():
        if name != "files" and saved.get(name, value) != value:
            changed.append(f"{name}: {saved[name]} → {value}")
    for flag, entries in now.get("files", {}).items():
        difference = file_difference(saved.get("files", {}).get(flag, entries), entries)
        if difference:
            changed.append(f"{flag}: {difference}")
    if changed:
        raise ValueError(f"{where} of another run ({'; '.join(changed)}); {advice}")


def claim_run(out, identity, parts=(), fresh=False, known=False):
    """Says whose files those of a run are: `out` and its `parts`. The identity of the run is noted
    in OUT.run.json.

    ValueError if one of them is an input, was not written by this command, or by another run of it,
    or if another process writes to it.
    fresh: they are moved aside first. known: they are ours, though the note is missing."""
    out, note = Path(out), sibling(out, ".run.json")
    files, inputs = [out, *parts], []
    for entries in identity["files"].values():
        inputs += [path for path, _ in entries]

    def is_ours(_):
        if note.exists():
            return read_json(note)["command"] == identity["command"]
        return fresh or known

    for path in (*files, note):
        claim_output(path, is_ours, inputs)

    # Nothing is moved from under a process that still writes to it.
    for path in filter(os.path.exists, files):
        with open(path, "ab") as file:
            lock_file(file, path)

    if fresh:
        set_aside(*files, note)
    saved, advice = read_json(note) if note.exists() else {}, "--fresh sets it aside"
    if any(path.exists() and path.stat().st_size for path in files):
        require_same(f"{out}: is", saved, identity, f"{advice}, or give another -o")
    written = {"written": saved["written"]} if "written" in saved else {}
    if written and out.exists() and digest(out) not in written["written"]:
        raise ValueError(f"{out}: was edited after this command wrote it; {advice}")
    write_json(note, identity | written)


def write_claimed(out, content):
    """Writes the bytes of a claimed file. The next claim notices if it was edited since."""
    note = sibling(out, ".run.json")
    # Noted first: either of the two is ours, whenever this is killed.
    written = [digest(out)] if os.path.exists(out) else []
    written.append(hashlib.sha256(content).hexdigest()[:16])
    write_json(note, read_json(note) | {"written": written})
    write_atomically(out, lambda file: file.write(content))
