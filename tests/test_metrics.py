"""Scores of answers: against hand-worked and published numbers. Statistics: against closed forms,
tables and simulations."""

import json
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import make_question, score_answers

from evaluation import metrics
from evaluation.questions import read_file
from evaluation.scores import FAMILIES, accuracy_rows, metric_rows

DATA = Path(os.environ.get("XLLAVA_DATA", "/nowhere"))


def about(images, each=1):
    """`each` questions about each of some images."""
    return [make_question("a", id=i, image=f"{i // each}.png") for i in range(images * each)]


# ------------------------------------------------------------------------------------ answers
def test_answers_that_differ_in_form_only_are_equal():
    assert metrics.normalise(" At the  TOP. ") == metrics.normalise("at the top")
    decomposed = "\u1112\u1161\u11ab"
    assert metrics.normalise(decomposed) == metrics.normalise("한")
    assert metrics.normalise("a\u00a0cat\u3000there") == "a cat there", "any kind of space"
    assert metrics.normalise("红色。") == metrics.normalise("红色！") == "红色"
    assert metrics.normalise("a cat .") == "a cat"
    assert metrics.normalise("a cat") != metrics.normalise("cat")


def test_a_caption_is_right_if_it_has_the_same_clauses():
    caption = make_question("a red cat, a big key, at night", id=0, metric="caption")
    for answer, accuracy, exact in (
        ("A red cat, a big key, at night.", 1, 1),
        ("a big key, a red cat, at night", 1, 0),
        ("a red cat, a red cat, at night", 0, 0),
        ("a red cat, a red cat, a big key, at night", 0, 0),
        ("a red cat, a big key", 0, 0),
    ):
        scores = metrics.score_answer(caption, answer)
        assert (scores["accuracy"], scores["exact"]) == (accuracy, exact), answer
    assert metrics.clauses("左侧有猫，在夜晚。") == metrics.clauses("在夜晚，左侧有猫")
    assert metrics.clauses("A cat, snow., ") == metrics.clauses("snow, a cat")


def test_the_language_of_an_answer_is_that_of_its_reference():
    question = make_question("고양이", "ko", id=0)
    answers = ("개", "a cat 고양이", "cat", "猫", "")
    same = [metrics.score_answer(question, answer)["same_language"] for answer in answers]
    assert same == [1, 1, 0, 0, 0]


def test_vqa_accuracy_is_the_mean_over_leaving_each_annotator_out():
    truths = ["cat"] * 3 + ["dog"] * 7
    assert metrics.vqa_accuracy("cat", truths) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10, abs=1e-12)
    assert metrics.vqa_accuracy("dog", truths) == 1 and metrics.vqa_accuracy("cow", truths) == 0
    one_in_ten = ["cat"] + ["dog"] * 9
    assert metrics.vqa_accuracy("A cat.", one_in_ten) == pytest.approx(9 / 30, abs=1e-12)
    assert metrics.vqa_accuracy("Cat.", ["cat"] * 10) == 1, (
        "an answer is normalised before the authors' tool gets it"
    )
    assert metrics.vqa_accuracy("the cat", ["the cat"] * 10) == 0, (
        "which leaves truths as they are where annotators agree"
    )
    assert metrics.vqa_accuracy(" cat\n", ["cat"] * 10) == 1


