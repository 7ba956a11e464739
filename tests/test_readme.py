"""What README, docs and docstrings tell people to type exists: scripts, commands, flags, files.

A command is any file with a `__main__` block: `python train.py` at the root,
`python -m demo` for demo/__main__.py, `python -m demo.write` for demo/write.py."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SIX = ["tokenizer", "vision", "model", "data", "train", "generate"]
PAGES = [README] + [
    page.read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name != "experiments.md"  # dated: its commands are those of their day
]


def source_files():
    """Every Python file of the project outside tests."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]
    outside = {"tests", "out", ".venv"}
    outside |= {path.parent.name for path in ROOT.glob("*/course.json")}  # students' copies
    return sorted(f for f in files if f.relative_to(ROOT).parts[0] not in outside)


def module_name(file):
    """demo/write.py -> "demo.write"."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(file): file.read_text(encoding="utf-8") for file in source_files()}
COMMANDS = [name for name, source in MODULES.items() if 'if __name__ == "__main__":' in source]


def as_typed(module):
    """What a person types to run a module, as a regular expression."""
    if "." not in module:
        return rf"(?:python3?|torchrun[^\n`]*?) {module}\.py"
    return rf"-m {re.escape(module.removesuffix('.__main__'))}(?![\w.])"


def parser_of(module, first, monkeypatch):
    """The argument parser that a module's main() makes, where `first` is the first word typed."""

    class Caught(Exception):
        pass

    def stop(self, *_, **__):
        raise Caught(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, first])
    with pytest.raises(Caught) as caught:
        importlib.import_module(module).main()
    return caught.value.args[0]


def options(parser):
    """(every flag, every sub-command) of a parser and of its sub-parsers.

    A positional argument with fixed choices counts as a sub-command."""
    flags, commands = set(), set()
    for action in parser._actions:
        flags |= set(action.option_strings)
        if action.option_strings or not action.choices:
            continue
        commands |= set(action.choices)
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                if isinstance(sub, argparse.ArgumentParser):
                    flags |= options(sub)[0]
    return flags, commands


def shown_commands(module):
    """What the pages and all docstrings show being typed: [(words after the command)]."""
    docstrings = [source.split('"""')[1] for source in MODULES.values() if '"""' in source]
    text = "\n".join([*PAGES, *docstrings]).replace("\\\n", " ")
    lines = re.findall(rf"{as_typed(module)}([ ][^`\n#…]*)?", text)
    return [re.split(r" {3,}", line.strip())[0].split() for line in lines]


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_that_are_shown_exist(module, monkeypatch):
    shown = shown_commands(module)
    assert shown, f"nobody is told how to run {module}"
    for words in shown:
        flags, commands = options(parser_of(module, words[0] if words else "", monkeypatch))
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z0-9-]*", word):
                assert word in flags, f"{module} {' '.join(words)}"
        if commands and words and re.fullmatch("[a-z]+", words[0]):
            assert words[0] in commands, f"{module} {' '.join(words)}"


def test_the_scripts_that_a_reader_expects_are_commands():
    assert set(SIX) <= set(COMMANDS)
    for package in ("demo", "checkpoint", "evaluation", "annotation"):
        assert f"{package}.__main__" in COMMANDS
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(SIX)


def test_every_command_that_is_shown_is_there():
    text = "\n".join(PAGES)
    for module in re.findall(r"python -m ([\w.]+)", text):
        if module.split(".")[0] in ("pip", "venv", "pytest", "torch"):
            continue
        assert module in COMMANDS or f"{module}.__main__" in COMMANDS, module
    for script in re.findall(r"python (\w[\w/]*\.py)", text):
        assert (ROOT / script).is_file(), script


def test_flags_named_without_a_command_are_some_commands(monkeypatch):
    every = set()
    for module in COMMANDS:
        every |= options(parser_of(module, "", monkeypatch))[0]
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", "\n".join(PAGES)))
    assert len(named) > 5
    torchruns = "nproc-per-node nnodes node-rank master-addr master-port shutdown-timeout"
    torchruns = {f"--{name}" for name in (*torchruns.split(), "signals-to-handle")}
    assert named - every <= torchruns | {"--arch", "--only"}, "or tests/compile_kernels.py's"


def test_files_and_links_that_the_readme_names_exist():
    rows = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    assert {f"{script}.py" for script in SIX} <= set(rows)
    for row in rows:
        assert (ROOT / row).exists(), row
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_folder_lists_its_files():
    """The docstring of a folder's __init__.py is its table of contents."""
    for init in ROOT.glob("*/__init__.py"):
        files = {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}
        contents = init.read_text(encoding="utf-8").split('"""')[1]
        missing = [name for name in files if name not in contents and name != "__main__.py"]
        assert not missing, f"{init.parent.name}/__init__.py does not mention {missing}"


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = re.findall(r"`make ([a-z]+)|^make ([a-z]+)", README, re.MULTILINE)
    assert {first or second for first, second in named} <= targets
    assert {"demo", "test", "lint", "bench", "clean"} <= targets


def test_the_six_scripts_are_an_evenings_reading():
    sizes = {script: (ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SIX}
    assert sum(map(len, sizes.values())) < 130_000
    assert all(text.count("\n") <= 450 for text in sizes.values())


def test_no_page_holds_a_placeholder():
    for page in PAGES:
        assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b(?!_)", page.replace("IGNORE_INDEX", ""))
