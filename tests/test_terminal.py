"""Commands on any terminal: locale, colours, keys, a reader that ends."""

import os
import subprocess
import sys

import pytest
from test_readme import ROOT

from vocabulary import command  # noqa: F401

CHILD = "from vocabulary import command; command.enable_line_editing(); "
CHILD += "print(ascii(input('you: ')), 'end')"


@pytest.mark.parametrize(
    "name, keys, line",
    [
        ("C.UTF-8", "고양이가\x7f 어디?", "고양이 어디?"),  # Backspace takes a syllable
        ("C.UTF-8", "b\x1b[Da", "ab"),  # arrow left
        ("C.UTF-8", "한\x1b[D\x1b[3~글", "글"),  # delete
        ("C", "고양이", "고양이"),  # without editing, whole
    ],
)
def test_the_chat_edits_its_line(name, keys, line):
    pty = pytest.importorskip("pty", reason="Windows: its console edits lines itself")
    pytest.importorskip("readline", reason="this Python was built without readline")
    environment = {key: value for key, value in os.environ.items() if key != "INPUTRC"}
    environment |= {"LC_ALL": name, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", CHILD], environment)

    read = b""
    while b"you: " not in read:
        read += os.read(terminal, 1000)
    os.write(terminal, f"{keys}\n".encode())
    while b"end" not in read:
        read += os.read(terminal, 1000)
    os.waitpid(process, 0)
    assert ascii(line).encode() in read


@pytest.mark.parametrize(
    "more", [{"PYTHONIOENCODING": "cp949"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"NO_COLOR": "1"}]
)
def test_help_and_errors_print_on_any_terminal(more):
    """train.py's help has Hangul, Han characters and arrows; tokenizer.py's an ellipsis."""
    for words in (["-m", "demo", "--help"], ["tokenizer.py", "--help"], ["tokenizer.py", "고양이"]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, cwd=ROOT, env=os.environ | more
        )
        assert done.returncode == (2 if "고양이" in words else 0), done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["cp949", "euc_kr", "gbk", "ascii", "cp1252"])
def test_a_table_keeps_its_columns_on_a_terminal_that_lacks_dashes(encoding):
    line = "en  98.2 (97.4 – 98.8)  −0.5"
    shown = line.encode(encoding, "replace_missing").decode(encoding)
    assert len(shown) == len(line) and shown.replace("–", "-").replace("−", "-") == (
        "en  98.2 (97.4 - 98.8)  -0.5"
    )
    assert "고".encode("ascii", "replace_missing") == b"\\uace0"
