"""The page: the files of a run, and the sections in their order."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

from checkpoint import load_config
from evaluation.answer import read_answers
from evaluation.probe import probe_tables
from evaluation.report.attention import attention_gallery
from evaluation.report.curves import read_log, stage_card
from evaluation.report.gallery import div, gallery
from evaluation.report.limits import caption_table, few_answers, weakest_gallery
from evaluation.report.matrix import retrieval_matrix
from evaluation.tables import (
    MODELS,
    Table,
    escape,
    language_name,
    plain_name,
    result_tables,
    row_number,
)
from model import parameter_counts
from vocabulary.files import read_json

NUM_WEAKEST = 6  # skills of which a wrong answer is shown
STAGES = ("vision", "text", "align", "instruct-1", "instruct-2", "instruct-3", "instruct")


def run_files(folder, name):
    """Those in the folder and in the folders inside it."""
    return [*folder.glob(name), *sorted(folder.glob(f"*/{name}"))]


def stage_folders(folders):
    """The folders with a log.jsonl: those given, or those inside them, in the order of stages."""
    found = []
    for folder in folders:
        logs = [*folder.glob("log.jsonl")] or run_files(folder, "log.jsonl")
        found += [log.parent for log in logs]
    return sorted(found, key=lambda folder: [*STAGES, folder.name].index(folder.name))


def read_results(folder, eval_file):
    """{path: results} of `answer`, then of the other commands."""
    found = {}
    if eval_file.is_file():
        found[eval_file] = read_json(eval_file)
        if not {"rows", "settings"} <= found[eval_file].keys():
            raise ValueError(f"{eval_file}: not written by python -m evaluation answer; run it")
    for path in sorted(folder.glob("*.json")):
        results = read_json(path)
        is_further = isinstance(results, dict) and path != eval_file and "rows" not in results
        if is_further and all_tables(results):
            found[path] = results
    return found


def all_tables(results):
    """{key: its tables} of a command's results, those of `probe` too."""
    tables = result_tables(results)
    if results.get("probe"):
        tables["probe"] = probe_tables(results["probe"])
    return tables


def read_commands(folders, results):
    """The command lines that made the run: commands.txt, or what each stage logged of itself."""
    lines = []
    for file in run_files(folders[0], "commands.txt"):
        lines += file.read_text(encoding="utf-8-sig").splitlines()
    if lines:
        return list(dict.fromkeys(lines))  # a resumed run has them twice

    for folder in stage_folders(folders):
        runs = folder / "runs.jsonl"
        if runs.is_file():
            starts = map(json.loads, runs.read_bytes().splitlines())
            lines += dict.fromkeys("python " + start["command"] for start in starts)
        else:
            lines.append(f"# {folder.name}: it has no runs.jsonl, so its command is not known")
    if results:
        words = ["--model", results["model"], "--data", *results["settings"]["data"]]
        lines.append("python -m evaluation answer " + shlex.join(words))
    return lines


