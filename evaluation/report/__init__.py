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
    page.html, sections.html, style.css
"""

from pathlib import Path

from evaluation.report.page import make_page
from vocabulary.files import claim_output, write_atomically

MARK = b'content="evaluation report"'  # at the top of page.html


def add_arguments(parser):
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="the run's, or its stages'")
    add("--eval", type=Path, help="of `answer` (default: FOLDER/eval.json)")
    add("-o", "--out", type=Path, help="default: FOLDER/report.html")
    add("--seed", type=int, default=0, help="which questions are shown")
    add("--each", type=int, default=4, help="right and wrong answers per language (default: 4)")
    add("--attention", type=int, default=6, help="images with attention (default: 6); 0: no model")


def run(args):
    for folder in args.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    out = args.out or args.folders[0] / "report.html"
    eval_file = args.eval or args.folders[0] / "eval.json"
    claim_output(out, lambda path: MARK in path.read_bytes()[:200], [eval_file])
    text = make_page(args.folders, eval_file, args.seed, args.each, args.attention)
    write_atomically(out, lambda file: file.write(text.encode()))
    print(f"{out}: {len(text) / 1e6:.1f} MB, one file")
