"""Trains the demo: draws a small world, then trains and measures a model that answers questions
about its images in every language of demo/words.

    python -m demo                               # everything, into out/demo
    python -m demo --out out/seed5 --seed 5      # another world, another start
    python -m demo --out out/cut --data out/demo/data --without text --trainable projector decoder
    python -m demo --dry-run                     # only print the commands

The third line leaves a stage out, on the same world, to see what the stage is for. Each step is a
command that is printed before it runs. The same line goes on where a run was stopped.
"""

import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path

from demo.recipe import OPTIONAL, TEXTS, example, make_steps
from demo.steps import Run, is_run, run_command, short_path, shown
from demo.words import LANGUAGES, parse_shares
from vocabulary.command import run_main
from vocabulary.files import set_aside

# The embeddings are not among them: a word that no image was named with so stays close to its
# translation.
TRAINABLE = ("projector", "decoder.layers")


def parse_args(words=None):
    parser = ArgumentParser(
        "python -m demo", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add, some = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--out", type=Path, default=Path("out/demo"), help="folder of the run (default: out/demo)")
    add("--data", type=Path, help="folder of the world, used as it is if there (default: OUT/data)")
    add("--seed", type=int, default=0, help="of the world and of training (default: 0)")
    add("--processes", type=int, default=1, help="processes that train together (default: 1)")
    about = f"steps to leave out, of {' '.join(OPTIONAL)}"
    add("--without", **some, choices=OPTIONAL, default=[], help=about)
    about = f"languages of the tokenizer (default: {' '.join(LANGUAGES)})"
    add("--vocabulary", **some, choices=LANGUAGES, default=LANGUAGES, help=about)
    about = f"what stage text reads (default: {' '.join(TEXTS)})"
    add("--texts", **some, choices=TEXTS, default=TEXTS, help=about)
    about = "stage vision reads the dictionary, too"
    add("--dictionary", action=BooleanOptionalAction, default=True, help=about)
    about = f"what the three stages of instruct train (default: {' '.join(TRAINABLE)})"
    add("--trainable", **some, default=TRAINABLE, help=about)
    add("--share", **some, default=[], help="of a language in training: ko=0.1 for a tenth")
    add("--fresh", action="store_true", help="move OUT aside and begin anew")
    add("--dry-run", action="store_true", help="print the commands and run none")

    # One folder is one path, however it was typed: commands are compared by their words.
    args = parser.parse_args(words)
    args.is_own_world = args.data is None
    args.out, args.data = short_path(args.out), short_path(args.data or args.out / "data")
    return args


def main(words=None, runner=run_command):
    """The command line; `runner` runs a command and returns its exit status."""
    args = parse_args(words)
    try:
        parse_shares(args.share)
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
