"""The command line of this package: python -m checkpoint show|build."""

import json
import math
import re
from dataclasses import asdict

import checkpoint
from checkpoint.build import WRITTEN_DTYPES, build, plan_build, write_dry_run
from checkpoint.names import tensor_specs
from checkpoint.safetensors import (
    DTYPE_NAMES,
    is_dry_run,
    load_weights,
    num_bytes,
    plan_shards,
)
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import entries, require_writable


def print_tensors(specs):
    """A line per tensor of {name: (dtype, shape)}, one for the same in all layers, and the sum."""
    groups = {}  # (name, dtype, shape) -> how many layers have it
    # Layers are alike: a line stands for all of them.
    for name, (dtype, shape) in specs.items():
        key = (re.sub(r"\.layers\.\d+\.", ".layers.*.", name), dtype, tuple(shape))
        groups[key] = groups.get(key, 0) + 1

    for (name, dtype, shape), layers in groups.items():
        kind, size = f"{list(shape)!s:19} {DTYPE_NAMES[dtype]:4}", layers * num_bytes(dtype, shape)
        print(f"{name:76} {layers:3} × {kind} {size:16,} bytes")

    total = sum(math.prod(shape) for _, shape in specs.values())
    total_bytes = sum(num_bytes(*spec) for spec in specs.values())
    print(f"{len(specs):,} tensors, {total:,} parameters, {total_bytes:,} bytes")


def print_plan(plan):
    """What `build` will write, and what comes from where."""
    specs = tensor_specs(plan.config, plan.dtype)
    print_tensors(specs)

    # Memory: one tensor at a time, and a new projector in float32.
    peak, note = max(num_bytes(*spec) for spec in specs.values()), "the largest tensor"
    if "projector" not in plan.sources:
        shapes = [shape for name, (_, shape) in specs.items() if "projector" in name]
        peak += 4 * sum(map(math.prod, shapes))
        note += ", a fresh projector in float32"
    print(
        f"{len(plan_shards(specs))} file(s) · memory for tensors at most {peak / 1e9:.3f} GB "
        f"beyond the mapped files ({note}); some 0.5 GB for the tokenizers"
    )
    for part in ("decoder", "projector", "vision"):
        print(f"{part}: {plan.sources.get(part, 'fresh')}")
    print(
        f"vocabulary: {plan.published.text.vocab_size:,} rows → {plan.config.text.vocab_size:,} "
        f"for {plan.tokenizer.vocab_size:,} pieces; images: {plan.config.image_aspect_ratio}; "
        f"{str(plan.dtype).removeprefix('torch.')}"
    )


def make_parser():
    parser = Parser(prog="python -m checkpoint", description=checkpoint.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="config and tensors of a model folder")
    show.add_argument("folder", type=flags.folder, help="a model's")

    make = commands.add_parser("build", help="a model folder from published parts")
    add = make.add_argument
    folder = {"type": flags.path, "metavar": "FOLDER"}
    add("--llm", required=True, **folder, help="Llama's or Qwen's, or LLaVA's in either layout")
    add("--vision", **folder, help="CLIP's or SigLIP's, if --llm has no vision encoder")
    layer = "hidden state of --vision for the projector (default: -2)"
    add("--layer", type=flags.at_least(-1000, most=1000), metavar="N", help=layer)
    projector = "a file with one, as LLaVA has after its first stage (default: random)"
    add("--projector", type=flags.path, metavar="FILE", help=projector)
    tokenizer = "one that begins with the pieces of --llm (default: --llm's)"
    add("--tokenizer", type=flags.path, metavar="FILE", help=tokenizer)
    how = "rows of new pieces: the mean of the old pieces that spelled them (default), or random"
    add("--init", choices=["mean", "random"], default="mean", help=how)
    add("--dtype", choices=WRITTEN_DTYPES, help="of the weights to write (default: --llm's)")
    add("--seed", type=flags.seed, default=0, help="of random weights")
    rows = "of --llm's embeddings: rows without a piece, if many"
    add("--padding-rows", type=flags.count, metavar="N", help=rows)
    add("--dry-run", action="store_true", help="write it without weights, for train.py --estimate")
    add("-o", "--out", type=flags.text, required=True, help="the folder to write")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.command == "build":
        parts = (args.llm, args.vision, args.projector, args.tokenizer)
        plan = plan_build(*parts, args.dtype, args.padding_rows, args.layer)
        # What a dry run wrote may be replaced.
        if entries(args.out) and not is_dry_run(args.out):
            raise ValueError(f"{args.out}: there is something already; give another -o")
        require_writable(args.out)
        print_plan(plan)
        if args.dry_run:
            write_dry_run(plan, args.out)
        else:
            build(plan, args.out, args.init, args.seed)
        return
    print(json.dumps(asdict(checkpoint.load_config(args.folder)), indent=2))
    tensors = load_weights(args.folder)
    print_tensors({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})


if __name__ == "__main__":
    run_main(main, "checkpoint")
