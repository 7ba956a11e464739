"""Reading lines and writing files, for every part of the project.

Pipeline: below everything. checkpoint/ and the other folders write through these functions.
"""

import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from vocabulary.formats import decode_line, open_text


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary neighbour of `path`, then rename it to `path`.

    So `path` is the old file or the whole new one, never half. On failure the neighbour goes.
    """
    path = Path(path)
    # Several processes may write the same file, on several machines, too.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            # The bytes must be on the disk before the name: else a power cut leaves an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def claim_output(
    path: str | os.PathLike,
    is_ours: Callable[[Path], bool],
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """ValueError if writing `path` would replace a file that this command did not write.

    is_ours: whether an existing file is an earlier output. It may raise ValueError. A command calls
    this before it changes a byte.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # os.replace would put a file in place of /dev/null
        kind = "a folder" if path.is_dir() else "a device"
        raise ValueError(f"{path}: is {kind}; -o needs a file")
    require_writable(path.parent)
    if not path.exists() or path.stat().st_size == 0:
        return
    # Two paths may be one file: by a link, or by another spelling.
    for source in inputs:
        if Path(source).exists() and path.samefile(source):
            raise ValueError(f"{path}: is an input of this command; give another -o")
    try:
        known = is_ours(path)
    except (ValueError, LookupError, TypeError, AttributeError, OSError):  # it is something else
        known = False
    if not known:
        raise ValueError(f"{path}: was not written by this command; give another -o")


def entries(folder: str | os.PathLike) -> set[str]:
    """The names in a folder, without what file managers leave in it; none if it is not there."""
    if not Path(folder).is_dir():
        return set()
    return set(os.listdir(folder)) - {".DS_Store", "Thumbs.db", "desktop.ini"}


def lock_file(file: IO, path: str | os.PathLike) -> None:
    """Lock an open file for this process; the system unlocks it however the process ends.

    ValueError if another process holds it.
    """
    try:
        # Each system has its own module, and lacks the other's.
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"{path}: another process writes to it; wait, or choose another -o"
        ) from None


def require_writable(folder: str | os.PathLike) -> None:
    """Make a folder if it is missing. An error, before the work, if it can't be written to."""
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file, must be a folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def sibling(out: str | os.PathLike, ending: str) -> Path:
    """OUT.json -> OUT + ending. Other dots are part of the name: llava-1.5 keeps its 5."""
    out = Path(out)
    return out.with_name(out.name.removesuffix(".json") + ending)


def set_aside(*paths: str | os.PathLike) -> None:
    """Rename files and folders, those that are there, to PATH.old-N, and say so.

    N is the first number that is free for all of them: what belongs together stays together.
    """
    paths, number = list(map(Path, paths)), 1
    while any(path.with_name(f"{path.name}.old-{number}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            aside = path.rename(path.with_name(f"{path.name}.old-{number}"))
            print(f"{path} is now {aside}", file=sys.stderr)


def write_json(path: str | os.PathLike, value: object, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON with a newline at the end, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 has characters that UTF-8 lacks: they stay escapes.
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(content))


def read_lines(paths: Iterable[str | os.PathLike]) -> Iterator[str]:
    """The lines of UTF-8 text files. ValueError names the file and the line that is not UTF-8."""
    for path in paths:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                yield decode_line(line, path, number)


def read_json(path: str | os.PathLike) -> object:
    """The value in a JSON file. ValueError names the file if it is not JSON."""
    with open_text(path) as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
