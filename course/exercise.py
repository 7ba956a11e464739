"""What an exercise is, and how the exercises of a lesson are found.

Pipeline: below all of course/. It imports no file of the project: those must come from the
student's copy, inside the checks.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
LAST_LESSON = 12
STILL_EMPTY = ": still empty"  # ends the message of a check that met an empty function
NOT_POSSIBLE = "needs {}, which this computer lacks: not counted"
GIVEN = "not yours: it was given to you for a later lesson; `start` empties it again"


@dataclass
class Check:
    """One thing that a solution must do."""

    points: int
    what: str  # "one pair is merged everywhere", shown with ok / not yet
    hint: str  # shown when it fails: where to look, never the answer
    test: Callable  # takes no argument; imports the student's modules inside; asserts


@dataclass
class Exercise:
    """Functions of one file that a student writes anew, with checks from easy to hard."""

    name: str  # "bpe": python -m course check 01 mine --only bpe
    title: str
    file: str  # of the copy: the one whose functions are emptied
    functions: list[str]  # ["bpe"] or ["RMSNorm.forward"]
    minutes: int  # of honest effort: about 20 (ten lines) or 120 (an afternoon)
    checks: list[Check]
    wrong: dict[str, int]  # {"01_bpe_a.py": 1}: a wrong solution, and the first check it fails
    needs: str = ""  # a package that some computers lack: there the exercise does not count

    def places(self) -> list[str]:
        """ "model.py: RMSNorm.forward" for each function."""
        return [f"{self.file}: {name}" for name in self.functions]

    def is_possible(self) -> bool:
        """Whether this computer can check it."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


@dataclass
class Repair:
    """A fault that really happens: `break` plants it, a student finds it by its symptom."""

    number: int
    lesson: int
    symptom: str  # all that the student is told
    file: str
    sound: str  # a text that is in the file once …
    faulty: str  # … and what replaces it
    hint: str
    test: Callable


def load_lesson(number: int):
    """The module of a lesson, with TITLE and EXERCISES. ValueError if it has no exercises."""
    name = f"lesson_{number:02}"
    if not (COURSE / "exercises" / f"{name}.py").is_file():
        raise ValueError(f"lesson {number:02} has no exercises; {numbers_text()} have")
    return importlib.import_module(f"course.exercises.{name}")


def lesson_numbers() -> list[int]:
    """The lessons that have exercises."""
    return sorted(int(path.stem[-2:]) for path in (COURSE / "exercises").glob("lesson_*.py"))


def numbers_text() -> str:
    return ", ".join(f"{number:02}" for number in lesson_numbers())


def load_repairs() -> dict[int, Repair]:
    """Number -> fault, from course/repairs.py."""
    if not (COURSE / "repairs.py").is_file():
        return {}
    return {each.number: each for each in importlib.import_module("course.repairs").REPAIRS}


def expect(what: str, found, expected) -> None:
    """An assertion with its message: "bpe('aaa') gives X, should be Y"."""
    assert found == expected, f"{what} gives {found!r}, should be {expected!r}"
