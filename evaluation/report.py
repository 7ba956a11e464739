"""One page about a finished run, to read or to project: curves, tables, held-out pictures with questions and answers, where the model looked.

Where it stands: after evaluate, whose files it reads; nothing is measured here. One HTML file without scripts or links: it works offline.

    python report.py out/demo                                     # writes out/demo/report.html
    python report.py out/align out/instruct --eval eval.json      # a run whose stages lie in folders of their own
    python report.py out/ablation                                 # comparisons of runs

From each stage's folder: log.jsonl. From the first folder: eval.json with its answers, and whatever else evaluate.py (likelihood, retrieve, compare) and
judge.py wrote there; timing.json and commands.txt where there are such. The gallery is drawn by --seed: neither good nor bad answers are picked by hand.
"""

import argparse
import base64
import html
import io
import json
import math
import random
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import data
import evaluation.answer as evaluate
import vision
from generate import load_for_inference
from kernels import rope

STAGES = ("vision", "text", "align", "lookup", "drill", "instruct")
LANGUAGES = {"en": "English", "ko": "한국어", "zh": "中文", "all": "all languages"}
COLOURS = {"full": "#2563eb", "blind": "#94a3b8", "chance": "#d6d3d1"}
STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --card: #fff; --page: #f8fafc; --right: #15803d; --wrong: #b91c1c }
* { box-sizing: border-box } html { scroll-behavior: smooth }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.5 system-ui, "Segoe UI", "Apple SD Gothic Neo", "Noto Sans CJK KR", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 32px 80px }
h1 { font-size: 40px; letter-spacing: -0.02em; margin: 0 } h2 { font-size: 27px; margin: 56px 0 6px; letter-spacing: -0.01em } h3 { font-size: 19px; margin: 24px 0 8px }
p { max-width: 78ch; margin: 6px 0 14px } .soft { color: var(--soft) } .small { font-size: 14px }
.row { display: flex; flex-wrap: wrap; gap: 18px } .card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px; box-shadow: 0 1px 2px #0f172a0d }
.big { font-size: 44px; font-weight: 700; line-height: 1.1; letter-spacing: -0.02em; color: #2563eb } .headline .card { flex: 1 1 200px }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 14px; overflow: hidden; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: 7px 14px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap } th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 14px; background: #f1f5f9 }
td:first-child, th:first-child { text-align: left } tr.sum td { font-weight: 700; background: #f8fafc } td .ci { color: var(--soft); font-size: 13.5px; font-weight: 400 }
.sub td:first-child { padding-left: 34px; color: var(--soft) } .scroll { overflow-x: auto } .bar { width: 190px; min-width: 190px }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(268px, 1fr)); gap: 18px } .gallery .card { padding: 0; overflow: hidden } .gallery img { width: 100%; display: block; background: var(--line) }
.gallery .text { padding: 12px 16px 16px } .q { font-weight: 600 } .tag { font-size: 14px; color: var(--soft) } .right { color: var(--right); font-weight: 700 } .wrong { color: var(--wrong); font-weight: 700 }
:lang(ko) { word-break: keep-all } .pair { display: grid; grid-template-columns: 1fr 1fr } .missing { padding: 60px 16px; text-align: center; color: var(--soft); background: var(--line) }
pre { background: #0f172a; color: #e2e8f0; border-radius: 14px; padding: 18px 20px; overflow-x: auto; font: 14px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.legend span { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 0; vertical-align: -1px } .legend { display: flex; gap: 18px }
@media print { body { background: #fff } .card, table { break-inside: avoid } }
"""


def esc(text):
    return html.escape(str(text))


# ---------------------------------------------------------------------------------------------- curves
def read_log(path):
    """The rows of a stage's steps that were taken; where a resumed run did steps again, the later ones count."""
    found = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            found[row["step"]] = row
        except (json.JSONDecodeError, KeyError):
            continue  # a line cut off by a crash
    return [found[step] for step in sorted(found) if found[step]["loss"] is not None]


def round_ticks(low, high, about=4):
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(n * power for n in (1, 2, 5, 10) if n * power * about >= 0.7 * (high - low))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def curve(title, rows, width=560, height=250):
    """A stage's loss as SVG: every step faint, their running mean (a twentieth of the run) strong."""
    steps, loss = np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows], float)
    window = max(1, len(loss) // 20)
    sums = np.cumsum(np.concatenate([[0], loss]))
    mean = np.array(
        [
            (sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1)
            for i in range(len(loss))
        ]
    )
    thin = np.unique(np.linspace(0, len(loss) - 1, min(500, len(loss))).astype(int))
    low, high = float(loss.min()), float(np.quantile(loss, 0.995))
    high = high if high > low else low + 1
    left, right, top, bottom = 52, width - 24, 14, height - 30
    x = lambda s: left + (right - left) * (s - steps[0]) / max(1, steps[-1] - steps[0])
    y = lambda l: bottom - (bottom - top) * (min(l, high) - low) / (high - low)
    line = lambda values: " ".join(f"{x(steps[i]):.1f},{y(values[i]):.1f}" for i in thin)
    ticks = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e2e8f0"/><text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in round_ticks(low, high)
    )
    ticks += "".join(
        f'<text x="{x(s):.1f}" y="{height - 8}" text-anchor="middle">{s:,.0f}</text>'
        for s in round_ticks(steps[0], max(steps[-1], steps[0] + 1))
    )
    seconds = sum(r.get("seconds", 0) for r in rows)
    return (
        f'<div class="card"><h3 style="margin-top:0">{esc(title)} <span class="soft small">loss {mean[-1]:.3f} at the end · {steps[-1]:,} steps · {seconds:,.0f} s</span></h3>'
        f'<svg viewBox="0 0 {width} {height}" width="100%" font-size="12" fill="#64748b" role="img" aria-label="loss of {esc(title)}">{ticks}'
        f'<polyline points="{line(loss)}" fill="none" stroke="#bfdbfe" stroke-width="1"/><polyline points="{line(mean)}" fill="none" stroke="#2563eb" stroke-width="2.5"/></svg></div>'
    )


# ---------------------------------------------------------------------------------------------- tables
def number(r, key="accuracy", scale=100):
    if r[key] is None:
        return "undefined"  # a ratio with nothing below the line
    if None in (r["low"], r["high"]):
        return f'{scale * r[key]:.1f} <span class="ci">(too few pictures)</span>'
    digits = 1 if scale == 100 else 3 if r[key] < 10 else 1 if r[key] < 100 else 0
    return f'{scale * r[key]:.{digits}f} <span class="ci">({scale * r["low"]:.{digits}f} – {scale * r["high"]:.{digits}f})</span>'


def bar(own):
    """Full, blind and chance as bars on a common scale of 0 – 100%, with the interval of full."""
    marks = "".join(
        f'<rect x="0" y="{y}" width="{190 * r["accuracy"]:.1f}" height="{h}" rx="2" fill="{COLOURS[r["model"]]}"/>'
        for r, y, h in zip(own, (2, 13, 18), (9, 4, 4))
    )
    full = own[0]
    return f'<svg width="190" height="24">{marks}<line x1="{190 * full["low"]:.1f}" x2="{190 * full["high"]:.1f}" y1="6.5" y2="6.5" stroke="#0f172a" stroke-width="1.6"/></svg>'


def accuracy_tables(rows):
    cell, parts = {(r["model"], r["split"], r["language"], r["kind"]): r for r in rows}, []
    for split in dict.fromkeys(r["split"] for r in rows):
        of = lambda language, kind, split=split: [
            cell.get((m, split, language, kind)) for m in ("full", "blind", "chance")
        ]
        kinds = sorted({r["kind"] for r in rows if r["split"] == split} - {"all"})
        languages = sorted({r["language"] for r in rows if r["split"] == split} - {"all"})
        lines = [(LANGUAGES.get(l, l), of(l, "all"), "") for l in languages] + [
            ("all", of("all", "all"), "sum")
        ]
        lines += [
            (kind.split(".")[-1].replace("_", " "), of("all", kind), "sub" if "." in kind else "")
            for kind in kinds
        ]
        body = "".join(
            f'<tr class="{style}"><td>{esc(name)}</td><td>{own[0]["n"]:,}</td>'
            + "".join(f"<td>{number(r)}</td>" for r in own)
            + f'<td class="bar">{bar(own)}</td></tr>'
            for name, own, style in lines
        )
        parts.append(
            f'<h3>{esc(split.replace("_", " "))}</h3><div class="scroll"><table><tr><th></th><th>n</th><th>full % (95%)</th><th>blind % (95%)</th><th>chance % (95%)</th><th></th></tr>{body}</table></div>'
        )
    return "".join(parts)


def metric_table(rows, scale):
    """F1, chrF, POPE's figures, perplexity: metric × split × language, a column for each model."""
    models, cell = (
        list(dict.fromkeys(r["model"] for r in rows)),
        {(r["split"], r["metric"], r["language"], r["model"]): r for r in rows},
    )
    body = ""
    for key in sorted({k[:3] for k in cell}):
        own = [cell.get((*key, m)) for m in models]
        body += (
            f"<tr><td>{esc(key[1])}</td><td>{esc(key[0].replace('_', ' '))}</td><td>{esc(LANGUAGES.get(key[2], key[2]))}</td><td>{next(r['n'] for r in own if r):,}</td>"
            + "".join(f"<td>{number(r, 'value', scale) if r else '–'}</td>" for r in own)
            + "</tr>"
        )
    return f'<div class="scroll"><table><tr><th>measure</th><th>split</th><th>language</th><th>n</th>{"".join(f"<th>{esc(m)} (95%)</th>" for m in models)}</tr>{body}</table></div>'


def retrieval_table(rows):
    body = "".join(
        f'<tr class="{"sum" if r["model"] == "full" else "sub"}"><td>{esc(r["direction"])}</td><td>{esc(r["model"])}</td><td>{r["n"]:,}</td><td>{r["pool"]}</td>'
        + "".join(
            f'<td>{100 * r[m][0]:.1f} <span class="ci">({100 * r[m][1]:.1f} – {100 * r[m][2]:.1f})</span></td>'
            for m in ("R@1", "R@5", "MRR")
        )
        + "</tr>"
        for r in rows
    )
    return f'<div class="scroll"><table><tr><th>from → to</th><th>model</th><th>queries</th><th>candidates</th><th>R@1 % (95%)</th><th>R@5 % (95%)</th><th>MRR % (95%)</th></tr>{body}</table></div>'


def comparison_table(found):
    """Accuracies, a column for each language; what they show, in words; every difference."""
    models, cell = (
        found["models"],
        {(r["split"], r["model"], r["language"]): r for r in found["models"]},
    )
    languages, tables = sorted({r["language"] for r in models}, key=lambda l: (l == "all", l)), ""
    for split in dict.fromkeys(r["split"] for r in models):
        names = [m for s, m, l in cell if s == split and l == "all"]
        spoken = [l for l in languages if (split, names[0], l) in cell]
        head = "".join(
            f"<th>{esc(LANGUAGES.get(l, l))} % (95%), n {cell[split, names[0], l]['n']:,}</th>"
            for l in spoken
        )
        body = ""
        for name in names:
            seeds = ", ".join(f"{100 * s:.1f}" for s in cell[split, name, "all"]["seeds"])
            style = "sub" if name == "chance" or name.endswith(", blind") else ""
            body += (
                f'<tr class="{style}"><td>{esc(name)}</td>'
                + "".join(f"<td>{number(cell[split, name, l])}</td>" for l in spoken)
                + f'<td class="soft small">{seeds}</td></tr>'
            )
        tables += f'<h3>{esc(split.replace("_", " "))}</h3><div class="scroll"><table><tr><th></th>{head}<th>all, each seed</th></tr>{body}</table></div>'
    said = "".join(
        "<p><b>{}{}</b>{}</p>".format(*map(esc, sentence.partition(":")))
        if ":" in sentence
        else f'<p class="soft">{esc(sentence)}</p>'
        for sentence in found.get("conclusions", [])
    )
    body = ""
    for r in found["pairs"]:
        seeds = (
            f"{100 * r['seeds_low']:.1f} – {100 * r['seeds_high']:.1f}"
            if "seeds_low" in r
            else "one seed"
        )
        body += (
            f"<tr><td>{esc(r['model'])} against {esc(r['against'])}</td><td>{esc(r['split'].replace('_', ' '))}</td><td>{esc(LANGUAGES.get(r['language'], r['language']))}</td>"
            f"<td>{r['n']:,}</td><td>{number(r, 'difference')}</td><td>{r['effect']:.2f}</td><td>{r['p_holm']:.4f}</td><td>{seeds}</td></tr>"
        )
    return (
        f'{said}{tables}<h3>differences</h3><div class="scroll"><table><tr><th></th><th>split</th><th>language</th><th>n</th><th>points (95%)</th>'
        f"<th>d<sub>z</sub></th><th>p (Holm)</th><th>over seeds (95%)</th></tr>{body}</table></div>"
    )


def judge_table(rows):
    body = "".join(
        f"<tr><td>{esc(r['measure'])}</td><td>{esc(LANGUAGES.get(r['language'], r['language']))}</td><td>{r['n']:,}</td><td>{number(r, 'value', 1)}</td></tr>"
        for r in rows
    )
    return f'<div class="scroll"><table><tr><th>measure</th><th>language</th><th>n</th><th>value (95%)</th></tr>{body}</table></div>'


# ---------------------------------------------------------------------------------------------- pictures
def as_image(picture):
    """A PIL picture as a data: address."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def shown(path, mode, size=336):
    """The picture as the model is given it, larger: padded or cut, so that patches lie where they lie for the model."""
    return Image.fromarray(
        vision.preprocess(vision.load_image(path), size, mode).permute(1, 2, 0).numpy()
    )


@torch.inference_mode()
def attention_over_patches(model, tokenizer, prompt, answer, path):
    """(N,) how much the answer's tokens attend to each patch of the prompt's last picture: the mean over layers, heads and answer tokens, without what goes to text."""
    config, device, captured = model.config, model.device, []
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda module, args: captured.append((module, args[0], args[1]))
        )
        for block in model.decoder.layers
    ]
    ids = prompt + tokenizer.encode(answer)
    pixels = vision.preprocess(
        vision.load_image(path), config.vision.image_size, config.image_aspect_ratio
    )[None].to(device)
    try:
        model(torch.tensor([ids], device=device), pixels)
    finally:
        for hook in hooks:
            hook.remove()
    patches, total = torch.tensor(ids, device=device) == config.image_token_id, 0
    for module, x, turn in captured:
        q, k = (
            proj(x).view(1, len(ids), -1, module.head_dim)
            for proj in (module.q_proj, module.k_proj)
        )
        q, k = rope(q, k, *turn)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = (
            torch.einsum("thd,shd->hts", q[0].float(), k[0].float()) / module.head_dim**0.5
        )  # (H, T, T)
        scores = scores.masked_fill(
            torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf
        )
        total = total + scores.softmax(-1)[:, len(prompt) - 1 :, patches].mean(
            (0, 1)
        )  # from where the answer's tokens are decided
    return (total / len(captured)).cpu().numpy()


def heat(picture, weights):
    """The picture pale and grey, orange where attention went; the patches' square of weights smoothed over it."""
    side = round(len(weights) ** 0.5)
    weights = (weights - weights.min()) / max(float(np.ptp(weights)), 1e-9)
    mask = Image.fromarray((255 * weights.reshape(side, side)).astype(np.uint8)).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    pale, glow = (
        Image.blend(p, Image.new("RGB", p.size, c), share)
        for p, c, share in (
            (picture.convert("L").convert("RGB"), "white", 0.6),
            (picture, (255, 80, 0), 0.65),
        )
    )
    return Image.composite(glow, pale, mask)


def card(row, image, rows=(), note=""):
    """A picture with its question, after what was said before it (among `rows`), and its answers; captions are neither right nor wrong, so they get their chrF."""
    earlier = [
        r
        for r in rows
        if (r["split"], r["id"]) == (row["split"], row["id"]) and r["turn"] < row["turn"]
    ]
    before = "".join(
        f'<div class="tag">{esc(r["question"])} {esc(evaluate.main_truth(r))}</div>'
        for r in sorted(earlier, key=lambda r: r["turn"])
    )
    found, truth, turn = (
        evaluate.worth(row, row["full"]),
        evaluate.main_truth(row),
        f" · turn {row['turn'] + 1}" if row["turn"] else "",
    )
    right = found["accuracy"] >= 0.5
    mark = (
        f'<span class="{"right" if right else "wrong"}">{"✓" if right else "✗"} {esc(row["full"] or "(nothing)")}</span>'
        if "chrf" not in found
        else f"<b>{esc(row['full'] or '(nothing)')}</b> · chrF {100 * found['chrf']:.1f}"
    )
    return (
        f'<div class="card" lang="{esc(row["language"])}">{image}<div class="text"><div class="tag">{esc(LANGUAGES.get(row["language"], row["language"]))} · {esc(row["split"].replace("_", " "))} · {esc(row["skill"].replace("_", " "))}{turn}{note}</div>'
        f'{before}<div class="q">{esc(row["question"])}</div><div>{mark}</div>'
        + ("" if right else f"<div>truth: {esc(truth)}</div>")
        + f'<div class="tag">without the picture: {esc(row["blind"] or "(nothing)")}</div></div></div>'
    )


def gallery(header, rows, seed, each):
    """For each language `each` right and `each` wrong answers, and as many captions, drawn by seed from all questions that have a picture."""
    rng, parts = random.Random(seed), []
    scored = [
        (
            row,
            "caption"
            if row["metric"] == "caption"
            else "right"
            if evaluate.worth(row, row["full"])["accuracy"] >= 0.5
            else "wrong",
        )
        for row in rows
        if row["image"]
    ]
    for language in sorted({row["language"] for row, _ in scored}):
        cards, counts = [], []
        for wanted in ("right", "wrong", "caption"):
            pool = [
                row for row, verdict in scored if row["language"] == language and verdict == wanted
            ]
            if pool:
                counts.append(
                    f"{min(each, len(pool))} of {len(pool):,} {wanted}"
                    + ("s" if wanted == "caption" else "")
                )
            for row in rng.sample(pool, min(each, len(pool))):
                path = evaluate.picture_path(header, row)
                cards.append(
                    card(
                        row,
                        f'<img src="{as_image(shown(path, "pad"))}" alt="">'
                        if path
                        else f'<div class="missing">{esc(row["image"])}<br>is not where it was</div>',
                        rows,
                    )
                )
        parts.append(
            f'<h3>{esc(LANGUAGES.get(language, language))} <span class="soft small">shown: {", ".join(counts)}</span></h3><div class="gallery">{"".join(cards)}</div>'
        )
    return "".join(parts)


def attention_gallery(folder, header, rows, seed, count):
    """Questions whose answer is right (or captions), drawn by seed, each picture beside where the answer's tokens looked."""
    model, tokenizer = load_for_inference(folder)
    rng, cards = random.Random(seed + 1), []
    pool = [
        row
        for row in rows
        if row["turn"] == 0
        and row["image"]
        and row["skill"] not in ("mood", "background")
        and (row["metric"] == "caption" or evaluate.worth(row, row["full"])["accuracy"] >= 0.5)
    ]
    for row in rng.sample(pool, min(count, len(pool))):
        path = evaluate.picture_path(header, row)
        if not path:
            continue
        prompt, _ = data.encode_chat(
            [(["", "\n" + row["question"]], None)], tokenizer, model.config.vision.num_patches
        )
        weights = attention_over_patches(model, tokenizer, prompt, row["full"], path)
        picture = shown(path, model.config.image_aspect_ratio)
        image = f'<div class="pair"><img src="{as_image(picture)}" alt=""><img src="{as_image(heat(picture, weights))}" alt="attention"></div>'
        cards.append(
            card(row, image, note=f" · {100 * weights.sum():.0f}% of the attention on the picture")
        )
    return f'<div class="gallery" style="grid-template-columns: repeat(auto-fill, minmax(380px, 1fr))">{"".join(cards)}</div>'


# ---------------------------------------------------------------------------------------------- the page
def commands_of(folders, evaluated):
    """The lines that made the run: commands.txt where it was kept, else what each stage noted of itself."""
    kept = [*folders[0].glob("commands.txt"), *sorted(folders[0].glob("*/commands.txt"))]
    if kept:
        return list(
            dict.fromkeys(
                line for file in kept for line in file.read_text(encoding="utf-8").splitlines()
            )
        )  # a resumed run says them again
    lines = []
    for folder in stage_folders(folders):
        runs, states = folder / "runs.jsonl", sorted(folder.glob("checkpoints/step-*.pt"))
        if runs.is_file():  # train.py's own note of each start
            lines += dict.fromkeys(
                "python " + json.loads(line)["command"]
                for line in runs.read_text(encoding="utf-8").splitlines()
            )
        elif states:
            settings = torch.load(states[-1], map_location="cpu", weights_only=True)["settings"]
            flags = {
                k: v
                for k, v in settings.items()
                if k != "stage" and v not in (None, False, [], 0, 0.0)
            }
            words = [
                word
                for k, v in flags.items()
                for word in (
                    "--" + k.replace("_", "-"),
                    *(map(str, v) if isinstance(v, (list, tuple)) else [str(v)]),
                )
            ]
            lines.append(
                shlex.join(["python", "train.py", settings["stage"], *words, "-o", str(folder)])
            )
        else:
            lines.append(f"# {folder.name}: no checkpoint was kept, so its settings are not known")
    if evaluated:
        settings = evaluated["settings"]
        lines.append(
            shlex.join(
                [
                    "python",
                    "evaluate.py",
                    "--model",
                    evaluated["model"],
                    "--data",
                    *settings["data"],
                ]
            )
        )
    return lines


def stage_folders(folders):
    """Folders with a log.jsonl: those given, or those inside them, in the order of the stages."""
    found = [
        f
        for folder in folders
        for f in (
            [folder]
            if (folder / "log.jsonl").is_file()
            else sorted(p.parent for p in folder.glob("*/log.jsonl"))
        )
    ]
    return sorted(found, key=lambda f: STAGES.index(f.name) if f.name in STAGES else len(STAGES))


def page(folders, eval_file, seed, each, attention):
    """The whole page as HTML."""
    stages, sections = stage_folders(folders), []
    evaluated = header = rows = None
    if eval_file.is_file():
        evaluated = checkpoint.load_json(eval_file)
        if not {"rows", "settings"} <= evaluated.keys():
            raise ValueError(f"{eval_file}: not a file that evaluate.py -o wrote; measure again")
        header, rows = evaluate.read_answers(eval_file.with_suffix(".answers.jsonl"))
    further = {
        path: checkpoint.load_json(path)
        for path in sorted(folders[0].glob("*.json"))
        if path != eval_file
    }
    further = {
        path: found
        for path, found in further.items()
        if isinstance(found, dict) and found.keys() & {"likelihood", "retrieval", "pairs", "judge"}
    }
    if not stages and not evaluated and not further:
        raise ValueError(
            f"{folders[0]}: neither a stage's log.jsonl nor {eval_file.name} nor a comparison; is this a run's folder?"
        )
    title, facts = folders[0].resolve().name, []
    model_folder = Path(evaluated["model"]) if evaluated else (stages or folders)[-1]
    if (model_folder / "config.json").is_file():
        config = checkpoint.load_config(model_folder)
        from model import parameter_counts

        counts = parameter_counts(config)
        facts.append(
            f"{sum(counts.values()):,} parameters ({', '.join(f'{part} {n:,}' for part, n in counts.items())}), {config.vision.num_patches} patches of a {config.vision.image_size}-pixel picture, {config.text.vocab_size:,} pieces"
        )
    times = Counter()
    for file in (*folders[0].glob("timing.json"), *folders[0].glob("*/timing.json")):
        times.update(json.loads(file.read_text()))
    if times:
        facts.append(
            f"{sum(times.values()):,.0f} seconds in all: "
            + ", ".join(f"{k} {v:,.0f}" for k, v in times.items())
        )
    head = f'<h1>{esc(title)}</h1><p class="soft">{"<br>".join(map(esc, facts))}</p>'
    if evaluated:
        first = evaluated["rows"][0]["split"]
        cards = ""
        for r in sorted(evaluated["rows"], key=lambda r: (r["language"] != "all", r["language"])):
            if (r["model"], r["split"], r["kind"]) == ("full", first, "all"):
                others = {
                    o["model"]: o
                    for o in evaluated["rows"]
                    if (o["split"], o["kind"], o["language"]) == (first, "all", r["language"])
                }
                cards += (
                    f'<div class="card"><b>{esc(LANGUAGES.get(r["language"], r["language"]))}</b><div class="soft">{esc(first.replace("_", " "))}</div><div class="big">{100 * r["accuracy"]:.1f}%</div>'
                    f'<div class="small soft">95%: {100 * r["low"]:.1f} – {100 * r["high"]:.1f} · n {r["n"]:,}<br>blind {100 * others["blind"]["accuracy"]:.1f} ({100 * others["blind"]["low"]:.1f} – {100 * others["blind"]["high"]:.1f})'
                    f"<br>chance {100 * others['chance']['accuracy']:.1f} ({100 * others['chance']['low']:.1f} – {100 * others['chance']['high']:.1f})</div></div>"
                )
        head += f'<div class="row headline">{cards}</div>'
    sections.append(head)
    if stages:
        sections.append(
            '<h2>Learning</h2><p class="soft">Loss per learnt token at each step (faint) and its running mean. Stages have different losses: compare a curve with itself only.</p>'
            '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:18px">'
            + "".join(curve(f.name, log) for f in stages if (log := read_log(f / "log.jsonl")))
            + "</div>"
        )
    if evaluated:
        legend = "".join(
            f'<div><span style="background:{c}"></span>{m}</div>' for m, c in COLOURS.items()
        )
        sections.append(
            "<h2>Right answers</h2><p>Percent of held-out questions. <b>Blind</b> is the same model asked without the picture: what the words alone give away. <b>Chance</b> always says the most "
            f'frequent answer. In brackets: 95% intervals, from resampling pictures with all their questions.</p><div class="legend small">{legend}</div>'
            + accuracy_tables(evaluated["rows"])
        )
        if evaluated.get("scores"):
            sections.append(
                "<h2>Nearly right answers</h2><p>Open answers by the characters they share with the truth (KorQuAD's F1), captions by chrF, POPE by its authors' figures; in percent.</p>"
                + metric_table(evaluated["scores"], 100)
            )
    for path, found in further.items():
        if "likelihood" in found:
            sections.append(
                "<h2>Likelihood of the truth</h2><p>Perplexity per token, and bits per byte, which models of different vocabularies can be compared by. Lower is better; chance is every token alike.</p>"
                + metric_table(found["likelihood"], 1)
            )
        if "retrieval" in found:
            sections.append(
                "<h2>Finding pictures and captions</h2><p>The right one among the candidates, ranked by the model's likelihood; between languages, captions meet through the pictures.</p>"
                + retrieval_table(found["retrieval"])
            )
        if "pairs" in found:
            sections.append(f"<h2>Compared: {esc(path.stem)}</h2>" + comparison_table(found))
        if "judge" in found:
            sections.append(f"<h2>By a judge: {esc(path.stem)}</h2>" + judge_table(found["judge"]))
    if rows:
        sections.append(
            f'<h2>Questions and answers</h2><p class="soft">Drawn by seed {seed} from all answers of the evaluation, not picked.</p>'
            + gallery(header, rows, seed, each)
        )
    if rows and attention and (model_folder / "config.json").is_file():
        sections.append(
            "<h2>Where it looks</h2><p>Where the decoder's attention lies while it says its answer, over the patches of the picture: mean of all layers and heads; orange is more. Right answers, "
            f"drawn by seed {seed}. Attention shows what was looked at, not why an answer was given.</p>"
            + attention_gallery(model_folder, header, rows, seed, attention)
        )
    lines = commands_of(folders, evaluated)
    sections.append("<h2>Every command</h2><pre>" + esc("\n".join(lines)) + "</pre>")
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{esc(title)}</title><style>{STYLE}</style></head><body><main>{"".join(sections)}</main></body></html>\n'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="the run's folder, or its stages' folders",
    )
    parser.add_argument(
        "--eval", type=Path, help="evaluate.py's file (default: eval.json in the first folder)"
    )
    parser.add_argument("-o", "--out", type=Path, help="default: report.html in the first folder")
    parser.add_argument("--seed", type=int, default=0, help="which questions are shown")
    parser.add_argument(
        "--each", type=int, default=4, help="right and wrong answers shown of each language"
    )
    parser.add_argument(
        "--attention",
        type=int,
        default=6,
        help="pictures shown with the model's attention; 0 loads no model",
    )
    args = parser.parse_args()
    for folder in args.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    out = args.out or args.folders[0] / "report.html"
    text = page(
        args.folders,
        args.eval or args.folders[0] / "eval.json",
        args.seed,
        args.each,
        args.attention,
    )
    checkpoint.write_atomically(out, lambda file: file.write(text.encode()))
    print(f"{out}: {len(text) / 1e6:.1f} MB, one file")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
