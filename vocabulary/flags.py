"""What a flag may be: argparse types, which refuse a value where it is given, not hours later.

add("--epochs", type=flags.at_least(1), …), add("--data", type=flags.file, …)
"""

from argparse import ArgumentTypeError

from vocabulary.formats import find_file


def at_least(least, kind=int, most=10**9):
    """A number of this kind from `least` to `most`; NaN is none."""

    def number(given):
        value = kind(given)
        if not value >= least:
            raise ArgumentTypeError(f"{given}: must be {least} or more")
        if value > most:
            raise ArgumentTypeError(f"{given}: must be {most} or less")
        return value

    number.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return number


count = at_least(1)
share = at_least(0, float, 1)
seed = at_least(0, most=2**63 - 1)  # what torch takes


def text(given):
    """Any text but the empty one, which a shell makes of an unset variable."""
    if not given.strip():
        raise ArgumentTypeError("is empty")
    return given


def path(given):
    """A file or a folder that is there."""
    if not find_file(text(given)).exists():
        raise ArgumentTypeError(f"{given}: no such file or folder")
    return given


def file(given):
    """A file that is there, or a pipe."""
    found = find_file(text(given))
    if found.is_dir():
        raise ArgumentTypeError(f"{given}: is a folder, must be a file")
    if not found.exists():
        raise ArgumentTypeError(f"{given}: no such file")
    return given


def folder(given):
    """A folder that is there."""
    found = find_file(text(given))
    if found.is_file():
        raise ArgumentTypeError(f"{given}: is a file, must be a folder")
    if not found.is_dir():
        raise ArgumentTypeError(f"{given}: no such folder")
    return given


def some_of(table):
    """Names of `table` in a comma-separated list. They come back in the table's order, so that the
    same names make the same request, however they are typed."""

    def names(given):
        found = [name.strip() for name in given.split(",") if name.strip()]
        unknown = [name for name in found if name not in table]
        if unknown or not found:
            wrong = ", ".join(unknown) or "nothing"
            raise ArgumentTypeError(f"{wrong} is not in the table; there are {', '.join(table)}")
        return [name for name in table if name in found]

    return names
