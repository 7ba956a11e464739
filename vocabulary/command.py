"""What all commands share: --help with defaults, errors of one line, output on any terminal."""

import argparse
import codecs
import locale
import os
import sys
import unicodedata


class Help(argparse.RawDescriptionHelpFormatter):
    """--help: the description as it is written, and each flag with its default."""

    def _get_help_string(self, action):
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = str(default).replace("%", "%%")
        if "default" in action.help or shown in ("", "None", "False", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, those of its commands, too."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help} | options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows all flags)\n")


def text_width(text):
    """Length in columns: an East Asian character takes two."""
    composed = unicodedata.normalize("NFC", text)  # file names of macOS are not
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in composed)


def use_colour():
    """Whether output may be coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def enable_line_editing():
    """input() gets arrows and a history, and Backspace takes a whole Hangul syllable."""
    # In the locale "C", readline would lose every letter that is not ASCII.
    if locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX"):
        return
    try:
        import readline  # noqa: F401
    except ImportError:  # Windows: its console edits lines itself
        pass


def replace_missing(error):
    """What a terminal shows for characters that it lacks: "-" for dashes, the others escaped."""
    if set(error.object[error.start : error.end]) <= set("–−"):  # Korean Windows has neither
        return "-" * (error.end - error.start), error.end
    return codecs.backslashreplace_errors(error)


codecs.register_error("replace_missing", replace_missing)


def first_few(names, most=8, separator=", "):
    """The first names of a list that may be long: "a, b, c and 9 more"."""
    names = list(names)
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(map(str, names[:most])) + rest


def run_main(main, name):
    """Runs main() and ends the process: 0, or 1 with one line for what a user can cause."""
    # Printing never fails.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace_missing")
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
