"""The course's commands. They are typed in the project's folder.

    python -m course start 05 -o mine          # a copy in which lesson 5's functions are empty
    python -m course check 05 mine             # points, what is wrong, and a hint
    python -m course check 05 mine --only rope
    python -m course break 5 -o mine           # plants a fault to find by its symptom
    python -m course check repair-5 mine       # is it mended?
    python -m course report CLASS              # a table, a row for each student's folder in CLASS
    python -m course figures merges -o merges.svg --run out/quick
    python -m course pack -o stick             # all that a class without a network needs
    python -m course prove                     # do the checks find every wrong solution?

A copy holds the whole project, so that what was not written in an earlier lesson is there.
`start` into a copy that is there empties the next lesson's functions and keeps all work.
"""

import importlib
from argparse import ArgumentTypeError
from pathlib import Path

from course import copies, grade, pack, prove
from course.exercise import COURSE, LAST_LESSON, lesson_numbers, load_lesson, load_repairs
from course.figures import save_figure
from vocabulary import flags
from vocabulary.command import Parser, first_few, run_main

lesson = flags.at_least(1, most=LAST_LESSON)


def lesson_or_repair(given):
    """ "05", "5" -> "05"; "repair-3" -> "repair-3"."""
    start, dash, number = given.rpartition("repair-")
    try:
        if dash and not start:
            return f"repair-{repair(number)}"
        return f"{lesson(given):02}"
    except ValueError:
        raise ArgumentTypeError(f"{given}: must be a lesson, 05, or a repair, repair-5") from None


def repair(given):
    """The number of a fault that is there."""
    number = flags.count(given)
    if number not in load_repairs():
        raise ArgumentTypeError(f"{given}: there are {first_few(load_repairs(), 20)}")
    return number


def exercise_name(given):
    """The name of an exercise of any lesson."""
    lessons = [load_lesson(number).EXERCISES for number in lesson_numbers()]
    if given not in (names := [each.name for exercises in lessons for each in exercises]):
        raise ArgumentTypeError(f"{given}: no such exercise; there are {first_few(names, 60)}")
    return given


def run_folder(given):
    """The folder of a finished demo."""
    if not Path(flags.text(given)).is_dir():
        raise ArgumentTypeError(f"{given}: no such folder; python -m demo --quick makes out/quick")
    return given


def address(given):
    """The address of a package index."""
    if not given.startswith(("https://", "http://")):
        raise ArgumentTypeError(f"{given}: must begin with https:// or http://")
    return given


def figure_names():
    return sorted(
        path.stem for path in (COURSE / "figures").glob("*.py") if not path.name.startswith("_")
    )


def run_start(args):
    folder = Path(args.out)
    done = copies.start(args.lesson, folder)
    for fate, what in (
        ("given", "Of earlier lessons these were still empty; the project's own are there now:"),
        ("kept", "These hold your work and stay:"),
        ("empty", f"{folder}: your copy. Write these functions:"),
    ):
        if done[fate]:
            print("\n  ".join([what, *done[fate]]))
    print(f"Then: python -m course check {args.lesson:02} {shown(folder)}")


def run_check(args):
    folder = Path(args.folder)
    copies.require_copy(folder)
    notes = copies.read_notes(folder)
    if args.what.startswith("repair-"):
        number = int(args.what.removeprefix("repair-"))
        if number not in notes["repairs"]:
            raise ValueError(f"{folder}: fault {number} is not there; `break {number}` plants it")
        is_mended = grade.check_repair(number, folder)
        return copies.tell_fault(load_repairs()[number], folder, is_mended)
    number = int(args.what)
    if number not in notes["lessons"]:
        raise ValueError(f"{folder}: lesson {number:02} was not started there; `start` empties it")
    grades = grade.grade(number, folder, args.only, notes["given"], grade.print_grade)
    path = grade.save_grades(number, folder, grades)
    points, most = sum(each.points for each in grades), sum(each.most for each in grades)
    print(f"\n{points} of {most} points; {path} is for your teacher")


