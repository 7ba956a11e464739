from collections import Counter

from evaluation.metrics import normalise
from evaluation.questions import reference_answer


def most_frequent_answers(questions):
    # One answer for all groups.
    counts = Counter(normalise(reference_answer(q)) for q in questions)
    return [max(counts, key=counts.get)] * len(questions)
