def holm(ps):
    # The results stand in the order of their size, not in the given one.
    adjusted, largest = [], 0.0
    for rank, p in enumerate(sorted(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * p))
        adjusted.append(largest)
    return adjusted
