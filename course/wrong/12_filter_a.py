from annotation.filters import MAX_TURNS, Rejected, find_fault, find_hostile


def filter_pairs(pairs, kind, objects=()):
    for code, said in pairs.items():
        for n, (question, answer) in enumerate(said):
            if reason := find_hostile(question) or find_hostile(answer):
                return [], [Rejected(None, "hostile", f"{code}, pair {n}: {reason}")]
    counts = {len(said) for said in pairs.values()}
    if len(counts) > 1 or not 1 <= max(counts) <= MAX_TURNS:
        return [], [Rejected(None, "turns", str(counts))]

    # A fault for each language: one pair is counted twice.
    rejected = []
    for code, said in pairs.items():
        for n, pair in enumerate(said):
            if fault := find_fault(*pair, code, objects):
                rejected.append(Rejected(n, fault[0], f"{code}: {fault[1]}"))
    bad = {entry.pair for entry in rejected}
    return [n for n in range(max(counts)) if n not in bad], rejected
