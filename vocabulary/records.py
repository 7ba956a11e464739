"""Reading files line by line or record by record: LLaVA's JSON, JSON Lines, text.

Pipeline: below everything. data.py hands these functions on.
"""

import json
import mmap
import os
import re
from pathlib import Path


def scan_records(path):
    """Yields (start, end, record) for each record of a LLaVA file: its bytes, and what they say.

    The file is decoded as Latin-1, a character a byte. So places are exact and texts as long as
    their UTF-8, but letters beyond ASCII are wrong: `read_record` reads those.
    ValueError in one line: file, line, what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")

    with open(path, "rb") as file:
        # A byte order mark may come first. A list begins with a bracket.
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(start)
        is_list = file.read(4096).lstrip()[:1] == b"["
        records = scan_list(file, start) if is_list else scan_lines(file, start)

        try:
            for number, (start, end, record) in enumerate(records):
                if not isinstance(record, dict):
                    kind = type(record).__name__
                    raise ValueError(f"{path}: record {number} is {kind}, must be an object")
                yield start, end, record
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise ValueError(f"{path}: not JSON: {error.msg}: {where}") from None


def scan_list(file, start):
    """The records of a JSON list, which is in memory meanwhile."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        text = str(raw, "latin-1")
    decode, skip_space = json.JSONDecoder().raw_decode, re.compile(r"\s*").match

    at = skip_space(text, text.index("[", start) + 1).end()
    while text[at : at + 1] != "]":
        record, end = decode(text, at)
        yield at, end, record

        at = skip_space(text, end).end()
        if text[at : at + 1] == ",":
            at = skip_space(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)

    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, at + 1)


def scan_lines(file, start):
    """The records of a JSON Lines file; one line is in memory at a time."""
    file.seek(start)
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield start, start + len(line), json.loads(line.rstrip().decode("latin-1"))
            except json.JSONDecodeError as error:
                error.lineno = number  # of the file; json counts from this line
                raise
        start += len(line)


def read_record(path, start, end):
    """The record in bytes start … end of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return json.loads(file.read(end - start))
        except UnicodeDecodeError as error:
            at = f"byte {start + error.start:,}"
            raise ValueError(f"{path}: {at} is not UTF-8: {error.reason}") from None


def read_records(path):
    """All records of a file, in memory."""
    return [read_record(path, start, end) for start, end, _ in scan_records(path)]


def decode_line(line, path, number):
    """A line of a text file, bytes -> str, stripped. ValueError names file and line."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8: {error.reason}") from None


def read_complete_lines(path):
    """The lines, as bytes, of a JSON Lines file that grows; [] if there is none. A last line that
    a crash cut off is removed from the file."""
    path = Path(path)
    # In bytes: str.splitlines would also split at U+2028, which JSON allows inside a text.
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    return lines
