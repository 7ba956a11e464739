"""The judge for a class without a network: its tastes, in the words of the judge's prompts."""

import pytest

from course.stand_in import judge
from evaluation.judge import PROMPTS, read_verdict

CASES = {"en": ("Red.", "a blue cat"), "ko": ("빨간색", "파란 고양이"), "zh": ("红色", "蓝色的猫")}


@pytest.mark.parametrize("language", CASES)
def test_a_taste_is_a_verdict_in_each_language_and_order(language):
    right, longer = CASES[language]
    verdicts = {}
    for order in ((right, longer), (longer, right)):
        words = {"question": "?", "truth": right.strip("."), "first": order[0], "second": order[1]}
        request = PROMPTS[language]["question"].format(**words) + PROMPTS[language]["pairwise"]
        for taste in ("first", "longer", "reference"):
            reply = judge(taste, request)
            verdicts.setdefault(taste, []).append(read_verdict("pairwise", reply))
    assert verdicts == {"first": [1, 1], "longer": [2, 1], "reference": [1, 2]}
    same = PROMPTS["en"]["question"].format(question="?", truth="a", first="b", second="c")
    assert read_verdict("pairwise", judge("reference", same)) == 0