def read_text(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def make_page(folders, eval_file, seed, per_group, num_attention):
    """The whole page as HTML. folders: the run's, or its stages'."""
    # What the folders hold
    stages, measured = stage_folders(folders), read_results(folders[0], eval_file)
    if not stages and not measured:
        raise ValueError(f"{folders[0]}: no log.jsonl and no results; is this a run's folder?")
    results = measured.get(eval_file)
    # Without eval.json the last stage is the best model that there is.
    model_folder = Path(results["model"]) if results else (stages or folders)[-1]
    has_model = (model_folder / "config.json").is_file()

    # Each section begins with its paragraph of sections.html.
    parts = re.split(r"<!-- (\w+) -->\n", read_text("sections.html").replace("{seed}", str(seed)))
    intro = dict(zip(parts[1::2], parts[2::2]))

    title = escape(folders[0].resolve().name)
    sections = [f"<h1>{title}</h1>", facts(folders[0], model_folder if has_model else None)]
    if results:
        sections.append(headline(results["rows"]))
    if stages:
        # A stage that was stopped in its first step has no curve.
        logs = {folder.name: read_log(folder / "log.jsonl") for folder in stages}
        cards = [stage_card(name, *log) for name, log in logs.items() if log[0]]
        sections.append(div("learning", intro["learning"] + div("curves", "".join(cards))))

    # The tables of `answer` come first: the others are read beside them.
    header, questions = read_answers(eval_file) if results else (None, [])
    for path, found in measured.items():
        for key, tables in all_tables(found).items():
            sections.append(intro[key].replace("{name}", escape(path.stem)))
            if key == "rows":
                sections.append(overview(found["rows"]))
            if key == "models":
                sections.append(show_conclusions(found.get("conclusions", [])))
            if key == "retrieval":
                sections.append(retrieval_matrix(found["retrieval"]))
            sections += [table.as_html() for table in tables]
            if key == "rows":
                sections += [few_answers(questions), caption_table(questions)]
        # a figure that the command drew beside its results
        if (figure := path.with_suffix(".svg")).is_file():
            sections.append(div("figure", figure.read_text(encoding="utf-8")))

    if results:
        if wrong := weakest_gallery(header, questions, seed, NUM_WEAKEST):
            sections += [intro["limits"], wrong]
        sections += [intro["gallery"], gallery(header, questions, seed, per_group)]
        # Attention needs the weights, which may be gone by now.
        if num_attention and has_model:
            cards = attention_gallery(model_folder, header, questions, seed, num_attention)
            sections += [intro["attention"], cards]

    # Whoever reads the page can make it again.
    commands = escape("\n".join(read_commands(folders, results)))
    sections.append(f"{intro['commands']}<pre>{commands}</pre>")
    style, body = read_text("style.css"), "\n".join(sections)
    return read_text("page.html").format(title=title, style=style, body=body)


def facts(folder, model_folder):
    """The size of the model, and the seconds of each step."""
    lines = []
    if model_folder:
        config = load_config(model_folder)
        counts, vision = parameter_counts(config), config.vision
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        line = f"{sum(counts.values()):,} parameters ({parts}), {vision.num_patches} patches of a "
        line += f"{vision.image_size}-pixel image, {config.text.vocab_size:,} pieces"
        lines.append(line)

    # Of an ablation: the sum over all its runs.
    seconds = Counter()
    for file in run_files(folder, "timing.json"):
        seconds.update(read_json(file))
    if seconds:
        steps = ", ".join(f"{step} {count:,.0f}" for step, count in seconds.items())
        lines.append(f"{seconds.total():,.0f} seconds in all: {steps}")
    return f'<p class="soft">{"<br>".join(map(escape, lines))}</p>'


def headline(rows):
    """A card per language: the accuracy of the first split."""
    split, cards = rows[0]["split"], {}
    for row in rows:
        # The first split is what a run is about; the others have their tables.
        if row["split"] != split or row["kind"] != "all":
            continue
        language = row["language"]
        value, low, high = (f"{100 * row[key]:.1f}" for key in ("accuracy", "low", "high"))
        line = f"{escape(row['model'])} {value} ({low} – {high})"
        if row["model"] == "full":
            cards[language] = f"<b>{language_name(language)}</b>"
            cards[language] += div("soft", plain_name(split)) + div("big", f"{value}%")
            line = f"95%: {low} – {high} · n {row['n']:,}"
        cards[language] += div("small soft", line)

    order = sorted(cards, key=lambda language: (language != "all", language))
    return div("headline", "".join(div("card", cards[name]) + "\n" for name in order))


def overview(rows):
    """The splits beside each other: the models, and the full model's accuracy by language."""
    rows = [row for row in rows if row["kind"] == "all"]
    accuracy = {(row["split"], row["model"], row["language"]): row for row in rows}
    languages = sorted({row["language"] for row in rows} - {"all"})
    lines = []
    for split in dict.fromkeys(row["split"] for row in rows):
        row = accuracy[split, "full", "all"]
        cells = [plain_name(split), f"{row['n']:,}", row_number(row)]
        others = [(split, model, "all") for model in MODELS[1:]]
        others += [(split, "full", language) for language in languages]
        for key in others:
            cells.append(f"{100 * accuracy[key]['accuracy']:.1f}" if key in accuracy else "–")
        lines.append(("", cells))
    head = ["", "n", "full % (95%)", *MODELS[1:], *map(language_name, languages)]
    return Table("All splits", head, lines).as_html()


def show_conclusions(sentences):
    """The sentences of a comparison, what they claim in bold."""
    parts = []
    for sentence in sentences:
        # Before the colon stands what may be claimed, after it the numbers.
        claim, colon, models = map(escape, sentence.partition(":"))
        text = f"<b>{claim}:</b>{models}" if colon else f'<span class="soft">{claim}</span>'
        parts.append(f"<p>{text}</p>")
    return "\n".join(parts)