def run_break(args):
    folder = Path(args.out)
    fault, is_new = load_repairs()[args.number], not copies.is_copy(folder)
    copies.plant(fault, folder)
    print(f"{folder}: one line or two are wrong now. {fault.symptom}")
    print(f"When you have mended it: python -m course check repair-{fault.number} {shown(folder)}")
    if is_new:
        print("It holds the project's own functions: write yours first, then look for the fault.")


def run_report(args):
    grade.print_report(Path(args.folder))


def run_figures(args):
    save_figure(importlib.import_module(f"course.figures.{args.name}"), Path(args.run), args.out)


def run_pack(args):
    pack.pack(Path(args.out), Path(args.run), args.systems, args.python, args.index)


def run_prove(args):
    numbers = [args.lesson] if args.lesson else lesson_numbers()
    problems = prove.prove(numbers, args.only, repairs=not args.lesson and not args.only)
    raise SystemExit(problems > 0)


def shown(path):
    """A path as one types it: in quotes where it has spaces."""
    return f'"{path}"' if " " in str(path) else str(path)


def main():
    parser = Parser(prog="python -m course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = {"type": flags.text, "required": True}
    copy = {"type": flags.folder, "metavar": "FOLDER", "help": "the student's copy"}
    only = {"type": exercise_name, "metavar": "NAME", "help": "one exercise"}

    command = commands.add_parser("start", help="empty a lesson's functions in a copy")
    command.set_defaults(run_command=run_start)
    add = command.add_argument
    add("lesson", type=lesson, help="1 to 12")
    add("-o", "--out", **out, metavar="FOLDER", help="the copy; made if it isn't there")

    command = commands.add_parser("check", help="points for a copy, and hints")
    command.set_defaults(run_command=run_check)
    add = command.add_argument
    add("what", type=lesson_or_repair, metavar="LESSON", help="1 to 12, or repair-N")
    add("folder", **copy)
    add("--only", **only)

    command = commands.add_parser("break", help="plant a fault in a copy")
    command.set_defaults(run_command=run_break)
    add = command.add_argument
    add("number", type=repair, help="of the fault: the lesson's")
    add("-o", "--out", **out, metavar="FOLDER", help="the copy; made if it isn't there")

    command = commands.add_parser("report", help="the table of a class")
    command.set_defaults(run_command=run_report)
    add = command.add_argument
    add("folder", type=flags.folder, metavar="CLASS", help="with a folder for each student")

    command = commands.add_parser("figures", help="draw a figure of a lesson")
    command.set_defaults(run_command=run_figures)
    add = command.add_argument
    add("name", choices=figure_names(), help="of the figure")
    add("-o", "--out", **out, metavar="FILE", help="the file to write")
    run = {"type": run_folder, "default": "out/quick", "metavar": "FOLDER"}
    add("--run", **run, help="a finished demo, whose models and data are shown")

    command = commands.add_parser("pack", help="all that a class without a network needs")
    command.set_defaults(run_command=run_pack)
    add = command.add_argument
    add("-o", "--out", **out, metavar="FOLDER", help="for the stick")
    add("--run", **run, help="a finished demo, whose models the lessons use")
    some = {"nargs": "+", "metavar": "NAME"}
    systems = list(pack.SYSTEMS)
    add("--systems", **some, choices=systems, default=systems, help="of " + " ".join(systems))
    versions = ["3.10", "3.11", "3.12", "3.13"]
    add("--python", **some, choices=versions, default=["3.12"], help="of " + " ".join(versions))
    add("--index", type=address, default=pack.CPU_INDEX, help="with torch for CPUs")

    command = commands.add_parser("prove", help="prove that the checks find wrong code")
    command.set_defaults(run_command=run_prove)
    add = command.add_argument
    add("lesson", type=lesson, nargs="?", help="one lesson (default: all, and the faults)")
    add("--only", **only)

    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    run_main(main, "python -m course")
