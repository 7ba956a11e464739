def bpe_textbook(symbols, scores, separator=""):
    # The leftmost pair that is a piece, whatever its score.
    symbols = list(symbols)
    i = 0
    while i < len(symbols) - 1:
        if symbols[i] + separator + symbols[i + 1] in scores:
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            i = max(i - 1, 0)
        else:
            i += 1
    return symbols
