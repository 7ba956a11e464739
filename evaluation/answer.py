"""How well the model answers: per language, with intervals, beside the same model without the picture, and chance.

Where it stands: last, beside train. Four commands, the first of which needs no name; two more files go on from there:

    python evaluate.py --model out/demo/instruct --data unseen_pictures.json unseen_combinations.json -o eval.json
    python evaluate.py likelihood --model out/demo/instruct --data unseen_pictures.json --text ko.txt      # perplexity and bits per byte
    python evaluate.py retrieve   --model out/demo/instruct --data captions.json                            # picture ↔ caption, R@1, R@5, MRR
    python evaluate.py compare    full=eval.0.json,eval.1.json small=eval.2.json,eval.3.json               # runs on the same questions
    python judge.py    --help                     # preferences and grades by another model
    python report.py   out/demo                   # all of it on one page

Questions may be LLaVA-format records with their answers (each turn is one question, asked after the true answers of the turns before it), or
the public files as they are: POPE, GQA and xGQA, VQAv2 (--annotations). metrics.py says what an answer is worth.

Three rows stand for each cell, and no number without its n and its 95% interval (pictures are resampled, see metrics.bootstrap):

    full    the model with the picture
    blind   the same model and question, without the picture: what the words alone give away
    chance  always the most frequent answer to that skill in that language, as if that were known beforehand

Letters for sizes: G pictures, Q questions, S seeds, K candidates, P pictures of a batch.
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import vision
from evaluation.metrics import bootstrap, by_picture, holm, normalise, paired, t_quantile, worth
from generate import answer_batch, load_for_inference, question_parts
from training.device import pick_precision


# ---------------------------------------------------------------------------------------------- questions
def language_of(path, question):
    """A public file's language: from its folder's or its own name (xgqa/ko/…, …_ko.json), else from the question's script."""
    named = re.findall(
        r"(?<![a-z])(en|ko|zh|de|pt|ru|id|bn)(?=[/._-])", "/".join(Path(path).parts[-2:])
    )
    if named:
        return named[-1]
    return (
        "ko" if re.search("[가-힣]", question) else "zh" if re.search("[一-鿿]", question) else "en"
    )


def read_file(path, images=None, annotations=None):
    """The questions of one file: [{"split", "id", "image", "pictures", "turn", "language", "kind", "skill", "metric", "question", "truth", "turns"}].

    `turns` is what encode_chat takes; `pictures` are paths. Raises ValueError with file, record and reason."""
    path, split = Path(path), Path(path).stem
    root = Path(images) if images else path.parent

    def single(id, image, language, kind, metric, question, truth):
        return {
            "split": split,
            "id": id,
            "image": image,
            "pictures": [str(root / image)],
            "turn": 0,
            "language": language,
            "kind": kind,
            "skill": kind,
            "metric": metric,
            "question": question,
            "truth": truth,
            "turns": [(question_parts(question, 1), None)],
        }

    text = path.read_bytes() if path.is_file() else b""
    whole = None
    if text.lstrip()[:1] == b"{":
        try:
            whole = json.loads(text)
        except ValueError:
            pass  # JSON Lines, or what data.read_records will say
    questions = []
    try:
        if whole and isinstance(whole.get("questions"), list):  # VQAv2
            if not annotations:
                raise ValueError(
                    f"{path}: VQA questions want --annotations, the file with the ten answers of each"
                )
            answers = checkpoint.load_json(annotations)
            if not isinstance(answers, dict) or "annotations" not in answers:
                raise ValueError(f"{annotations}: no annotations in it")
            answers = {a["question_id"]: a for a in answers["annotations"]}
            missing = [
                q["question_id"] for q in whole["questions"] if q["question_id"] not in answers
            ]
            if missing:
                raise ValueError(
                    f"{annotations}: no annotation for {len(missing):,} questions of {path}, such as {missing[0]}"
                )
            return [
                single(
                    q["question_id"],
                    f"COCO_{whole['data_subtype']}_{q['image_id']:012}.jpg",
                    language_of(path, q["question"]),
                    answers[q["question_id"]]["answer_type"],
                    "vqa",
                    q["question"],
                    [a["answer"] for a in answers[q["question_id"]]["answers"]],
                )
                for q in whole["questions"]
            ]
        if whole and all(
            isinstance(q, dict) and "imageId" in q for q in whole.values()
        ):  # GQA, xGQA: the questions in many languages, the answers in English
            return [
                single(
                    id,
                    f"{q['imageId']}.jpg",
                    language_of(path, q["question"]),
                    q.get("types", {}).get("structural", "?"),
                    "exact",
                    q["question"],
                    q["answer"],
                )
                for id, q in whole.items()
            ]
        for i, record in enumerate(data.read_records(path)):
            if {"text", "label", "image"} <= record.keys():  # POPE
                if record["label"] not in ("yes", "no"):
                    raise ValueError(
                        f"{path}: record {i}: the label is {record['label']!r}, must be yes or no, in every language"
                    )
                questions.append(
                    single(
                        record["question_id"],
                        record["image"],
                        language_of(path, record["text"]),
                        "yes_no",
                        "pope",
                        record["text"],
                        record["label"],
                    )
                )
                continue
            try:
                turns, names = data.read_turns(record), data.image_files(record)
                markers = sum(len(parts) - 1 for parts, _ in turns)
                if markers != len(names):
                    raise ValueError(
                        f"{markers} {data.IMAGE_TOKEN} marker(s) for {len(names)} picture(s)"
                    )
            except ValueError as error:
                raise ValueError(f"{path}: record {i} (id {record.get('id')!r}): {error}") from None
            kind = record.get("kind", "?")
            for n, (parts, truth) in enumerate(turns):
                questions.append(
                    {
                        "split": split,
                        "id": record.get("id", i),
                        "image": record.get("image"),
                        "pictures": [str(root / name) for name in names],
                        "turn": n,
                        "language": record.get("language", "?"),
                        "kind": kind,
                        "skill": record.get("skill", kind),
                        "metric": "caption" if kind == "caption" else "exact",
                        "question": parts[-1].strip(),
                        "truth": truth,
                        "turns": turns[:n] + [(parts, None)],
                    }
                )
    except KeyError as error:
        raise ValueError(f"{path}: a question has no {error}") from None
    return questions


