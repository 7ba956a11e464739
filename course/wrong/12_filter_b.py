from annotation.filters import Rejected, find_fault, find_hostile, truncate_conversation


def filter_pairs(pairs, kind, objects=()):
    # A hostile text rejects its own pair only, and the shortest language decides the number.
    passed, rejected = [], []
    for n in range(min(map(len, pairs.values()))):
        for code, said in pairs.items():
            reason = find_hostile(said[n][0]) or find_hostile(said[n][1])
            fault = ("hostile", reason) if reason else find_fault(*said[n], code, objects)
            if fault:
                rejected.append(Rejected(n, fault[0], f"{code}: {fault[1]}"))
                break
        else:
            passed.append(n)
    return truncate_conversation(kind, passed, rejected)
