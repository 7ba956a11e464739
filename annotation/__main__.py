"""Builds a visual instruction set in several languages from any folder of images.

Any model behind an OpenAI-compatible endpoint writes it: OpenAI, vLLM, Ollama, llama.cpp …

    python -m annotation IMAGES -o set.json --base-url http://localhost:11434/v1 --model M --dry-run
    python -m annotation IMAGES -o set.json --base-url http://localhost:11434/v1 --model M
    python -m annotation stats set.json --sheet sheet.html     # counts; random samples to look over
    python data.py check set.json --model START                # then train on it

The journal set.journal.jsonl holds every reply: after Ctrl-C, kill -9 or a power loss the same
command goes on, and nothing is paid for twice; --max-requests 20 makes a cheap start. The API key
is read from the environment (--key-env) and never printed or saved. A local server needs room for
about 6,000 tokens (OLLAMA_CONTEXT_LENGTH=8192 ollama serve).
"""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path

from annotation.build import annotate
from annotation.filters import LANGUAGES
from annotation.prompts import KINDS
from annotation.stats import print_stats
from evaluation.client import add_client_arguments
from vocabulary import flags
from vocabulary.command import Parser, run_main


def stats_parser():
    parser = Parser(prog="python -m annotation stats", description=print_stats.__doc__)
    add = parser.add_argument
    add("file", type=flags.file, help="a set that `python -m annotation` made")
    add("--sheet", type=flags.text, metavar="HTML", help="write a page of 40 random samples")
    return parser


def annotation_parser():
    parser = Parser(prog="python -m annotation", description=__doc__)

    # `--flag` and `--no-flag`.
    add = parser.add_argument
    yes_no = {"action": BooleanOptionalAction, "default": False}
    about = "images; its folders are searched, links out of it refused"
    add("folder", type=flags.folder, help=about)
    add("-o", "--out", type=flags.text, required=True, help="the set, a .json file")
    for name, table in (("languages", LANGUAGES), ("kinds", KINDS)):
        names = {"type": flags.some_of(table), "default": ",".join(table)}
        add(f"--{name}", **names, metavar="NAME,…", help="of the conversations")
    add(
        "--objects",
        type=flags.file,
        metavar="FILE",
        help='JSON {"image.jpg": ["cat", "sofa"], …}: objects that are there',
    )
    add("--verify", **yes_no, help="ask again about each pair, and drop what is not confirmed")

    # An answer often gives away the next one: apart, each must be read from the image.
    apart = "but for conversations; train.py --records-per-sample puts them side by side"
    add("--one-pair-per-record", **yes_no, help=apart)
    add(
        "--max-side", type=flags.at_least(16), default=1024, help="pixels of the image that is sent"
    )
    add("--fresh", action="store_true", help="set aside what another run left in -o")
    add("--dry-run", action="store_true", help="print one request per kind and the cost; send none")
    add_client_arguments(parser)
    return parser


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
    if arguments[:1] == ["stats"]:
        args = stats_parser().parse_args(arguments[1:])
        args.file = Path(args.file)
        return print_stats(args)

    args = annotation_parser().parse_args(arguments)
    args.folder, args.out = Path(args.folder), Path(args.out)
    return annotate(args)


if __name__ == "__main__":
    run_main(main, "annotation")
