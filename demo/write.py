"""Writes the files of the demo world: LLaVA JSON with PNG images beside it, and plain text.

python -m demo.write -o out/world             # 6,000 training images, test splits and text
python -m demo.write --sheet sheet.png        # images and their captions, to look at
python -m demo.write --atlas NotoColorEmoji.ttf    # remake assets/atlas.png from the font
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from demo import records
from demo.atlas import make_atlas, read_atlas
from demo.backgrounds import SIDE
from demo.drawing import draw_scene
from demo.questions import full_caption
from demo.records import image_path
from demo.text import dictionary, document, text_record
from demo.words import (
    AVAILABLE,
    DEFAULT,
    LANGUAGES,
    choose_languages,
    parse_shares,
)
from demo.world import BASE_ONLY, HELD_OUT, random_for, random_scene
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import entries, read_json, require_writable, write_json
from vocabulary.png import claim_png, save_png


def make_scenes(seed, num_images):
    """{split: scenes}. No scene of a test split occurs in another split."""
    train = [random_scene(random_for(seed, "train", i)) for i in range(num_images)]
    splits, taken = {"train": train}, {scene.key for scene in train}
    num_tests = 200 if num_images >= 1000 else max(6, num_images // 5)
    for split, name in records.SPLITS.items():
        splits[split], held_out = [], split == "unseen_combinations"
        for i in range(num_tests):
            rng = random_for(seed, name, i)
            base_only = split == "cross_lingual" or i % records.BASE_ONLY_EVERY == 0
            scene = train[0]
            while scene.key in taken:
                scene = random_scene(rng, base_only, held_out)
            taken.add(scene.key)
            splits[split].append(scene)
    return splits


def draw_job(job):
    """Draws one image. Returns {file: lines of JSON} if it is a training image."""
    folder, seed, split, index, scene = job
    name = records.SPLITS.get(split, split)
    image = draw_scene(scene, random_for(seed, "drawn", name, index))
    image.save(folder / image_path(split, index), compress_level=1)
    if split != "train":
        return {}

    if index % records.GREY_EVERY == 0:
        image.convert("L").save(folder / image_path("grey", index), compress_level=1)
    return to_lines(records.train_records(scene, seed, index))


def text_job(job):
    kind, seed, index = job
    return document(kind, random_for(seed, "document", kind, index)) + "\n"


def to_lines(rows_of):
    """{"captions.json": a line of JSON for each row} from {"captions": rows}."""
    return {
        f"{name}.json": [json.dumps(row, ensure_ascii=False) for row in rows]
        for name, rows in rows_of.items()
    }


def subsample(lines, shares):
    """The training lines that are left where a language describes a share of the images alone,
    {"ko": 0.1}. What is not about an image stays.

    Its lines about one image stay or go together; a smaller share keeps a part of a larger one's.
    """
    for language, share in shares.items():
        # The name of the image decides, which the grey image shares.
        pattern, kept = re.compile(rf'([^/"]+[.]png"), "language": "{language}"'), []
        for line in lines:
            match = pattern.search(line)
            if not match or random_for("share", language, match[1]).random() < share:
                kept.append(line)
        lines = kept
    return lines


def evaluation_lines(splits, seed):
    """{file: lines} of the test splits, the captions of unseen images, and the true scenes."""
    rows = {split: records.split_records(split, splits[split], seed) for split in records.SPLITS}
    for split, (source, _) in records.MORE_SPLITS.items():
        rows[split] = records.more_records(split, splits[source], seed)
    rows |= {"unseen_captions": [], "scenes": []}
    # captions as in training, by a seed of their own
    for index, scene in enumerate(splits["unseen_images"]):
        for record in records.train_records(scene, f"{seed} unseen", index)["captions"]:
            record["id"] = f"unseen_images-{index:05}-{record['language']}-caption"
            record["image"] = image_path("unseen_images", index)
            record["skill"] = f"things_{len(scene.things)}"
            rows["unseen_captions"].append(record)

    for split, own in splits.items():
        for index, scene in enumerate(own):
            rows["scenes"].append({"image": image_path(split, index)} | asdict(scene))
    return to_lines(rows)


def start_worker(languages):
    """A process that starts afresh has the default languages. Ctrl-C is for its parent alone: one
    that it ends would leave the parent waiting for its share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    choose_languages(languages)


def training_lines(folder, splits, documents, seed, workers):
    """Draws all images. Returns {file: lines} to train on."""
    drawings = [
        (folder, seed, split, index, scene)
        for split, scenes in splits.items()
        for index, scene in enumerate(scenes)
    ]
    kinds, lines = (*LANGUAGES, *["parallel"] * (len(LANGUAGES) > 1)), defaultdict(list)
    texts = [(kind, seed, i) for kind in kinds for i in range(documents)]

    # imap keeps the order of the jobs, so the number of processes changes nothing.
    with multiprocessing.Pool(workers, start_worker, (list(LANGUAGES),)) as pool:
        bar = partial(tqdm, disable=None, leave=False)
        written = bar(pool.imap(text_job, texts, chunksize=1000), "documents", len(texts))
        for (kind, *_), line in zip(texts, written):
            lines[f"text/{kind}.txt"].append(line)
        drawn = pool.imap(draw_job, drawings, chunksize=50)
        for made in bar(drawn, "images", len(drawings)):
            for file, own in made.items():
                lines[file] += own
    more = [text_record(i, seed) for i in range(len(splits["train"]))]
    lines["instruct.json"] += to_lines({"instruct": more})["instruct.json"]
    return lines


