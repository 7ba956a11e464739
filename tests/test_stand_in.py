"""The judge for a class without a network: its tastes, in the words of the judge's prompts."""

import pytest

from course.stand_in import judge
from evaluation.judge import PROMPTS, read_verdict

CASES = {"en": ("Red.", "a blue cat"), "ko": ("빨간색", "파란 고양이"), "zh": ("红色", "蓝色的猫")}


@pytest.mark.parametrize("language", CASES)
def test_a_taste_is_a_verdict_in_each_language_and_order(language):
    prompts, (right, longer) = PROMPTS[language], CASES[language]
    verdicts = {}
    for order in ((right, longer), (longer, right)):
        reference = prompts["reference"].format(truth=right.strip("."))
        words = {"question": "?", "reference": reference, "first": order[0], "second": order[1]}
        request = prompts["question"].format(**words) + prompts["pairwise"]
        for taste in ("first", "longer", "reference"):
            reply = judge(taste, request)
            verdicts.setdefault(taste, []).append(read_verdict("pairwise", reply))
    assert verdicts == {"first": [1, 1], "longer": [2, 1], "reference": [1, 2]}
    words = {"question": "?", "reference": "Reference answer: a\n", "first": "b", "second": "c"}
    same = PROMPTS["en"]["question"].format(**words)
    assert read_verdict("pairwise", judge("reference", same)) == 0