@pytest.mark.parametrize(
    "text, want",
    [
        ("The two dogs.", "2 dogs"),
        ("1,000 people", "1000 people"),
        ("black-and-white", "black and white"),
        ("on - top", "on top"),
        ("3.5 feet.", "3.5 feet"),
        ("dont know", "don't know"),
        ("yes, it's red!", "yes it's red"),
        ("none", "0"),
        ("a b/c", "b c"),
        ("what ?", "what"),
        ("twas", "'twas"),
        ("youll", "you'll"),
        ("youd've", "you'd've"),
        ("y'alld've", "y'all'd've"),
        ("youdve", "youdve"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("x" + "." * 40, "x" + "." * 8),
    ],
)
def test_vqa_normalisation_is_the_authors(text, want):
    assert metrics.vqa_normalise(text) == want


def test_pope_reads_answers_as_its_authors_do():
    for answer in ("Yes, there is.", "yes. no", "Nothing"):
        assert metrics.says_yes(answer, "en")
    for answer in ("No, there isn't.", "There is not one"):
        assert not metrics.says_yes(answer, "en")
    assert not metrics.says_yes("Yes, there is no doubt", "en"), (
        "the authors' quirk, kept so that numbers can be compared"
    )


def test_one_text_in_two_encodings_scores_as_one():
    korean = unicodedata.normalize("NFD", "아니요, 없어요")
    assert not metrics.says_yes(korean, "ko")
    assert metrics.chrf(korean, "아니요, 없어요") == 1
    question = make_question("아니요, 없어요 3", "ko")
    scores = metrics.score_answer(question, korean + " ３")
    assert (scores["same_language"], scores["accuracy"]) == (1, 1)
    assert metrics.score_answer(make_question("cat"), "")["same_language"] == 0


def test_pope_reads_korean_and_chinese_answers_by_their_negations():
    for answer in (
        "네, 있어요",
        "네, 고양이가 보입니다. 개는 없습니다.",
        "네, 의자가 하나 있고 사람은 없습니다.",
        "틀림없이 있습니다.",
    ):
        assert metrics.says_yes(answer, "ko")
    for answer in (
        "아니요",
        "없어요",
        "그림에 고양이가 없습니다.",
        "자전거가 보이지 않습니다",
        "No, no cat.",
        "아닙니다",
        "아뇨",
        "못 찾겠어요",
        "고양이를 찾지 못했어요. 없는 것 같아요.",
    ):
        assert not metrics.says_yes(answer, "ko")
    for answer in (
        "有",
        "是的",
        "图中有一只猫。没有狗。",
        "是的，图片中有一架无人机。",
        "图片中有一架无人机",
        "有不少猫",
        "有，但是没有狗",
        "没错，图里有一只狗。",
    ):
        assert metrics.says_yes(answer, "zh")
    for answer in ("不是", "没有", "图中没有猫。", "No", "未看到", "无", "不在图中"):
        assert not metrics.says_yes(answer, "zh")


def test_character_f1_is_korquads():
    assert metrics.character_f1("고양이가", "고양이는") == pytest.approx(3 / 4)
    assert metrics.character_f1("빨간 고양이", "빨간고양이") == 1, "spaces don't count"
    assert metrics.character_f1("《홍길동전》", "홍길동전.") == 1
    assert metrics.character_f1("红色的猫。", "红色的猫") == 1
    assert metrics.character_f1("猫", "红色的猫") == pytest.approx(2 * 1 * 0.25 / 1.25)
    assert metrics.character_f1("가가가", "가") == pytest.approx(0.5), (
        "a character that is there three times is right once"
    )
    assert metrics.character_f1("", "가") == metrics.character_f1("나", "가") == 0


def test_chrf_is_the_published_one():
    # sacrebleu's own tests: beta 3, runs that a text is too short for left out. Spaces count there,
    # so a letter replaces them here.
    for answer, reference, want in (
        (
            "Die Beziehung zwischen Obama und Netanjahu ist nicht gerade freundlich.",
            "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
            0.673481606,
        ),
        (
            "risk assessment must be made of those who are qualified and expertise in the sector"
            " - these are the scientists .",
            "risk assessment has to be undertaken by those who are qualified and expert in that "
            "area - that is the scientists .",
            0.652414427,
        ),
    ):
        answer, reference = answer.replace(" ", "␣"), reference.replace(" ", "␣")
        assert metrics.chrf(answer, reference, beta=3) == pytest.approx(want, abs=1e-6)
    assert metrics.chrf("a b c", "abc") == 1 and metrics.chrf("", "c") == 0
    assert metrics.chrf("aa", "ab") == pytest.approx(0.25)
    # runs of one: P 1, R 2/3; of two: P 1, R 1/2; mean P 1, R 7/12; F2 = 5PR / (4P + R)
    assert metrics.chrf("ab", "abc") == pytest.approx(5 * 7 / 12 / (4 + 7 / 12))


# ------------------------------------------------------------------------------------ statistics
def test_students_t_is_the_tables():
    table = {1: 12.7062, 2: 4.30265, 5: 2.57058, 30: 2.04227, 1000: 1.96234, 1e6: 1.95996}
    for df, want in table.items():
        assert metrics.t_quantile(df) == pytest.approx(want, rel=2e-5)


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, table I
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert metrics.wilson(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_the_bootstrap_of_a_mean_is_students_interval():
    for n in (10, 300):
        x = np.random.default_rng(n).normal(0.5, 0.1, n)
        value, low, high = metrics.bootstrap(np.stack([x, np.ones(n)], axis=1))
        half = metrics.t_quantile(n - 1) * x.std(ddof=1) / math.sqrt(n)
        assert value == pytest.approx(x.mean())
        assert (high - low) / 2 == pytest.approx(half, rel=0.06)


@pytest.mark.parametrize("images, each", [(8, 3), (80, 6)])
def test_the_interval_holds_the_truth_95_times_in_a_hundred_where_questions_share_images(
    images, each
):
    rng, hits, naive, runs = np.random.default_rng(images), 0, 0, 2000
    for run in range(runs):
        # Each image is easy or hard. A smooth score: else few images have a handful of means.
        difficulty = rng.normal(0, 0.12, images)[:, None]
        score = np.clip(0.6 + difficulty + rng.normal(0, 0.1, (images, each)), 0, 1)
        _, low, high = metrics.bootstrap(np.stack([score.sum(1), np.full(images, each)], axis=1))
        hits += low <= 0.6 <= high
        if run < 300:
            _, low, high = metrics.bootstrap(np.stack([score.ravel(), np.ones(score.size)], axis=1))
            naive += low <= 0.6 <= high
    assert 0.93 <= hits / runs <= 0.97
    assert naive / 300 < 0.9, (
        "as if questions were independent: too narrow, which this test must be able to show"
    )


def test_the_interval_of_right_and_wrong_answers_holds_too():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        right = rng.binomial(5, rng.beta(8, 2, 100))  # 100 images of 5 questions, mean 0.8
        _, low, high = metrics.bootstrap(np.stack([right, np.full(100, 5)], axis=1))
        hits += low <= 0.8 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_where_nothing_varies_the_interval_is_wilsons_over_images():
    columns = metrics.sums_per_image(about(20, each=4), np.zeros(80))
    assert metrics.bootstrap(columns) == (0, *metrics.wilson(0, 20))


def test_a_precision_of_one_of_thirty_images_is_not_certain():
    questions = [make_question("yes", id=i, image=f"{i}.png", metric="pope") for i in range(30)]
    scores = [metrics.score_answer(q, "Yes" if q.id == 0 else "No") for q in questions]
    rows = {r["metric"]: r for r in metric_rows("full", questions, scores, FAMILIES)}
    precision, recall = rows["POPE precision"], rows["POPE recall"]
    assert (precision["value"], recall["value"]) == (1, pytest.approx(1 / 30))
    assert (precision["low"], precision["high"]) == metrics.wilson(1, 1)


def test_images_are_the_unit_and_splits_keep_theirs_apart():
    questions = [
        make_question("a", split=split, id=i, image="0.png") for split in "ab" for i in range(3)
    ]
    questions.append(make_question("a", split="a", id=9))
    sums = metrics.sums_per_image(questions, np.arange(7.0))
    assert sums.tolist() == [[3, 3], [12, 3], [6, 1]]


def test_few_images_get_the_exact_permutation_p_and_many_the_sign_tests():
    sign_test = 2 * (1 + 10) / 2**10
    assert metrics.permutation_p([1] * 9 + [-1]) == pytest.approx(sign_test)
    assert metrics.permutation_p([0, 0, 0]) == 1 and metrics.permutation_p([3]) == 1
    assert metrics.permutation_p([2, 1, 1]) == pytest.approx(2 / 8)
    # McNemar's exact test: 30 against 14
    exact = 2 * sum(math.comb(44, k) for k in range(15)) / 2**44
    sampling_error = math.sqrt(exact / 10_000)
    got = metrics.permutation_p([1] * 30 + [-1] * 14)
    assert got == pytest.approx(exact, abs=4 * sampling_error)
    # as if all patterns were drawn at once
    x = np.random.default_rng(1).normal(size=101)
    signs = np.random.default_rng(0).integers(0, 2, (1200, 101), dtype=np.int8)
    as_far = (abs((1 - 2 * signs) @ x) >= abs(x.sum()) - 1e-9).sum()
    assert metrics.permutation_p(x, flips=1200) == pytest.approx((as_far + 1) / 1201)


def test_equal_models_are_told_apart_5_times_in_a_hundred():
    rng = np.random.default_rng(0)
    found = sum(
        metrics.permutation_p(rng.integers(-2, 3, 30), flips=500) <= 0.05 for _ in range(1000)
    )
    assert 30 <= found <= 70


def test_holms_correction_is_the_hand_worked_one():
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.9, 0.8]) == [1, 1] and metrics.holm([]) == []


