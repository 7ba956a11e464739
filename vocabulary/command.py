"""What all commands share: number flags with a range, short errors, output on any terminal."""

import argparse
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. --help shows the docstring as it is."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows all flags)\n")


def at_least(least, kind=int):
    """An argparse type: a number of this kind, not below `least`."""

    def number(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return value

    number.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return number


def first_few(names, most=8, separator=", "):
    """The first names of a list that may be long: "a, b, c and 9 more"."""
    names = list(names)
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(map(str, names[:most])) + rest


def run_main(main, name):
    """Runs main() and ends the process: 0, or 1 with one line for what a user can cause."""
    # A terminal that lacks a character shows it escaped. Printing never fails.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        sys.stderr.close()
        status = 0
    except (ValueError, OSError) as error:
        status = f"{name}: {error}"
        if getattr(error, "filename", None):
            status = f"{name}: {error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
