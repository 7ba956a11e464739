"""What the runs of the ablation show together: transfer between languages, and fertility.

    python -m demo.findings out/ablation        # -> findings.json, findings.svg

Transfer: kinds that images name in one language alone, asked in each other. A line per language
that names them, a column per language asked; in its own language, on other images. Fertility: the
tokens of a caption in a language, of the same images in all, beside its right answers.
"""

import math
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np

from checkpoint import load_tokenizer
from demo.ablation import make_groups
from demo.records import BASE_ONLY_EVERY
from demo.words import DEFAULT
from evaluation.compare import read_run, welch
from evaluation.scores import accuracy_row
from evaluation.tables import show_results
from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.files import claim_output, read_json, write_atomically

PALETTE = ("#2a6fbb", "#c8553d", "#3a8f5c", "#8a5fb0", "#c99a2e", "#4aa3a8")
SVG_MARK = b"<svg "


def find_runs(out):
    """{name of a variant: folders of its runs, one per seed}."""
    runs = defaultdict(list)
    for path in sorted(out.glob("*/eval.json")):
        runs[path.parent.name.rpartition(".")[0]].append(path.parent)
    return dict(runs)


def world_of(folder):
    """(folder of a run's world, its languages)."""
    inputs = read_json(folder / "steps.json")["steps"]["instruct"]["inputs"]
    world = next(Path(path) for path in inputs if path.endswith("world.json"))
    return world.parent, read_json(world)["arguments"].get("languages", list(DEFAULT))


def make_rows(questions, full, indices, **labels):
    """A row of some questions: accuracy over the seeds full (S, Q), its interval over images."""
    own = [questions[i] for i in indices]
    row = accuracy_row(own, full[:, indices].mean(0), **labels)
    return row | {"seeds": full[:, indices].mean(1).tolist()}


def shows_base_only(image):
    """Whether an image of a test split shows a base-only kind."""
    return int(Path(image).stem) % BASE_ONLY_EVERY == 0


# ---- transfer


def is_named_here(question, skills):
    """Whether a question of unseen_images is about an image of a base-only kind, and one that
    cross_lingual asks, too."""
    if question.split != "unseen_images" or question.skill not in skills or not question.image:
        return False
    return shows_base_only(question.image)


def transfer_rows(runs):
    """Rows of a table: the accuracy on base-only kinds, by the language that names them in images
    and the language asked. runs: {name: folders}, of worlds with the same languages."""
    rows = []
    for folders in runs.values():
        source, *others = world_of(folders[0])[1]
        questions, full, _ = read_run([folder / "eval.json" for folder in folders], None, None)
        asked = [i for i, q in enumerate(questions) if q.split == "cross_lingual"]
        skills = {questions[i].skill for i in asked}
        model = f"{source} names them"
        cells = {name: [i for i in asked if questions[i].language == name] for name in others}
        cells[source] = [i for i, q in enumerate(questions) if is_named_here(q, skills)]
        for language in [*sorted(cells), "all others"]:
            indices = cells.get(language, asked)
            labels = {"split": "transfer", "model": model, "language": language}
            rows.append(make_rows(questions, full, indices, **labels, source=source))
    return rows


def effect_size(a, b):
    """Cohen's h of two shares: 0.2 is small, 0.5 medium, 0.8 large."""
    return 2 * math.asin(math.sqrt(a)) - 2 * math.asin(math.sqrt(b))


def difference(a, b):
    """(difference, low, high) of two rows. The questions are others, so that the variances over
    images add up."""
    z = NormalDist().inv_cdf(0.975)
    variance = sum(((row["high"] - row["low"]) / 2 / z) ** 2 for row in (a, b))
    value = a["accuracy"] - b["accuracy"]
    return value, value - z * math.sqrt(variance), value + z * math.sqrt(variance)


def transfer_sentences(rows):
    """Who helps whom: for each language asked, the one that helps most against the least."""
    parts = []
    for language in sorted({row["source"] for row in rows}):
        found = [r for r in rows if r["language"] == language and r["source"] != language]
        if len(found) < 2:
            continue
        found.sort(key=lambda row: row["accuracy"])
        worst, best = found[0], found[-1]
        value, low, high = (100 * each for each in difference(best, worst))
        text = f"{language} {best['source']} against {worst['source']} {value:+.1f} "
        text += f"({low:+.1f} to {high:+.1f} over images"
        if min(len(best["seeds"]), len(worst["seeds"])) > 1:
            _, low, high = (100 * each for each in welch(best["seeds"], worst["seeds"]))
            text += f", {low:+.1f} to {high:+.1f} over seeds"
        effect = effect_size(best["accuracy"], worst["accuracy"])
        parts.append(f"{text}, h {effect:.2f})")
    start = "Asked in each language, from which language kinds come across best and worst (the "
    start += "extremes of several, so a difference without a cause is likely): "
    return [start + "; ".join(parts)] if parts else []


