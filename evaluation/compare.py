"""Runs compared on the same questions: what their differences support, and what they don't.

    python -m evaluation compare full=eval.0.json,eval.1.json small=eval.2.json,eval.3.json

A run is a name and its -o files of `answer`, one per seed. Each is compared with the first run: the
difference with its interval over images, an effect size, a permutation test with Holm's correction
and, with several seeds, Welch's interval over seeds.

Dimensions: S seeds of a run, Q questions.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from evaluation import metrics
from evaluation.answer import read_answers
from evaluation.questions import question_name
from evaluation.scores import count_languages, group_indices, most_frequent_answers
from evaluation.tables import print_results


def read_runs(paths, languages=None):
    """A run's seeds: (questions by name, accuracies full (S, Q), accuracies blind (S, Q))."""
    questions, full, blind = None, [], []
    for path in map(Path, paths):
        if not path.name.endswith(".answers.jsonl"):
            path = path.with_suffix(".answers.jsonl")
        _, answered = read_answers(path)
        if languages:
            answered = [question for question in answered if question.language in languages]
        if not answered:
            raise ValueError(f"{path}: no questions in {', '.join(languages or ['it'])}")

        answered.sort(key=question_name)
        questions = questions or answered
        check_same_questions(path, answered, paths[0], questions)
        full.append([metrics.score_answer(q, q.full)["accuracy"] for q in answered])
        blind.append([metrics.score_answer(q, q.blind)["accuracy"] for q in answered])
    return questions, np.array(full), np.array(blind)


def check_same_questions(name, questions, first_name, first_questions):
    if list(map(question_name, questions)) != list(map(question_name, first_questions)):
        raise ValueError(f"{name}: not the questions of {first_name}, as a comparison needs")


def welch(a, b):
    """(difference, low, high) of the means of two small samples, here of seeds (Welch 1947)."""
    var_a, var_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    difference = float(np.mean(a) - np.mean(b))
    if not var_a + var_b:
        return difference, difference, difference
    df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = metrics.t_quantile(df) * math.sqrt(var_a + var_b)
    return difference, difference - half, difference + half


def compare(runs):
    """runs: {name: (questions, full (S, Q), blind (S, Q))} -> (rows of each run, rows of each run
    against the first), by split and language."""
    # Accuracies (S, Q) of each run, of each without images, and of chance
    first, *others = runs
    questions, scores = runs[first][0], {}
    for name, (own_questions, full, blind) in runs.items():
        check_same_questions(name, own_questions, first, questions)
        scores |= {name: full, f"{name}, blind": blind}
    guesses = zip(questions, most_frequent_answers(questions))
    scores["chance"] = np.array(
        [[metrics.score_answer(q, guess)["accuracy"] for q, guess in guesses]]
    )

    num_languages = count_languages(questions)
    models, pairs = [], []
    for (split, language, kind), indices in group_indices(questions).items():
        if kind != "all":
            continue
        own = [questions[i] for i in indices]
        group = {"split": split, "language": language}
        for name, values in scores.items():
            models.append(run_row(name, group, own, values[:, indices]))

        # With one language, "all" would be the same comparison again.
        if language != "all" or num_languages[split] > 1:
            for name in others:
                pair = pair_row(own, scores[name][:, indices], scores[first][:, indices])
                pairs.append({"model": name, "against": first, **group, **pair})

    for row, p in zip(pairs, metrics.holm([row["p"] for row in pairs])):
        row["p_holm"] = p
    return models, pairs


def run_row(name, group, questions, scores):
    """A run's accuracy: the mean over its seeds, and of each seed. scores (S, Q)."""
    interval = metrics.bootstrap(metrics.sums_per_image(questions, scores.mean(0)))
    row = metrics.make_row(interval, len(questions), "accuracy", model=name, **group)
    return row | {"seeds": scores.mean(1).tolist()}


def pair_row(questions, a, b):
    """Scores (S, Q) of two runs compared: over images, and over seeds if both have several."""
    row = metrics.paired_comparison(questions, a.mean(0), b.mean(0))
    if min(len(a), len(b)) > 1:
        _, row["seeds_low"], row["seeds_high"] = welch(a.mean(1), b.mean(1))
    return row


EVIDENCE = {
    "recipe": "Supported, and larger than the spread of seeds, so the recipe makes the difference:",
    "seeds": "Only these trained models differ; seeds differ too much to credit the recipe:",
    "models": "These two trained models differ; one seed does not show what another would give:",
    "open": "Not shown, and not ruled out up to {most:.1f} points:",
    "same": "No difference at all, each question has the same score in both:",
}


def evidence_level(row, level=0.05):
    """What a comparison shows: a key of EVIDENCE."""
    if row["low"] == row["high"] == 0:
        return "same"
    if row["p_holm"] >= level or row["low"] <= 0 <= row["high"]:
        return "open"
    if "seeds_low" not in row:
        return "models"
    return "seeds" if row["seeds_low"] <= 0 <= row["seeds_high"] else "recipe"


def conclusions(pairs):
    """Sentences: what the numbers of a comparison support, and what they don't."""
    sentences = [
        f"In points against {pairs[0]['against']}, with 95% intervals over images; p-values of "
        f"{len(pairs)} comparisons, corrected together (Holm). Intervals over seeds are not "
        "corrected, and one in twenty excludes 0 by chance."
    ]

    # One sentence per kind of evidence, with the differences of each run
    for evidence, words in EVIDENCE.items():
        rows = [r for r in pairs if evidence_level(r) == evidence and r["language"] != "all"]
        texts = defaultdict(list)
        for row in rows:
            text = f"{row['split'].replace('_', ' ')} {row['language']}"
            if evidence != "same":
                mean, low, high = (100 * row[key] for key in ("difference", "low", "high"))
                text += f" {mean:+.1f} ({low:+.1f} to {high:+.1f})"
            texts[row["model"]].append(text)

        if rows:
            most = 100 * max(abs(row[end]) for row in rows for end in ("low", "high"))
            models = "; ".join(f"{model}: {', '.join(own)}" for model, own in texts.items())
            sentences.append(f"{words.format(most=most)} {models}.")
    scope = "All of this holds for other questions of these kinds, not for other data or training."
    return [*sentences, scope]


def add_arguments(parser):
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FILE[,FILE…]", help="-o files of `answer`, one per seed"
    )
    parser.add_argument("--languages", nargs="+", help="only questions in these")
    parser.add_argument("-o", "--out", help="JSON with the results")


def run(args):
    runs = {}
    for text in args.runs:
        name, equals, paths = text.partition("=")
        if not equals:  # without a name: the file's, or the path of an eval.json
            name = text if Path(text).stem == "eval" else Path(text).stem
            paths = text
        if name in runs:
            raise ValueError(f"{name}: named twice")
        runs[name] = read_runs(paths.split(","), args.languages)
    if len(runs) < 2:
        raise ValueError("give two runs or more: NAME=eval.json, with seeds NAME=a.json,b.json")

    models, pairs = compare(runs)
    results = {"models": models, "pairs": pairs, "conclusions": conclusions(pairs)}
    print_results(results)
    print("\n".join(results["conclusions"]))
    if args.out:
        metrics.write_results(args.out, results)
