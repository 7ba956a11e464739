from tokenizer import (
    NORMAL,
    USER_DEFINED,
    Tokenizer,
    bpe,
    is_blocked,
    is_foreign,
    report,
    scores_below,
)


def select_pieces(base, new, *, unreachable="drop", foreign_only=True, same_normalizer=True):
    # One pass: a piece that needs a later one is lost.
    left_out = {reason: [] for reason in report.REASONS}
    if isinstance(new, Tokenizer):
        left_out["special"] = [p.text for p in new.pieces if p.type not in (NORMAL, USER_DEFINED)]
        new = [p.text for p in new.pieces if p.type in (NORMAL, USER_DEFINED)]
    scores, next_scores, added = dict(base.scores), scores_below(base), []
    for text in filter(None, dict.fromkeys(new)):
        if text in base.ids:
            left_out["known"].append(text)
        elif foreign_only and not is_foreign(text):
            left_out["english"].append(text)
        elif unreachable == "keep":
            added.append(text)
        elif is_blocked(text, base):
            left_out["blocked"].append(text)
        elif len(bpe(text, scores)) <= 2:
            added.append(text)
            scores[text] = next(next_scores)
        else:
            left_out["unreachable"].append(text)
    return added, left_out