def test_a_model_against_itself_is_no_difference():
    scores = np.random.default_rng(0).integers(0, 2, 60)
    row = metrics.paired_comparison(about(20, 3), scores, scores)
    assert [row[key] for key in ("difference", "low", "high", "effect", "p")] == [0, 0, 0, 0, 1]
    assert row["images"] == 20


def test_a_difference_that_never_varies_has_no_finite_effect():
    row = metrics.paired_comparison(about(20), np.zeros(20), np.ones(20))
    assert row["effect"] == -math.inf and row["different"] == 20


def test_a_known_difference_is_found_with_its_size():
    rng = np.random.default_rng(0)
    b = rng.normal(0.5, 0.1, 400)
    a = b + rng.normal(0.05, 0.1, 400)
    row, d = metrics.paired_comparison(about(400), a, b), a - b
    assert row["difference"] == pytest.approx(d.mean()) and row["p"] < 0.001
    assert row["effect"] == pytest.approx(d.mean() / d.std(ddof=1))
    half = 1.96 * d.std(ddof=1) / 20
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.06)


def test_what_json_lacks_becomes_null(tmp_path):
    metrics.write_results(
        tmp_path / "r.json", {"rows": [{"low": -math.inf, "high": (math.nan, 1)}]}
    )
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"rows": [{"low": None, "high": [None, 1]}]}


