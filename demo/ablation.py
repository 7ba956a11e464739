"""The ablation: what is each idea of X-LLaVA worth, and each language?

    python -m demo.ablation                                       # all variants, three seeds each
    python -m demo.ablation --variants full no-V --seeds 0 1      # some of it
    python -m demo.ablation --jobs 2                              # two runs at a time

Each run is the demo with one thing changed, on the same images and questions, at equal steps. A
finished run is not run again. The result is report.html.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from demo.recipe import report_step, world_step
from demo.steps import Run, Step, short_path, shown
from demo.words import BASE, LANGUAGES
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import require_writable

MINUTES = (12, 27)  # that one run takes on one core

# V, vocabulary expansion: without it the tokenizer spells other languages in bytes. P, bilingual
# pretraining: without it all text is in the base language.
NO_V = ["--vocabulary", BASE]
NO_P = ["--texts", BASE, "--no-dictionary"]
PAPER = {"full": [], "no-V": NO_V, "no-P": NO_P, "no-V-P": NO_V + NO_P}
PAIRS = {f"{BASE}-{language}": [BASE, language] for language in LANGUAGES[1:]}
# {variant: flags of `python -m demo`}, and {variant: shares} of those with a world of their own:
# of two languages, or with a tenth of another language.
VARIANTS, SHARES, LOW = dict(PAPER), {}, f"low-{LANGUAGES[1]}"
for name, pair in PAIRS.items():
    VARIANTS[name] = ["--vocabulary", *pair, "--texts", *pair, "parallel"]
    SHARES[name] = [f"{language}=0" for language in LANGUAGES if language not in pair]
VARIANTS[LOW], SHARES[LOW] = [], [f"{LANGUAGES[1]}=0.1"]


def world_of(out, variant):
    return out / (f"data.{variant}" if variant in SHARES else "data")


def make_worlds(out, variants):
    """A step for each world that the variants need."""
    # Variants without shares of their own have one world in common.
    shares = {world_of(out, name): SHARES.get(name, ()) for name in variants}
    return [world_step(f"world {path.name}", path, share=own) for path, own in shares.items()]


def make_runs(out, variants, seeds):
    """{folder of a run: its command}."""
    runs = {}
    for seed, name in product(map(str, seeds), variants):
        folder, world = out / f"{name}.{seed}", world_of(out, name)
        command = ["-m", "demo", "--out", str(folder), "--data", str(world), "--seed", seed]
        runs[folder] = [*command, *VARIANTS[name], "--without", "report"]
    return runs


def make_comparisons(out, variants, seeds):
    """Steps that compare the variants that were run, and the report."""
    steps, groups = [], {"paper": list(PAPER)} | {name: ["full", name] for name in SHARES}
    for name, members in groups.items():
        members = [member for member in members if member in variants]
        if len(members) < 2:
            continue

        # A world of two languages is compared in these alone.
        command, reads, result = ["-m", "evaluation", "compare"], [], out / f"{name}.json"
        for member in members:
            paths = [out / f"{member}.{seed}" / "eval.json" for seed in seeds]
            command.append(f"{member}={','.join(map(str, paths))}")
            reads += paths
        if name in PAIRS:
            command += ["--languages", *PAIRS[name]]
        command += ["-o", str(result)]
        steps.append(Step(f"compare {name}", command, reads, result, again=True))

    return [*steps, report_step(out, [step.writes for step in steps])]


def run_one(command, log, jobs):
    """Runs a command; beside others, its output goes to a file."""
    if jobs == 1:
        status = subprocess.run([sys.executable, *command]).returncode
    else:
        print(f"{shown(command)} > {log}", flush=True)
        # All cores for each run would make all of them slower.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        with open(log, "a", encoding="utf-8") as file:
            more = {"env": threads | os.environ, "stdout": file, "stderr": file}
            status = subprocess.run([sys.executable, *command], **more).returncode
    if status:
        raise ValueError(f"{log.stem} ended early, with exit status {status}: run it again")


def run_all(runs, jobs, runner=run_one):
    """Runs all commands, `jobs` at a time. After a failure none is begun."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(runner, command, folder.with_name(f"{folder.name}.log"), jobs)
            for folder, command in runs.items()
        ]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(words=None):
    parser = Parser(prog="python -m demo.ablation", description=__doc__)
    add, some = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--out", type=flags.text, default="out/ablation", metavar="FOLDER", help="of all runs")
    add("--variants", **some, choices=VARIANTS, default=list(VARIANTS), help="of the demo")
    add("--seeds", nargs="+", type=flags.seed, default=[0, 1, 2], metavar="N", help="of training")
    jobs = flags.at_least(1, most=64)
    add("--jobs", type=jobs, default=1, metavar="N", help="runs at a time")
    add("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(words)
    args.out = short_path(args.out)

    # A seed that is given twice must not count twice.
    out, seeds = Path(args.out), list(dict.fromkeys(args.seeds))
    worlds = make_worlds(out, args.variants)
    runs = make_runs(out, args.variants, seeds)
    comparisons = make_comparisons(out, args.variants, seeds)
    if args.dry_run:
        before, after = ([step.command for step in steps] for steps in (worlds, comparisons))
        print("\n".join(map(shown, [*before, *runs.values(), *after])))
        return

    # Hours, before anything begins.
    left = [folder for folder in runs if not (folder / "eval.json").exists()]
    low, high = (len(left) * minutes / 60 / args.jobs for minutes in MINUTES)
    print(f"{len(left)} of {len(runs)} runs to do: {low:.1f} to {high:.1f} hours with a core each")

    try:
        require_writable(out)
        run = Run(out)
        run.run(worlds)
        run_all(runs, args.jobs)
        run.run(comparisons)
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"demo.ablation: {error}")


if __name__ == "__main__":
    run_main(main, "demo.ablation")
