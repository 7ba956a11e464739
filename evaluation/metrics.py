"""Scores of single answers, between 0 and 1, and the statistics of many.

    accuracy    LLaVA, GQA: equal to the reference after `normalise`. VQAv2: the rule of its ten
                annotators. POPE: yes or no, read as by its authors
    f1          open answers: shared characters (KorQuAD 1.0)
    chrf        captions: shared n-grams of 1 to 6 characters (Popović 2015)

Questions about one image are not independent, so statistics resample whole images.
Dimensions: G images, Q questions, R resamples.
"""

import json
import math
import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from vocabulary.files import write_json


def normalise(text):
    """Unicode NFC, lower case, single spaces, no full stop at the end: for exact match."""
    text = unicodedata.normalize("NFC", text).casefold()
    return " ".join(text.split()).rstrip(".。!")


NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# {spelling without one apostrophe: the right one}
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in Path(__file__).with_name("contractions.txt").read_text(encoding="utf-8").split()
    for i, char in enumerate(word)
    if char == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the authors' table has it the wrong way round


def vqa_normalise(text):
    """VQAv2's processing of an answer, quirks included (github.com/GT-Vision-Lab/VQA, vqaEval)."""
    original = text
    has_thousands = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if has_thousands or beside_space else " ")

    # The authors pass a regex flag (32) where re.sub expects a count.
    text = re.sub(r"\.(?!\d)", "", text, count=32)

    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(answer, references):
    """min(1, agreeing annotators / 3), averaged over leaving out each of the ten annotators."""

    def strip(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    # The authors' tool normalises references only if they differ. LLaVA normalises the answer
    # first: else "Yes" would be wrong where all ten say "yes".
    answer = vqa_normalise(strip(answer))
    references = [strip(reference) for reference in references]
    if len(set(references)) > 1:
        references = [vqa_normalise(reference) for reference in references]

    agrees = [reference == answer for reference in references]
    scores = [min(1, (sum(agrees) - own) / 3) for own in agrees]
    return sum(scores) / len(scores)


NEGATIONS = {"ko": re.compile("아니|없|않|안 보|^안 "), "zh": re.compile("[不没沒否无無]")}


def says_yes(answer, language):
    """POPE's reading (github.com/AoiDragon/POPE): "no" if the first sentence has the word No, no
    or not, else "yes"."""
    # Its authors read English alone. In Korean and Chinese a negation means "no".
    if language in NEGATIONS:
        first_sentence = re.split("[.。]", answer.strip())[0]
        if NEGATIONS[language].search(first_sentence):
            return False
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def korquad_normalise(text):
    """KorQuAD 1.0's: lower case, spaces for brackets and quotes, no punctuation (of Unicode, for
    Chinese), single spaces."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("['\"《》<>〈〉()‘’]", " ", text).lower()
    text = "".join(char for char in text if char not in string.punctuation)
    text = "".join(char for char in text if unicodedata.category(char)[0] != "P")
    return " ".join(text.split())


def character_f1(answer, reference):
    """F1 of the characters (KorQuAD 1.0, Lim et al. 2019). An answer that differs in a particle, 이
    or 가, keeps most of its score."""
    a = Counter(korquad_normalise(answer).replace(" ", ""))
    b = Counter(korquad_normalise(reference).replace(" ", ""))
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


def chrf(answer, reference, order=6, beta=2):
    """F-score of character n-grams, n = 1 … order, without spaces; recall weighs `beta` times as
    much (chrF2). An n longer than one of the texts is skipped, as in sacrebleu."""
    answer, reference = "".join(answer.split()), "".join(reference.split())

    def count_ngrams(text, n):
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    precisions, recalls = [], []
    for n in range(1, order + 1):
        a, b = count_ngrams(answer, n), count_ngrams(reference, n)
        if a and b:
            shared = sum((a & b).values())
            precisions.append(shared / sum(a.values()))
            recalls.append(shared / sum(b.values()))
    if not any(precisions):
        return 0.0

    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def score_answer(question, answer):
    """{"accuracy": …} of an answer, and the other scores of that kind of question."""
    if question.metric == "vqa":
        return {"accuracy": vqa_accuracy(answer, question.truth)}
    if question.metric == "pope":
        says, truth = says_yes(answer, question.language), question.truth != "no"
        flags = {"accuracy": says == truth, "true_positive": says and truth}
        flags |= {"says_yes": says, "is_yes": truth}
        return {key: float(flag) for key, flag in flags.items()}

    scores = {"accuracy": float(normalise(answer) == normalise(question.truth))}
    if question.metric == "caption":
        return scores | {"chrf": chrf(answer, question.truth)}
    return scores | {"f1": character_f1(answer, question.truth)}


@lru_cache
def t_quantile(df, p=0.975):
    """The p-quantile of Student's t, summing its density: cos(θ)^(df−1), with t = √df · tan θ."""
    if df > 10_000:
        return NormalDist().inv_cdf(p)
    theta = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    density = np.cos(theta) ** (df - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp(p, cumulative / cumulative[-1], theta))


def wilson(p, n, z=1.959964):
    """95% interval of a proportion p of n, valid also at 0 and 1 (Wilson 1927)."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@lru_cache(maxsize=16)
def resample_counts(G, R=2000):
    """How often each of R resamples has each of G images: uint8 (R, G), always the same."""
    counts = np.random.default_rng(G).multinomial(G, np.full(G, 1 / G), size=R)
    return counts.astype(np.uint8)


def sums_per_image(questions, *columns):
    """The sums of each column (Q,) over the questions of each image, and their number: float64
    (G, columns + 1). A question without an image stands alone."""
    clusters, index = {}, []
    for question in questions:
        key = question.split, str(question.image or question.id)
        index.append(clusters.setdefault(key, len(clusters)))
    columns = (*columns, np.ones(len(index)))
    return np.stack([np.bincount(index, column, len(clusters)) for column in columns], axis=1)


def ratio(sums):
    """The mean score: the sum of the scores over the number of questions."""
    return sums[..., 0] / sums[..., -1]


def bootstrap(columns, statistic=ratio):
    """(value, low, high): a statistic with its 95% bootstrap interval, resampling whole images.

    columns (G, m): of sums_per_image. statistic: (…, m) -> (…)."""
    columns = np.asarray(columns, float)
    columns = columns[columns[:, -1] > 0]
    G, value = len(columns), float(statistic(columns.sum(0)))

    # Where nothing varies, resampling can't help: 0 of 40 is not "never".
    if statistic is ratio:
        is_constant = value in (0, 1) and np.ptp(ratio(columns)) == 0
        if G == 1 or is_constant:
            return value, *wilson(value, G)
    if G < 2:
        return value, -math.inf, math.inf

    # (R, G) @ (G, m) -> (R, m), a part of the resamples at a time to save memory
    parts = np.array_split(resample_counts(G), -(-G // 2000))
    sums = np.concatenate([part.astype(float) @ columns for part in parts])

    # Of few images the percentiles are too narrow. They are widened so that the interval of a mean
    # is Student's (Hesterberg 2015, "expanded percentile").
    tail = NormalDist().cdf(-math.sqrt(G / (G - 1)) * t_quantile(G - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(statistic(sums), [tail, 1 - tail])
    return value, float(low), float(high)


def permutation_p(sums, flips=10_000):
    """Two-sided p-value of "no difference", from each image's summed difference (G,)."""
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0

    # If two models are equal, the sign of each difference is random. Of few images all patterns of
    # signs are tried, else random ones.
    is_exact = len(sums) <= 12
    if is_exact:
        bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        signs = 1 - 2 * bits
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (flips, len(sums)), dtype=np.int8)

    extreme = int((abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return extreme / len(signs) if is_exact else (extreme + 1) / (flips + 1)


def holm(ps):
    """Holm's correction of p-values for making several comparisons (1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def paired_comparison(questions, a, b):
    """Compares two models' scores (Q,) on the same questions: the mean of a − b. effect: the mean
    over the standard deviation (Cohen's d_z); 0.2 is called small, 0.8 large."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    columns = sums_per_image(questions, differences)
    std = differences.std(ddof=1) if len(differences) > 1 else 0.0

    # Not `ratio` itself: differences are no proportions, for which Wilson's interval is.
    difference, low, high = bootstrap(columns, lambda sums: ratio(sums))
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "effect": float(differences.mean() / std) if std else 0.0,
        "p": permutation_p(columns[:, 0]),
        "n": len(differences),
        "images": len(columns),
    }


def make_row(interval, n, key="value", **labels):
    """A row of results: labels, the number of questions, a value with its interval."""
    value, low, high = interval
    return {**labels, "n": n, key: value, "low": low, "high": high}


def format_interval(value, low, high, scale=100):
    """A number as tables show it: "63.9 (61.0 – 65.9)"."""
    return f"{scale * value:5.1f} ({scale * low:4.1f} – {scale * high:5.1f})"


def write_results(path, results):
    """Writes JSON. Infinity and NaN, which it lacks (the interval of one image), become null."""
    results = json.loads(json.dumps(results), parse_constant=lambda name: None)
    write_json(path, results, indent=1)
