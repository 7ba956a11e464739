"""What an answer is worth, and how sure one can be of a number: the published measures, and the statistics of questions about pictures.

Where it stands: beside evaluate, judge and report, which call it; it imports nothing of the project. What an answer is worth, between 0 and 1:

    accuracy    LLaVA, GQA: equal to the truth after `normalise`; VQAv2: its ten annotators' rule; POPE: yes or no, as its authors read it
    f1          open answers: shared characters (KorQuAD 1.0's definition, see `character_f1`)
    chrf        captions: shared runs of 1 – 6 characters (Popović 2015, see `chrf`)

Questions about one picture are not independent, so pictures are what is resampled (`bootstrap`), and what the sign of a
difference is flipped for (`permutation_p`).

    python metrics.py "the red cat" "a red cat"         # an answer and a truth: every measure

Letters for sizes: G pictures ("clusters"), Q questions, R resamples.
"""

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from functools import lru_cache
from statistics import NormalDist

import numpy as np


# ---------------------------------------------------------------------------------------------- what an answer is worth
def normalise(text):
    """What two equal answers agree in: Unicode NFC, no case, single spaces, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".。!")


NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
    )
)
CONTRACTIONS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't might've
    mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll
    why're why's won't would've wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've wouldn't've who'd've y'all'll y'all'd've you'd've 'ow's'at"""
# keyed by how they look with one apostrophe forgotten; the authors' table has one entry that takes it away
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, c in enumerate(word)
    if c == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normalise(text):
    """VQAv2's processing of an answer, its quirks included: https://github.com/GT-Vision-Lab/VQA, vqaEval.py."""
    whole, thousands = text, re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        text = text.replace(
            mark, "" if thousands or mark + " " in whole or " " + mark in whole else " "
        )
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the authors pass a flag where the count stands
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


def vqa_accuracy(answer, truths):
    """min(1, annotators who agree / 3), averaged over leaving each of the ten annotators out. Truths are normalised only where they differ, as in the authors' tool;
    the answer always, as LLaVA does before it hands answers to that tool: else "Yes" would be wrong where all ten say "yes"."""
    clean = lambda text: text.replace("\n", " ").replace("\t", " ").strip()
    answer, truths = vqa_normalise(clean(answer)), [clean(truth) for truth in truths]
    if len(set(truths)) > 1:
        truths = [vqa_normalise(truth) for truth in truths]
    agree = sum(truth == answer for truth in truths)
    return sum(min(1, (agree - (truth == answer)) / 3) for truth in truths) / len(truths)


NO = {"ko": re.compile("아니|없|않|안 보|^안 "), "zh": re.compile("[不没沒否无無]")}


def says_yes(answer, language):
    """POPE's own reading: "no" if No, no or not is a word of the first sentence, all else is "yes" (https://github.com/AoiDragon/POPE, evaluate.py).
    It knows no 아니요 and no 不是: in the first sentence of a Korean or Chinese answer their negations count like No."""
    if language in NO and NO[language].search(re.split("[.。]", answer.strip())[0]):
        return False
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def korquad_normalise(text):
    """KorQuAD 1.0's: lower case, brackets and quotes are spaces, other punctuation goes (for Chinese: Unicode's, too), single spaces."""
    text = re.sub("['\"《》<>〈〉()‘’]", " ", unicodedata.normalize("NFC", text)).lower()
    return " ".join(
        "".join(
            c
            for c in text
            if c not in string.punctuation and not unicodedata.category(c).startswith("P")
        ).split()
    )


def character_f1(answer, truth):
    """Harmonic mean of precision and recall of the characters, as a multiset (KorQuAD 1.0, Lim et al. 2019). Spaces don't count. Particles do: an
    answer that differs in 이/가 alone keeps most of its worth, which is why this is for languages that glue them on; no morphological analysis."""
    a, b = (Counter(korquad_normalise(text).replace(" ", "")) for text in (answer, truth))
    same = sum((a & b).values())
    return 2 * same / (sum(a.values()) + sum(b.values())) if same else 0.0


def chrf(answer, truth, order=6, beta=2):
    """F of character runs of 1 … 6, spaces left out, recall weighing twice as much (chrF2, Popović 2015); runs longer than a text don't count, as in sacrebleu."""
    answer, truth = "".join(answer.split()), "".join(truth.split())
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, order + 1):
        a, b = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (answer, truth)
        )
        if a and b:
            same = sum((a & b).values())
            precision, recall, orders = (
                precision + same / sum(a.values()),
                recall + same / sum(b.values()),
                orders + 1,
            )
    if not precision:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def worth(q, answer):
    """{"accuracy": …} of an answer, and what else its kind of question is measured by."""
    if q["metric"] == "vqa":
        return {"accuracy": vqa_accuracy(answer, q["truth"])}
    if q["metric"] == "pope":
        said, true = says_yes(answer, q["language"]), q["truth"] != "no"
        return {"accuracy": float(said == true), "said": float(said), "true": float(true)}
    scores = {"accuracy": float(normalise(answer) == normalise(q["truth"]))}
    if q["metric"] == "caption":
        return scores | {"chrf": chrf(answer, q["truth"])}
    return scores | {"f1": character_f1(answer, q["truth"])}


