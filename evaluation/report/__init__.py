"""A finished run on one page: curves, tables, images with questions and answers, attention.

    python -m evaluation report out/demo            # -> out/demo/report.html
    python -m evaluation report out/ablation        # comparisons of runs
    python -m evaluation report out/a/align out/b/instruct --eval eval.json

It reads log.jsonl of each stage, and in the first folder the JSON files of the other commands,
timing.json and commands.txt. The page works offline.

    page.py         the sections in their order
    curves.py       the loss of each stage
    gallery.py      images with questions and answers
    attention.py    where the decoder attends
    matrix.py       retrieval between images and languages
    page.html, sections.html, style.css
"""

from pathlib import Path

from evaluation.report.page import make_page
from vocabulary import flags
from vocabulary.files import claim_output, write_atomically

MARK = b'content="evaluation report"'  # at the top of page.html


def add_arguments(parser):
    add = parser.add_argument
    folders = {"nargs": "+", "type": flags.folder, "metavar": "FOLDER"}
    add("folders", **folders, help="the run's, or its stages'")
    about = "of `answer` (default: FOLDER/eval.json)"
    add("--eval", type=flags.file, metavar="FILE", help=about)
    add("-o", "--out", type=flags.text, metavar="FILE", help="default: FOLDER/report.html")
    add("--seed", type=flags.seed, default=0, help="which questions are shown")
    number = {"type": flags.at_least(0, most=1000), "metavar": "N"}
    add("--each", **number, default=4, help="right and wrong answers per language")
    add("--attention", **number, default=6, help="images with attention; 0: no model is loaded")


def run(args):
    folders = [Path(folder) for folder in args.folders]
    out = Path(args.out or folders[0] / "report.html")
    eval_file = Path(args.eval or folders[0] / "eval.json")
    claim_output(out, lambda path: MARK in path.read_bytes()[:200], [eval_file])
    text = make_page(folders, eval_file, args.seed, args.each, args.attention)
    write_atomically(out, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
    print(f"{out}: {len(text) / 1e6:.1f} MB, one file")
