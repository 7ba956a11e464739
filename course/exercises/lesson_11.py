"""Lesson 11: chance, intervals over images, the bootstrap, a permutation test, Holm, seeds."""

import math
import random

import numpy as np

from course.exercise import Check, Exercise, expect

TITLE = "Measuring: blind rows, intervals, seeds, the ablation"


def question(number=0, image=None, split="s", language="en", skill="colour", truth="red"):
    from evaluation.questions import Question

    return Question(split, number, language, "object", "What?", truth, skill, image=image)


def close(what, found, expected, tolerance=1e-6):
    assert found is not None, f"{what}: nothing was returned"
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, must be {expected.shape}"
    good = np.allclose(found, expected, rtol=0, atol=tolerance)
    assert good, f"{what} gives {found.tolist()}, should be {expected.tolist()}"


# ------------------------------------------------------------------------- chance
def chance_of_one_group():
    from evaluation.scores import most_frequent_answers

    questions = [question(truth=truth) for truth in ("red", "blue", "red")]
    expect("chance of red, blue, red", most_frequent_answers(questions), ["red"] * 3)


def chance_by_language_and_skill():
    from evaluation.scores import most_frequent_answers

    questions = [
        question(truth="red"),
        question(truth="빨간색", language="ko"),
        question(truth="two", skill="count"),
        question(truth="blue", split="t"),
        question(truth="red"),
    ]
    found = most_frequent_answers(questions)
    expect("chance of five groups", found, ["red", "빨간색", "two", "blue", "red"])


def chance_of_equal_spellings():
    from evaluation.scores import most_frequent_answers

    questions = [question(truth=truth) for truth in ("Red", "blue", "red.", "blue", "red")]
    found = set(most_frequent_answers(questions))
    assert len(found) == 1 and found.pop().lower().strip(".") == "red", (
        "Red, red. and red are one answer: three of five, before blue's two"
    )


CHANCE = Exercise(
    "chance",
    "What always the same answer would reach",
    "evaluation/scores.py",
    ["most_frequent_answers"],
    20,
    [
        Check(
            1,
            "the most frequent reference, for each question",
            "collections.Counter, reference_answer(question).",
            chance_of_one_group,
        ),
        Check(
            1,
            "counted apart for each split, skill and language",
            "Nobody would answer an English question with 빨간색.",
            chance_by_language_and_skill,
        ),
        Check(
            1,
            "answers that score the same are counted together",
            "normalise() is what accuracy compares.",
            chance_of_equal_spellings,
        ),
    ],
    {"11_chance_a.py": 1, "11_chance_b.py": 2},
)


# ------------------------------------------------------------------------- wilson
def wilson_by_hand():
    from evaluation.metrics import wilson

    # With z = 2: centre 0.5 + 4/8 = 1, half 2·√(0.25/4 + 4/64) = 0.7071, all over 1 + 4/4 = 2.
    close("2 of 4, z = 2", wilson(0.5, 4, 2.0), (0.1464466, 0.8535534))


def wilson_at_the_ends():
    from evaluation.metrics import wilson

    # At p = 0 the upper bound is z² / (n + z²).
    close("0 of 40, z = 2", wilson(0.0, 40, 2.0), (0, 4 / 44))
    close("40 of 40, z = 2", wilson(1.0, 40, 2.0), (40 / 44, 1))


def wilson_solves_its_equation():
    from evaluation.metrics import wilson

    # Both bounds solve |p − bound| = z · √(bound · (1 − bound) / n).
    for p, n in ((0.1, 10), (0.5, 7), (0.93, 1000)):
        for bound in wilson(p, n):
            left, right = abs(p - bound), 1.959964 * math.sqrt(bound * (1 - bound) / n)
            close(f"distance of a bound from {p} of n = {n}", left, right)


