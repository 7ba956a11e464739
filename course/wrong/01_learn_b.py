from collections import Counter

from tokenizer import merge_pair


def learn_merges_textbook(words, n_pieces, max_piece_length):
    # Each word counts once.
    words = [tuple(word) for word in words]
    pieces = []
    while len(pieces) < n_pieces:
        counts = Counter(pair for symbols in words for pair in zip(symbols, symbols[1:]))
        fitting = [pair for pair in counts if len("".join(pair)) <= max_piece_length]
        if not fitting:
            break
        pair = min(fitting, key=lambda p: (-counts[p], len("".join(p)), "".join(p)))
        pieces.append("".join(pair))
        words = [merge_pair(symbols, pair) for symbols in words]
    return pieces
