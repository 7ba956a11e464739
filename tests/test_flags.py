"""Every flag of every command is checked where it is given: numbers have a range, names have
choices, files are there. Errors are one line, and --help says what each flag is and its default."""

import argparse
import importlib
import os
import re
import sys

import pytest
import torch
from test_readme import COMMANDS, ROOT, parser_of

import demo.__main__
import evaluation.__main__
from demo.recipe import STAGES
from model import PRESETS, XLlava
from vocabulary import flags
from vocabulary.command import run_main
from vocabulary.files import claim_output

# What may be any text: files to write, names on a server or in a model, addresses, questions.
FREE = set(
    "--out --json --profile --sheet --cache --base-url --key-env --control --bos --eos "
    "--suffix --share --export --stages question text words runs answers".split()
)
FREE_HERE = {
    "annotation --model",
    "judge --model",
    "compare --languages",
    "demo --data",
    "demo --test",
}
FREE_HERE |= {"demo.ablation --variants"}  # named by --poor, too
FREE_HERE |= {
    f"train.py {stage} {flag}"
    for stage in "vision text align instruct".split()
    for flag in ("--data", "--trainable")
}  # checked with weights, and by the model
EMPTY = {"--suffix", "--profile", "question", "text"}  # what may be empty
# Where 0 means something: none, no limit, the smallest index.
ZERO = set(
    "--seed --seeds --temperature --top-p --warmup-ratio --decay-ratio --weight-decay --beta2 "
    "--muon-lr --lora-rank --micro-batch-size --pack --save-every --workers --each "
    "--attention --layer --max-requests --max-cost --price-in --price-out --backoff "
    "--character-coverage".split()
)
NO_NUMBERS = ("nan", "inf", "-inf", "-1", "-0.5", "1e400", "9" * 30, "x", "")


def leaves(parser):
    """The parsers of a parser's commands, or the parser itself."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found or [parser]


@pytest.fixture(scope="module")
def parsers():
    """The parsers of all commands of the tree, each command of a command by itself."""
    found = []
    for module in COMMANDS:
        for first in ["", "stats"] if module == "annotation.__main__" else [""]:
            with pytest.MonkeyPatch.context() as monkeypatch:
                found += leaves(parser_of(module, first, monkeypatch))
    assert len(found) >= 25
    return found


def values(parsers):
    """(name of the flag, "command flag", action) of all that take a value."""
    for parser in parsers:
        for action in parser._actions:
            if action.nargs != 0:
                name = max(action.option_strings, key=len, default=action.dest)
                yield name, f"{parser.prog.removeprefix('python -m ')} {name}", action


def refuses(action, text):
    """Whether the action's type or its choices refuse a text."""
    try:
        value = action.type(text) if action.type else text
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return action.choices is not None and value not in action.choices


def is_free(name, where):
    """Whether it may be any text."""
    return name in FREE or any(where.endswith(each) for each in FREE_HERE)


def test_no_flag_takes_just_any_text(parsers):
    for name, where, action in values(parsers):
        assert refuses(action, "nowhere/nothing") != is_free(name, where), where
        assert refuses(action, "") == (name not in EMPTY), where


def test_every_number_has_a_range(parsers):
    numbers = 0
    for name, where, action in values(parsers):
        if is_free(name, where) or all(refuses(action, text) for text in ("1", "2", "16", "0.5")):
            continue
        numbers += 1
        wrong = set(NO_NUMBERS) - ({"-1"} if name == "--layer" else set())  # -1: the last layer
        taken = [text for text in wrong if not refuses(action, text)]
        assert not taken, f"{where} takes {taken}"
        takes_zero = name in ZERO and where != "demo.write --workers"
        assert refuses(action, "0") != takes_zero, where
    assert numbers > 100


def test_a_file_is_no_folder(parsers, tmp_path):
    """What takes the one refuses the other, save for a tokenizer and what has a projector."""
    (tmp_path / "file.json").touch()
    both = []
    for name, where, action in values(parsers):
        takes = [not refuses(action, str(path)) for path in (tmp_path, tmp_path / "file.json")]
        if all(takes) and not is_free(name, where):
            both.append(name)
    assert set(both) == {"--llm", "--vision", "--tokenizer", "--projector", "base", "new", "models"}


def test_help_says_what_each_flag_is_and_its_default(parsers):
    for parser in parsers:
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.dest}"
            text = parser._get_formatter()._expand_help(action)
            if action.option_strings and action.default not in (
                None,
                False,
                "",
                [],
                "==SUPPRESS==",
            ):
                assert "default" in text, f"{parser.prog} {action.dest}: {text}"
        assert "nan" not in parser.format_help().split()


