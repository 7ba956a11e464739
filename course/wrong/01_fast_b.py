import heapq


def bpe(symbols, scores, separator=""):
    # Python's heap gives the smallest first: here that is the worst score.
    symbols = list(symbols)
    left = list(range(-1, len(symbols) - 1))
    right = list(range(1, len(symbols) + 1))
    heap = []

    def propose(i, j):
        if 0 <= i and j < len(symbols):
            merge = symbols[i] + separator + symbols[j]
            if merge in scores:
                heapq.heappush(heap, (scores[merge], i, j, merge))

    for i in range(len(symbols) - 1):
        propose(i, i + 1)
    while heap:
        _, i, j, merge = heapq.heappop(heap)
        if not symbols[i] or not symbols[j] or symbols[i] + separator + symbols[j] != merge:
            continue
        symbols[i], symbols[j] = symbols[i] + symbols[j], ""
        right[i] = right[j]
        if right[j] < len(symbols):
            left[right[j]] = i
        propose(left[i], i)
        propose(i, right[i])
    return [symbol for symbol in symbols if symbol]
