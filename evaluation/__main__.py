"""Measures a trained model and shows the results. Each command has a --help of its own."""

from evaluation import answer, compare, heatmap, judge, likelihood, probe, report, retrieval
from evaluation.batching import model_identity
from evaluation.journal import is_journal
from vocabulary.command import Parser, run_main
from vocabulary.files import sibling
from vocabulary.identity import claim_run

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


def claim_results(args):
    """ValueError if -o is not this command's, or another run's. Nothing is changed up to here."""
    identity, ending, known = {"files": {}}, ".answers.jsonl", False
    if args.command == "judge":
        identity, ending = judge.judge_identity(args), ".journal.jsonl"
        known = is_journal(sibling(args.out, ending))
    elif args.command not in ("compare", "probe"):  # these are made anew each time
        identity = model_identity(args)
    identity["command"] = f"evaluation {args.command}"
    fresh = getattr(args, "fresh", False)
    claim_run(args.out, identity, [sibling(args.out, ending)], fresh, known)


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
    writes_json = args.out and args.command not in ("heatmap", "report")
    if writes_json and not getattr(args, "dry_run", False):
        claim_results(args)
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_main(main, "evaluation")
