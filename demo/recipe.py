"""The recipe of the demo: which commands make it, in which order.

Each stage starts from the model that the stage before it left. `train.py instruct` runs four
times, from few kinds of question to all (docs/experiments.md).
"""

import sys
from pathlib import Path
from typing import NamedTuple

from demo.records import MORE_SPLITS
from demo.steps import Step
from demo.words import DEFAULT, LANGUAGES, WORDS, parse_shares
from vocabulary.files import read_json


class Stage(NamedTuple):
    """One run of train.py."""

    flags: str
    steps: int
    quick_steps: int  # with --quick
    seconds: int  # about how long the steps take on two cores, with bfloat16


STAGES = {
    "vision": Stage("--lr 1e-3 --muon-lr 0.01 --batch-size 32", 4000, 760, 115),
    "text": Stage("--lr 1e-3 --muon-lr 0.005 --batch-size 32", 300, 80, 25),
    "align": Stage("--lr 2e-3 --batch-size 32", 60, 20, 6),
    # First to look up, then to compare: each is learnt sooner when little else is asked. The rate
    # falls late, because some seeds begin to learn late.
    "instruct-1": Stage(
        "--lr 1e-3 --muon-lr 0.005 --decay-ratio 0.3 --batch-size 32 --records-per-sample 4",
        1000,
        270,
        88,
    ),
    "instruct-2": Stage(
        "--lr 1e-3 --muon-lr 0.005 --decay-ratio 0.4 --batch-size 16 --records-per-sample 8",
        450,
        100,
        45,
    ),
    "instruct-3": Stage(
        "--lr 1e-3 --muon-lr 0.005 --decay-ratio 0.4 --batch-size 16 --records-per-sample 8",
        300,
        20,
        26,
    ),
    "instruct": Stage(
        "--lr 6e-4 --muon-lr 0.003 --decay-ratio 0.6 --batch-size 16 --records-per-sample 8",
        2600,
        220,
        265,
    ),
}
# Training images, and documents of each kind of text
SIZES = ("--images", "6000")
QUICK_SIZES = ("--images", "1500", "--documents", "4000")
OPTIONAL = (*list(STAGES)[:-1], "report")
TEST_SPLITS = ("unseen_images", "unseen_combinations", "cross_lingual")
# Further questions about the same images, and their captions.
FURTHER_SPLITS = [name for name, (source, _) in MORE_SPLITS.items() if source in TEST_SPLITS]
FURTHER_SPLITS = (*FURTHER_SPLITS, "unseen_captions")


def make_steps(args):
    """The steps of a run; `python -m demo --help` explains the arguments.

    Raises ValueError if --data holds a world with other shares.
    """
    # A folder that --data names is used as it is, if there is a world in it.
    steps, world = [], args.data / "world.json"
    if args.is_own_world or not world.exists():
        sizes = QUICK_SIZES if args.quick else SIZES
        steps.append(world_step("world", args.data, args.seed, args.share, sizes))
    else:
        arguments = read_json(world).get("arguments", {})
        if args.share and arguments.get("shares") != parse_shares(args.share):
            raise ValueError(f"{args.data} was not written with --share {' '.join(args.share)}")
        languages = arguments.get("languages", list(DEFAULT))
        if languages != LANGUAGES:
            raise ValueError(
                f"{args.data} is of other languages: --languages {' '.join(languages)}"
            )

    # The first stage starts from new weights, each other one from the stage before it.
    steps += tokenizer_steps(args)
    tokenizer = steps[-1].writes
    start, model_files = ["--preset", "tiny", "--tokenizer", str(tokenizer)], [tokenizer]
    for name in STAGES:
        if name not in args.without:
            steps.append(stage_step(name, args, start, model_files))
            model = args.out / name
            start = ["--model", str(model)]
            model_files = [model / "config.json", model / "model.safetensors"]

    # Measuring is quick, so it is made again where something has changed.
    names = TEST_SPLITS[:1] if args.quick else TEST_SPLITS + find_further_splits(args.data)
    names = [name for name in names if name != "cross_lingual" or len(LANGUAGES) > 1]
    splits, result = [args.data / f"{name}.json" for name in names], args.out / "eval.json"
    splits = list(map(Path, args.test or splits))
    command = ["-m", "evaluation", "answer", *start, "--data", *map(str, splits), "--fresh"]
    command += ["--blind", "other-image", "-o", str(result)]
    steps.append(Step("evaluate", command, model_files + splits, result, 28, again=True))
    if "report" not in args.without:
        steps.append(report_step(args.out, [result]))
    return steps


