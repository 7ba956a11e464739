from evaluation.judge import REFUSAL, SCORES, VERDICT


def read_verdict(mode, text):
    # Whoever mentions what it cannot do is taken to refuse.
    if REFUSAL.search(text):
        return None
    if mode == "pairwise":
        if found := VERDICT.findall(text):
            return {"1": 1, "2": 2}.get(found[-1], 0)
    elif found := SCORES.findall(text):
        grades = tuple(map(int, found[-1]))
        if all(1 <= grade <= 10 for grade in grades):
            return grades
    raise ValueError("no verdict")
