"""A student's copy: the project without the course, and with some functions empty.

Nothing is kept twice: a copy is made from the real source. `ast` finds a function, and its body is
cut out by lines, so the rest of the file stays as it is, byte for byte. course.json in a copy notes
the lessons that were started and the faults that were planted.
"""

import ast
import os
import shutil
import textwrap
from pathlib import Path

from course.exercise import ROOT, Exercise, Repair, load_lesson
from vocabulary.files import read_json, write_atomically, write_json

NOTES = "course.json"
FOLDERS = ("tests", "docs", "assets")  # copied beside the folders that hold Python
LEFT_OUT = ("course", "out")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.tmp", "test_course.py", ".*")


# ------------------------------------------------------------------------- functions in a file
def find_function(source: bytes, name: str) -> ast.FunctionDef:
    """The node of a function by its dotted name, such as "bpe" or "RMSNorm.forward"."""
    node = ast.parse(source)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [each for each in node.body if isinstance(each, kinds) and each.name == part]
        if not found:
            raise ValueError(f"has no function {name}")
        node = found[-1]
    return node


def first_line(node) -> int:
    """The line that a function or statement begins at, counted from 1: its first decorator's."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])


def split(source: bytes, name: str) -> tuple[bytes, bytes, bytes]:
    """(all before the function, its decorators to its last line, all after it)."""
    node = find_function(source, name)
    lines = source.splitlines(keepends=True)
    start, end = first_line(node) - 1, node.end_lineno
    return b"".join(lines[:start]), b"".join(lines[start:end]), b"".join(lines[end:])


def empty_function(source: bytes, name: str, message: str) -> bytes:
    """Put `raise NotImplementedError(message)` in place of a function's body.

    Signature, decorators, docstring and the comments around the function stay.
    """
    node = find_function(source, name)
    lines = source.splitlines(keepends=True)
    statement = f'raise NotImplementedError("{message}")'.encode()
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    last = node.body[-1]
    ending = lines[last.end_lineno - 1]
    newline = ending[len(ending.rstrip(b"\r\n")) :]

    if not body:  # there is only a docstring
        indent = b" " * node.body[0].col_offset
        after = newline + indent + statement
        lines[last.end_lineno - 1] = ending.rstrip(b"\r\n") + after + newline
        return b"".join(lines)

    # Columns count bytes. What stands before the body on its first line stays, such as a one-line
    # function's signature.
    start = first_line(body[0]) - 1
    head = lines[start][: body[0].col_offset]
    return b"".join([*lines[:start], head, statement, newline, *lines[last.end_lineno :]])


def replace_functions(source: bytes, names: list[str], other: bytes) -> bytes:
    """Put the definitions that `other` has in place of the functions of the same names."""
    for name in names:
        before, _, after = split(source, name)
        try:
            source = before + split(other, name)[1].rstrip() + b"\n" + after
        except ValueError:  # this one is right as it is
            if names == [name]:
                raise
    return source


def emptied(exercise: Exercise, number: int, source: bytes) -> bytes:
    """A file's source with the functions of an exercise empty."""
    for name in exercise.functions:
        message = f"lesson {number:02}, exercise {exercise.name}"
        source = empty_function(source, name, message)
    return source


# ------------------------------------------------------------------------- copies
def is_copy(folder: Path) -> bool:
    return (folder / NOTES).is_file()


def require_copy(folder: Path) -> None:
    if not is_copy(folder):
        raise ValueError(f"{folder}: is no copy of the course; `start` makes one")


def make_copy(folder: Path) -> None:
    """Copy the project into a new or an empty folder, whole."""
    if folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is there, and is no copy of the course; give another -o")
    copy_project(folder)
    write_notes(folder, {"lessons": [], "repairs": []})


