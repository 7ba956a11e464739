"""How well the model answers, per split, language and kind of question, beside the same model without the picture, and chance.

Where it stands: last, beside train. Questions are LLaVA-format records with their answers; each turn of a conversation is one question, asked
after the true answers of the turns before it. An answer is right if it equals the truth (exact match, after `normalise`).

    python evaluate.py --model out/demo/instruct --data unseen_pictures.json unseen_combinations.json -o eval.json

Three rows stand for each cell:
    full    the model with the picture
    blind   the same model and question, without the picture: what the words alone give away
    chance  always the most frequent answer to that skill in that language, as if that were known beforehand
`low` and `high` are Wilson's 95% interval for the accuracy.
"""

import argparse
import json
import math
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
from generate import answer_batch, load
from train import pick_precision


def normalise(text):
    """What two equal answers agree in: Unicode NFC, no case, single spaces, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".。!")


def wilson(right, n, z=1.959964):
    """95% score interval of a proportion (Wilson 1927): unlike ± 2 standard errors it holds near 0 and 1."""
    if not n:
        return 0.0, 1.0
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def read_questions(path, tokenizer, config):
    """The turns of a file as questions: [{"split", "language", "kind", "skill", "truth", "question", "prompt" and "blind" ids, "pixels"}]."""
    samples, questions = data.Chats([path], tokenizer, config, config.text.max_position_embeddings), []
    for i in range(len(samples)):
        record, (_, _, pixels) = samples.record(i), samples.sample(i)
        turns = data.read_turns(record)
        for n, (question, truth) in enumerate(turns):
            asked = turns[:n] + [(question, None)]
            prompt, _ = data.encode_chat(asked, tokenizer, config.vision.num_patches)
            blind, _ = data.encode_chat([("".join(parts).strip(), answer) for parts, answer in asked], tokenizer, config.vision.num_patches)
            questions.append({"split": Path(path).stem, "id": record.get("id"), "image": record.get("image"), "pictures": [f"{Path(path).parent / name}" for name in data.picture_names(record)], "turn": n, "language": record.get("language", "?"), "kind": record.get("kind", "?"),
                              "skill": record.get("skill", record.get("kind", "?")), "question": question[-1].strip(), "truth": truth, "prompt": prompt, "blind": blind, "pixels": pixels})  # fmt: skip
    return questions


def answer_all(model, tokenizer, questions, blind, batch_size=None, max_new=64, precision="auto"):
    """The model's answers, in the questions' order.

    Each different prompt is answered once: without the picture many are the same. A batch has prompts of like length (in steps of 8 tokens) and in
    it those about one picture stand together, because generate() reads a picture once a batch."""
    device, config, which = model.decoder.norm.device, model.config, "blind" if blind else "prompt"
    key = lambda q: (len(q[which]) // 8, () if blind else q["pictures"], q[which])
    keys = [key(q) for q in questions]
    first = {k: i for i, k in reversed(list(enumerate(map(repr, keys))))}  # the first question with this prompt
    order = sorted(first.values(), key=lambda i: keys[i])
    dtype, answers = pick_precision(precision, device), {}
    if batch_size is None:
        longest, text = max(len(q[which]) for q in questions) + max_new, config.text
        cache = longest * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * dtype.itemsize  # bytes of a row
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
        batch_size = max(1, min(512, budget // cache))
    for start in tqdm(range(0, len(order), batch_size), desc="blind" if blind else "full", unit="batch", disable=None):
        near = order[start : start + batch_size]
        pixels = {} if blind else {picture: tensor for i in near for picture, tensor in zip(questions[i]["pictures"], questions[i]["pixels"])}
        places = {picture: n for n, picture in enumerate(pixels)}
        pictures = [[] if blind else [places[picture] for picture in questions[i]["pictures"]] for i in near]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            texts = answer_batch(model, tokenizer, [questions[i][which] for i in near], torch.stack(list(pixels.values())).to(device) if pixels else None, pictures=pictures, max_new=max_new)
        answers.update(zip(near, texts))
    return [answers[first[repr(k)]] for k in keys]


def chance(questions):
    """The most frequent truth of each question's split, skill and language, as the answer to it."""
    seen = defaultdict(Counter)
    key = lambda q: (q["split"], q["skill"], q["language"])
    for q in questions:
        seen[key(q)][normalise(q["truth"])] += 1
    return [seen[key(q)].most_common(1)[0][0] for q in questions]


