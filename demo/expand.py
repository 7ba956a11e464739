"""Is a longer vocabulary worth it on published weights? The paper's first claim, on your own text.

    python -m demo.expand --llm SmolLM2-135M --vision siglip2-base-patch16-224 \\
        --text ko.txt --unseen ko-unseen.txt en-unseen.txt --steps 1000

Three models of one base train on the same text: `base` with its own vocabulary; `mean` and `random`
with more pieces, whose embeddings start at the mean of the pieces that spelled them, or at random.
They take equally many steps of equally many FLOPs. With more pieces a document has fewer tokens, so
a step has more documents.

Bits per byte on unseen text can be compared between vocabularies. The base language's show what was
forgotten. A file's name is its language. A stopped run goes on with the same command.
"""

import json
from pathlib import Path

import torch

from checkpoint import load_config, load_tokenizer
from demo.steps import Run, Step, run_command, short_path
from model import XLlava
from training.cost import flops_per_unit
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import read_json, read_lines, require_writable

MODELS = {"base": [], "mean": ["--init", "mean"], "random": ["--init", "random"]}
SAMPLED = 500  # documents whose tokens are counted


def start_steps(args, out):
    """The longer vocabulary, and the three models before they train."""
    longer = out / "vocabulary" / "tokenizer.json"
    extend = ["tokenizer.py", "extend", args.llm, *args.text, "--pieces", str(args.pieces)]
    files = [Path(path) for path in args.text]
    steps = [Step("extend", [*extend, "-o", str(longer.parent)], files, longer, 30)]
    for name, init in MODELS.items():
        folder = out / f"{name}.start"
        build = ["-m", "checkpoint", "build", "--llm", args.llm, "--vision", args.vision]
        build += ["--tokenizer", str(longer.parent), *init] if init else []
        build += ["--seed", str(args.seed), "-o", str(folder)]
        steps.append(Step(f"build {name}", build, [], folder / "config.json", 5))
    return steps


def train_steps(args, out):
    """Measure, train and measure each model; the start models are there."""
    texts = [Path(path) for path in args.text]
    base_flops, steps = document_flops(out / "base.start", args.text), []
    for name in MODELS:
        start, model = out / f"{name}.start", out / name
        # Two micro-batches a step.
        flops = base_flops if name == "base" else document_flops(start, args.text)
        micro_batch = max(1, round(args.batch_size / 2 * base_flops / flops))
        train = ["train.py", "text", "--model", str(start), "--data", *args.text]
        train += ["--steps", str(args.steps), "--batch-size", str(2 * micro_batch)]
        train += ["--micro-batch-size", str(micro_batch), "--lr", str(args.lr)]
        train += ["--precision", args.precision, "--seed", str(args.seed), "--save-every", "25"]
        train += ["--keep-checkpoints", "1", "--resume", "-o", str(model)]
        steps += [
            measure_step(args, start),
            Step(f"text {name}", train, texts, model / "config.json", 20 * args.steps, trains=True),
            measure_step(args, model),
        ]
    return steps


def measure_step(args, model):
    result = model.with_name(f"{model.name}.json")
    command = ["-m", "evaluation", "likelihood", "--model", str(model), "--text", *args.unseen]
    command += ["--precision", args.precision, "--batch-size", "16", "--fresh", "-o", str(result)]
    reads = [model / "config.json", *map(Path, args.unseen)]
    return Step(f"measure {model.name}", command, reads, result, 60, again=True)


def document_flops(model, paths):
    """FLOPs of training on a document, the mean over some that are evenly spread."""
    tokenizer, lines = load_tokenizer(model), [line for line in read_lines(paths) if line.strip()]
    with torch.device("meta"):
        flops = flops_per_unit(XLlava(load_config(model)))
    lines = lines[:: max(1, len(lines) // SAMPLED)]
    lengths = [len(tokenizer.encode(line)) + 2 for line in lines]
    total = sum(
        flops.token * n + flops.target * (n - 1) + flops.attention_pair * n * n for n in lengths
    )
    return total / len(lines)


def print_table(args, out):
    """Bits per byte of each model and text, before and after, with 95% intervals by document."""
    languages = [Path(path).stem for path in args.unseen]
    print("| model | tokens |" + "".join(f" {name}: before | after |" for name in languages))
    for name in MODELS:
        log = (out / name / "log.jsonl").read_text(encoding="utf-8")
        tokens = sum(row["tokens"] for row in map(json.loads, log.splitlines()))
        cells = [name, f"{tokens:,}"]
        for language in languages:
            for stage in (f"{name}.start", name):
                rows = read_json(out / f"{stage}.json")["likelihood"]
                cells += [show_bits(row) for row in rows if is_bits(row, language)]
        print(f"| {' | '.join(cells)} |")


def is_bits(row, language):
    wanted = {"metric": "bits per byte", "model": "full", "split": language}
    return wanted.items() <= row.items()


def show_bits(row):
    return f"{row['value']:.3f} ({row['low']:.3f} – {row['high']:.3f})"


def main(words=None, runner=run_command):
    """The command line; `runner` runs a command and returns its exit status."""
    parser = Parser(prog="python -m demo.expand", description=__doc__)
    add, some = parser.add_argument, {"nargs": "+", "type": flags.file, "metavar": "FILE"}
    folder = {"type": flags.folder, "metavar": "FOLDER"}
    add("--llm", **folder, required=True, help="the base's, with a byte-level vocabulary")
    add("--vision", **folder, required=True, help="CLIP's or SigLIP's: not used, but saved along")
    add("--text", **some, required=True, help="of the new language, a document a line")
    add("--unseen", **some, required=True, help="to measure on; nothing of it is in --text")
    add("--pieces", type=flags.count, default=8000, help="to append")
    add("--steps", type=flags.count, default=100, help="of training")
    add("--batch-size", type=flags.at_least(2), default=16, help="documents a step of the base")
    add("--lr", type=flags.at_least(1e-12, float), default=5e-4, help="peak learning rate")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as in train.py")
    add("--seed", type=flags.seed, default=0, help="of training and of random embeddings")
    add("--out", type=flags.text, default="out/expand", metavar="FOLDER", help="of the run")
    args = parser.parse_args(words)

    out = short_path(args.out)
    require_writable(out)
    run = Run(out)
    run.run(start_steps(args, out), runner)
    run.run(train_steps(args, out), runner)
    print_table(args, out)


if __name__ == "__main__":
    run_main(main, "demo.expand")
