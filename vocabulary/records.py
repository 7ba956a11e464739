"""Reading files record by record: LLaVA's JSON, JSON Lines.

Pipeline: below everything. conversations.py tells what a record may hold.
"""

import json
import mmap
import os
import re
from pathlib import Path

from vocabulary.formats import MARK, find_file, open_text, shorten


def scan_records(path):
    """Yields (start, end, value) for each record of a LLaVA file: its bytes, and what they say.

    The file is decoded as Latin-1, a character a byte. So places are exact and texts as long as
    their UTF-8, but letters beyond ASCII are wrong: `read_record` reads those.
    ValueError in one line: file, line, what is wrong."""
    path, number = find_file(path), 0
    with open_text(path) as file:
        if not path.is_file():
            raise ValueError(f"{path}: is a pipe; records need a file")
        start = file.tell()
        head = file.read(4096).lstrip()
        records = scan_list(file, start) if head[:1] == b"[" else scan_lines(file, start)
        if head and head[:1] not in (b"[", b"{"):
            raise ValueError(f"{path}: {describe_text(head)}; must be a JSON list or JSON Lines")

        try:
            for record in records:
                yield record
                number += 1
        except json.JSONDecodeError as error:
            if number == 0 and head[:1] == b"{":
                refuse_object(path)
            where = f"line {error.lineno} column {error.colno}"
            raise ValueError(f"{path}: not JSON: {error.msg}: {where}") from None
        except RecursionError:
            raise ValueError(f"{path}: record {number} is nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"{path}: record {number}: {shorten(error)}") from None


def describe_text(head):
    """What a text that is no JSON seems to be."""
    line = head.split(b"\n")[0].decode("utf-8", "replace")
    what = "a table (CSV or TSV)" if "\t" in line or "," in line else "no JSON"
    return f"{what}, begins with {line[:40].strip()!r}"


def refuse_object(path):
    """ValueError if a file that is no JSON Lines holds one object over several lines."""
    with open_text(path) as file:
        text = file.read().decode("latin-1").lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    lists = [key for key, entry in value.items() if isinstance(entry, list) and "conv" not in key]
    inside = f" (those in {shorten(lists[0], 40)!r}, it seems)" if lists else ""
    raise ValueError(
        f"{path}: one JSON object over several lines; make it a list of records{inside}, or write "
        "one record a line"
    )


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
        # Files with a byte order mark, put end to end, have marks within.
        text = line.removeprefix(MARK).rstrip()
        if text:
            try:
                yield start, start + len(line), json.loads(text.decode("latin-1"))
            except json.JSONDecodeError as error:
                error.lineno = number  # of the file; json counts from this line
                raise
        start += len(line)


def read_record(path, start, end):
    """The record in bytes start … end of a file."""
    return read_records(path, [(start, end)])[0]


def read_records(path, spans):
    """The records in these ranges of bytes, [(start, end), …], of a file."""
    records = []
    with open(find_file(path), "rb") as file:
        for start, end in spans:
            file.seek(start)
            try:
                records.append(json.loads(file.read(end - start).decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                where = f"byte {start + error.start:,}"
                raise ValueError(f"{where} is not UTF-8: {error.reason}") from None
    return records


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
