"""The ablation: what is each idea of X-LLaVA worth, and what does a language cost?

    python -m demo.ablation                                  # the paper's ideas, three seeds each
    python -m demo.ablation --groups poor pairs number transfer --seeds 0
    python -m demo.ablation --variants full no-V --seeds 0 1      # some of the runs
    python -m demo.ablation --quick --groups poor --jobs 2        # the quick recipe, two at a time

Each run is the demo with one thing changed, on the same images, at equal steps if nothing else is
said. docs/languages.md says what each group asks. A finished run is not run again. The result is
report.html, which grows with each group.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from demo.recipe import QUICK_SIZES, SIZES, TEST_SPLITS, report_step, world_step
from demo.steps import FLOAT32_TAKES, Run, Step, multiplies_bf16, short_path, shown
from demo.words import AVAILABLE, DEFAULT
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import require_writable

MINUTES, QUICK_MINUTES = (13, 30), (2.5, 6)  # that one run takes on one core with bfloat16
BASE = DEFAULT[0]
EVERY = (BASE, *sorted(set(AVAILABLE) - {BASE}))
PERCENT = (30, 10, 3, 1)  # of the images, that a poor language describes
# Of a poor language, its ideas are left out at this share.
ABLATED = 10


class Variant(NamedTuple):
    """A run of the demo: how it differs from the default."""

    flags: tuple = ()  # of `python -m demo`
    languages: tuple = DEFAULT  # of the world, the base language first
    shares: tuple = ()  # of the world
    length: float = 1  # of training
    asks_every: bool = False  # asked the questions of the world of every language

    @property
    def world(self):
        """The name of its world's folder."""
        names = self.languages if self.languages != DEFAULT else ()
        return ".".join(["data", *(["-".join(names)] if names else []), *self.shares])


# V, vocabulary expansion: without it the tokenizer spells other languages in bytes. P, bilingual
# pretraining: without it all text is in the base language.
NO_V = ("--vocabulary", BASE)
NO_P = ("--texts", BASE, "--no-dictionary")
PAPER = {
    "full": Variant(),
    "no-V": Variant(NO_V),
    "no-P": Variant(NO_P),
    "no-V-P": Variant(NO_V + NO_P),
}


def poor_variants(language):
    """A language that describes few images: by share, then without what may help it."""
    names = (BASE, *sorted({*DEFAULT, language} - {BASE}))
    found = {"full" if names == DEFAULT else f"{language}-100": Variant(languages=names)}
    for percent in PERCENT:
        share = (f"{language}={percent / 100:g}",)
        found[f"{language}-{percent}"] = Variant((), names, share)

    few = found[f"{language}-{ABLATED}"]
    without = {
        "V": ("--vocabulary", *(name for name in names if name != language)),
        "parallel": ("--texts", *names),
        "dictionary": ("--no-dictionary",),
    }
    for name, words in without.items():
        found[f"{language}-{ABLATED}-no-{name}"] = few._replace(flags=words)
    return found


def of_languages(languages, length=1, asks_every=True):
    """{name: variant} of a world of these languages."""
    name = "-".join(languages) if len(languages) < len(EVERY) else f"{languages[0]}-every"
    name += f"-x{length:.2g}" if length != 1 else ""
    return {name: Variant((), tuple(languages), (), length, asks_every)}


def merged(variants):
    return {name: variant for own in variants for name, variant in own.items()}