# ------------------------------------------------------------------------------------ public files
@pytest.mark.skipif(
    not (DATA / "eval/pope").is_dir(), reason="set XLLAVA_DATA to a folder with eval/pope"
)
@pytest.mark.parametrize("name", ["random", "popular", "adversarial"])
def test_popes_figures_are_those_of_its_authors_counting(name):
    path = DATA / f"eval/pope/coco_pope_{name}.json"
    questions = read_file(path)
    assert len(questions) > 2900
    choices = ["Yes, there is.", "yes", "No, there is not.", "no"]
    choices += ["No. Yes.", "I see, not one", "There isn't", "Yes. no"]
    rng, answers = np.random.default_rng(0), []
    tp = fp = tn = fn = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        label = json.loads(line)["label"]
        answer = str(rng.choice(choices))
        answers.append(answer)
        first = answer.partition(".")[0].replace(",", "").split(" ")
        says_no = any(word in first for word in ("No", "not", "no"))
        tp += not says_no and label == "yes"
        fp += not says_no and label == "no"
        tn += says_no and label == "no"
        fn += says_no and label == "yes"

    precision, recall = tp / (tp + fp), tp / (tp + fn)
    scores = score_answers(questions, answers)
    rows = metric_rows("full", questions, scores, FAMILIES)
    got = {row["metric"]: row["value"] for row in rows if row["language"] == "all"}
    want = {
        "POPE precision": precision,
        "POPE recall": recall,
        "POPE f1": 2 * precision * recall / (precision + recall),
        "POPE yes_ratio": (tp + fp) / len(answers),
    }
    assert got == pytest.approx(want, abs=1e-9)
    rows = accuracy_rows("full", questions, scores)
    (whole,) = [row for row in rows if row["language"] == row["kind"] == "all"]
    assert whole["n"] == len(questions)
    assert whole["accuracy"] == pytest.approx((tp + tn) / len(answers), abs=1e-9)