def read_questions(paths, tokenizer, config, images=None, annotations=None, suffix=""):
    """The questions of all files, each with its ids: "prompt", and "blind", the same without the picture."""
    questions, known, named = [], set(), {}
    for q in (q for path in paths for q in read_file(path, images, annotations)):
        turns = q.pop("turns")
        if suffix:
            parts = [turns[-1][0]] if isinstance(turns[-1][0], str) else turns[-1][0]
            turns = turns[:-1] + [([*parts[:-1], parts[-1] + "\n" + suffix], None)]
        without = [
            ("".join([parts] if isinstance(parts, str) else parts).strip(), answer)
            for parts, answer in turns
        ]
        q["prompt"] = data.encode_chat(turns, tokenizer, config.vision.num_patches)[0]
        q["blind"] = data.encode_chat(without, tokenizer, config.vision.num_patches)[0]
        q["pictures"] = q["pictures"][
            : sum(len(parts) - 1 for parts, _ in turns if not isinstance(parts, str))
        ]  # those shown so far
        where = f"{q['split']}: question {q['id']!r}, turn {q['turn']}"
        if len(q["prompt"]) >= config.text.max_position_embeddings:
            raise ValueError(
                f"{where}: {len(q['prompt'])} tokens, the model reads {config.text.max_position_embeddings}"
            )
        for picture in q["pictures"]:
            if picture not in known and not Path(picture).is_file():
                raise ValueError(
                    f"{where}: {picture}: no such picture (--images names the folder of a public data set's pictures)"
                )
            known.add(picture)
        if named.setdefault(name_of(q), (q["prompt"], q["pictures"])) != (
            q["prompt"],
            q["pictures"],
        ):
            raise ValueError(
                f"{where}: another question has the same name; evaluate files of one name one by one"
            )
        questions.append(q)
    if not questions:
        raise ValueError(f"{', '.join(map(str, paths))}: no questions")
    return questions


def main_truth(q):
    """The truth, or of ten annotators' answers the most frequent."""
    return q["truth"] if isinstance(q["truth"], str) else Counter(q["truth"]).most_common(1)[0][0]


