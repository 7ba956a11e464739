def bpe_textbook(symbols, scores, separator=""):
    # The separator stays in the symbol.
    symbols = list(symbols)
    while True:
        best = None
        for i in range(len(symbols) - 1):
            merge = symbols[i] + separator + symbols[i + 1]
            if merge in scores and (best is None or scores[merge] > best[0]):
                best = scores[merge], i, merge
        if best is None:
            return symbols
        _, i, merge = best
        symbols[i : i + 2] = [merge]
