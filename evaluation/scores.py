"""Scores of many answers: accuracy, F1, chrF and POPE's figures, by split, language and kind."""

from collections import Counter, defaultdict

import numpy as np

from evaluation.metrics import bootstrap, make_row, normalise, ratio, sums_per_image
from evaluation.questions import reference_answer

# Keys of metrics.score_answer, and statistics of their sums. The last sum counts the questions.
FAMILIES = (
    (("f1",), {"character F1": ratio}),
    (("chrf",), {"chrF": ratio}),
    (
        ("true_positive", "says_yes", "is_yes"),
        {
            "POPE precision": lambda sums: sums[..., 0] / sums[..., 1],
            "POPE recall": lambda sums: sums[..., 0] / sums[..., 2],
            "POPE f1": lambda sums: 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2]),
            "POPE yes_ratio": lambda sums: sums[..., 1] / sums[..., 3],
        },
    ),
)


def most_frequent_answers(questions):
    """Chance: for each question the most frequent reference of its split, skill and language."""
    counts, spelling = defaultdict(Counter), {}
    groups = [(q.split, q.skill, q.language) for q in questions]
    for group, question in zip(groups, questions):
        answer = reference_answer(question)
        counts[group][normalise(answer)] += 1
        spelling.setdefault(normalise(answer), answer)
    return [spelling[counts[group].most_common(1)[0][0]] for group in groups]


def group_indices(questions):
    """{(split, language, kind): indices}, "all" languages last. A kind's skill: "object.colour"."""
    # A question counts for its language, kind and skill, and for all of them.
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        skill = question.kind
        if question.skill != question.kind:
            skill = f"{question.kind}.{question.skill}"
        for language in dict.fromkeys((question.language, "all")):
            for kind in dict.fromkeys((question.kind, skill, "all")):
                groups[question.split, language, kind].append(i)

    splits = list(dict.fromkeys(split for split, _, _ in groups))
    order = sorted(groups, key=lambda group: (splits.index(group[0]), group[1] == "all", group[1]))
    return {group: groups[group] for group in order}


def count_languages(questions):
    """{split: number of languages}."""
    return Counter(split for split, _ in {(q.split, q.language) for q in questions})


def accuracy_rows(model, questions, scores):
    """Rows {"model", "split", "language", "kind", "n", "accuracy", "low", "high"}."""
    values = np.array([score["accuracy"] for score in scores])
    rows = []
    for (split, language, kind), indices in group_indices(questions).items():
        labels = {"model": model, "split": split, "language": language, "kind": kind}
        interval = bootstrap(sums_per_image([questions[i] for i in indices], values[indices]))
        rows.append(make_row(interval, len(indices), "accuracy", **labels))
    return rows


def metric_rows(model, questions, scores, families):
    """Rows {"metric", "model", "split", "language", "n", "value", "low", "high"}.

    scores: a dict per question. families: as FAMILIES; questions without its keys do not count."""
    rows = []
    for (split, language, kind), indices in group_indices(questions).items():
        if kind != "all":
            continue
        labels = {"model": model, "split": split, "language": language}
        for keys, statistics in families:
            scored = [i for i in indices if keys[0] in scores[i]]
            if not scored:
                continue
            columns = [[scores[i][key] for i in scored] for key in keys]
            sums = sums_per_image([questions[i] for i in scored], *columns)
            for metric, statistic in statistics.items():
                with np.errstate(invalid="ignore", divide="ignore"):
                    interval = bootstrap(sums, statistic)
                rows.append(make_row(interval, len(scored), metric=metric, **labels))
    return rows