# ---------------------------------------------------------------------------------------------- answers
class Batcher:
    """Cuts questions into batches of like length in which those about one picture stand together, and loads the pictures of each batch once."""

    def __init__(self, model, precision, batch_size, longest):
        self.device, self.config = model.device, model.config
        self.dtype, self.batch_size = pick_precision(precision, self.device), batch_size
        if (
            batch_size is None
        ):  # as many rows as the keys and values of half the GPU's memory, or of a gigabyte, hold
            text = self.config.text
            row = (
                longest
                * text.num_hidden_layers
                * text.num_key_value_heads
                * text.head_dim
                * 2
                * self.dtype.itemsize
            )
            room = (
                torch.cuda.mem_get_info(self.device)[0] // 2
                if self.device.type == "cuda"
                else 1 << 30
            )
            self.batch_size = max(1, min(512, room // row))

    def batches(self, lengths, pictures):
        """Lists of indices into the questions. Lengths are like in steps of 8 tokens: sorted finer, pictures would be torn apart."""
        order = sorted(
            range(len(lengths)), key=lambda i: (lengths[i] // 8, pictures[i], lengths[i])
        )
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]

    def pixels(self, pictures):
        """[paths of each row] -> (uint8 (P, 3, S, S) of the different ones or None, [their places for each row])."""
        places = {
            path: n
            for n, path in enumerate(dict.fromkeys(path for own in pictures for path in own))
        }
        size, mode = self.config.vision.image_size, self.config.image_aspect_ratio
        tensors = [vision.preprocess(vision.load_image(path), size, mode) for path in places]
        return torch.stack(tensors).to(self.device) if tensors else None, [
            [places[path] for path in own] for own in pictures
        ]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def answer_all(
    model,
    tokenizer,
    questions,
    batch_size=None,
    max_new_tokens=128,
    precision="auto",
    each=lambda n, full, blind: None,
):
    """The model's answers in the questions' order: (full, blind). `each` is told every answer as soon as it is there."""
    batcher, full, without = (
        Batcher(
            model, precision, batch_size, max(len(q["prompt"]) for q in questions) + max_new_tokens
        ),
        [None] * len(questions),
        {},
    )
    bar = tqdm(total=len(questions), desc="answers", unit="question", disable=None)
    for near in batcher.batches(
        [len(q["prompt"]) for q in questions], [q["pictures"] for q in questions]
    ):
        new = sorted(
            {tuple(questions[i]["blind"]) for i in near} - without.keys()
        )  # without the picture many questions are the same one
        pixels, pictures = batcher.pixels([questions[i]["pictures"] for i in near])
        with batcher.autocast():
            texts = answer_batch(
                model,
                tokenizer,
                [questions[i]["prompt"] for i in near],
                pixels,
                pictures=pictures,
                max_new_tokens=max_new_tokens,
            )
            without.update(
                zip(
                    new,
                    answer_batch(
                        model, tokenizer, list(map(list, new)), max_new_tokens=max_new_tokens
                    )
                    if new
                    else [],
                )
            )
        for i, text in zip(near, texts):
            full[i] = text
            each(i, text, without[tuple(questions[i]["blind"])])
        bar.update(len(near))
    bar.close()
    return full, [without[tuple(q["blind"])] for q in questions]


def chance(questions):
    """The most frequent truth of each question's split, skill and language, as the answer to it."""
    seen, written = defaultdict(Counter), {}
    key = lambda q: (q["split"], q["skill"], q["language"])
    for q in questions:
        seen[key(q)][normalise(main_truth(q))] += 1
        written.setdefault(normalise(main_truth(q)), main_truth(q))
    return [written[seen[key(q)].most_common(1)[0][0]] for q in questions]


def name_of(q):
    return json.dumps(
        [q["split"], q["id"], q["image"], q["turn"], q["question"]], ensure_ascii=False
    )


class AnswerFile:
    """NAME.answers.jsonl: a first line that says of which model, then a line for each question, appended as it is answered.

    A second run goes on where the first one stopped. Answers of another model or setting are moved aside, to NAME.answers.old.jsonl."""

    def __init__(self, path, header):
        self.path, self.given = Path(path), {}
        lines = data.read_complete_lines(self.path)
        if lines and json.loads(lines[0]) != header:
            old = self.path.with_suffix(".old.jsonl")
            os.replace(self.path, old)
            tqdm.write(
                f"{self.path}: answers of another model or setting, moved to {old.name}",
                file=sys.stderr,
            )
            lines = []
        self.file = open(self.path, "a", encoding="utf-8")
        if not lines:
            print(json.dumps(header, ensure_ascii=False), file=self.file, flush=True)
        for row in map(json.loads, lines[1:]):
            self.given[name_of(row)] = row["full"], row["blind"]

    def add(self, q, full, blind):
        row = {k: v for k, v in q.items() if k not in ("prompt", "blind", "pictures")} | {
            "full": full,
            "blind": blind,
        }
        print(json.dumps(row, ensure_ascii=False), file=self.file, flush=True)


def read_answers(path):
    """(header, rows) of an answer file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; evaluate.py -o writes it beside the scores")
    try:
        header, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        for row in rows:
            name_of(row), row["full"], row["blind"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not an answer file of evaluate.py, or cut off: the evaluate.py that made it goes on with it"
        ) from None
    return header, rows


def picture_path(header, row):
    """Where an answered question's picture lies, or None where it is no more."""
    name = row["image"] if isinstance(row["image"], str) else (row["image"] or [None])[0]
    if not name:
        return None
    roots = (
        [Path(header["images"])]
        if header.get("images")
        else [Path(p).parent for p in header["data"] if Path(p).stem == row["split"]]
    )
    return next((root / name for root in roots if (root / name).is_file()), None)


# ---------------------------------------------------------------------------------------------- tables
def cells(questions):
    """{(split, language, kind): [indices]}; "all" languages and kinds, and a kind's skills as "object.colour"."""
    found = defaultdict(list)
    for i, q in enumerate(questions):
        for language in dict.fromkeys((q["language"], "all")):
            for kind in dict.fromkeys(
                (
                    q["kind"],
                    q["kind"] if q["skill"] == q["kind"] else f"{q['kind']}.{q['skill']}",
                    "all",
                )
            ):
                found[q["split"], language, kind].append(i)
    splits = list(dict.fromkeys(split for split, _, _ in found))
    return dict(
        sorted(
            found.items(),
            key=lambda cell: (splits.index(cell[0][0]), cell[0][1] == "all", cell[0][1]),
        )
    )


def score(model_name, questions, answers):
    """Rows {"model", "split", "language", "kind", "n", "accuracy", "low", "high"}."""
    values, rows = (
        np.array([worth(q, answer)["accuracy"] for q, answer in zip(questions, answers)]),
        [],
    )
    for (split, language, kind), own in cells(questions).items():
        value, low, high = bootstrap(by_picture([questions[i] for i in own], values[own]))
        rows.append(
            {
                "model": model_name,
                "split": split,
                "language": language,
                "kind": kind,
                "n": len(own),
                "accuracy": value,
                "low": low,
                "high": high,
            }
        )
    return rows


POPE = {  # of the sums over pictures: said yes and it is there, said yes, it is there, n
    "precision": lambda s: s[..., 0] / s[..., 1],
    "recall": lambda s: s[..., 0] / s[..., 2],
    "f1": lambda s: 2 * s[..., 0] / (s[..., 1] + s[..., 2]),
    "yes_ratio": lambda s: s[..., 1] / s[..., 3],
}


def further_scores(model_name, questions, answers):
    """Rows {"metric", "model", "split", "language", "n", "value", "low", "high"}: F1, chrF, and POPE's precision, recall, F1 and yes-ratio."""
    scores, rows = [worth(q, answer) for q, answer in zip(questions, answers)], []
    for (split, language, kind), own in cells(questions).items():
        if kind != "all":
            continue
        for metric in ("f1", "chrf"):
            have = [i for i in own if metric in scores[i]]
            if have:
                value, low, high = bootstrap(
                    by_picture([questions[i] for i in have], [scores[i][metric] for i in have])
                )
                rows.append(
                    {
                        "metric": {"f1": "character F1", "chrf": "chrF"}[metric],
                        "model": model_name,
                        "split": split,
                        "language": language,
                        "n": len(have),
                        "value": value,
                        "low": low,
                        "high": high,
                    }
                )
        have = [i for i in own if "said" in scores[i]]
        if have:
            said, true = (np.array([scores[i][k] for i in have]) for k in ("said", "true"))
            columns = by_picture([questions[i] for i in have], said * true, said, true)
            for metric, statistic in POPE.items():
                with np.errstate(invalid="ignore", divide="ignore"):
                    value, low, high = bootstrap(columns, statistic)
                rows.append(
                    {
                        "metric": f"POPE {metric}",
                        "model": model_name,
                        "split": split,
                        "language": language,
                        "n": len(have),
                        "value": value,
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def interval(value, low, high, scale=100):
    """A number as tables show it: "63.9 (61.0 – 65.9)"."""
    return f"{scale * value:5.1f} ({scale * low:4.1f} – {scale * high:5.1f})"


def table(rows):
    """The rows as text for people: each kind of question, then each language; full beside blind and chance, each with its interval."""
    cell = {(r["model"], r["split"], r["language"], r["kind"]): r for r in rows}
    lines = []
    for split in dict.fromkeys(r["split"] for r in rows):
        kinds = sorted({r["kind"] for r in rows if r["split"] == split} - {"all"})
        languages = sorted({r["language"] for r in rows if r["split"] == split} - {"all"})
        lines += [
            "",
            f"{split:26}{'n':>6}  "
            + "".join(f"{m + ' % (95%)':>22}" for m in ("full", "blind", "chance")),
        ]
        for language, kind in [("all", kind) for kind in kinds] + [
            (language, "all") for language in (*languages, "all")
        ]:
            own = [cell[m, split, language, kind] for m in ("full", "blind", "chance")]
            lines.append(
                f"  {kind if language == 'all' else language:24}{own[0]['n']:>6}  "
                + "".join(f"{interval(r['accuracy'], r['low'], r['high']):>22}" for r in own)
            )
    return "\n".join(lines)


def further_table(rows):
    """F1, chrF and POPE's figures as text: a line for each metric, split and language, full beside blind and chance."""
    cell = {(r["split"], r["metric"], r["language"], r["model"]): r for r in rows}
    lines = [
        "",
        f"{'':26}{'':16}{'':9}{'n':>6}  "
        + "".join(f"{m + ' (95%)':>22}" for m in ("full", "blind", "chance")),
    ]
    for key in sorted({key[:3] for key in cell}):
        own = [cell[(*key, m)] for m in ("full", "blind", "chance")]
        lines.append(
            f"{key[0]:26}{key[1]:16}{key[2]:9}{own[0]['n']:>6}  "
            + "".join(f"{interval(r['value'], r['low'], r['high']):>22}" for r in own)
        )
    return "\n".join(lines) if rows else ""


# ---------------------------------------------------------------------------------------------- likelihood and retrieval
@torch.inference_mode()
def log_likelihoods(model, items, batcher):
    """log P(answer | prompt, pictures) of each (prompt ids, paths of its pictures, answer ids), natural logarithm."""
    result, image = [0.0] * len(items), model.config.image_token_id
    for near in tqdm(
        batcher.batches([len(p) + len(a) for p, _, a in items], [paths for _, paths, _ in items]),
        desc="likelihood",
        unit="batch",
        disable=None,
    ):
        rows = [items[i] for i in near]
        batch = data.collate(
            [
                data.Sample(prompt + answer, [0] * len(prompt) + [1] * len(answer), [])
                for prompt, _, answer in rows
            ],
            model.config.pad_token_id,
        )
        ids, targets = batch["ids"].to(batcher.device), batch["targets"].to(batcher.device)
        pixels, places = batcher.pixels([paths for _, paths, _ in rows])
        with batcher.autocast():
            x = model.decoder.embed_tokens(ids)
            if pixels is not None:  # each picture is seen once, however many rows show it
                patches = model.encode_images(pixels)[[place for own in places for place in own]]
                x = x.masked_scatter((ids == image)[..., None], patches.to(x.dtype))
            wanted = targets != data.IGNORE_INDEX
            logits = model.logits(model.decoder(x)[wanted])  # (learnt tokens, V)
        logp = logits.log_softmax(-1).gather(1, targets[wanted][:, None])[:, 0].double()
        sums = torch.zeros(len(rows), dtype=torch.float64, device=logp.device).index_add(
            0, wanted.nonzero()[:, 0], logp
        )
        for i, value in zip(near, sums.tolist()):
            result[i] = value
    return result


def likelihood_rows(questions, logps, tokens, vocab_size):
    """Rows of perplexity and bits per byte for each split and language. Bits per byte compare models of different vocabularies, perplexities do not:
    it is the answer's log-likelihood, its </s> included, over the bytes of its UTF-8."""
    rows = []
    size = np.array([len(main_truth(q).encode()) for q in questions], float)
    tokens = np.array(tokens, float)
    languages = Counter(
        split for split, language in {(q["split"], q["language"]) for q in questions}
    )
    statistics = {
        "perplexity": lambda s: np.exp(s[..., 0] / s[..., 1]),
        "bits per byte": lambda s: s[..., 0] / s[..., 2] / math.log(2),
    }
    for model_name, logp in (logps | {"chance": -tokens * math.log(vocab_size)}).items():
        for (split, language, kind), own in cells(questions).items():
            if kind == "all" and (language != "all" or languages[split] > 1):
                columns = by_picture(
                    [questions[i] for i in own], -np.array(logp)[own], tokens[own], size[own]
                )
                for metric, statistic in statistics.items():
                    value, low, high = bootstrap(columns, statistic)
                    rows.append(
                        {
                            "metric": metric,
                            "model": model_name,
                            "split": split,
                            "language": language,
                            "n": len(own),
                            "value": value,
                            "low": low,
                            "high": high,
                        }
                    )
    return rows


def rank_scores(scores, right):
    """What a row of K scores is worth, ties broken at random (in expectation): {"R@1", "R@5", "MRR"}."""
    above, equal = int((scores > scores[right]).sum()), int((scores == scores[right]).sum())
    within = lambda k: min(max(k - above, 0), equal) / equal
    return {
        "R@1": within(1),
        "R@5": within(5),
        "MRR": sum(1 / r for r in range(above + 1, above + equal + 1)) / equal,
    }


def retrieve(likelihood, blind, languages):
    """likelihood[l] (K, K): log P(caption j of language l | picture i); blind[l] (K,): without a picture. -> {(direction, model): [rank_scores of each query]}.

    picture → caption ranks by log P(c | picture) − log P(c), how much likelier the picture makes a caption: plain likelihood (the "raw" rows) prefers
    short and common ones. caption → picture needs no such thing, for there the caption is fixed. caption → caption goes through the pictures:
    Σ_p P(p | c) · P(c' | p) / P(c'), with P(p | c) the softmax over the pool's pictures."""
    K, found = len(next(iter(blind.values()))), defaultdict(list)
    for l in languages:
        L, b = likelihood[l], blind[l]
        for i in range(K):
            for direction, model_name, scores in (
                (f"picture → {l}", "full", L[i] - b),
                (f"picture → {l}", "blind", np.zeros(K)),
                (f"picture → {l}, raw", "full", L[i]),
                (f"picture → {l}, raw", "blind", b),
                (f"{l} → picture", "full", L[:, i]),
                (f"{l} → picture", "blind", np.full(K, b[i])),
            ):
                found[direction, model_name].append(rank_scores(scores, i))
        of_picture = np.exp(
            L - np.logaddexp.reduce(L, axis=0)
        )  # (pictures, captions of l): P(picture | caption)
        for other in languages:
            if other != l:
                gain = (
                    likelihood[other] - blind[other]
                )  # (pictures, captions of the other language)
                for i in range(K):
                    with np.errstate(divide="ignore"):
                        found[f"{l} → {other}", "full"].append(
                            rank_scores(
                                np.logaddexp.reduce(
                                    np.log(of_picture[:, i])[:, None] + gain, axis=0
                                ),
                                i,
                            )
                        )
                    found[f"{l} → {other}", "blind"].append(rank_scores(np.zeros(K), i))
    for direction in dict.fromkeys(direction for direction, _ in found):
        found[direction, "chance"] = [rank_scores(np.zeros(K), 0)] * K
    return found


def read_captions(paths, images=None, seed=0):
    """({picture: {language: caption}}, languages, {language: question}): pictures with a caption in every language, no caption twice; order by seed."""
    said, asked = defaultdict(dict), defaultdict(Counter)
    for path in paths:
        for q in read_file(path, images):
            if q["turn"] == 0 and len(q["pictures"]) == 1 and isinstance(q["truth"], str):
                said[q["pictures"][0]].setdefault(q["language"], q["truth"])
                asked[q["language"]][q["question"]] += 1
    languages = sorted(asked)
    pictures, seen = [p for p in sorted(said) if len(said[p]) == len(languages)], set()
    np.random.default_rng(seed).shuffle(pictures)
    chosen = {}
    for picture in pictures:
        if not seen & set(said[picture].values()):
            chosen[picture] = said[picture]
            seen |= set(said[picture].values())
    return chosen, languages, {l: c.most_common(1)[0][0] for l, c in asked.items()}


# ---------------------------------------------------------------------------------------------- comparing runs
def read_runs(paths, languages=None):
    """The answer files of one recipe's runs (seeds): (questions, full (S, Q), blind (S, Q)), each score an accuracy; of some languages only, where said."""
    runs, questions = {"full": [], "blind": []}, None
    for path in paths:
        path = Path(path)
        _, rows = read_answers(
            path if path.name.endswith(".answers.jsonl") else path.with_suffix(".answers.jsonl")
        )
        rows = sorted(
            (row for row in rows if not languages or row["language"] in languages), key=name_of
        )
        if not rows:
            raise ValueError(
                f"{path}: no questions" + (f" in {', '.join(languages)}" if languages else "")
            )
        if questions is not None and [name_of(q) for q in rows] != [name_of(q) for q in questions]:
            raise ValueError(
                f"{path}: not the questions of {paths[0]}, so they can't be compared pair by pair"
            )
        questions = questions or rows
        for which, scores in runs.items():
            scores.append([worth(q, q[which])["accuracy"] for q in rows])
    return questions, np.array(runs["full"]), np.array(runs["blind"])


def welch(a, b):
    """Difference of the means of two small samples with its 95% interval (Welch 1947): are these *recipes* different, whatever the seed?"""
    var_a, var_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    difference = float(np.mean(a) - np.mean(b))
    if not var_a + var_b:
        return difference, difference, difference
    df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = t_quantile(df) * math.sqrt(var_a + var_b)
    return difference, difference - half, difference + half


def compare(groups):
    """groups {name: (questions, full (S, Q), blind)}: (rows of each model, rows of each against the first), by split and language."""
    names = list(groups)
    questions = groups[names[0]][0]
    for name in names[1:]:
        if [name_of(q) for q in groups[name][0]] != [name_of(q) for q in questions]:
            raise ValueError(
                f"{name}: not the questions of {names[0]}, so they can't be compared pair by pair"
            )
    models, pairs = [], []
    guesses = np.array(
        [worth(q, guess)["accuracy"] for q, guess in zip(questions, chance(questions))]
    )
    spoken = Counter(split for split, _ in {(q["split"], q["language"]) for q in questions})
    for (split, language, kind), own in cells(questions).items():
        if kind != "all":
            continue
        mine = [questions[i] for i in own]
        for name, (_, full, blind) in groups.items():
            for which, scores in (("full", full), ("blind", blind)):
                value, low, high = bootstrap(by_picture(mine, scores[:, own].mean(0)))
                models.append(
                    {
                        "model": name if which == "full" else f"{name}, blind",
                        "split": split,
                        "language": language,
                        "n": len(own),
                        "accuracy": value,
                        "low": low,
                        "high": high,
                        "seeds": scores[:, own].mean(1).tolist(),
                    }
                )
        value, low, high = bootstrap(by_picture(mine, guesses[own]))
        models.append(
            {
                "model": "chance",
                "split": split,
                "language": language,
                "n": len(own),
                "accuracy": value,
                "low": low,
                "high": high,
                "seeds": [value],
            }
        )
        for name in (
            names[1:] if language != "all" or spoken[split] > 1 else ()
        ):  # of one language "all" would be the same comparison again
            a, b = groups[name][1][:, own], groups[names[0]][1][:, own]
            row = {
                "model": name,
                "against": names[0],
                "split": split,
                "language": language,
            } | paired(mine, a.mean(0), b.mean(0))
            if min(len(a), len(b)) > 1:
                row["seeds_low"], row["seeds_high"] = welch(a.mean(1), b.mean(1))[1:]
            pairs.append(row)
    for row, p in zip(pairs, holm([row["p"] for row in pairs])):
        row["p_holm"] = p
    return models, pairs


def standing(row, level=0.05):
    """What a comparison shows: "recipe", "seeds", "models", "open" or "same", see STANDING."""
    if row["low"] == row["high"] == 0:
        return "same"
    if row["p_holm"] >= level or row["low"] <= 0 <= row["high"]:
        return "open"
    if "seeds_low" not in row:
        return "models"
    return "seeds" if row["seeds_low"] <= 0 <= row["seeds_high"] else "recipe"


STANDING = {
    "recipe": "Supported, for it outweighs how much seeds differ, so that the recipe makes the difference:",
    "seeds": "Only these trained models differ; seeds differ too much to lay it to the recipe:",
    "models": "These two trained models differ; one seed says nothing of what another would give:",
    "open": "Not shown, and not ruled out up to {most:.1f} points:",
    "same": "No difference at all, each question is worth the same to both:",
}


def conclusions(pairs):
    """What the numbers of a comparison support, and what they don't, in sentences."""
    said = [
        f"In points against {pairs[0]['against']}, with 95% intervals over pictures; {len(pairs)} comparisons, their p values corrected together (Holm); intervals over seeds stand each by itself, and one in twenty excludes 0 by chance."
    ]
    for kind, words in STANDING.items():
        rows, found = (
            [r for r in pairs if standing(r) == kind and r["language"] != "all"],
            defaultdict(lambda: defaultdict(list)),
        )
        for r in rows:
            points = (
                f" {100 * r['difference']:+.1f} ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"
            )
            found[r["model"]][r["split"].replace("_", " ")].append(
                r["language"] + points * (kind != "same")
            )
        if found:
            most = 100 * max(abs(r[end]) for r in rows for end in ("low", "high"))
            said.append(
                words.format(most=most)
                + " "
                + "; ".join(
                    model
                    + ": "
                    + " · ".join(f"{split} {', '.join(own)}" for split, own in cells.items())
                    for model, cells in found.items()
                )
                + "."
            )
    return [
        *said,
        "All of it holds for other questions of these kinds; none of it speaks of other data, sizes or lengths of training.",
    ]


def compare_tables(models, pairs):
    """The rows as text for people: accuracies with a column for each language, then the differences."""
    width, cell, lines = (
        max(len(r["model"]) for r in models) + 2,
        {(r["split"], r["model"], r["language"]): r for r in models},
        [],
    )
    for split in dict.fromkeys(r["split"] for r in models):
        names = list(dict.fromkeys(m for s, m, _ in cell if s == split))
        languages = list(dict.fromkeys(l for s, _, l in cell if s == split))
        heads = [f"{l}, n {cell[split, names[0], l]['n']:,}" for l in languages]
        lines += [
            "",
            f"{split}, % (95%)",
            " " * (width + 2) + "".join(f"{head:>22}" for head in heads) + "    all, each seed",
        ]
        for name in names:
            rows = [cell[split, name, l] for l in languages]
            seeds = " ".join(f"{100 * s:.1f}" for s in rows[-1]["seeds"])
            lines.append(
                f"  {name:{width}}"
                + "".join(f"{interval(r['accuracy'], r['low'], r['high']):>22}" for r in rows)
                + "    "
                + seeds
            )
    first = f"against {pairs[0]['against']}"
    lines += [
        "",
        f"{first:{width + 2}}{'split':21}{'language':9}{'n':>6}{'pictures':>9}  difference (95%)            d_z       p  p (Holm)   over seeds (95%)",
    ]
    for r in pairs:
        difference = (
            f"{100 * r['difference']:+6.1f} ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"
        )
        seeds = (
            f"{100 * r['seeds_low']:+.1f} to {100 * r['seeds_high']:+.1f}"
            if "seeds_low" in r
            else "one seed"
        )
        lines.append(
            f"  {r['model']:{width}}{r['split']:21}{r['language']:9}{r['n']:>6}{r['pictures']:>9}  {difference:24}{r['effect']:>7.2f}  {r['p']:6.4f}  {r['p_holm']:8.4f}   {seeds}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- commands
def write_json(path, value):
    """JSON knows no infinity: the ends of an interval that has none, of a single picture say, become null."""
    finite = lambda x: (
        {k: finite(v) for k, v in x.items()}
        if isinstance(x, dict)
        else [finite(v) for v in x]
        if isinstance(x, (list, tuple))
        else None
        if isinstance(x, float) and not math.isfinite(x)
        else x
    )
    checkpoint.write_atomically(
        path,
        lambda file: file.write(
            (json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n").encode()
        ),
    )


def weights_of(folder):
    """What tells a model's weights from others: names, sizes and times of its files."""
    return [
        [f.name, f.stat().st_size, f.stat().st_mtime_ns]
        for f in sorted(Path(folder).glob("*.safetensors"))
    ]


def answer_command(args):
    model, tokenizer = load_for_inference(args.model)
    questions = read_questions(
        args.data, tokenizer, model.config, args.images, args.annotations, args.suffix
    )
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "precision": args.precision,
        "suffix": args.suffix,
        "data": args.data,
        "images": args.images,
    }
    header = {
        "model": args.model,
        "weights": weights_of(args.model),
        "asked": [[Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path in args.data],
        **settings,
    }
    kept = AnswerFile(Path(args.out).with_suffix(".answers.jsonl"), header) if args.out else None
    given = kept.given if kept else {}
    todo = [q for q in questions if name_of(q) not in given]
    if given:
        print(
            f"{len(questions) - len(todo):,} of {len(questions):,} questions were answered before"
        )
    if todo:
        full, blind = answer_all(
            model,
            tokenizer,
            todo,
            args.batch_size,
            args.max_new_tokens,
            args.precision,
            lambda i, *texts: kept and kept.add(todo[i], *texts),
        )
        given = given | {name_of(q): pair for q, pair in zip(todo, zip(full, blind))}
    answers = {
        "full": [given[name_of(q)][0] for q in questions],
        "blind": [given[name_of(q)][1] for q in questions],
        "chance": chance(questions),
    }
    rows = [row for name, own in answers.items() for row in score(name, questions, own)]
    further = [row for name, own in answers.items() for row in further_scores(name, questions, own)]
    print(table(rows), further_table(further), sep="\n")
    if args.out:
        write_json(
            args.out, {"model": args.model, "rows": rows, "scores": further, "settings": settings}
        )
        print(f"\n{len(questions):,} questions; rows in {args.out}, answers in {kept.path}")


def likelihood_command(args):
    model, tokenizer = load_for_inference(args.model)
    config, questions, items = model.config, [], {"full": [], "blind": []}
    if args.data:
        questions = read_questions(
            args.data, tokenizer, config, args.images, args.annotations, args.suffix
        )
        for q in questions:
            answer = tokenizer.encode(main_truth(q)) + [tokenizer.eos_id]
            items["full"].append((q["prompt"], q["pictures"], answer))
            items["blind"].append((q["blind"], [], answer))
    rows = []

    def measure(questions, items):
        batcher = Batcher(
            model,
            args.precision,
            args.batch_size,
            max(len(p) + len(a) for own in items.values() for p, _, a in own),
        )
        logps = {name: log_likelihoods(model, own, batcher) for name, own in items.items()}
        return likelihood_rows(
            questions,
            logps,
            [len(a) for _, _, a in next(iter(items.values()))],
            config.text.vocab_size,
        )

    if questions:
        rows += measure(questions, items)
    for path in args.text:  # plain text: a line is a document, and there is no picture to withhold
        documents, most = [], config.text.max_position_embeddings
        for line in filter(
            None,
            (
                data.decode_line(line, path, number)
                for number, line in enumerate(Path(path).read_bytes().splitlines(), 1)
            ),
        ):
            ids = [tokenizer.bos_id, *tokenizer.encode(line), tokenizer.eos_id]
            documents += [
                ids[at : at + most] for at in range(0, len(ids) - 1, most - 1)
            ]  # a long one goes on, from its last token
        asked = [
            {
                "split": Path(path).stem,
                "id": i,
                "image": None,
                "language": Path(path).stem,
                "kind": "text",
                "skill": "text",
                "truth": tokenizer.decode(ids),
            }
            for i, ids in enumerate(documents)
        ]
        rows += measure(asked, {"full": [(ids[:1], [], ids[1:]) for ids in documents]})
    if not rows:
        raise ValueError("give --data, --text or both")
    for row in rows:
        print(
            f"{row['split']:24}{row['language']:>6}{row['model']:>8}  {row['metric']:14}{row['n']:>7}  {row['value']:10.3f} ({row['low']:.3f} – {row['high']:.3f})"
        )
    if args.out:
        write_json(args.out, {"model": args.model, "likelihood": rows})


def retrieve_command(args):
    model, tokenizer = load_for_inference(args.model)
    said, languages, asked = read_captions(args.data, args.images, args.seed)
    pools = min(args.pictures, len(said)) // args.pool
    if not pools:
        raise ValueError(
            f"{len(said)} pictures have a caption of their own in each of {', '.join(languages) or 'no language'}; a pool takes {args.pool}"
        )
    pictures, N = list(said)[: pools * args.pool], model.config.vision.num_patches
    prompts = {
        l: data.encode_chat([(question_parts(asked[l], 1), None)], tokenizer, N)[0]
        for l in languages
    }
    blinds = {l: data.encode_chat([(asked[l], None)], tokenizer, N)[0] for l in languages}
    items, places = [], []
    for at, picture in enumerate(pictures):
        pool = at // args.pool * args.pool
        for l in languages:
            for j in range(pool, pool + args.pool):
                answer = tokenizer.encode(said[pictures[j]][l]) + [tokenizer.eos_id]
                items.append((prompts[l], [picture], answer))
                places.append((l, at // args.pool, at - pool, j - pool))
            items.append((blinds[l], [], tokenizer.encode(said[picture][l]) + [tokenizer.eos_id]))
            places.append((l, at // args.pool, None, at - pool))
    batcher = Batcher(
        model, args.precision, args.batch_size, max(len(p) + len(a) for p, _, a in items)
    )
    K = args.pool
    likelihood, blind = (
        {l: np.zeros((pools, *shape)) for l in languages} for shape in ((K, K), (K,))
    )
    for (l, pool, i, j), value in zip(places, log_likelihoods(model, items, batcher)):
        (blind[l][pool] if i is None else likelihood[l][pool, i])[j] = value
    found = defaultdict(list)
    for pool in range(pools):
        for key, scores in retrieve(
            {l: likelihood[l][pool] for l in languages},
            {l: blind[l][pool] for l in languages},
            languages,
        ).items():
            found[key] += scores
    rows = []
    print(f"{len(pictures)} queries in {pools} pools of {K}; each measure with its 95% interval")
    for (direction, model_name), scores in sorted(
        found.items(), key=lambda item: (item[0][0], ("full", "blind", "chance").index(item[0][1]))
    ):
        row = {"direction": direction, "model": model_name, "n": len(scores), "pool": K}
        for metric in scores[0]:
            values = [s[metric] for s in scores]
            row[metric] = (
                (values[0],) * 3
                if model_name == "chance"
                else bootstrap(np.stack([values, np.ones(len(values))], axis=1))
            )
        rows.append(row)
        print(
            f"{direction:20}{model_name:>8}{row['n']:>6}  "
            + "   ".join(
                f"{m} {100 * row[m][0]:5.1f} ({100 * row[m][1]:.1f} – {100 * row[m][2]:.1f})"
                for m in scores[0]
            )
        )
    if args.out:
        write_json(args.out, {"model": args.model, "retrieval": rows})


def compare_command(args):
    groups = {}
    for given in args.runs:
        name, paths = (
            given.split("=", 1)
            if "=" in given
            else (Path(given).stem if Path(given).stem != "eval" else given, given)
        )
        if name in groups:
            raise ValueError(f"{name}: named twice")
        groups[name] = read_runs(paths.split(","), args.languages)
    if len(groups) < 2:
        raise ValueError(
            "give two runs or more, as NAME=eval.json or, with several seeds, NAME=a.json,b.json"
        )
    models, pairs = compare(groups)
    print(compare_tables(models, pairs), "", *conclusions(pairs), sep="\n")
    if args.out:
        write_json(args.out, {"models": models, "pairs": pairs, "conclusions": conclusions(pairs)})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="answer | likelihood | retrieve | compare"
    )
    for name, command, about in (
        ("answer", answer_command, "answers and their accuracy (the default)"),
        (
            "likelihood",
            likelihood_command,
            "perplexity and bits per byte of the true answers, and of plain text",
        ),
        (
            "retrieve",
            retrieve_command,
            "pictures from captions, captions from pictures, captions from captions of another language",
        ),
    ):
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=command)
        sub.add_argument("--model", required=True)
        sub.add_argument(
            "--data",
            nargs="+",
            required=name != "likelihood",
            default=[],
            help="files of questions and answers; a file's name is its split's",
        )
        sub.add_argument("--images", help="the folder of the pictures (default: the file's own)")
        sub.add_argument(
            "-o",
            "--out",
            help="JSON with the rows"
            + (
                "; every answer goes beside it, into NAME.answers.jsonl" if name == "answer" else ""
            ),
        )
        sub.add_argument(
            "--batch-size",
            type=int,
            help="default: as many rows as the cache has room for, 512 at most",
        )
        sub.add_argument(
            "--precision",
            choices=["auto", "bf16", "fp32"],
            default="auto",
            help="auto: bf16 where the machine has it",
        )
        if name == "retrieve":
            sub.add_argument("--pictures", type=int, default=200, help="so many at most")
            sub.add_argument("--pool", type=int, default=20, help="candidates for each query")
            sub.add_argument(
                "--seed", type=int, default=0, help="which pictures, and which share a pool"
            )
            continue
        sub.add_argument("--annotations", help="VQAv2's file of ten answers for each question")
        sub.add_argument(
            "--suffix",
            default="",
            help='a line after each question, such as LLaVA-1.5\'s "Answer the question using a single word or phrase."',
        )
        if name == "answer":
            sub.add_argument(
                "--max-new-tokens", type=int, default=128, help="tokens of an answer at most"
            )
        else:
            sub.add_argument(
                "--text",
                nargs="+",
                default=[],
                help="text files, one document a line, named by their language",
            )
    sub = commands.add_parser(
        "compare",
        help="runs on the same questions",
        description="runs on the same questions: differences from the first, with intervals, effect sizes and corrected p values",
    )
    sub.set_defaults(run=compare_command)
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="NAME=FILE[,FILE…]",
        help="evaluate.py's -o files of one model; several for its seeds",
    )
    sub.add_argument(
        "--languages",
        nargs="+",
        help="only questions in these, such as those that all models were taught",
    )
    sub.add_argument("-o", "--out", help="JSON with the rows")
    argv = sys.argv[1:]
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["answer", *argv]
    args = parser.parse_args(argv)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
