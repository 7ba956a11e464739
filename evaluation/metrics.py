"""Scores of single answers, between 0 and 1, and the statistics of many.

accuracy    LLaVA, GQA: equal to the reference. VQAv2: by its ten annotators. POPE: yes or no.
            Captions: the reference's clauses, in any order
f1          open answers: shared characters (KorQuAD 1.0)
exact, chrf captions: equal to the reference; shared n-grams of 1 to 6 characters (Popović 2015)
same_language    whether the answer is in the script of the reference; an empty one is in none

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

from vocabulary.files import read_json, write_json
from vocabulary.scripts import guess_language, normalise

# Numbers as digits, and contractions with their apostrophe (the authors' table, mistakes included)
VQA_WORDS = read_json(Path(__file__).with_name("vqa_words.json"))


def vqa_normalise(text):
    """VQAv2's processing of an answer, quirks included (github.com/GT-Vision-Lab/VQA, vqaEval)."""
    original = text
    has_thousands = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if has_thousands or beside_space else " ")

    # The authors pass a regex flag (32) where re.sub expects a count.
    words = re.sub(r"\.(?!\d)", "", text, count=32).lower().split()
    return " ".join(VQA_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer, references):
    """min(1, agreeing annotators / 3), averaged over leaving out each of them."""

    # The authors normalise references only if they differ, LLaVA the answer always: else "Yes"
    # would be wrong where all ten say "yes".
    answer, *references = [re.sub("[\n\t]", " ", text).strip() for text in (answer, *references)]
    answer = vqa_normalise(answer)
    if len(set(references)) > 1:
        references = [vqa_normalise(reference) for reference in references]

    agrees = [reference == answer for reference in references]
    scores = [min(1, (sum(agrees) - own) / 3) for own in agrees]
    return sum(scores) / len(scores)


# Yes at the beginning of an answer decides; else a negation in the first sentence means no. Letters
# of other words are none: 无人机 is a drone, 不少 many, 没错 right, 틀림없이 surely.
YES = {
    "ko": r"(네|예|응|그래요|그렇습니다|맞아요|맞습니다)(?![가-힣])",
    "zh": "是的|没错|是[，,。]|对[，,。]|有[，,。]|有的|嗯",
}
NEGATIONS = {
    "ko": r"아니|아닙|아닌|아뇨|(?<!틀림)없|않|못\s?(찾|보|봤|하|했)|안 보|^(안|못) ",
    "zh": "[沒没否未]|不(?!少|错|同|锈|断|仅)|[无無](?!人机|人車|人车|线|論|论|数)",
}


def says_yes(answer, language):
    """POPE's reading (github.com/AoiDragon/POPE): "no" if the first sentence has No, no or not."""
    # Its authors read English alone.
    answer = unicodedata.normalize("NFC", answer)
    first_sentence = re.split("[.。]", answer.strip())[0]
    if language in NEGATIONS:
        if re.match(YES[language], answer.strip()):
            return True
        if re.search(NEGATIONS[language], first_sentence):
            return False
    words = answer.split(".")[0].replace(",", "").split(" ")
    return {"No", "not", "no"}.isdisjoint(words)


def count_characters(text):
    """KorQuAD 1.0's: lower case, no spaces, no punctuation (of Unicode too, for Chinese)."""
    text = unicodedata.normalize("NFC", text).lower()
    kept = [char for char in "".join(text.split()) if char not in string.punctuation]
    return Counter(char for char in kept if unicodedata.category(char)[0] != "P")


def character_f1(answer, reference):
    """F1 of characters (KorQuAD 1.0, Lim et al. 2019): a wrong particle, 이 or 가, costs little."""
    a, b = count_characters(answer), count_characters(reference)
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def chrf(answer, reference, order=6, beta=2):
    """F-score of character n-grams, n = 1 … order, without spaces. Recall weighs `beta` times as
    much. As in sacrebleu, an n longer than one of the texts is skipped."""
    texts = (unicodedata.normalize("NFC", text) for text in (answer, reference))
    answer, reference = ("".join(text.split()) for text in texts)

    def count_ngrams(text, n):
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    precisions, recalls = [], []
    for n in range(1, order + 1):
        a, b = count_ngrams(answer, n), count_ngrams(reference, n)
        if a and b:
            shared = (a & b).total()
            precisions.append(shared / a.total())
            recalls.append(shared / b.total())
    if not any(precisions):
        return 0.0

    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def score_answer(question, answer):
    """{"accuracy": …}, and the other scores of that kind of question."""
    if question.metric == "vqa":
        return {"accuracy": vqa_accuracy(answer, question.truth)}
    if question.metric == "pope":
        says, truth = says_yes(answer, question.language), question.truth != "no"
        flags = says == truth, says and truth, says, truth
        return dict(zip(("accuracy", "true_positive", "says_yes", "is_yes"), map(float, flags)))

    is_same = bool(answer.strip()) and guess_language(answer) == guess_language(question.truth)
    scores = {"same_language": float(is_same)}
    exact = float(normalise(answer) == normalise(question.truth))
    if question.metric == "caption":
        accuracy = float(clauses(answer) == clauses(question.truth))
        return scores | {"accuracy": accuracy, "exact": exact, "chrf": chrf(answer, question.truth)}
    return scores | {"accuracy": exact, "f1": character_f1(answer, question.truth)}


