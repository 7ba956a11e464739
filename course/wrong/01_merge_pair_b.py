def merge_pair(symbols, pair):
    # The joined neighbours are compared as one text.
    merged, i = [], 0
    while i < len(symbols):
        if merged and merged[-1] + symbols[i] == "".join(pair):
            merged[-1] += symbols[i]
        else:
            merged.append(symbols[i])
        i += 1
    return tuple(merged)
