"""Measures a trained model and shows the results. Each command has a --help of its own."""

import argparse
import sys
from pathlib import Path

from evaluation import answer, compare, judge, likelihood, report, retrieval

COMMANDS = {
    "answer": answer,
    "likelihood": likelihood,
    "retrieve": retrieval,
    "compare": compare,
    "judge": judge,
    "report": report,
}


def main():
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about, layout = module.__doc__, argparse.RawDescriptionHelpFormatter
        first_line = about.partition("\n")[0]
        command = commands.add_parser(
            name, help=first_line, description=about, formatter_class=layout
        )
        module.add_arguments(command)
    args = parser.parse_args()
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluation: {error}")