def make_groups(poor):
    """{group: {comparison: {name: variant}}}; a comparison is with its first variant."""
    scarce = poor_variants(poor)
    shares = scarce[f"{poor}-{ABLATED}"].shares
    at_share = {name: own for name, own in scarce.items() if own.shares == shares}
    pairs = [(BASE, other) for other in EVERY[1:]] + [DEFAULT[1:3]]

    # At equal steps; then each for as long as it takes to see as many examples of a language as
    # the default world gives.
    numbers = [EVERY[:1], DEFAULT[:2], DEFAULT, EVERY]
    equal_examples = [of_languages(own, len(own) / len(DEFAULT)) for own in numbers]
    length = len(EVERY) / len(DEFAULT)
    turns = [(first, *sorted(set(EVERY) - {first})) for first in EVERY]
    return {
        "paper": {"paper": PAPER},
        "poor": {
            "poor": {name: own for name, own in scarce.items() if not own.flags},
            "poor-ideas": at_share,
        },
        "pairs": {"pairs": merged(map(of_languages, pairs))},
        "number": {
            "number": merged(map(of_languages, numbers)),
            "number-examples": merged(equal_examples),
        },
        # Each language in turn is the one that names the base-only kinds in images.
        "transfer": {"transfer": merged(of_languages(own, length, False) for own in turns)},
    }


def make_worlds(out, variants, sizes):
    """A step for each world that the variants need."""
    every = Variant(languages=EVERY)
    needed = [*variants.values(), *(every for own in variants.values() if own.asks_every)]
    worlds = {own.world: own for own in needed}
    return [
        world_step(f"world {name}", out / name, 0, own.shares, sizes, own.languages)
        for name, own in worlds.items()
    ]


def make_runs(out, variants, seeds, quick=False):
    """{folder of a run: its command}."""
    runs = {}
    for seed, (name, own) in product(map(str, seeds), variants.items()):
        folder, world = out / f"{name}.{seed}", out / own.world
        command = ["-m", "demo", "--out", str(folder), "--data", str(world), "--seed", seed]
        if own.languages != DEFAULT:
            command += ["--languages", *own.languages]
        command += [*own.flags, *(["--quick"] if quick else [])]
        if own.length != 1:
            command += ["--length", f"{own.length:.4g}"]

        # The images of all worlds are the same, the questions are not.
        asked = out / Variant(languages=EVERY).world if own.asks_every else world
        if own.asks_every or quick:
            command += ["--test", *(str(asked / f"{split}.json") for split in TEST_SPLITS)]
        runs[folder] = [*command, "--without", "report"]
    return runs


def make_comparisons(out, comparisons, seeds):
    """Steps that compare runs, each with the first of its comparison."""
    steps = []
    for name, variants in comparisons.items():
        # Where the runs know other languages, each language is compared by itself.
        known = [own.languages for own in variants.values()]
        if len(set(map(frozenset, known))) == 1:
            if len(set(known)) == 1:
                steps.append(compare_step(out, name, variants, seeds))
            continue
        for language in EVERY:
            own = [run for run, variant in variants.items() if language in variant.languages]
            steps.append(compare_step(out, f"{name}.{language}", own, seeds, [language]))
    return [step for step in steps if step]


def compare_step(out, name, runs, seeds, languages=()):
    """A comparison of runs; None where there is nothing to compare."""
    if len(runs) < 2:
        return None
    command, reads, result = ["-m", "evaluation", "compare"], [], out / f"{name}.json"
    for run in runs:
        paths = [out / f"{run}.{seed}" / "eval.json" for seed in seeds]
        command.append(f"{run}={','.join(map(str, paths))}")
        reads += paths
    command += ["--languages", *languages] if languages else []
    command += ["-o", str(result)]
    return Step(f"compare {name}", command, reads, result, again=True)


def findings_step(out):
    """Transfer and fertility, over all runs that are there."""
    command, reads = ["-m", "demo.findings", str(out)], sorted(out.glob("*/eval.json"))
    return Step("findings", command, reads, out / "findings.json", again=True)


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


def chosen_groups(groups, names):
    """The groups with the variants of these names alone; with all if there are no names. A group
    of which nothing is left but what an earlier one runs is left out."""
    if not names:
        return groups
    found, taken = {}, set()
    for group, comparisons in groups.items():
        own = {
            title: {name: variants[name] for name in variants if name in names}
            for title, variants in comparisons.items()
        }
        if not merged(own.values()).keys() <= taken:
            found[group] = own
            taken |= merged(own.values()).keys()
    return found


