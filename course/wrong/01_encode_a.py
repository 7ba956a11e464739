from tokenizer import merge_pair


def bpe_textbook(symbols, scores, separator=""):
    # One pass through the merges in their order: no pair is looked at again.
    symbols = tuple(symbols)
    for merge in sorted(scores, key=scores.get, reverse=True):
        for pair in zip(symbols, symbols[1:]):
            if separator.join(pair) == merge:
                symbols = merge_pair(symbols, pair)
                break
    return list(symbols)