def write_world(out, images=6000, documents=8000, seed=0, workers=2, shares=None):
    """Writes all files under `out`: beside it first, renamed when complete. The number of
    `workers` changes nothing in them, `shares` only the training files."""
    arguments = {"images": images, "documents": documents, "seed": seed}
    arguments |= {"shares": shares} if shares else {}
    arguments |= {"languages": list(LANGUAGES)} if tuple(LANGUAGES) != DEFAULT else {}
    shares = shares or {}
    if entries(out):
        world = out / "world.json"
        made = read_json(world) if world.exists() else None
        if isinstance(made, dict) and made.get("arguments") == arguments:
            print(f"{out} is complete: nothing to do")
            return
        raise ValueError(f"{out} holds something else: remove it, or choose another -o")

    # What an interrupted run left is of no use.
    read_atlas()
    start, folder = time.time(), out.with_name(out.name + ".partial")
    require_writable(out.parent)
    if entries(folder) and not (folder / "images" / "grey").exists():
        raise ValueError(f"{folder} holds something else: remove it, or choose another -o")
    shutil.rmtree(folder, ignore_errors=True)
    splits = make_scenes(seed, images)
    for name in ("images/grey", "text", *(f"images/{split}" for split in splits)):
        (folder / name).mkdir(parents=True)

    # Shares thin out what is trained on, not the test splits.
    lines = training_lines(folder, splits, documents, seed, workers)
    lines = {file: subsample(own, shares) for file, own in lines.items()}
    lines |= evaluation_lines(splits, seed)
    counts = {file: len(own) for file, own in lines.items()}
    lines["text/dictionary.txt"] = [line + "\n" for line in dictionary()]

    # bytes: the same line ends on every system
    for file, own in lines.items():
        text = "".join(own)
        if file.endswith(".json"):
            text = "[\n" + ",\n".join(own) + "\n]\n"
        (folder / file).write_bytes(text.encode())
    counts |= {f"images/{split}": len(scenes) for split, scenes in splits.items()}
    world = {"arguments": arguments, "held_out": HELD_OUT, "base_only": BASE_ONLY, "counts": counts}
    write_json(folder / "world.json", world, 1)
    if entries(out):  # it was empty when this began
        raise ValueError(f"{out} holds something else now; the world is complete in {folder}")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(folder, out)
    files = ", ".join(f"{n:,} {file}" for file, n in counts.items() if file.endswith(".json"))
    print(f"{out}: {files} in {time.time() - start:.0f} s")


def contact_sheet(path, seed=0, columns=6, rows=4):
    """Draws images with their captions in the base language, to look at."""
    claim_png(path, "demo.write")
    font, margin = ImageFont.load_default(11), 16
    width, height = SIDE + margin, SIDE + margin + 66  # below each image, four lines of text
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(columns * rows):
        scene = random_scene(random_for(seed, "sheet", i))
        x, y = margin + i % columns * width, margin + i // columns * height
        sheet.paste(draw_scene(scene, random_for(seed, "sheet drawn", i)), (x, y))

        # One line per clause, as wide as the image.
        text = "\n".join(full_caption(scene, LANGUAGES[0]))
        text = text.replace(" at the ", ", ").replace(" in the ", ", ")
        draw.multiline_text((x, y + SIDE + 4), text, "black", font, spacing=3)
    save_png(sheet, path, "demo.write")


def main():
    parser = Parser(prog="python -m demo.write", description=__doc__)
    add = parser.add_argument
    out_help = "folder to write (python -m demo has out/demo/data)"
    add("-o", "--out", type=flags.text, metavar="FOLDER", help=out_help)
    number = {"type": flags.at_least(1, most=10**7), "metavar": "N"}
    add("--images", **number, default=6000, help="training images")
    add("--documents", **number, default=8000, help="of each kind")
    add("--seed", type=flags.seed, default=0, help="another seed makes another world")
    languages = {"nargs": "+", "choices": AVAILABLE, "metavar": "LANGUAGE"}
    add("--languages", **languages, default=DEFAULT, help="of the world: files of demo/words")
    share_help = "of the training images that a language describes: ko=0.1 for a tenth"
    share = {"nargs": "+", "type": flags.text, "metavar": "LANGUAGE=SHARE"}
    add("--share", **share, default=[], help=share_help)
    workers = flags.at_least(1, most=256)
    count = min(8, os.cpu_count() or 1)
    add("--workers", type=workers, default=count, metavar="N", help=f"processes (here {count})")
    sheet_help = "only draw a sheet of images and captions"
    add("--sheet", type=flags.text, metavar="PNG", help=sheet_help)
    add("--atlas", type=flags.file, metavar="FONT", help="only remake assets/atlas.png")
    args = parser.parse_args()
    choose_languages(args.languages)
    if args.atlas:
        make_atlas(args.atlas)
    elif args.sheet:
        contact_sheet(args.sheet, args.seed)
    elif args.out:
        shares = parse_shares(args.share)
        write_world(Path(args.out), args.images, args.documents, args.seed, args.workers, shares)
    else:
        parser.error("give -o FOLDER, --sheet or --atlas")


if __name__ == "__main__":
    run_main(main, "demo.write")