def parse_args(words):
    parser = Parser(prog="python -m demo.ablation", description=__doc__)
    add, some = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    about = "of all runs (default: out/ablation, or out/ablation-quick)"
    add("--out", type=flags.text, metavar="FOLDER", help=about)
    names = list(make_groups(DEFAULT[1]))
    about = f"of {' '.join(names)} (default: {names[0]}; with --variants all)"
    add("--groups", **some, choices=names, help=about)
    add(
        "--variants",
        **some,
        type=flags.text,
        help="some runs of the groups alone; --dry-run names them",
    )
    about = f"the language of group poor (default: {DEFAULT[1]})"
    add("--poor", choices=EVERY[1:], default=DEFAULT[1], metavar="LANGUAGE", help=about)
    add("--seeds", nargs="+", type=flags.seed, default=[0, 1, 2], metavar="N", help="of training")
    jobs = flags.at_least(1, most=64)
    add("--jobs", type=jobs, default=1, metavar="N", help="runs at a time")
    add("--quick", action="store_true", help="the quick recipe for each run: a first look")
    add("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(words)

    args.out = short_path(args.out or ("out/ablation-quick" if args.quick else "out/ablation"))
    groups = make_groups(args.poor)
    known = merged(own for comparisons in groups.values() for own in comparisons.values())
    if other := sorted(set(args.variants or ()) - known.keys()):
        parser.error(f"argument --variants: no {other[0]}; there are {' '.join(known)}")
    chosen = args.groups or (names if args.variants else names[:1])
    args.groups = chosen_groups({name: groups[name] for name in chosen}, args.variants)
    # A seed that is given twice must not count twice.
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def hours(runs, variants, jobs, quick):
    """How many runs are left, and how long they take."""
    left = [folder for folder in runs if not (folder / "eval.json").exists()]
    length = sum(variants[folder.name.rpartition(".")[0]].length for folder in left)
    minutes = QUICK_MINUTES if quick else MINUTES
    pace = 1 if multiplies_bf16() else FLOAT32_TAKES
    low, high = (length * pace * each / 60 / jobs for each in minutes)
    return f"{len(left)} of {len(runs)} runs to do: {low:.1f} to {high:.1f} hours with a core each"


def run_group(run, args, group, seeds):
    """Runs one group with the last of these seeds, then compares what there is."""
    out, comparisons = run.out, args.groups[group]
    variants = merged(comparisons.values())
    runs = make_runs(out, variants, seeds[-1:], args.quick)
    print(
        f"\n{group}, seed {seeds[-1]}: {hours(runs, variants, args.jobs, args.quick)}", flush=True
    )
    run.run(make_worlds(out, variants, QUICK_SIZES if args.quick else SIZES))
    run_all(runs, args.jobs)

    steps = [*make_comparisons(out, comparisons, seeds), findings_step(out)]
    run.run([*steps, report_step(out, [step.writes for step in steps])])


def main(words=None):
    args = parse_args(words)
    out = Path(args.out)
    if args.dry_run:
        for group, comparisons in args.groups.items():
            variants = merged(comparisons.values())
            steps = make_worlds(out, variants, QUICK_SIZES if args.quick else SIZES)
            runs = make_runs(out, variants, args.seeds, args.quick)
            after = make_comparisons(out, comparisons, args.seeds)
            print(f"# {group}: {hours(runs, variants, args.jobs, args.quick)}")
            before, after = ([step.command for step in own] for own in (steps, after))
            print("\n".join(map(shown, [*before, *runs.values(), *after])))
        return

    try:
        require_writable(out)
        run = Run(out)
        # One seed of all groups comes before a second one of any.
        for n, group in product(range(len(args.seeds)), args.groups):
            run_group(run, args, group, args.seeds[: n + 1])
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except (ValueError, OSError) as error:
        sys.exit(f"demo.ablation: {error}")


if __name__ == "__main__":
    run_main(main, "demo.ablation")