def clauses(caption):
    """The parts of a caption between its commas, sorted: their order does not matter, but a clause
    that is said twice counts."""
    parts = (normalise(part) for part in re.split("[,，、،]", caption))
    return sorted(part for part in parts if part)


@lru_cache
def t_quantile(df):
    """The 97.5% quantile of Student's t. Its density is cos(θ)^(df−1), with t = √df · tan θ."""
    if df > 10_000:
        return NormalDist().inv_cdf(0.975)
    theta = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    density = np.cos(theta) ** (df - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp(0.975, cumulative / cumulative[-1], theta))


def wilson(p, n, z=1.959964):
    """95% interval of a proportion p of n, valid also at 0 and 1: all shares q of which p is
    at most z standard errors away, |p − q| ≤ z·√(q(1 − q)/n) (Wilson 1927)."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@lru_cache(maxsize=16)
def resample_counts(G, R=2000):
    """How often each resample has each image: uint8 (R, G), always the same."""
    counts = np.random.default_rng(G).multinomial(G, np.full(G, 1 / G), size=R)
    return counts.astype(np.uint8)


def sums_per_image(questions, *columns):
    """The sums of each column (Q,) over the questions of an image, and their number: float64
    (G, columns + 1). A question without an image stands alone."""
    clusters = {}
    keys = [(question.split, str(question.image or question.id)) for question in questions]
    index = [clusters.setdefault(key, len(clusters)) for key in keys]
    columns = *columns, np.ones(len(index))
    return np.stack([np.bincount(index, column) for column in columns], axis=1)


def ratio(sums):
    """The mean score."""
    return sums[..., 0] / sums[..., -1]


def bootstrap(columns, statistic=ratio):
    """(value, low, high): a statistic (…, m) -> (…) of columns (G, m) of sums_per_image, with its
    95% bootstrap interval: percentiles over `resample_counts`, widened for few images. Of two to
    four images it is still too narrow: no resample lies outside of what they show.

    Rows whose last column is 0 are left out. A ratio of one image, or of 0 or 1 in all of them, has
    Wilson's interval; any other statistic of one image an infinite one."""
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

    # Of few images percentiles are too narrow. They are widened to Student's interval of a mean
    # (Hesterberg 2015, "expanded percentile").
    tail = NormalDist().cdf(-math.sqrt(G / (G - 1)) * t_quantile(G - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(statistic(sums), [tail, 1 - tail])
    return value, float(low), float(high)


def permutation_p(sums, flips=10_000):
    """Two-sided p-value of "no difference", of the images' differences (G,): the share of sign
    patterns whose sum is at least as far from 0. Zeros are left out. Up to 12 differences all
    patterns are tried, else `flips` random ones. To these the one that was found is added, and
    counts like them: p is never 0."""
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0

    # If two models are equal, the sign of each difference is random.
    n, found = len(sums), int(len(sums) > 12)
    if found:
        rng, block = np.random.default_rng(0), 500  # patterns at a time, to save memory
        sizes = [min(block, flips - start) for start in range(0, flips, block)]
        patterns = (rng.integers(0, 2, (size, n), dtype=np.int8) for size in sizes)
    else:
        flips = 2**n
        patterns = [(np.arange(flips)[:, None] >> np.arange(n)) & 1]
    bound = abs(sums.sum()) - 1e-9
    extreme = sum(int((abs((1 - 2 * bits) @ sums) >= bound).sum()) for bits in patterns)
    return (extreme + found) / (flips + found)


def holm(ps):
    """Holm's correction of p-values for several comparisons (1979): the smallest of n times n, the
    next times n − 1 …, none above 1 or below the one before it."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def paired_comparison(questions, a, b):
    """Compares two models' scores (Q,): the mean of a − b. effect: the mean over the standard
    deviation (Cohen's d_z); 0.2 is called small, 0.8 large; infinite if all differ by the same.
    different: the number of questions whose scores differ."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    columns = sums_per_image(questions, differences)
    std = differences.std(ddof=1) if len(differences) > 1 else 0.0

    # Not `ratio` itself: Wilson's interval is for proportions.
    interval = bootstrap(columns, lambda sums: ratio(sums))
    mean = float(differences.mean())
    effect = mean / std if std else math.copysign(math.inf, mean) if mean else 0.0
    return dict(zip(("difference", "low", "high"), interval)) | {
        "effect": effect,
        "p": permutation_p(columns[:, 0]),
        "n": len(differences),
        "different": int((differences != 0).sum()),
        "images": len(columns),
    }


def make_row(interval, n, key="value", **labels):
    """A row of results; n counts its questions."""
    value, low, high = interval
    return {**labels, "n": n, key: value, "low": low, "high": high}


def format_interval(value, low, high, scale=100):
    """ "63.9 (61.0 – 65.9)"."""
    interval = "(too few images)"
    if math.isfinite(high - low):
        interval = f"({scale * low:4.1f} – {scale * high:5.1f})"
    return f"{scale * value:5.1f} {interval}"


def write_results(path, results):
    """Writes JSON. Infinity and NaN (the interval of one image) become null."""
    results = json.loads(json.dumps(results), parse_constant=lambda name: None)
    write_json(path, results, indent=1)