WILSON = Exercise(
    "wilson",
    "The interval of a share",
    "evaluation/metrics.py",
    ["wilson"],
    15,
    [
        Check(
            1,
            "2 of 4",
            "centre p + z²/2n, half z·√(p(1−p)/n + z²/4n²), both over 1 + z²/n.",
            wilson_by_hand,
        ),
        Check(
            1,
            "0 of 40 is not never, 40 of 40 not always",
            "p(1−p) is 0 there; what else is under the root?",
            wilson_at_the_ends,
        ),
        Check(
            1, "the bounds solve Wilson's equation", "Test with n = 7.", wilson_solves_its_equation
        ),
    ],
    {"11_wilson_a.py": 1, "11_wilson_b.py": 2},
)


# ------------------------------------------------------------------------- sums per image
def sums_of_one_column():
    from evaluation.metrics import sums_per_image

    questions = [question(n, image) for n, image in enumerate(("a", "b", "a"))]
    found = sorted(sums_per_image(questions, [1, 0, 0.5]).tolist())
    expect("scores 1, 0, ½ of images a, b, a", found, [[0, 1], [1.5, 2]])


def sums_of_two_columns():
    from evaluation.metrics import sums_per_image

    questions = [question(n, image) for n, image in enumerate(("a", "b", "a"))]
    found = sorted(sums_per_image(questions, [1, 0, 1], [5, 7, 2]).tolist())
    expect("two columns", found, [[0, 7, 1], [2, 7, 2]])


def images_of_other_splits():
    from evaluation.metrics import sums_per_image

    questions = [question(0, "a.png"), question(1, "a.png", split="t"), question(2), question(3)]
    found = sums_per_image(questions, [1, 1, 1, 1])
    assert len(found) == 4, (
        f"{len(found)} groups, must be 4: a.png of two splits are two images, and two questions "
        "without an image belong to none"
    )
    several = question(0, ["a", "b"]), question(1, ["a", "b"]), question(2, ["b", "a"])
    expect("groups of several images", len(sums_per_image(several, [1, 1, 1])), 2)


SUMS = Exercise(
    "sums_per_image",
    "Questions about one image belong together",
    "evaluation/metrics.py",
    ["sums_per_image"],
    20,
    [
        Check(
            1,
            "the sum and the number of an image's questions",
            "A dict from image to its row; np.bincount has weights.",
            sums_of_one_column,
        ),
        Check(
            1, "several columns", "The number of questions is the last column.", sums_of_two_columns
        ),
        Check(
            1,
            "equal file names of two splits; questions without an image",
            "What names an image? What, where there is none, names the question?",
            images_of_other_splits,
        ),
    ],
    {"11_sums_a.py": 2, "11_sums_b.py": 2},
)


# ------------------------------------------------------------------------- bootstrap
def independent(G, seed, share=0.5, copies=1):
    """Columns (G, 2): each image's questions are all right or all wrong."""
    rng = np.random.default_rng(seed)
    right = rng.random(G) < share
    return np.stack([right * copies, np.full(G, copies)], axis=1)


def value_and_order():
    from evaluation.metrics import bootstrap

    columns = np.array([[2, 4], [1, 4], [0, 4], [3, 4]])
    value, low, high = bootstrap(columns)
    close("the mean of 6 of 16", value, 0.375)
    assert low <= value <= high, f"{low} ≤ {value} ≤ {high} should hold"
    again = bootstrap(columns)
    expect("a second call", again, (value, low, high))


def width_of_many():
    from evaluation.metrics import bootstrap

    value, low, high = bootstrap(independent(400, 0))
    # Of a share of 400: p ± 1.96·√(p(1−p)/400).
    half = 1.96 * math.sqrt(value * (1 - value) / 400)
    assert 0.85 * half < (high - low) / 2 < 1.15 * half, (
        f"400 images: half a width of {(high - low) / 2:.4f}, should be about {half:.4f}"
    )


def images_not_questions():
    from evaluation.metrics import bootstrap

    one, ten = bootstrap(independent(100, 1)), bootstrap(independent(100, 1, copies=10))
    close("ten equal questions about each image instead of one", ten, one, 1e-9)

    # Images have unequal numbers of questions: the mean is over questions.
    value, *_ = bootstrap([[9, 10], [0, 1], [1, 1]])
    close("10 right of 12 questions", value, 10 / 12)