def test_every_error_is_one_line(parsers, capsys):
    for parser in parsers:
        with pytest.raises(SystemExit) as done:
            parser.parse_args(["--no-such-flag"])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith(f"{parser.prog}: "), error


# ------------------------------------------------------------------------- whole commands
@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py align --epochs 0", "--epochs: 0: must be 1e-06 or more"),
        ("train.py instruct --batch-size 0", "--batch-size: 0: must be 1 or more"),
        ("train.py instruct --estimate 0", "--estimate: 0: must be 1 or more"),
        (
            "train.py align --preset tiny --tokenizer README.md --data x.json -o x --estimate 1 "
            "--precision fp32",
            "--estimate counts bf16",
        ),
        ("train.py align --validate nowhere.json", "--validate: nowhere.json: no such file"),
        ("train.py text --beta2 1", "--beta2: 1: must be 0.999999 or less"),
        ("train.py text --lr nan", "--lr: nan: must be 1e-12 or more"),
        ("generate.py --temperature nan", "--temperature: nan: must be 0 or more"),
        ("generate.py --model tests/nowhere", "--model: tests/nowhere: no such folder"),
        ("generate.py --model README.md", "--model: README.md: is a file, must be a folder"),
        ("generate.py --batch tests", "--batch: tests: is a folder, must be a file"),
        ("generate.py --model tests --batch README.md What?", "give it alone"),
        ("tokenizer.py show README.md", "required: text"),
        ("-m demo --trainable projectr", "--trainable: invalid choice: 'projectr'"),
        ("-m demo --processes 3", "--processes: invalid choice: 3"),
        ("-m demo --dry-run --data README.md", "README.md: is a file, must be a folder"),
        ("-m demo --dry-run --data docs", "docs: has no world.json"),
        ("-m demo --dry-run --share ko=0.5 ko=0.1", "ko has a share already"),
        ("-m evaluation retrieve --pool 1", "--pool: 1: must be 2 or more"),
        ("-m evaluation report docs --eval nowhere.json", "--eval: nowhere.json: no such file"),
        ("-m annotation docs --languages en,xx", "xx is not in the table; there are en, ko, zh"),
        ("-m demo.write --atlas nowhere.ttf", "--atlas: nowhere.ttf: no such file"),
    ],
)
def test_a_wrong_value_is_one_line_at_once(monkeypatch, capsys, command, message):
    first, *words = command.removeprefix("-m ").split()
    module = first.removesuffix(".py")
    if (ROOT / module).is_dir():
        module += ".__main__"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [first, *words])
    with pytest.raises(SystemExit) as done:
        run_main(importlib.import_module(module).main, first)

    # The interpreter prints a status that is a text, and ends with 1.
    output = capsys.readouterr()
    error = output.err if done.value.code == 2 else f"{done.value.code}\n"
    assert not output.out and error.count("\n") == 1 and message in error, error


def test_where_nothing_can_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "new" / "er", tmp_path):
        claim_output(folder / "x.json", lambda path: False)
        assert folder.is_dir() and not list(folder.glob("*.json"))
    with pytest.raises(ValueError, match="file: is a file, must be a folder"):
        claim_output(tmp_path / "file" / "x.json", lambda path: False)
    if hasattr(os, "geteuid") and os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            claim_output(tmp_path / "x.json", lambda path: False)


def test_names_in_a_list_come_back_in_the_order_of_the_table():
    names = flags.some_of({"en": 1, "ko": 2, "zh": 3})
    assert names("zh, en") == names("en,zh,en") == ["en", "zh"]


def test_a_file_of_questions_that_is_given_twice_counts_once(monkeypatch, tmp_path):
    (tmp_path / "a.json").touch()
    file, seen = str(tmp_path / "a.json"), []
    monkeypatch.setattr(evaluation.answer, "run", seen.append)
    words = ["answer", "--model", str(tmp_path), "--data", file, file]
    monkeypatch.setattr(sys, "argv", ["evaluation", *words])
    evaluation.__main__.main()
    assert seen[0].data == [file]


def test_the_demos_choices_are_what_its_stages_can_do():
    with torch.device("meta"):
        model = XLlava(PRESETS["tiny"])
    for name in demo.__main__.MODULES:
        assert any(True for _ in model.get_submodule(name).parameters())
    all_flags = " ".join(stage.flags for stage in STAGES.values())
    sizes = [int(size) for size in re.findall(r"--batch-size (\d+)", all_flags)]
    assert len(sizes) == len(STAGES)
    for number in demo.__main__.PROCESSES:
        assert all(size % number == 0 for size in sizes)
