"""Runs compared on the same questions: what their differences support, and what they don't.

    python -m evaluation compare full=eval.0.json,eval.1.json small=eval.2.json,eval.3.json

A run is a name and its -o files of `answer`, one per seed. Each is compared with the first run: the
difference with its interval over images, an effect size, a permutation test with Holm's correction
and, of several seeds, Welch's interval.

Dimensions: S seeds of a run, Q questions.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from evaluation import metrics
from evaluation.answer import read_answers
from evaluation.questions import question_name
from evaluation.scores import accuracy_row, count_languages, group_indices, most_frequent_answers
from evaluation.tables import show_results
from vocabulary import flags
from vocabulary.files import read_json


def score_accuracy(questions, answers):
    """The accuracies of answers, a list (Q,)."""
    return [score["accuracy"] for score in map(metrics.score_answer, questions, answers)]


def read_run(paths, languages, questions):
    """A run's seeds: (questions by name, accuracies full (S, Q) and blind (S, Q)). questions: None
    or those of the first run."""
    full, blind = [], []
    for path in paths:
        _, answered = read_answers(path)
        if missing := set(languages or ()) - {q.language for q in answered}:
            raise ValueError(f"{path}: no questions in {', '.join(sorted(missing))} (--languages)")
        answered = [q for q in answered if not languages or q.language in languages]
        if not answered:
            raise ValueError(f"{path}: no questions")

        # After an interruption a file has its questions in another order.
        answered.sort(key=question_name)
        questions = questions or answered
        asked, first = ([(question_name(q), q.truth) for q in own] for own in (answered, questions))
        if asked != first:
            raise ValueError(f"{path}: not the questions of the first file; compare needs the same")
        full.append(score_accuracy(answered, (q.full for q in answered)))
        blind.append(score_accuracy(answered, (q.blind for q in answered)))
    return questions, np.array(full), np.array(blind)


def welch(a, b):
    """(difference, low, high) of the means of two small samples (Welch 1947): the difference ± t·s,
    s² = s²_a/n_a + s²_b/n_b, with s⁴ / (Σ (s²_i/n_i)² / (n_i − 1)) degrees of freedom of t."""
    var_a, var_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    difference = float(np.mean(a) - np.mean(b))
    # Seeds that agree to the digit leave nothing to estimate a spread from.
    if not var_a + var_b:
        return difference, difference, difference
    df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = metrics.t_quantile(df) * math.sqrt(var_a + var_b)
    return difference, difference - half, difference + half


def compare(questions, runs):
    """runs: {name: (full, blind)} -> (rows of each run, rows of each against the first)."""
    # Accuracies (S, Q) of each run, of each without images, and of chance
    first, *others = runs
    scores = {}
    for name, (full, blind) in runs.items():
        scores |= {name: full, f"{name}, blind": blind}
    scores["chance"] = np.array([score_accuracy(questions, most_frequent_answers(questions))])

    num_languages = count_languages(questions)
    models, pairs = [], []
    for (split, language, kind), indices in group_indices(questions).items():
        if kind != "all":
            continue
        own = [questions[i] for i in indices]
        group = {"split": split, "language": language}
        for name, values in scores.items():
            row = accuracy_row(own, values[:, indices].mean(0), model=name, **group)
            models.append(row | {"seeds": values[:, indices].mean(1).tolist()})

        # With one language, "all" would be the same comparison again.
        if language == "all" and num_languages[split] == 1:
            continue
        for name in others:
            a, b = scores[name][:, indices], scores[first][:, indices]
            row = {"model": name, "against": first, **group}
            row |= metrics.paired_comparison(own, a.mean(0), b.mean(0))
            if min(len(a), len(b)) > 1:
                _, row["seeds_low"], row["seeds_high"] = welch(a.mean(1), b.mean(1))
            pairs.append(row)

    # Of many comparisons some look significant by chance alone.
    for row, p in zip(pairs, metrics.holm([row["p"] for row in pairs])):
        row["p_holm"] = p
    return models, pairs


# A sentence for each kind of evidence, and what holds for all of them
SENTENCES = read_json(Path(__file__).with_name("conclusions.json"))


def evidence_level(row, level=0.05):
    """What a comparison shows: a key of SENTENCES."""
    if not row["different"]:
        return "same"
    if row["p_holm"] >= level or row["low"] <= 0 <= row["high"]:
        return "open"
    if "seeds_low" not in row:
        return "models"
    return "seeds" if row["seeds_low"] <= 0 <= row["seeds_high"] else "recipe"


def conclusions(pairs):
    """Sentences: what the numbers of a comparison support, and what they don't."""
    intro, *evidence, scope = SENTENCES
    sentences = [SENTENCES[intro].format(first=pairs[0]["against"], number=len(pairs))]
    for level in evidence:
        most, texts = 0, defaultdict(list)
        for row in pairs:
            if evidence_level(row) != level or row["language"] == "all":
                continue
            mean, low, high = (100 * row[key] for key in ("difference", "low", "high"))
            text = f"{row['split'].replace('_', ' ')} {row['language']}"
            if level != "same" and math.isinf(high):
                text += f" {mean:+.1f} (too few images)"
            elif level != "same":
                most = max(most, abs(low), abs(high))
                text += f" {mean:+.1f} ({low:+.1f} to {high:+.1f})"
            texts[row["model"]].append(text)
        if texts:
            models = "; ".join(f"{model}: {', '.join(own)}" for model, own in texts.items())
            sentences.append(f"{SENTENCES[level].format(most=most)} {models}.")
    return [*sentences, SENTENCES[scope]]


def add_arguments(parser):
    add, files = parser.add_argument, "-o files of `answer`, one per seed"
    add("runs", nargs="+", type=flags.text, metavar="NAME=FILE[,FILE…]", help=files)
    some = {"nargs": "+", "type": flags.text, "metavar": "CODE"}
    add("--languages", **some, help="only questions in these, such as en ko")
    add("-o", "--out", type=flags.text, metavar="FILE", help="JSON with the results")


def run(args):
    questions, runs = None, {}
    for text in args.runs:
        name, equals, paths = text.partition("=")
        if not equals or len(args.runs) < 2:
            raise ValueError("give two runs or more: NAME=eval.json, with seeds NAME=a.json,b.json")
        # The second of two equal names would hide the first.
        if name in runs:
            raise ValueError(f"{name}: named twice")
        paths = paths.split(",")
        if len(set(paths)) < len(paths):
            raise ValueError(f"{name}: a file is named twice; each seed has one of its own")
        questions, *runs[name] = read_run(paths, args.languages, questions)

    models, pairs = compare(questions, runs)
    results = {"models": models, "pairs": pairs, "conclusions": conclusions(pairs)}
    show_results(results, args.out)