def other_statistics_and_empty_images():
    from evaluation.metrics import bootstrap

    columns = np.array([[3.0, 1, 2], [8, 4, 2], [5, 5, 1], [0, 0, 0]])

    def quotient(sums):
        return sums[..., 0] / sums[..., 1]

    value, low, high = bootstrap(columns, quotient)
    close("the sums' quotient 16 / 10", value, 1.6)
    assert 1.0 <= low < value < high <= 3.0, (
        f"of quotients of 3, 2 and 1: {low:.2f} – {high:.2f}, beyond all of them"
    )
    expect(
        "without the image that has no question", bootstrap(columns[:3], quotient)[1:], (low, high)
    )
    # Of three images both bounds are the outermost resamples; of many an empty image would widen.
    many = independent(60, 2)
    found = bootstrap(np.concatenate([many, np.zeros((60, 2))]))
    close("60 images beside 60 without a question", found, bootstrap(many), 1e-9)


def nothing_varies():
    from evaluation.metrics import bootstrap

    _, low, high = bootstrap([[0, 2]] * 40)
    assert low == 0 and 0.05 < high < 0.12, f"40 images, none right: {low:.3f} – {high:.3f}"
    _, low, high = bootstrap([[2, 2]] * 40)
    assert high > 0.999 and 0.88 < low < 0.95, f"40 images, all right: {low:.3f} – {high:.3f}"
    _, low, high = bootstrap([[1, 2]] * 40)
    assert low == high == 0.5, f"40 images, each half right: {low:.3f} – {high:.3f}"
    _, low, high = bootstrap([[1, 1, 1], [0, 0, 1], [0, 0, 1]], lambda s: s[..., 0] / s[..., 1])
    assert low == high == 1, f"0 / 0 in some resamples: {low} – {high}, must be left out"
    _, low, high = bootstrap([[1, 1]])
    assert low < 0.5, f"one image, right: {low:.2f} – {high:.2f}"
    _, low, high = bootstrap([[3.0, 1]], lambda sums: sums[..., 0])
    assert math.isinf(low) and math.isinf(high), "one image can't tell how much another differs"


def it_holds_what_it_says():
    from evaluation.metrics import bootstrap

    # Of 6 images, with a truth of ½: 95% of the intervals should hold it.
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scores = 4 * rng.random(6)  # of 4 questions each
        _, low, high = bootstrap(np.stack([scores, np.full(6, 4)], axis=1))
        held += low <= 0.5 <= high
    assert held >= 0.92 * 300, (
        f"of 300 intervals over 6 images each {held} hold the truth, must be about 285: too narrow"
    )


BOOTSTRAP = Exercise(
    "bootstrap",
    "An interval over images",
    "evaluation/metrics.py",
    ["bootstrap"],
    120,
    [
        Check(
            1,
            "the value, between its bounds, the same each time",
            "resample_counts(G) has fixed resamples: how often each has each image.",
            value_and_order,
        ),
        Check(
            2,
            "of 400 images about ±1.96 standard errors",
            "The sums of a resample are counts @ columns; then quantiles of the statistic.",
            width_of_many,
        ),
        Check(
            2,
            "more questions about an image do not make it narrower",
            "Images are drawn, with all of their questions. The statistic is of sums.",
            images_not_questions,
        ),
        Check(
            1,
            "another statistic; an image without questions",
            "Call statistic(sums), and leave out rows whose last column is 0.",
            other_statistics_and_empty_images,
        ),
        Check(
            2,
            "where nothing varies",
            "For a share there is Wilson's interval, with n images. Else one image gives ±inf.",
            nothing_varies,
        ),
        Check(
            2,
            "of 6 images 95% hold the truth",
            "Of few images percentiles are too narrow by √(G/(G−1)) and Student's t: t_quantile.",
            it_holds_what_it_says,
        ),
    ],
    {"11_bootstrap_a.py": 2, "11_bootstrap_b.py": 4, "11_bootstrap_c.py": 5},
)


