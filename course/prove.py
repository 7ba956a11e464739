"""The proof that the course holds: `python -m course prove`, outside `make test`.

For each exercise: emptied it passes no check, each wrong solution passes the checks before its
index and fails that one, ours passes all. Each fault fails its check, which passes without it.
"""

import sys
import tempfile
from pathlib import Path

from course.copies import emptied, make_copy, plant, replace_functions
from course.exercise import COURSE, NOT_POSSIBLE, ROOT, load_lesson, load_repairs
from course.grade import grade, run_checks


def prove_exercise(number: int, exercise, folder: Path) -> list[str]:
    """What does not hold. `folder` is a whole copy, and is one again afterwards."""
    path = folder / exercise.file
    real = (ROOT / exercise.file).read_bytes()
    problems = []

    def results(source):
        path.write_bytes(source)
        return grade(number, folder, exercise.name)[0].messages

    for what, message in zip(exercise.checks, results(emptied(exercise, number, real))):
        if message is None:
            problems.append(f"emptied passes: {what.what}")
    for file, index in exercise.wrong.items():
        other = (COURSE / "wrong" / file).read_bytes()
        messages = results(replace_functions(real, exercise.functions, other))
        early = [message for message in messages[:index] if message is not None]
        if index < 1 or early:
            problems.append(f"{file}: fails before check {index}: {early}")
        if messages[index] is None:
            problems.append(f"{file}: passes check {index}: {exercise.checks[index].what}")
    for check, message in zip(exercise.checks, results(real)):
        if message is not None:
            problems.append(f"ours fails: {check.what}: {message}")
    return problems


def prove_repair(repair, folder: Path) -> list[str]:
    """What does not hold of a fault. `folder` is a whole copy, and is one again afterwards."""
    problems = []
    what, path = f"repair-{repair.number}", folder / repair.file
    if run_checks(what, folder, [0])[0] is not None:
        problems.append("the check fails without the fault")
    plant(repair, folder)
    if run_checks(what, folder, [0])[0] is None:
        problems.append("the check passes with the fault")
    path.write_bytes((ROOT / repair.file).read_bytes())
    return problems


def prove(numbers: list[int], only: str | None, repairs: bool) -> int:
    """Print a line for each exercise and fault; the number of problems."""
    count = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        make_copy(folder)
        for number in numbers:
            for exercise in load_lesson(number).EXERCISES:
                if only not in (None, exercise.name):
                    continue
                if not exercise.is_possible():
                    print(f"{number:02} {exercise.name}: {NOT_POSSIBLE.format(exercise.needs)}")
                else:
                    problems = prove_exercise(number, exercise, folder)
                    count += show(f"{number:02} {exercise.name}", problems)
        for repair in load_repairs().values() if repairs else []:
            count += show(f"repair {repair.number}", prove_repair(repair, folder))
    return count


def show(name: str, problems: list[str]) -> int:
    print(f"{name}: {'; '.join(problems) or 'holds'}")
    sys.stdout.flush()
    return len(problems)
