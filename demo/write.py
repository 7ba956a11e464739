"""Writes the files of the demo world: LLaVA JSON with PNG images beside it, and plain text.

Pipeline: world -> words -> drawing, questions, text -> records -> **write**. The rest of the
project reads these files as it reads any data.

    python -m demo.write -o out/demo/data       # 8,000 training images, test splits and text
    python -m demo.write --sheet sheet.png      # a contact sheet: images and their captions
    python -m demo.write --atlas NotoColorEmoji.ttf    # remake assets/atlas.png from the font
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict
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
from demo.words import BASE, LANGUAGES, WORDS, parse_shares
from demo.world import BASE_ONLY, HELD_OUT, random_for, random_scene

CHUNK = 1000  # lines of text that a process makes at a time


def make_scenes(seed, num_images):
    """{split: scenes}. No scene of a test split occurs in another split."""
    train = [random_scene(random_for(seed, "train", i)) for i in range(num_images)]
    splits, taken = {"train": train}, {scene.key for scene in train}
    for split, name in records.SPLITS.items():
        splits[split] = []
        for i in range(200 if num_images >= 1000 else max(6, num_images // 5)):
            rng = random_for(seed, name, i)
            base_only = split == "cross_lingual" or i % records.BASE_ONLY_EVERY == 0
            scene = None
            while scene is None or scene.key in taken:
                scene = random_scene(rng, base_only, held_out=split == "unseen_combinations")
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
    made = records.train_records(scene, seed, index)
    return {file: to_lines(rows) for file, rows in made.items()}


def text_job(job):
    """Some documents of one kind, one a line."""
    kind, seed, numbers = job
    return [document(kind, random_for(seed, "document", kind, i)) + "\n" for i in numbers]


def to_lines(rows):
    """One line of JSON for each row."""
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def write_text(path, text):
    """Writes UTF-8 with the same line ends on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def subsample(lines, shares):
    """The training lines that are left where a language has a share of the data, {"ko": 0.1}.

    All lines in that language about one image stay or go together. The draw is always the same:
    a smaller share keeps a part of what a larger one keeps.
    """
    for language, share in shares.items():
        script, kept = re.compile(f"[{WORDS[language]['script']}]"), []
        for line in lines:
            # The name of the image decides, which the grey image shares; else the line itself.
            image = re.search(r'[^/"]+[.]png"', line)
            rng = random_for("share", language, image[0] if image else line)
            if not script.search(line) or rng.random() < share:
                kept.append(line)
        lines = kept
    return lines


def evaluation_lines(splits, seed):
    """{file: lines} of the test splits, the captions of unseen images, and the true scenes."""
    captions, scenes = [], []
    # captions as in training, by a seed of their own
    for index, scene in enumerate(splits["unseen_images"]):
        for record in records.train_records(scene, f"{seed} unseen", index)["captions"]:
            record["id"] = f"unseen_images-{index:05}-{record['language']}-caption"
            record["image"] = image_path("unseen_images", index)
            captions.append(record)

    for split, own in splits.items():
        scenes += [{"image": image_path(split, i)} | asdict(scene) for i, scene in enumerate(own)]
    made = {split: records.split_records(split, splits[split], seed) for split in records.SPLITS}
    made |= {"unseen_captions": captions, "scenes": scenes}
    return {file: to_lines(rows) for file, rows in made.items()}


def is_complete(out, arguments):
    """Whether the folder holds this world. Raises ValueError if it holds anything else."""
    if (out / "world.json").exists():
        world = json.loads((out / "world.json").read_text(encoding="utf-8"))
        if world["arguments"] == arguments:
            return True
        raise ValueError(f"{out} is a world of other arguments: remove it, or choose another -o")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and not a demo world: choose another -o")
    return False


def make_lines(folder, splits, images, documents, seed, workers):
    """Draws all images, and returns ({file: lines of JSON} to train on, {kind: lines of text})."""
    drawings = [
        (folder, seed, split, index, scene)
        for split, scenes in splits.items()
        for index, scene in enumerate(scenes)
    ]
    lines = {file: [] for file in records.TRAINING_FILES}
    texts = {kind: [] for kind in (*LANGUAGES, "parallel")}
    chunks = [range(i, min(i + CHUNK, documents)) for i in range(0, documents, CHUNK)]
    jobs = [(kind, seed, numbers) for kind in texts for numbers in chunks]

    # imap keeps the order of the jobs, so the number of processes changes nothing.
    with multiprocessing.Pool(workers) as pool:
        drawn = pool.imap(draw_job, drawings, chunksize=50)
        for made in tqdm(drawn, "images", len(drawings), disable=None, leave=False):
            for file, own in made.items():
                lines[file] += own
        for (kind, *_), own in zip(jobs, pool.imap(text_job, jobs)):
            texts[kind] += own
    lines["instruct"] += to_lines(text_record(i, seed) for i in range(images))
    return lines, texts


