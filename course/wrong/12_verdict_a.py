from evaluation.judge import REFUSAL, SCORES, VERDICT


def read_verdict(mode, text):
    # The first one counts, which may be a quotation of the task.
    if mode == "pairwise":
        if found := VERDICT.search(text):
            return {"1": 1, "2": 2}.get(found[1], 0)
    elif found := SCORES.search(text):
        grades = int(found[1]), int(found[2])
        if all(1 <= grade <= 10 for grade in grades):
            return grades
    if REFUSAL.search(text):
        return None
    raise ValueError("no verdict")
