"""The ablation: what is each idea of X-LLaVA worth, and each language?

    python -m demo.ablation                                       # all variants, three seeds each
    python -m demo.ablation --variants full no-V --seeds 0 1      # some of it
    python -m demo.ablation --jobs 2                              # two runs at a time

Each run is the demo with one thing changed, on the same images and questions, at equal steps. A
finished run is not run again. The result is out/ablation/report.html.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo.recipe import world_step
from demo.steps import Run, Step, shown
from demo.words import BASE, LANGUAGES

MINUTES = (12, 27)  # that one run takes on one core

# Without vocabulary expansion (V) the base tokenizer spells other languages in bytes. Without
# bilingual pretraining (P) all text is in the base language.
NO_V = ["--vocabulary", BASE]
NO_P = ["--texts", BASE, "--no-dictionary"]
PAPER = {"full": [], "no-V": NO_V, "no-P": NO_P, "no-V-P": NO_V + NO_P}
PAIRS = {f"{BASE}-{language}": [BASE, language] for language in LANGUAGES[1:]}
# {variant: flags of `python -m demo`}, and {variant: shares} of those with a world of their own:
# of two languages, or with a tenth of another language.
VARIANTS = PAPER | {
    name: ["--vocabulary", *pair, "--texts", *pair, "parallel"] for name, pair in PAIRS.items()
}
SHARES = {name: [f"{n}=0" for n in LANGUAGES if n not in pair] for name, pair in PAIRS.items()}
VARIANTS[f"low-{LANGUAGES[1]}"] = []
SHARES[f"low-{LANGUAGES[1]}"] = [f"{LANGUAGES[1]}=0.1"]


def world_of(out, variant):
    """The folder of a variant's world."""
    return out / (f"data.{variant}" if variant in SHARES else "data")


def make_worlds(out, variants):
    """A step for each world that the variants need."""
    shares = {world_of(out, name): SHARES.get(name, ()) for name in variants}
    return [world_step(f"world {path.name}", path, share=own) for path, own in shares.items()]


def make_runs(out, variants, seeds):
    """{folder of a run: its command}."""
    runs = {}
    for seed in map(str, seeds):
        for name in variants:
            folder, world = out / f"{name}.{seed}", world_of(out, name)
            command = ["-m", "demo", "--out", str(folder), "--data", str(world), "--seed", seed]
            runs[folder] = [*command, *VARIANTS[name], "--without", "report"]
    return runs


def make_comparisons(out, variants, seeds):
    """Steps that compare the variants that were run, and the report."""
    comparisons = {"paper": list(PAPER)} | {name: ["full", name] for name in SHARES}
    steps = []
    for name, members in comparisons.items():
        members = [member for member in members if member in variants]
        if len(members) < 2:
            continue

        # Each variant with the results of its seeds; two languages are compared in these alone.
        command, reads, result = ["-m", "evaluation", "compare"], [], out / f"{name}.json"
        for member in members:
            paths = [out / f"{member}.{seed}" / "eval.json" for seed in seeds]
            command.append(f"{member}={','.join(map(str, paths))}")
            reads += paths
        if name in PAIRS:
            command += ["--languages", *PAIRS[name]]
        command += ["-o", str(result)]
        steps.append(Step(f"compare {name}", command, reads, result, again=True))

    results, command = [step.writes for step in steps], ["-m", "evaluation", "report", str(out)]
    return [*steps, Step("report", command, results, out / "report.html", again=True)]


def run_one(command, log, jobs):
    """Runs a command. Beside others, its output goes to a file. Raises ValueError if it fails."""
    command = [sys.executable, *command]
    if jobs == 1:
        status = subprocess.run(command).returncode
    else:
        print(f"{shown(command[1:])} > {log}", flush=True)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        with open(log, "w", encoding="utf-8") as file:
            more = {"env": threads | os.environ, "stdout": file, "stderr": file}
            status = subprocess.run(command, **more).returncode
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
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, list(VARIANTS)
    variants = {"choices": names, "default": names, "help": f"(default: {' '.join(names)})"}
    add("--out", type=Path, default=Path("out/ablation"), help="folder (default: out/ablation)")
    add("--variants", nargs="+", metavar="VARIANT", **variants)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training (default: 0 1 2)")
    add("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    add("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(words)

    worlds = make_worlds(args.out, args.variants)
    runs = make_runs(args.out, args.variants, args.seeds)
    comparisons = make_comparisons(args.out, args.variants, args.seeds)
    if args.dry_run:
        commands = [step.command for step in worlds] + list(runs.values())
        for command in commands + [step.command for step in comparisons]:
            print(shown(command))
        return

    # Hours, before anything begins.
    left = [folder for folder in runs if not (folder / "eval.json").exists()]
    low, high = (len(left) * minutes / 60 / args.jobs for minutes in MINUTES)
    print(f"{len(left)} of {len(runs)} runs to do: {low:.1f} to {high:.1f} hours with a core each")

    try:
        run = Run(args.out)
        run.run(worlds)
        run_all(runs, args.jobs)
        run.run(comparisons)
    except (ValueError, OSError) as error:
        sys.exit(f"demo.ablation: {error}")


if __name__ == "__main__":
    main()
