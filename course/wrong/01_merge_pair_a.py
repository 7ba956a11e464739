def merge_pair(symbols, pair):
    for i in range(len(symbols) - 1):
        if symbols[i : i + 2] == pair:
            return symbols[:i] + ("".join(pair),) + symbols[i + 2 :]
    return symbols