def find_further_splits(folder):
    """The further splits of a world. One that an earlier version wrote lacks some: it says so."""
    missing = [name for name in FURTHER_SPLITS if not (folder / f"{name}.json").exists()]
    if not missing or not (folder / "world.json").exists():
        return FURTHER_SPLITS
    print(f"{folder}: an older world, not measured: {', '.join(missing)}", file=sys.stderr)
    return tuple(name for name in FURTHER_SPLITS if name not in missing)


def world_step(name, folder, seed=0, share=(), sizes=SIZES, languages=None):
    languages = tuple(languages or LANGUAGES)
    command = ["-m", "demo.write", "-o", str(folder), *sizes, "--seed", str(seed)]
    command += ["--languages", *languages] if languages != DEFAULT else []
    command += ["--share", *share] if share else []
    return Step(name, command, [], folder / "world.json", int(sizes[1]) // 200)


def report_step(out, results):
    command = ["-m", "evaluation", "report", str(out)]
    return Step("report", command, results, out / "report.html", 5, again=True)


def tokenizer_steps(args):
    """A tokenizer for each language, then one with the pieces of all."""
    steps = []
    for language in args.vocabulary:
        words, text = WORDS[language], args.data / f"text/{language}.txt"
        model = args.out / f"{language}.model"
        command = ["tokenizer.py", "train", str(text), "--vocab-size", str(words["vocab_size"])]
        command += [*words["tokenizer_flags"], "-o", str(model)]
        steps.append(Step(f"tokenizer {language}", command, [text], model))

    models, merged = [step.writes for step in steps], args.out / "tokenizer.model"
    command = ["tokenizer.py", "merge", *map(str, models), "-o", str(merged)]
    reads = list(models)
    if any(shares_letters(language) for language in args.vocabulary if language != LANGUAGES[0]):
        # Pieces in the letters of the base language may change what becomes of its own text.
        reads.append(args.data / f"text/{LANGUAGES[0]}.txt")
        command += ["--compare", str(reads[-1])]
    return [*steps, Step("tokenizer merged", command, reads, merged, 1)]


def shares_letters(language):
    """Whether a language is written in letters of the base language."""
    own, base = (set("".join(WORDS[name]["kind"].values())) for name in (language, LANGUAGES[0]))
    return bool(own & base - {" "})


def stage_step(name, args, start, model_files):
    stage, file = name.split("-")[0], {"vision": "phrases", "align": "captions"}.get(name, name)
    files, more = [args.data / f"{file}.json"], []
    if stage == "text":
        files = [args.data / f"text/{text}.txt" for text in args.texts]
    command = ["train.py", stage, *start, "--data", *map(str, files)]
    if args.processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone"]
        command = [*launch, f"--nproc_per_node={args.processes}", *command]

    # what only some stages take
    if stage == "vision" and args.dictionary:
        more = [args.data / "text/dictionary.txt"]
        command += ["--dictionary", str(more[0])]
    if stage == "instruct":
        command += ["--trainable", *args.trainable]
    model, (flags, steps, quick_steps, seconds) = args.out / name, STAGES[name]
    if args.quick:
        steps, seconds = quick_steps, seconds * quick_steps / steps
    steps, seconds = max(1, round(steps * args.length)), seconds * args.length
    command += [*flags.split(), "--steps", str(steps), "--seed", str(args.seed), "--resume"]
    # Images are decoded once for all stages.
    command += ["--cache", str(args.out / "cache"), "-o", str(model)]
    reads = [*model_files, args.data / "world.json", *files, *more]
    return Step(name, command, reads, model / "config.json", seconds, trains=True)


def example(args):
    """(command, right answer): a question on an unseen image, not in the base language."""
    records = read_json(args.data / "unseen_images.json")
    # in the base language if there is no other
    record = min(records, key=lambda record: record["language"] == LANGUAGES[0])
    question, answer = (turn["value"] for turn in record["conversations"][:2])
    model, image = args.out / "instruct", args.data / record["image"]
    command = ["generate.py", "--model", str(model), "--image", str(image)]
    return [*command, question.removeprefix("<image>\n")], answer
