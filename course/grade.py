"""Grades a copy: each check of a lesson, under a time limit; and sums up a class.

Pipeline: `python -m course check` and `report`. The checks run in course/worker.py.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from pathlib import Path

from course.exercise import (
    GIVEN,
    NOT_POSSIBLE,
    ROOT,
    STILL_EMPTY,
    Exercise,
    load_lesson,
    load_repairs,
)
from vocabulary.command import text_width
from vocabulary.files import read_json, write_json

START_LIMIT = 180  # seconds until torch is imported, on a slow disk
CHECK_LIMIT = 60  # of one check; each takes under 5 on an idle computer
NOT_RUN = "not run: a check above was still running"
WORKER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from course.worker import main; main()"


def run_checks(what: str, folder: Path, numbers: list[int], limit=CHECK_LIMIT) -> dict:
    """{number: None if it passes, else what is wrong} of some checks of a lesson or repair."""
    return dict(each_result(what, folder, numbers, limit))


def each_result(
    what: str, folder: Path, numbers: list[int], limit=CHECK_LIMIT, exercises=(), given=()
):
    """Yields the pairs of run_checks as they come. exercises: lists of numbers; if one check runs
    too long, those behind it in its exercise are not run, for they would most likely, too. given:
    functions that raise an error in these checks, since they are not the student's."""
    left = list(numbers)
    while left:
        for number, message in run_worker(what, folder, list(left), limit, given):
            left.remove(number)
            yield number, message
            if message == too_long(limit):
                others = {n for some in exercises if number in some for n in some}
                for other in [n for n in left if n in others]:
                    left.remove(other)
                    yield other, NOT_RUN


def too_long(limit: float) -> str:
    return f"still running after {limit:g} seconds: an endless loop?"


