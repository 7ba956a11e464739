"""Runs checks in a process of its own: an endless loop or a crash there stops nothing here.

Pipeline: started by grade.py, in the student's copy. It imports no file of the project itself.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from course.exercise import GIVEN, ROOT, STILL_EMPTY, load_lesson, load_repairs


def all_checks(what: str) -> list:
    """The tests of lesson "05", or of "repair-3"."""
    if what.startswith("repair-"):
        return [load_repairs()[int(what.removeprefix("repair-"))].test]
    return [check.test for each in load_lesson(int(what)).EXERCISES for check in each.checks]


def forget_project() -> None:
    """From here on the project's modules come from the working directory, the student's copy."""
    sys.path = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    sys.path.insert(0, os.getcwd())
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = file and ROOT in Path(file).resolve().parents
        if ours and name.split(".")[0] != "course" and "site-packages" not in file:
            del sys.modules[name]


class Given:
    """In place of a function that is not the student's."""

    def __init__(self, name):
        self.name = name

    def __call__(self, *_, **__):
        raise NotImplementedError(f"{self.name}: {GIVEN}")

    __getitem__ = __call__  # a kernel is called as kernel[grid](…)


def take_back(place: str) -> None:
    """Put a Given in place of "model.py: RMSNorm.forward"."""
    file, name = place.split(": ")
    owner = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    *classes, last = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    setattr(owner, last, Given(name))


def explain(error: BaseException) -> str:
    """One plain line about an error. An assertion speaks for itself."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):
        return text
    if isinstance(error, NotImplementedError) and text.endswith(GIVEN):
        return text
    if isinstance(error, NotImplementedError) and text.startswith("lesson "):
        return text + STILL_EMPTY
    if isinstance(error, SyntaxError):
        file = Path(error.filename or "?").name
        return f"{file}, line {error.lineno}: Python can't read it: {error.msg}"

    # The last line of the student's that ran.
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(os.getcwd()) in Path(frame.filename).parents:
            file = Path(frame.filename).relative_to(os.getcwd()).as_posix()
            place = f"{file}, line {frame.lineno}: "
    return f"{place}{type(error).__name__}: {text}".rstrip(": ")


def main() -> None:
    """Arguments: what to check, the functions that are not the student's, as JSON, and the numbers
    of the checks. Prints a JSON line for each."""
    what, given, *numbers = sys.argv[1:]
    # What the student prints goes to the terminal's error stream, the results to the parent.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # which is written line by line: this process may be killed
    tests, given = all_checks(what), json.loads(given)
    forget_project()
    print(json.dumps("ready"), file=results, flush=True)

    for number in map(int, numbers):
        try:
            for place in given:
                take_back(place)
            tests[number]()
            message = None
        except (Exception, SystemExit) as error:
            message = explain(error) or "is not right yet"
        print(json.dumps([number, message]), file=results, flush=True)