# ---------------------------------------------------------------------------------------------- statistics
@lru_cache
def t_quantile(df, p=0.975):
    """Student's t: with t = √df · tan θ its density is cos(θ)^(df−1), which is summed here."""
    if df > 10_000:
        return NormalDist().inv_cdf(p)
    theta = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    density = np.cos(theta) ** (df - 1)
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp(p, total / total[-1], theta))


def wilson(p, n, z=1.959964):
    """95% score interval of a proportion p of n (Wilson 1927), which holds at 0 and 1 too."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


@lru_cache(maxsize=16)
def draws(G, R=2000):
    """How often each of G pictures is drawn in each of R resamples: uint8 (R, G), the same every time."""
    return np.random.default_rng(G).multinomial(G, np.full(G, 1 / G), size=R).astype(np.uint8)


def ratio(sums):
    return sums[..., 0] / sums[..., -1]


def bootstrap(columns, statistic=ratio):
    """(value, low, high) of a statistic of sums over pictures: a 95% bootstrap interval in which whole pictures are drawn, with all their questions.

    columns (G, m): each picture's sums, the last of them its number of questions; statistic: (…, m) -> (…). The percentiles are those that make the
    interval of a mean as wide as Student's (Hesterberg 2015, "expanded percentile"), without which few pictures give too narrow ones."""
    columns = np.asarray(columns, float)
    columns = columns[columns[:, -1] > 0]
    G, value = len(columns), float(statistic(columns.sum(0)))
    if statistic is ratio and (
        G == 1 or (np.ptp(columns[:, 0] / columns[:, -1]) == 0 and value in (0, 1))
    ):
        return value, *wilson(
            value, G
        )  # nothing varies, so nothing can be resampled: 0 of 40 is not "surely 0"
    if G < 2:
        return value, -math.inf, math.inf
    sums = np.concatenate(
        [part.astype(float) @ columns for part in np.array_split(draws(G), -(-G // 2000))]
    )  # (R, G) @ (G, m), in parts
    tail = NormalDist().cdf(-math.sqrt(G / (G - 1)) * t_quantile(G - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(statistic(sums), [tail, 1 - tail])
    return value, float(low), float(high)


def by_picture(questions, *columns):
    """(G, m + 1): sums of each column over each picture's questions, and their number. A question without a picture stands alone."""
    place, index = {}, []
    for q in questions:
        index.append(place.setdefault((q["split"], str(q["image"] or q["id"])), len(place)))
    return np.stack(
        [np.bincount(index, column, len(place)) for column in (*columns, np.ones(len(index)))],
        axis=1,
    )


def permutation_p(sums, flips=10_000):
    """Two-sided p of "no difference" from each picture's summed difference: were the two models the same, either could have given either set of
    answers, so each picture's sign is a coin's. All 2^G sign patterns up to 12 pictures, else `flips` random ones."""
    sums = np.asarray(sums, float)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    exact = len(sums) <= 12
    if exact:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (flips, len(sums)), dtype=np.int8)
    extreme = int((abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return extreme / len(signs) if exact else (extreme + 1) / (flips + 1)


def holm(ps):
    """Holm's (1979) correction: the chance that any of several "differences" is none stays below the level that each is held to."""
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = most
    return adjusted


def paired(questions, a, b):
    """Of two models' scores on the same questions: {"difference" a − b, "low", "high", "effect", "p", "n", "pictures"}.

    effect: the mean difference in units of its standard deviation over questions (Cohen's d_z): 0.2 is called small, 0.8 large."""
    d = np.asarray(a, float) - np.asarray(b, float)
    columns = by_picture(questions, d)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    difference, low, high = bootstrap(columns, lambda sums: sums[..., 0] / sums[..., -1])
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "effect": float(d.mean() / spread) if spread else 0.0,
        "p": permutation_p(columns[:, 0]),
        "n": len(d),
        "pictures": len(columns),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('metrics.py: give an answer and a truth, such as "the red cat" "a red cat"')
    answer, truth = sys.argv[1:]
    print(
        f"exact match {float(normalise(answer) == normalise(truth)):.0f}   VQAv2, all ten agreeing {vqa_accuracy(answer, [truth] * 10):.2f}   character F1 {character_f1(answer, truth):.4f}   chrF {chrf(answer, truth):.4f}"
    )
