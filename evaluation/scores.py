"""Scores of many answers by split, language and kind."""

from collections import Counter, defaultdict

import numpy as np

from evaluation.metrics import bootstrap, make_row, normalise, ratio, sums_per_image
from evaluation.questions import reference_answer

# Keys of metrics.score_answer, and statistics of their sums. The last sum counts questions. A pair
# of lists of columns is a share: the sum of the first ones by that of the second ones.
FAMILIES = (
    (("f1",), {"character F1": ratio}),
    (("chrf",), {"chrF": ratio}),
    (("exact",), {"exact match": ratio}),
    (("same_language",), {"same language": ratio}),
    (
        ("true_positive", "says_yes", "is_yes"),
        {
            "POPE precision": ([0], [1]),
            "POPE recall": ([0], [2]),
            "POPE f1": ([0, 0], [1, 2]),
            "POPE yes_ratio": ([1], [3]),
        },
    ),
)


def most_frequent_answers(questions):
    """Chance: the most frequent reference of each question's split, skill and language. References
    that score alike (`normalise`) count together."""
    counts, spelling = defaultdict(Counter), {}
    for q in questions:
        answer = reference_answer(q)
        counts[q.split, q.skill, q.language][normalise(answer)] += 1
        spelling.setdefault(normalise(answer), answer)
    most_frequent = {group: spelling[max(own, key=own.get)] for group, own in counts.items()}
    return [most_frequent[q.split, q.skill, q.language] for q in questions]


def group_indices(questions):
    """{(split, language, kind): indices}, "all" languages last. A skill is "object.colour"."""
    # A question counts for its language, kind and skill, and for all of them.
    groups = defaultdict(list)
    for i, q in enumerate(questions):
        skill = q.kind if q.skill == q.kind else f"{q.kind}.{q.skill}"
        for language in dict.fromkeys((q.language, "all")):
            for kind in dict.fromkeys((q.kind, skill, "all")):
                groups[q.split, language, kind].append(i)

    splits = list(dict.fromkeys(q.split for q in questions))
    order = sorted(groups, key=lambda group: (splits.index(group[0]), group[1] == "all", group[1]))
    return {group: groups[group] for group in order}


def count_languages(questions):
    """{split: number of languages}."""
    return Counter(split for split, _ in {(q.split, q.language) for q in questions})


def accuracy_row(questions, scores, **labels):
    interval = bootstrap(sums_per_image(questions, scores))
    return make_row(interval, len(questions), "accuracy", **labels)


def accuracy_rows(model, questions, scores):
    """Rows {"model", "split", "language", "kind", "n", "accuracy", "low", "high"}."""
    rows = []
    for group, indices in group_indices(questions).items():
        labels = dict(zip(("split", "language", "kind"), group))
        own = [scores[i]["accuracy"] for i in indices]
        rows.append(accuracy_row([questions[i] for i in indices], own, model=model, **labels))
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
            # A caption has no F1, a POPE question no chrF.
            scored = [i for i in indices if keys[0] in scores[i]]
            if not scored:
                continue
            columns = [[scores[i][key] for i in scored] for key in keys]
            sums = sums_per_image([questions[i] for i in scored], *columns)
            for metric, statistic in statistics.items():
                # Who never says yes has no precision: 0 / 0, which is shown as undefined.
                with np.errstate(invalid="ignore", divide="ignore"):
                    if isinstance(statistic, tuple):
                        shares = np.stack([sums[:, part].sum(1) for part in statistic], axis=1)
                        interval = bootstrap(shares)
                    else:
                        interval = bootstrap(sums, statistic)
                rows.append(make_row(interval, len(scored), metric=metric, **labels))
    return rows