def write_world(out, images=8000, documents=20000, seed=0, workers=2, shares=None):
    """Writes all files under `out`: beside it first, renamed when complete.

    The number of `workers` changes nothing in them, `shares` only the training files.
    """
    arguments = {"images": images, "documents": documents, "seed": seed}
    shares = shares or {}
    if shares:
        arguments["shares"] = shares
    if is_complete(out, arguments):
        print(f"{out} is complete: nothing to do")
        return

    # What an interrupted run left is of no use.
    read_atlas()
    start, folder = time.time(), out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    splits = make_scenes(seed, images)
    for name in ("text", "images/grey", *(f"images/{split}" for split in splits)):
        (folder / name).mkdir(parents=True)
    lines, texts = make_lines(folder, splits, images, documents, seed, workers)

    # Shares thin out what is trained on, not the test splits.
    counts = {}
    for kind, own in texts.items():
        own = subsample(own, shares)
        write_text(folder / f"text/{kind}.txt", "".join(own))
        counts[f"text/{kind}.txt"] = len(own)
    write_text(folder / "text/dictionary.txt", "\n".join([*dictionary(shares), ""]))
    lines = {file: subsample(own, shares) for file, own in lines.items()}
    for file, own in (lines | evaluation_lines(splits, seed)).items():
        write_text(folder / f"{file}.json", "[\n" + ",\n".join(own) + "\n]\n")
        counts[f"{file}.json"] = len(own)
    counts |= {f"images/{split}": len(scenes) for split, scenes in splits.items()}

    world = {"arguments": arguments, "held_out": HELD_OUT, "base_only": BASE_ONLY, "counts": counts}
    write_text(folder / "world.json", json.dumps(world, indent=1) + "\n")
    if out.exists():
        out.rmdir()
    os.replace(folder, out)
    files = ", ".join(f"{n:,} {file}" for file, n in counts.items() if file.endswith(".json"))
    print(f"{out}: {files} in {time.time() - start:.0f} s")


def contact_sheet(path, seed=0, columns=6, rows=4):
    """Draws images with their captions in the base language, to look at."""
    font, margin = ImageFont.load_default(11), 16
    width, height = SIDE + margin, SIDE + margin + 66  # below each image, four lines of text
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(columns * rows):
        scene = random_scene(random_for(seed, "sheet", i))
        x, y = margin + i % columns * width, margin + i // columns * height
        sheet.paste(draw_scene(scene, random_for(seed, "sheet drawn", i)), (x, y))

        text = "\n".join(full_caption(scene, BASE, random.Random(i)))
        for long, short in WORDS[BASE]["abbreviate"].items():
            text = text.replace(long, short)
        draw.multiline_text((x, y + SIDE + 4), text, "black", font, spacing=3)
    sheet.save(path)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.write",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("out/demo/data"), help="folder to write")
    add("--images", type=int, default=8000, help="training images (default: 8000)")
    add("--documents", type=int, default=20000, help="texts of each kind (default: 20000)")
    add("--seed", type=int, default=0, help="another seed makes another world (default: 0)")
    share_help = "share of a language in the training data: ko=0.1 for a tenth, zh=0 for none"
    add("--share", nargs="+", default=[], metavar="LANGUAGE=SHARE", help=share_help)
    add("--workers", type=int, default=2, help="processes; the files do not depend on it")
    add("--sheet", type=Path, metavar="PNG", help="only draw a contact sheet")
    add("--atlas", type=Path, metavar="FONT", help="only remake assets/atlas.png from this font")
    args = parser.parse_args()
    try:
        if args.atlas:
            return make_atlas(args.atlas)
        read_atlas()
        if args.sheet:
            return contact_sheet(args.sheet, args.seed)
        for name in ("images", "documents", "workers"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}: at least 1 is needed")
        shares = parse_shares(args.share)
        write_world(args.out, args.images, args.documents, args.seed, args.workers, shares)
    except (ValueError, OSError) as error:
        sys.exit(f"demo.write: {error}")


if __name__ == "__main__":
    main()
