"""What the README and the docstrings tell people to type exists: scripts, sub-commands, flags, files, make targets."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def parser_of(script, first, monkeypatch):
    """The argument parser that a script's main() makes, where `first` is the first word typed."""

    class Caught(Exception):
        pass

    def stop(self, *_, **__):
        raise Caught(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, first])
    with pytest.raises(Caught) as caught:
        importlib.import_module(script).main()
    return caught.value.args[0]


def options(parser):
    """(every flag, every sub-command) of a parser and of its sub-parsers; a positional with fixed choices counts as a sub-command."""
    flags, commands = set(), set()
    for action in parser._actions:
        flags |= set(action.option_strings)
        if not action.option_strings and action.choices:
            commands |= set(action.choices)
            for sub in action.choices.values() if isinstance(action.choices, dict) else ():
                if isinstance(sub, argparse.ArgumentParser):
                    flags |= options(sub)[0]
    return flags, commands


def commands_for(script):
    """What README, Makefile and the script's own docstring show being typed: [(words after the script's name)]."""
    docstring = (ROOT / f"{script}.py").read_text(encoding="utf-8").split('"""')[1]
    make = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(TRAIN)", "train.py")
    text = "\n".join(
        [
            README,
            docstring,
            make.replace("$(INSTRUCT)", re.search("^INSTRUCT := (.*)", make, re.MULTILINE)[1]),
        ]
    )
    found = re.findall(rf"(?<![\w/]){script}\.py ([^`\n#…]*)", text)
    return [re.split(r" {3,}", line)[0].split() for line in found]


COMMANDS = [s for s in SCRIPTS if "def main(" in (ROOT / f"{s}.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", COMMANDS)
def test_commands_that_are_shown_exist(script, monkeypatch):
    shown = commands_for(script)
    for words in shown:
        flags, commands = options(parser_of(script, words[0] if words else "", monkeypatch))
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in flags, f"{script}.py {' '.join(words)}"
        if commands and words and re.fullmatch("[a-z]+", words[0]):
            assert words[0] in commands, f"{script}.py {' '.join(words)}"
    assert shown, f"nobody is told how to run {script}.py"


def test_flags_that_the_readme_names_without_a_command_are_some_commands(monkeypatch):
    every = set().union(*(options(parser_of(script, "", monkeypatch))[0] for script in COMMANDS))
    named = set(re.findall(r"`(--[a-z][a-z-]*)", README))
    assert len(named) > 5 and named <= every, named - every


def test_the_table_of_files_is_the_tree():
    rows = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    assert {row for row in rows if row.endswith(".py")} == {f"{script}.py" for script in SCRIPTS}
    assert all((ROOT / row).exists() for row in rows)
    for link in re.findall(r"\]\((?!http)([^)]+)\)|`(docs/[\w.-]+)`|`(assets/[\w.-]+)`", README):
        assert (ROOT / next(filter(None, link))).exists(), link


def test_make_targets_that_are_named_exist():
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"`make (?:-\w+ )?([a-z]+)|^make ([a-z]+)", README, re.MULTILINE))
    assert {next(filter(None, pair)) for pair in named} <= targets and {
        "demo",
        "test",
        "bench",
        "clean",
    } <= targets