def score(model_name, questions, answers):
    """Rows {"model", "split", "language", "kind", "n", "accuracy", "low", "high"}; a kind such as "object.colour" is one skill of its kind."""
    cells = defaultdict(lambda: [0, 0])
    for q, answer in zip(questions, answers):
        right = normalise(answer) == normalise(q["truth"])
        for language in (q["language"], "all"):
            for kind in dict.fromkeys((q["kind"], q["kind"] if q["skill"] == q["kind"] else f"{q['kind']}.{q['skill']}", "all")):
                cell = cells[q["split"], language, kind]
                cell[0] += right
                cell[1] += 1
    rows = []
    for (split, language, kind), (right, n) in cells.items():
        low, high = wilson(right, n)
        rows.append({"model": model_name, "split": split, "language": language, "kind": kind, "n": n, "accuracy": right / n, "low": low, "high": high})
    return rows


def table(rows):
    """The rows as text for people: a line for each kind of question, full beside blind and chance, then the languages."""
    cell = {(r["model"], r["split"], r["language"], r["kind"]): r for r in rows}
    lines = []
    for split in dict.fromkeys(r["split"] for r in rows):
        kinds = sorted({r["kind"] for r in rows if r["split"] == split} - {"all"}) + ["all"]
        languages = sorted({r["language"] for r in rows if r["split"] == split} - {"all"})
        lines += ["", f"{split:24}{'n':>6}  {'full':>6}  {'95% interval':14}{'blind':>6}{'chance':>8}   " + "".join(f"{l:>7}" for l in languages)]
        for kind in kinds:
            full, blind, guess = (cell[m, split, "all", kind] for m in ("full", "blind", "chance"))
            by_language = "".join(f"{100 * cell['full', split, l, kind]['accuracy']:6.1f}%" if ("full", split, l, kind) in cell else f"{'–':>7}" for l in languages)
            lines.append(f"  {kind:22}{full['n']:>6}  {100 * full['accuracy']:5.1f}%  {100 * full['low']:5.1f} – {100 * full['high']:5.1f}  {100 * blind['accuracy']:5.1f}%{100 * guess['accuracy']:7.1f}%   {by_language}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="LLaVA files of questions and answers; a file's name is its split's")
    parser.add_argument("-o", "--out", help="JSON with the rows; every answer goes beside it, into NAME.answers.jsonl")
    parser.add_argument("--batch-size", type=int, help="default: as many rows as the cache has room for, 512 at most")
    parser.add_argument("--max-new", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    questions = [q for path in args.data for q in read_questions(path, tokenizer, model.config)]
    answers = {"full": answer_all(model, tokenizer, questions, False, args.batch_size, args.max_new, args.precision), "blind": answer_all(model, tokenizer, questions, True, args.batch_size, args.max_new, args.precision), "chance": chance(questions)}
    rows = [row for name, given in answers.items() for row in score(name, questions, given)]
    print(table(rows))
    if args.out:
        out = Path(args.out)
        with open(out.with_suffix(".answers.jsonl"), "w", encoding="utf-8") as file:
            for i, q in enumerate(questions):
                row = {k: v for k, v in q.items() if k not in ("prompt", "blind", "pictures", "pixels")} | {"full": answers["full"][i], "blind": answers["blind"][i]}
                print(json.dumps(row, ensure_ascii=False), file=file)
        beside = out.with_suffix(".tmp")
        beside.write_text(json.dumps({"model": args.model, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(out)
        print(f"\n{len(questions):,} questions; rows in {out}, answers in {out.with_suffix('.answers.jsonl')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
