from collections import Counter

from tokenizer import BYTE, UNKNOWN


def fertility_counts(tokenizer, lines):
    # Each byte counts as an unknown character.
    pieces, counts = Counter(), Counter()
    for line in lines:
        line = line.rstrip("\r\n")
        for i in tokenizer.encode(line):
            piece = tokenizer.pieces[i]
            pieces[piece.text] += 1
            counts["tokens"] += 1
            counts["byte_tokens"] += piece.type == BYTE
            counts["unknown"] += piece.type in (BYTE, UNKNOWN)
        counts["characters"] += len(line)
        counts["words"] += len(line.split())
        counts["bytes"] += len(line.encode())
    return counts, pieces
