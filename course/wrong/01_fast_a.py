def bpe(symbols, scores, separator=""):
    # The textbook's: right, but each merge looks at the whole text again.
    symbols = list(symbols)
    while True:
        best = None
        for i in range(len(symbols) - 1):
            score = scores.get(symbols[i] + separator + symbols[i + 1])
            if score is not None and (best is None or score > best[0]):
                best = score, i
        if best is None:
            return symbols
        i = best[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
