from collections import Counter

from tokenizer import merge_pair


def learn_merges_textbook(words, n_pieces, max_piece_length):
    # Overlapping pairs count twice: a a in a a a.
    words = {tuple(word): n for word, n in words.items()}
    pieces = []
    while len(pieces) < n_pieces:
        counts = Counter()
        for symbols, n in words.items():
            for pair in zip(symbols, symbols[1:]):
                if len("".join(pair)) <= max_piece_length:
                    counts[pair] += n
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], len("".join(p)), "".join(p)))
        pieces.append("".join(pair))
        words = {merge_pair(symbols, pair): n for symbols, n in words.items()}
    return pieces
