"""Trains the demo: draws a small world, then trains and measures a model that answers questions
about its images in several languages, each a file of demo/words.

    python -m demo                               # everything, into out/demo
    python -m demo --out out/seed5 --seed 5      # another world, another start
    python -m demo --out out/cut --data out/demo/data --without text --trainable projector decoder
    python -m demo --quick                       # a smaller recipe: a first look, into out/quick
    python -m demo --out out/six --languages en ko zh tr ar sw
    python -m demo --dry-run                     # only print the commands

The third line leaves a stage out, on the same world, to see what the stage is for. Each step is a
command that is printed before it runs. The same line goes on where a run was stopped.
"""

import sys
from argparse import BooleanOptionalAction
from importlib.util import find_spec

from demo.recipe import OPTIONAL, example, make_steps
from demo.steps import Run, is_run, run_command, short_path, shown
from demo.words import AVAILABLE, DEFAULT, LANGUAGES, choose_languages, parse_shares
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import entries, require_writable, set_aside

MODULES = ("vision", "projector", "decoder", "decoder.embed_tokens", "decoder.layers")
# The embeddings are not among them: a word that no image was named with so stays close to its
# translation.
TRAINABLE = ("projector", "decoder.layers")
# Each batch of each stage is shared out evenly.
PROCESSES = (1, 2, 4, 8, 16)


def parse_args(words=None):
    parser = Parser(prog="python -m demo", description=__doc__)
    add, some = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    folder = {"type": flags.text, "metavar": "FOLDER"}
    add("--out", **folder, help="of the run (default: out/demo, or out/quick)")
    add("--quick", action="store_true", help="fewer images and steps: a fifth of the time")
    about = "of the world, used as it is if there (default: OUT/data)"
    add("--data", **folder, help=about)
    add("--seed", type=flags.seed, default=0, help="of the world and of training")
    about = "processes that train together: 1 2 4 8 16"
    add("--processes", type=int, choices=PROCESSES, default=1, metavar="N", help=about)
    about = f"steps to leave out, of {' '.join(OPTIONAL)}"
    add("--without", **some, choices=OPTIONAL, default=[], help=about)
    about = "of the world; more languages take longer"
    add("--languages", **some, choices=AVAILABLE, default=DEFAULT, help=about)
    about = "languages of the tokenizer (default: all of the world)"
    add("--vocabulary", **some, choices=AVAILABLE, help=about)
    about = "what stage text reads (default: all languages, and parallel)"
    add("--texts", **some, choices=(*AVAILABLE, "parallel"), help=about)
    about = "stage vision reads the dictionary, too"
    add("--dictionary", action=BooleanOptionalAction, default=True, help=about)
    about = f"what the stages of instruct train, of {' '.join(MODULES)}"
    add("--trainable", **some, choices=MODULES, default=TRAINABLE, help=about)
    add(
        "--share",
        **some,
        type=flags.text,
        default=[],
        help="of the training images that a language describes: ko=0.1 for a tenth",
    )
    about = "files of questions to answer (default: the test splits of the world)"
    add("--test", nargs="+", type=flags.text, metavar="FILE", help=about)
    about = "of training: 2 for twice the steps of each stage"
    add("--length", type=flags.at_least(1e-6, float), default=1, metavar="FACTOR", help=about)
    add("--fresh", action="store_true", help="move OUT aside and begin anew")
    add("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(words)
    args.out = args.out or ("out/quick" if args.quick else "out/demo")
    try:
        choose_languages(args.languages)
    except ValueError as error:
        parser.error(str(error))
    args.vocabulary = args.vocabulary or LANGUAGES
    # One language has no translations.
    args.dictionary = args.dictionary and len(LANGUAGES) > 1
    args.texts = args.texts or (*LANGUAGES, *["parallel"] * (len(LANGUAGES) > 1))
    for name in ("vocabulary", "texts"):
        if other := sorted({*getattr(args, name)} - {*LANGUAGES, "parallel"}):
            parser.error(f"argument --{name}: {other[0]} is none of the languages")

    # A name that is given twice is one name.
    for name in ("without", "vocabulary", "texts", "trainable"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    # One folder is one path, however it was typed: commands are compared by their words.
    args.is_own_world = args.data is None
    args.out = short_path(args.out)
    args.data = short_path(args.data or args.out / "data")
    return args


def check_folders(args):
    """ValueError if one is a file, or if --data holds something else than a world."""
    for folder in (args.out, args.data):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file, must be a folder")
    if not args.is_own_world and entries(args.data):
        if not (args.data / "world.json").exists():
            raise ValueError(f"{args.data}: has no world.json; give a world, or a new folder")


def main(words=None, runner=run_command):
    """The command line; `runner` runs a command and returns its exit status."""
    args = parse_args(words)
    try:
        parse_shares(args.share)
        check_folders(args)
        if args.dry_run:
            print("\n".join(shown(step.command) for step in make_steps(args)))
            return
        for name in ("torch", "numpy", "sentencepiece", "PIL", "tqdm"):
            if find_spec(name) is None:
                advice = f"{sys.executable} -m pip install -r requirements.txt"
                raise ValueError(f"the package {name} is missing: {advice}")
        if args.fresh and args.out.exists():
            if not is_run(args.out):
                raise ValueError(f"{args.out}: not a run of the demo; choose another --out")
            set_aside(args.out)
        require_writable(args.out)
        run = Run(args.out)
        run.run(make_steps(args), runner)
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")

    # what to look at, and what to try
    times = run.timing()
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in times.items())
    print(f"\nSeconds: {seconds}; together {sum(times.values()):.0f}")
    if "report" not in args.without:
        print(f"The run on one page: {args.out / 'report.html'}")
    command, answer = example(args)
    print(f"Ask the model something (the right answer is {answer!r}):\n  {shown(command)}")


if __name__ == "__main__":
    run_main(main, "demo")