# ------------------------------------------------------------------------- permutation
def permutation_by_hand():
    from evaluation.metrics import permutation_p

    # Signs of 1, 1, 1: only +++ and −−− reach a sum of 3 in size, of 8.
    close("differences 1, 1, 1", permutation_p([1, 1, 1]), 2 / 8)
    # 3 − 1 = 2: all four patterns of signs reach it.
    close("differences 3, −1", permutation_p([3, -1]), 1.0)


def zeros_say_nothing():
    from evaluation.metrics import permutation_p

    close("no difference at all", permutation_p([0, 0, 0]), 1.0)
    close("zeros beside 1, 1, 1", permutation_p([1, 0, 1, 0, 0, 1] + [0] * 30), 2 / 8)


def two_sided():
    from evaluation.metrics import permutation_p

    values = [2, 1, 4, -1, 3]
    close("the other model first", permutation_p([-v for v in values]), permutation_p(values))
    # Sums of 9 of 11 and more: 4 of 32 on each side.
    exact = sum(
        abs(sum(v * s for v, s in zip((2, 1, 4, 1, 3), signs))) >= 9
        for signs in np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    )
    close("differences 2, 1, 4, −1, 3", permutation_p(values), exact / 32)


def never_zero():
    from evaluation.metrics import permutation_p

    p = permutation_p([1] * 60, flips=999)
    close("60 of 60 in favour, 999 random patterns", p, 1 / 1000)
    p = permutation_p([0.1] * 6 + [-0.1] * 2)
    close("six of 0.1 and two of −0.1", p, 74 / 256)
    # In tenths the same differences have the same p, whatever rounding does to their sums.
    for seed in range(20):
        whole = np.random.default_rng(seed).integers(-4, 5, 8)
        close(f"{whole.tolist()}, in tenths", permutation_p(whole * 0.1), permutation_p(whole))
    values = np.random.default_rng(0).normal(0.3, 1, 20)
    expect("p of 20 differences, a second time", permutation_p(values), permutation_p(values))


def many_differences():
    from evaluation.metrics import permutation_p

    # Of differences of equal size the binomial distribution tells p: as many of one sign, or more.
    for n, up in ((20, 14), (40, 25)):
        want = 2 * sum(math.comb(n, k) for k in range(up, n + 1)) / 2**n
        for values in ([1] * up + [-1] * (n - up), [-1] * up + [1] * (n - up)):
            p = permutation_p(values)
            error = abs(p - want) / math.sqrt(want * (1 - want) / 10_000)
            assert error < 4, (
                f"{n} differences, {values.count(1)} are 1 and {values.count(-1)} are -1: {p:.4f}, "
                f"is {want:.4f} by the binomial distribution ({error:.0f} standard errors off)"
            )
    found = 100 * permutation_p([1] * 14 + [-1] * 6, flips=99)
    assert abs(found - round(found)) < 1e-6 and found > 1.5, (
        f"99 random patterns and the one that was found: p is {found:.2f} of 100"
    )


PERMUTATION = Exercise(
    "permutation",
    "Could it be chance?",
    "evaluation/metrics.py",
    ["permutation_p"],
    40,
    [
        Check(
            1,
            "two cases by hand",
            "If the models are equal, each difference might as well have the other sign.",
            permutation_by_hand,
        ),
        Check(
            1,
            "images without a difference don't count",
            "Their sign changes nothing.",
            zeros_say_nothing,
        ),
        Check(
            2,
            "all patterns of signs, both sides",
            "Up to 12 differences are 4,096 patterns: try all. Compare sizes.",
            two_sided,
        ),
        Check(
            2,
            "never 0 with random patterns; equal sums count",
            "The pattern that was found is one of them. 0.1 + 0.1 + 0.1 is not 0.3.",
            never_zero,
        ),
        Check(
            1,
            "20 and 40 differences: near the exact value",
            "For many differences, too, count the patterns whose sum is as far from 0, or farther.",
            many_differences,
        ),
    ],
    {
        "11_permutation_a.py": 2,
        "11_permutation_b.py": 3,
        "11_permutation_c.py": 3,
        "11_permutation_d.py": 4,
    },
)