def copy_project(folder: Path) -> None:
    """Copy the project without the course, and without what was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(ROOT.iterdir()):
        if path.name.startswith(".") or path.name in LEFT_OUT or is_copy(path):
            continue
        if path.is_file():
            shutil.copy(path, folder / path.name)
        elif path.name in FOLDERS or (path / "__init__.py").is_file():
            shutil.copytree(path, folder / path.name, ignore=SKIPPED)


def write_notes(folder: Path, notes: dict) -> None:
    """Save the notes, and the copy's README: what is empty, and what to type."""
    write_json(folder / NOTES, notes)
    rows = []
    for number in notes["lessons"]:
        for each in load_lesson(number).EXERCISES:
            names = ", ".join(f"`{name}`" for name in each.functions)
            rows.append(f"| {number:02} | {each.name} | `{each.file}` | {names} | {each.minutes} |")
    text = textwrap.dedent("""\
        # Your copy

        This is the whole project, except that these functions are empty. Write them.
        The lessons are in `course/lessons`, in the folder that this copy was made from.
        Type there, NN being the lesson and FOLDER this folder: `python -m course check NN FOLDER`

        | lesson | exercise | file | empty functions | minutes |
        |---|---|---|---|---|
        """)
    content = (text + "\n".join(rows) + "\n").encode()
    write_atomically(folder / "README.md", lambda file: file.write(content))


def read_notes(folder: Path) -> dict:
    notes = read_json(folder / NOTES)
    if not isinstance(notes, dict) or not isinstance(notes.get("lessons"), list):
        raise ValueError(f"{folder / NOTES}: is not what `start` wrote; start a new copy")
    return notes


def start(number: int, folder: Path) -> list[Exercise]:
    """Empty the functions of a lesson in a copy, which is made if it isn't there.

    In a copy that is there all other functions stay as the student left them. ValueError if one of
    this lesson's is not as the project has it: it holds work.
    """
    exercises = load_lesson(number).EXERCISES
    if not is_copy(folder):
        make_copy(folder)
    notes = read_notes(folder)

    # All files are checked before one is written.
    sources = {each.file: (folder / each.file).read_bytes() for each in exercises}
    for each in exercises:
        real = (ROOT / each.file).read_bytes()
        blank = emptied(each, number, real)
        for name in each.functions:
            try:
                now = split(sources[each.file], name)[1]
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{folder / each.file}: {error}; mend it first") from None
            if normal(now) not in (normal(split(real, name)[1]), normal(split(blank, name)[1])):
                raise ValueError(
                    f"{folder / each.file}: {name} holds work, and `start {number:02}` would empty "
                    "it; give another -o"
                )
        sources[each.file] = emptied(each, number, sources[each.file])
    for file, source in sources.items():
        write_atomically(folder / file, writer(source))
    notes["lessons"] = sorted({*notes["lessons"], number})
    write_notes(folder, notes)
    return exercises


def normal(source: bytes) -> bytes:
    """Without what an editor changes by itself: line ends, spaces at the end of lines."""
    return b"\n".join(line.rstrip() for line in source.splitlines())


def writer(content: bytes):
    """A function for write_atomically."""

    def write(file):
        file.write(content)

    return write


def plant(repair: Repair, folder: Path) -> None:
    """Plant a fault in a copy, which is made if it isn't there."""
    if not is_copy(folder):
        make_copy(folder)
    notes = read_notes(folder)
    path = folder / repair.file
    with open(path, encoding="utf-8", newline="") as file:
        source = file.read()
    newline = "\r\n" if "\r\n" in source else "\n"
    sound, faulty = (text.replace("\n", newline) for text in (repair.sound, repair.faulty))
    if source.count(sound) != 1:
        raise ValueError(f"{path}: was changed where the fault belongs; give another -o")
    write_atomically(path, writer(source.replace(sound, faulty).encode()))
    notes["repairs"] = sorted({*notes.get("repairs", []), repair.number})
    write_notes(folder, notes)


def short(path: Path) -> str:
    """A path as one would type it here."""
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive of Windows
        return str(path)