# ---- fertility


def tokens_per_caption(folder):
    """{language: mean tokens of a caption}, of the same images in every world: those that have
    captions in all languages."""
    world, languages = world_of(folder)
    captions = defaultdict(dict)
    for record in read_json(world / "unseen_captions.json"):
        if not shows_base_only(record["image"]):
            captions[record["image"]][record["language"]] = record["conversations"][1]["value"]
    shared = [own for own in captions.values() if len(own) == len(languages)]
    tokenizer = load_tokenizer(folder / "instruct")
    return {
        language: fmean(len(tokenizer.encode(own[language])) for own in shared)
        for language in languages
    }


def fertility_rows(runs):
    """Rows of tables, one per language: each run's tokens per caption and right answers."""
    rows = []
    for name, folders in runs.items():
        tokens = tokens_per_caption(folders[0])
        questions, full, _ = read_run([folder / "eval.json" for folder in folders], None, None)
        for language, number in tokens.items():
            indices = [
                i
                for i, q in enumerate(questions)
                if (q.split, q.language) == ("unseen_images", language)
            ]
            if indices:
                labels = {"split": f"fertility, {language}", "language": language}
                labels |= {"model": f"{name}: {number:.1f} tokens per caption"}
                row = make_rows(questions, full, indices, **labels)
                rows.append(row | {"tokens": number})
    return sorted(rows, key=lambda row: (row["language"], row["tokens"]))


def rank_correlation(x, y):
    """Spearman's: of ranks, ties in the middle. None where one does not vary."""
    ranks = [[fmean(np.flatnonzero(np.sort(own) == value)) for value in own] for own in (x, y)]
    if min(len(set(own)) for own in ranks) < 2:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def fertility_sentences(rows):
    """The rank correlation over all runs and languages, and within each language."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["language"]].append(row)
    parts = []
    for name, own in [("all", rows), *groups.items()]:
        tokens, right = ([row[key] for row in own] for key in ("tokens", "accuracy"))
        if len(own) > 2 and (value := rank_correlation(tokens, right)) is not None:
            parts.append(f"{name} {value:+.2f} (n {len(own)})")
    start = "More tokens per caption against right answers on unseen images, rank correlation "
    start += "(runs share images, so n is no sample size): "
    return [start + ", ".join(parts)] if parts else []


def draw(rows, size=(640, 420), margin=50):
    """An SVG figure: right answers, with intervals, against tokens per caption."""
    (width, height), parts = size, []
    largest = 1.08 * max(row["tokens"] for row in rows)
    languages = sorted({row["language"] for row in rows})

    def place(tokens, share):
        """Where a point is, in pixels."""
        x = margin + tokens / largest * (width - 2 * margin)
        return round(x, 1), round(height - margin - share * (height - 2 * margin), 1)

    for percent in range(0, 101, 20):
        x, y = place(0, percent / 100)
        parts.append(f'<path d="M{x} {y}H{width - margin}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{percent}</text>')
    for tokens in range(0, int(largest) + 1, max(1, round(largest / 6))):
        x, y = place(tokens, 0)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{tokens}</text>')
    for row in rows:
        colour = PALETTE[languages.index(row["language"]) % len(PALETTE)]
        x, y = place(row["tokens"], row["accuracy"])
        low, high = (place(0, row[key])[1] for key in ("low", "high"))
        parts.append(f'<path d="M{x} {low}V{high}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
    for n, language in enumerate(languages):
        colour, x = PALETTE[n % len(PALETTE)], margin + 60 * n
        parts.append(f'<circle cx="{x}" cy="22" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8}" y="26">{language}</text>')
    label = "right answers on unseen images (%), against tokens per caption"
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{label}</text>')
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    return start + 'font-family="sans-serif" font-size="12">' + "\n".join(parts) + "</svg>\n"


def main(words=None):
    parser = Parser(prog="python -m demo.findings", description=__doc__)
    parser.add_argument("folder", type=flags.folder, metavar="FOLDER", help="of the ablation")
    out = Path(parser.parse_args(words).folder)
    runs = find_runs(out)
    if not runs:
        raise ValueError(f"{out}: no run has an eval.json; run python -m demo.ablation")
    names = make_groups(DEFAULT[1])["transfer"]["transfer"]
    transfer = transfer_rows({name: runs[name] for name in names if name in runs})
    fertility = fertility_rows(runs)
    sentences = transfer_sentences(transfer) + fertility_sentences(fertility)

    figure = out / "findings.svg"
    claim_output(figure, lambda path: path.read_bytes().startswith(SVG_MARK))
    write_atomically(figure, lambda file: file.write(draw(fertility).encode()))
    results = {"models": transfer + fertility, "conclusions": sentences}
    show_results(results, out / "findings.json")
    print(figure)


if __name__ == "__main__":
    run_main(main, "demo.findings")
