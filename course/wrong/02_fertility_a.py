from collections import Counter


def fertility_counts(tokenizer, lines):
    # The end of a line counts as text.
    pieces, counts = Counter(), Counter()
    for line in lines:
        ids = tokenizer.encode(line)
        pieces.update(tokenizer.piece(i) for i in ids)
        counts["tokens"] += len(ids)
        counts["characters"] += len(line)
        counts["words"] += len(line.split())
        counts["bytes"] += len(line.encode())
    return counts, pieces
