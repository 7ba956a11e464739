"""The page: the files of a run, and the sections in their order."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

from checkpoint import load_config
from evaluation.answer import read_answers
from evaluation.report.attention import attention_gallery
from evaluation.report.curves import loss_curve, read_log
from evaluation.report.gallery import gallery
from evaluation.tables import escape, language_name, plain_name, result_tables
from model import parameter_counts
from vocabulary.files import read_json

STAGES = ("vision", "text", "align", "instruct-1", "instruct-2", "instruct")


def stage_folders(folders):
    """The folders with a log.jsonl: those given, or those inside them, in the order of stages."""
    found = []
    for folder in folders:
        logs = [*folder.glob("log.jsonl")] or sorted(folder.glob("*/log.jsonl"))
        found += [log.parent for log in logs]
    return sorted(found, key=lambda folder: [*STAGES, folder.name].index(folder.name))


def read_evaluation(path):
    """eval.json, the header and the questions of its answers; three times None without it."""
    if not path.is_file():
        return None, None, None
    results = read_json(path)
    if not {"rows", "settings"} <= results.keys():
        raise ValueError(f"{path}: not written by python -m evaluation answer; run that again")
    return results, *read_answers(path.with_suffix(".answers.jsonl"))


def read_further_results(folder, eval_file):
    """{path: results} of likelihood, retrieve, compare and judge."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        results = read_json(path)
        is_further = isinstance(results, dict) and path != eval_file and "rows" not in results
        if is_further and result_tables(results):
            found[path] = results
    return found


def read_commands(folders, results):
    """The command lines that made the run: commands.txt, or what each stage logged of itself."""
    lines = []
    for file in (*folders[0].glob("commands.txt"), *sorted(folders[0].glob("*/commands.txt"))):
        lines += file.read_text(encoding="utf-8").splitlines()
    if lines:
        return list(dict.fromkeys(lines))  # a resumed run has them twice

    for folder in stage_folders(folders):
        runs = folder / "runs.jsonl"
        if runs.is_file():
            starts = [json.loads(line) for line in runs.read_bytes().splitlines()]
            lines += dict.fromkeys("python " + start["command"] for start in starts)
        else:
            lines.append(f"# {folder.name}: it has no runs.jsonl, so its command is not known")
    if results:
        words = ["python", "-m", "evaluation", "answer", "--model", results["model"]]
        lines.append(shlex.join([*words, "--data", *results["settings"]["data"]]))
    return lines


def read_text(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def make_page(folders, eval_file, seed, per_group, num_attention):
    """The whole page as HTML. folders: the run's, or its stages'."""
    # What the folders hold
    stages = stage_folders(folders)
    results, header, questions = read_evaluation(eval_file)
    measured = read_further_results(folders[0], eval_file)
    if results:
        measured = {eval_file: results} | measured
    if not stages and not measured:
        raise ValueError(f"{folders[0]}: no log.jsonl and no results; is this a run's folder?")
    model_folder = Path(results["model"]) if results else (stages or folders)[-1]
    if not (model_folder / "config.json").is_file():
        model_folder = None

    # Each section begins with its paragraph of sections.html.
    parts = re.split(r"<!-- (\w+) -->\n", read_text("sections.html"))[1:]
    intro = {name: text.replace("{seed}", str(seed)) for name, text in zip(parts[::2], parts[1::2])}

    title = escape(folders[0].resolve().name)
    sections = [f"<h1>{title}</h1>", facts(folders[0], model_folder)]
    if results:
        sections.append(headline(results["rows"]))
    if stages:
        logs = {folder.name: read_log(folder / "log.jsonl") for folder in stages}
        curves = [loss_curve(name, log) for name, log in logs.items() if log]
        sections.append(f'{intro["learning"]}<div class="curves">{"".join(curves)}</div>')

    for path, found in measured.items():
        for key, tables in result_tables(found).items():
            sections.append(intro[key].replace("{name}", escape(path.stem)))
            if key == "models":
                sections.append(show_conclusions(found.get("conclusions", [])))
            sections += [table.as_html() for table in tables]

    if questions:
        sections += [intro["gallery"], gallery(header, questions, seed, per_group)]
    if questions and num_attention and model_folder:
        cards = attention_gallery(model_folder, header, questions, seed, num_attention)
        sections += [intro["attention"], cards]

    commands = escape("\n".join(read_commands(folders, results)))
    sections.append(f"{intro['commands']}<pre>{commands}</pre>")

    body = "\n".join(sections)
    return read_text("page.html").format(title=title, style=read_text("style.css"), body=body)


def facts(folder, model_folder):
    """The size of the model, and the seconds of each step."""
    lines = []
    if model_folder:
        config = load_config(model_folder)
        counts = parameter_counts(config)
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        lines.append(
            f"{sum(counts.values()):,} parameters ({parts}), {config.vision.num_patches} patches "
            f"of a {config.vision.image_size}-pixel image, {config.text.vocab_size:,} pieces"
        )

    seconds = Counter()
    for file in (*folder.glob("timing.json"), *folder.glob("*/timing.json")):
        seconds.update(read_json(file))
    if seconds:
        steps = ", ".join(f"{step} {count:,.0f}" for step, count in seconds.items())
        lines.append(f"{sum(seconds.values()):,.0f} seconds in all: {steps}")
    return f'<p class="soft">{"<br>".join(map(escape, lines))}</p>'


def headline(rows):
    """A card per language: the accuracy of the first split."""
    split, cards = rows[0]["split"], {}
    for row in rows:
        if row["split"] == split and row["kind"] == "all":
            value, low, high = (f"{100 * row[key]:.1f}" for key in ("accuracy", "low", "high"))
            line = f"{row['model']} {value} ({low} – {high})"
            if row["model"] == "full":
                line = f"95%: {low} – {high} · n {row['n']:,}"
                cards[row["language"]] = [
                    f"<b>{language_name(row['language'])}</b>",
                    f'<div class="soft">{plain_name(split)}</div><div class="big">{value}%</div>',
                ]
            cards[row["language"]].append(f'<div class="small soft">{line}</div>')

    order = sorted(cards, key=lambda language: (language != "all", language))
    body = "".join(f'<div class="card">{"".join(cards[language])}</div>\n' for language in order)
    return f'<div class="headline">{body}</div>'


def show_conclusions(sentences):
    """The sentences of a comparison, what they claim in bold."""
    parts = []
    for sentence in sentences:
        verdict, colon, models = map(escape, sentence.partition(":"))
        text = f"<b>{verdict}:</b>{models}" if colon else f'<span class="soft">{verdict}</span>'
        parts.append(f"<p>{text}</p>")
    return "\n".join(parts)
