"""Reading lines and writing files, for every part of the project.

Pipeline: below everything. checkpoint/ and the other folders write through these functions.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary neighbour of `path`, then rename it to `path`.

    So `path` is the old file or the whole new one, never half. On failure the neighbour goes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            # The bytes must be on the disk before the name: else a power cut leaves an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: object, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON with a newline at the end, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_lines(paths: Iterable[str | os.PathLike]) -> Iterator[str]:
    """The lines of UTF-8 text files. ValueError names the file and the line that is not UTF-8."""
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    reason = f"{error.reason} at byte {error.start + 1}"
                    raise ValueError(f"{path}, line {number}: not UTF-8 ({reason})") from None


def read_json(path: str | os.PathLike) -> object:
    """The value in a JSON file. ValueError names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
