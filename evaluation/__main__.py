"""Measures a trained model and shows the results. Each command has a --help of its own."""

from evaluation import answer, compare, heatmap, judge, likelihood, probe, report, retrieval
from vocabulary.command import Parser, run_main
from vocabulary.files import claim_output, read_json

# Each command's results have one of these keys.
RESULTS = {"rows", "likelihood", "retrieval", "models", "judge", "probe"}
COMMANDS = {
    "answer": answer,
    "likelihood": likelihood,
    "retrieve": retrieval,
    "compare": compare,
    "judge": judge,
    "probe": probe,
    "heatmap": heatmap,
    "report": report,
}


def is_result(path):
    """Whether a file holds the results of one of these commands."""
    return bool(RESULTS & read_json(path).keys())


def main():
    parser = Parser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about = {"help": module.__doc__.partition("\n")[0], "description": module.__doc__}
        module.add_arguments(commands.add_parser(name, **about))
    args = parser.parse_args()
    # A file that is given twice must not count twice.
    if getattr(args, "data", None):
        args.data = list(dict.fromkeys(args.data))
    if args.out and args.command not in ("heatmap", "report"):  # these write no JSON
        inputs = [*getattr(args, "data", []), *getattr(args, "answers", [])]
        claim_output(args.out, is_result, inputs)
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_main(main, "evaluation")