# ------------------------------------------------------------------------- holm
def holm_of_one():
    from evaluation.metrics import holm

    close("one p-value", holm([0.03]), [0.03])
    close("two", holm([0.01, 0.5]), [0.02, 0.5])


def holm_in_any_order():
    from evaluation.metrics import holm

    close("0.04, 0.01, 0.3", holm([0.04, 0.01, 0.3]), [0.08, 0.03, 0.3])


def holm_never_falls():
    from evaluation.metrics import holm

    close("0.02, 0.03, 0.03", holm([0.02, 0.03, 0.03]), [0.06, 0.06, 0.06])
    close("0.9, 0.5, 0.6", holm([0.9, 0.5, 0.6]), [1, 1, 1])
    rng = random.Random(0)
    for _ in range(50):
        ps = [rng.random() ** 3 for _ in range(6)]
        order = sorted(range(6), key=ps.__getitem__)
        # The definition: the largest of (m − j)·p_j over all smaller p.
        want = {
            i: min(1, max((6 - j) * ps[k] for j, k in enumerate(order[: place + 1])))
            for place, i in enumerate(order)
        }
        close(f"{ps}", holm(ps), [want[i] for i in range(6)])


HOLM = Exercise(
    "holm",
    "Many comparisons",
    "evaluation/metrics.py",
    ["holm"],
    20,
    [
        Check(1, "one or two p-values", "The smallest of m counts m times.", holm_of_one),
        Check(
            1,
            "in any order, and the result in the given one",
            "Sort the indices, not the values.",
            holm_in_any_order,
        ),
        Check(
            1,
            "a larger p never gets a smaller result, none is over 1",
            "Carry the largest so far along.",
            holm_never_falls,
        ),
    ],
    {"11_holm_a.py": 1, "11_holm_b.py": 2},
)


# ------------------------------------------------------------------------- welch
def welch_by_hand():
    from evaluation.compare import welch

    # Variances 1 and 1, of 3 each: standard error √(2/3), 4 degrees of freedom, t = 2.776445.
    half = 2.776445 * math.sqrt(2 / 3)
    found = welch([4, 5, 6], [1, 2, 3])
    close("4 5 6 against 1 2 3", found, (3, 3 - half, 3 + half), 1e-4)


def welch_of_unequal_spread():
    from evaluation.compare import welch

    # Variances 1/3 and 100/3 of the means: 2.04 degrees of freedom, where t is about 4.23.
    difference, low, high = welch([1, 2, 3], [0, 10, 20])
    close("the difference", difference, -8)
    assert 24.0 < difference - low < 25.2, (
        f"half a width of {difference - low:.2f}, should be 24.5: two degrees of freedom, not four"
    )


def welch_of_equal_seeds():
    from evaluation.compare import welch

    found = welch([0.5, 0.5], [0.25, 0.25])
    close("seeds that agree to the digit", found, (0.25, 0.25, 0.25))


WELCH = Exercise(
    "welch",
    "Two recipes, three seeds each",
    "evaluation/compare.py",
    ["welch"],
    20,
    [
        Check(
            1,
            "two recipes of equal spread",
            "The variance of a mean: np.var(a, ddof=1) / len(a). metrics.t_quantile(df).",
            welch_by_hand,
        ),
        Check(
            1,
            "two recipes of unequal spread",
            "Welch's degrees of freedom lie between the smaller n − 1 and n + m − 2.",
            welch_of_unequal_spread,
        ),
        Check(
            1,
            "seeds that agree to the digit",
            "0 / 0: nothing is left to estimate a spread from.",
            welch_of_equal_seeds,
        ),
    ],
    {"11_welch_a.py": 1, "11_welch_b.py": 2},
)

EXERCISES = [CHANCE, WILSON, SUMS, BOOTSTRAP, PERMUTATION, HOLM, WELCH]
