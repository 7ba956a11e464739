"""A student's copy: the project without the course, and with some functions empty.

Nothing is kept twice: a copy is made from the real source. `ast` finds a function, and its body is
cut out by lines, so the rest of the file stays as it is, byte for byte. course.json in a copy notes
the lessons that were started and the faults that were planted.
"""

import ast
import shutil
from pathlib import Path

from course.exercise import ROOT, Exercise, Repair, load_lesson
from vocabulary.files import entries, read_json, write_atomically, write_json

NOTES = "course.json"
FOLDERS = ("tests", "docs", "assets")  # copied beside the folders that hold Python
FILES = ("LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements.txt")
FILES += tuple(f"{name}.py" for name in "data generate model tokenizer train vision".split())
LEFT_OUT = ("course", "out")
MEND, MENDED = "- mend what causes this: ", "- mended: "
README = """\
# Your copy

This is the whole project. What is empty in it, or wrong, stands below. The lessons are in
`course/lessons`, in the folder that this copy was made from. Type there, NN being the lesson and
FOLDER this folder: `python -m course check NN FOLDER`

"""
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
    if folder.is_file() or entries(folder):
        raise ValueError(f"{folder}: is there, and is no copy of the course; give another -o")
    copy_project(folder)
    # In the project's folder, git and the linter must pass over it.
    write_atomically(folder / ".gitignore", writer(b"*\n"))
    write_notes(folder, {"lessons": [], "given": [], "repairs": []}, [])


def copy_project(folder: Path) -> None:
    """Copy the project without the course, what was trained, and files that somebody left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(ROOT.iterdir()):
        if path.name.startswith(".") or path.name in LEFT_OUT or is_copy(path):
            continue
        if path.name in FILES:
            shutil.copy(path, folder / path.name)
        elif path.name in FOLDERS or (path / "__init__.py").is_file():
            shutil.copytree(path, folder / path.name, ignore=SKIPPED)


def write_notes(folder: Path, notes: dict, lines: list[str]) -> None:
    """Save the notes, and the copy's README: what is empty or wrong, and what to type."""
    write_json(folder / NOTES, notes)
    readme = folder / "README.md"
    before = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    faults = [line for line in before if line.startswith((MEND, MENDED))]
    content = (README + "\n".join([*lines, *faults]) + "\n").encode()
    write_atomically(readme, writer(content))


def read_notes(folder: Path) -> dict:
    notes = read_json(folder / NOTES)
    if not isinstance(notes, dict) or {"lessons", "given", "repairs"} - notes.keys():
        raise ValueError(f"{folder / NOTES}: is not what `start` wrote; start a new copy")
    return notes


def start(number: int, folder: Path) -> dict[str, list[str]]:
    """Empty the functions of a lesson in a copy, which is made if it isn't there.

    A function that holds work stays. What earlier lessons left empty becomes whole, so that nothing
    is missing. -> {"empty": …, "kept": …, "given": …}, each a list of "file: function (exercise)".
    """
    exercises = load_lesson(number).EXERCISES
    if not is_copy(folder):
        make_copy(folder)
    notes = read_notes(folder)
    lessons = {n: load_lesson(n).EXERCISES for n in notes["lessons"]} | {number: exercises}
    files = {each.file for some in lessons.values() for each in some}
    sources = {file: (folder / file).read_bytes() for file in files}
    done = {"empty": [], "kept": [], "given": []}

    # All files are worked out before one is written.
    given = set(notes["given"]) - {place for each in exercises for place in each.places()}
    every = [(i, each, name) for i in lessons for each in lessons[i] for name in each.functions]
    for n, each, name in every:
        real, what = (ROOT / each.file).read_bytes(), f"{each.file}: {name} ({each.name})"
        blank = emptied(each, n, real)
        try:
            now = normal(split(sources[each.file], name)[1])
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{folder / each.file}: {error}; mend it first") from None
        is_blank, is_real = (now == normal(split(x, name)[1]) for x in (blank, real))
        if n != number and is_blank:
            sources[each.file] = replace_functions(sources[each.file], [name], real)
            given.add(f"{each.file}: {name}")
            done["given"].append(what)
        elif n == number and (is_blank or is_real):
            sources[each.file] = replace_functions(sources[each.file], [name], blank)
            done["empty"].append(what)
        elif n == number:
            done["kept"].append(what)
    if not done["empty"]:
        raise ValueError(f"{folder}: holds your work on all of lesson {number:02}; give another -o")
    for file, source in sources.items():
        write_atomically(folder / file, writer(source))
    notes |= {"lessons": sorted(lessons), "given": sorted(given)}
    write_notes(folder, notes, [f"- write {what}" for what in done["empty"]])
    return done


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
    notes |= {"repairs": sorted({*notes["repairs"], repair.number})}
    write_json(folder / NOTES, notes)
    tell_fault(repair, folder, is_mended=False)


def tell_fault(repair: Repair, folder: Path, is_mended: bool) -> None:
    """Say in the copy's README whether a planted fault is mended."""
    readme, symptom = folder / "README.md", repair.symptom
    before = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    lines = [line for line in before if line not in (MEND + symptom, MENDED + symptom)]
    lines.append((MENDED if is_mended else MEND) + symptom)
    write_atomically(readme, writer("\n".join([*lines, ""]).encode()))