def run_worker(what: str, folder: Path, numbers: list[int], limit: float, given=()):
    """Yields (number, message) until all are done or the process ends; the last message says so."""
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",  # a file may change twice in one second
        "PYTHONIOENCODING": "utf-8",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",  # checks run on a CPU
    }
    words = [what, json.dumps([*given]), *map(str, numbers)]
    command = [sys.executable, "-c", WORKER, str(ROOT), *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    number = numbers[0]
    try:
        if lines.get(timeout=START_LIMIT) != "ready":
            raise ValueError(f"the checks of {what} do not start; the lines above say why")
        for number in numbers:
            if (answer := lines.get(timeout=limit)) is None:
                yield number, f"Python stopped during this check (exit code {process.wait()})"
                return
            yield tuple(answer)
    except queue.Empty:
        yield number, too_long(limit)
    finally:
        process.kill()
        process.wait()


@dataclass
class Grade:
    """An exercise with the results of its checks, in their order; none if it is not possible."""

    exercise: Exercise
    messages: list

    @property
    def points(self) -> int:
        checks = zip(self.exercise.checks, self.messages)
        return sum(check.points for check, message in checks if message is None)

    @property
    def most(self) -> int:
        return sum(check.points for check, _ in zip(self.exercise.checks, self.messages))

    def as_json(self) -> dict:
        checks = [
            {"what": c.what, "of": c.points, "points": c.points * (m is None), "message": m}
            for c, m in zip(self.exercise.checks, self.messages)
        ]
        name = self.exercise.name
        return {"name": name, "points": self.points, "of": self.most, "checks": checks}


def grade(number: int, folder: Path, only=None, given=(), show=None) -> list[Grade]:
    """The grades of a lesson's exercises, or of one of them. given: functions that the copy
    has from the project, "model.py: loss", which give no points. show: called with each grade when
    it is there."""
    exercises, chosen, first = load_lesson(number).EXERCISES, {}, 0
    for exercise in exercises:
        numbers = range(first, first + len(exercise.checks))
        first += len(exercise.checks)
        if only in (None, exercise.name):
            chosen[exercise.name] = exercise, numbers
    if not chosen:
        names = ", ".join(exercise.name for exercise in exercises)
        raise ValueError(f"lesson {number:02} has no exercise {only}; it has {names}")
    # An exercise may be half the student's: then what was given is empty for its checks.
    possible = {name for name, (each, _) in chosen.items() if each.is_possible()}
    own = {name for name in possible if {*chosen[name][0].places()} - {*given}}
    given = [place for name in own for place in chosen[name][0].places() if place in given]
    groups = [numbers for name, (_, numbers) in chosen.items() if name in own]
    wanted = [n for numbers in groups for n in numbers]
    done = each_result(f"{number:02}", folder, wanted, exercises=groups, given=given)
    results, grades = {}, []
    for name, (exercise, numbers) in chosen.items():
        while name in own and numbers[-1] not in results:
            results.update([next(done)])
        numbers = numbers if name in possible else []
        grades.append(Grade(exercise, [results.get(n, GIVEN) for n in numbers]))
        if show:
            show(grades[-1])
    return grades


def print_grade(grade: Grade) -> None:
    """Each check in a line; below a failed one what is wrong, and a hint."""
    exercise, messages = grade.exercise, grade.messages
    print(f"\n{exercise.name}: {exercise.title} ({grade.points} of {grade.most} points)")
    if not messages:
        print(f"  {NOT_POSSIBLE.format(exercise.needs)}", flush=True)
        return
    if set(messages) == {GIVEN}:
        print(f"  {GIVEN}", flush=True)
        return
    if all(message and message.endswith(STILL_EMPTY) for message in messages):
        print(f"  {', '.join(exercise.functions)} in {exercise.file}{STILL_EMPTY}", flush=True)
        return
    for check, message in zip(exercise.checks, messages):
        print(f"  {'ok     ' if message is None else 'not yet'}  {check.what}")
        if message is not None:
            print(f"           {message}")
        if message not in (None, NOT_RUN):
            print(f"           Hint: {check.hint}")
    sys.stdout.flush()


def save_grades(number: int, folder: Path, grades: list[Grade]) -> Path:
    """Write course-NN.json into the copy. Exercises that were not checked keep their old grades."""
    path = folder / f"course-{number:02}.json"
    new = {each.exercise.name: each.as_json() for each in grades}
    old = {each["name"]: each for each in read_grades(path)["exercises"]} if path.exists() else {}
    exercises = []
    for exercise in load_lesson(number).EXERCISES:
        blank = Grade(exercise, ["not checked"] * len(exercise.checks) * exercise.is_possible())
        name = exercise.name
        exercises.append(new.get(name) or old.get(name) or blank.as_json())
    value = {
        "lesson": number,
        "points": sum(each["points"] for each in exercises),
        "of": sum(each["of"] for each in exercises),
        "when": datetime.now().isoformat(timespec="seconds"),
        "exercises": exercises,
    }
    write_json(path, value)
    return path


def read_grades(path: Path) -> dict:
    """A course-NN.json. ValueError if it is none."""
    value = read_json(path)
    try:
        _ = value["lesson"] + value["points"] + value["of"] + 0
        for each in value["exercises"]:
            _ = each["name"] + "", each["points"] + each["of"] + 0
            _ = [check["what"] + "" for check in each["checks"] if check["points"] + 0 < 0]
    except (LookupError, TypeError):
        raise ValueError(f"{path}: is not what `check` wrote; check again") from None
    return value


def check_repair(number: int, folder: Path) -> bool:
    """Print whether a planted fault is mended."""
    repair = load_repairs()[number]
    message = run_checks(f"repair-{number}", folder, [0])[0]
    if message is None:
        print(f"repair {number}: mended")
    else:
        print(f"repair {number}: not yet\n  {message}\n  Hint: {repair.hint}")
    return message is None


def print_report(folder: Path) -> None:
    """A class: a row for each folder in `folder` that holds course-NN.json, at any depth. Of a
    student's copies the one with most points counts."""
    table, files = {}, sorted(folder.rglob("course-[0-9][0-9].json"))
    for path in files:
        try:
            value = read_grades(path)
        except (ValueError, OSError) as error:
            print(error)
            continue
        parts = path.relative_to(folder).parts
        row = table.setdefault(parts[0] if parts[1:] else folder.name, {})
        row[value["lesson"]] = max(row.get(value["lesson"], value), value, key=itemgetter("points"))
    if not table:
        raise ValueError(f"{folder}: no folder in it holds a course-NN.json; `check` writes them")

    lessons = sorted({number for row in table.values() for number in row})
    width = max(text_width(name) for name in [*table, "student"])
    print("student" + " " * (width - 7), *(f"{number:>7}" for number in lessons), "    all")
    for student, row in table.items():
        cells = [f"{row[n]['points']}/{row[n]['of']}" if n in row else "–" for n in lessons]
        together = sum(each["points"] for each in row.values())
        cells.append(str(together))
        print(student + " " * (width - text_width(student)), *(f"{cell:>7}" for cell in cells))

    failed = Counter()
    for value in (value for row in table.values() for value in row.values()):
        for each in value["exercises"]:
            wrong = [check["what"] for check in each["checks"] if not check["points"]]
            failed.update((value["lesson"], each["name"], what) for what in wrong)
    if failed:
        print("\nWhat most have not reached yet:")
    for (lesson, name, what), count in failed.most_common(5):
        print(f"  {count:>3}  {lesson:02} {name}: {what}")
