"""Opening what people give us: every text file is opened here, every image found here.

A byte order mark is no letter. A file that is no UTF-8 text is named for what it is. A file name is
found however its letters are composed.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import BinaryIO

MARK = b"\xef\xbb\xbf"  # the byte order mark in UTF-8

# Patterns of a file's first bytes -> what it is, and what to do.
SAVE_AS_UTF8 = "save it as UTF-8"
UNPACK = "unpack it first"
EXPORT = "write its rows as JSON Lines first"
DOWNLOADS = {  # in place of the file itself
    rb"version https://git-lfs": "a Git LFS pointer, not the file; `git lfs pull` fetches it",
    rb"(?i)\s*(<!doctype html|<html|entry not found)": "a web page, not the file; log in and "
    "download it again",
}
FORMATS = {
    **DOWNLOADS,
    rb"\xff\xfe\0\0|\0\0\xfe\xff": f"text in UTF-32; {SAVE_AS_UTF8}",
    # With a byte order mark, or without one: every other byte of ASCII is zero.
    rb"\xff\xfe|\xfe\xff|([\t-~]\0){2}|(\0[\t-~]){2}": f"text in UTF-16; {SAVE_AS_UTF8}",
    rb"PAR1": f"a Parquet file; {EXPORT}",
    rb"ARROW1|\xff\xff\xff\xff": f"an Arrow file; {EXPORT}",
    rb"SQLite format 3": f"an SQLite database; {EXPORT}",
    rb"\x89HDF": f"an HDF5 file; {EXPORT}",
    rb"\x1f\x8b": f"compressed with gzip; {UNPACK}",
    rb"PK\x03\x04": f"a zip archive; {UNPACK}",
    rb"BZh\d1AY": f"compressed with bzip2; {UNPACK}",
    rb"\xfd7zXZ": f"compressed with xz; {UNPACK}",
    rb"\x28\xb5\x2f\xfd": f"compressed with zstd; {UNPACK}",
    rb"7z\xbc\xaf": f"a 7z archive; {UNPACK}",
    rb"(?s:.{257})ustar": f"a tar archive; {UNPACK}",
    rb"\x89PNG|\xff\xd8\xff|GIF8": "an image, must be text",
    rb"%PDF-": "a PDF, must be plain text",
}


def open_text(path: str | os.PathLike) -> BinaryIO:
    """A UTF-8 text file, opened as bytes, after its byte order mark.

    ValueError in one line if there is none, or if it is something else.
    """
    path = find_file(path)
    if path.is_dir():
        raise ValueError(f"{shorten(path)}: is a folder, must be a file")
    if not path.exists():
        raise ValueError(f"{shorten(path)}: no such file")

    # `peek` takes nothing away: a pipe can't be read twice.
    file = open(path, "rb")
    head = file.peek(512)[:512]
    try:
        check_format(head, path, FORMATS)
    except ValueError:
        file.close()
        raise
    if head.startswith(MARK):
        file.read(len(MARK))
    return file


def check_format(head: bytes, path: str | os.PathLike, formats: dict = DOWNLOADS) -> None:
    """ValueError if a file begins as one of these formats."""
    for pattern, what in formats.items():
        if re.match(pattern, head):
            raise ValueError(f"{shorten(path)}: {what}")


def decode_line(line: bytes, path: str | os.PathLike, number: int) -> str:
    """A line of a text file. ValueError names file and line if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")  # files with a mark, put end to end, have marks within
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start + 1}"
        raise ValueError(f"{path}: line {number} is not UTF-8: {reason}") from None


def find_file(path: str | os.PathLike) -> Path:
    """The path as the disk spells it. macOS composes letters otherwise than most programs do: 가 is
    one character (NFC) or two (NFD), and other systems take these for two names."""
    path = Path(path)
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        spellings = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        found = next((found / name for name in spellings if (found / name).exists()), found / part)
    return found


def file_version(path: str | os.PathLike) -> tuple:
    """Path, size and times of a file: with another content it has another version."""
    path = find_file(path).resolve()
    stat = path.stat()
    # Whoever replaces a file may give it the old time; then ctime tells.
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def shorten(value: object, limit: int = 200) -> str:
    """A value as a message shows it: on one line, printable, its middle cut out if it is long."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}…{text[-limit // 3 :]} ({len(text):,} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
