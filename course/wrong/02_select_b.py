from tokenizer import NORMAL, USER_DEFINED, Tokenizer, is_blocked, is_foreign, report


def select_pieces(base, new, *, unreachable="drop", foreign_only=True, same_normalizer=True):
    # Two halves that are pieces seem enough: the base's merges are forgotten.
    left_out = {reason: [] for reason in report.REASONS}
    if isinstance(new, Tokenizer):
        left_out["special"] = [p.text for p in new.pieces if p.type not in (NORMAL, USER_DEFINED)]
        new = [p.text for p in new.pieces if p.type in (NORMAL, USER_DEFINED)]
    waiting, known = [], set(base.scores)
    for text in filter(None, dict.fromkeys(new)):
        if text in base.ids:
            left_out["known"].append(text)
        elif foreign_only and not is_foreign(text):
            left_out["english"].append(text)
        elif unreachable != "keep" and is_blocked(text, base):
            left_out["blocked"].append(text)
        else:
            waiting.append(text)
    if unreachable == "keep":
        return waiting, left_out
    added, count = [], -1
    while count != len(added):
        count = len(added)
        for text in waiting:
            halves = [(text[:i], text[i:]) for i in range(1, len(text))]
            if len(text) == 1 or any(a in known and b in known for a, b in halves):
                added.append(text)
                known.add(text)
        waiting = [text for text in waiting if text not in known]
    left_out["unreachable"] = waiting
    return added, left_out
