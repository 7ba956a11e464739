"""Fast training and encoding: the same results as the textbook's BPE in tokenizer.py.

Pipeline: below tokenizer.py. The tests hold `learn_merges` to `learn_merges_textbook` and `bpe` to
`bpe_textbook`.

Encoding keeps the candidate merges in a heap: O(n log n) for n characters.

Training lays all distinct words in one array, one slot a character. The slots of a pair are noted
once, when the pair first appears. Later its count can only fall, as a new occurrence would need a
new symbol. So an outdated count is an upper bound, and it is enough to recount the pair on top of
a heap. A merge touches its own slots only, and N slots can lose at most N symbols: all merges
together move O(N) slots and sort them in O(N log N), in numpy.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import numpy as np
from tqdm import tqdm

from vocabulary.scripts import script
from vocabulary.sentencepiece_file import SPACE


def bpe(symbols: Iterable[str], scores: dict[str, float], separator: str = "") -> list[str]:
    """`bpe_textbook` in O(n log n): a heap of candidates, and links between the symbols left."""
    symbols = list(symbols)
    left = list(range(-1, len(symbols) - 1))
    right = list(range(1, len(symbols) + 1))
    heap = []

    def propose(i, j):
        """Put the neighbours i and j on the heap if they may be merged."""
        if i < 0 or j == len(symbols):
            return
        merge = symbols[i] + separator + symbols[j]
        if merge in scores:
            heapq.heappush(heap, (-scores[merge], i, j, merge))

    for i in range(len(symbols) - 1):
        propose(i, i + 1)

    # A merged symbol lives on at the left index; the right one becomes "".
    while heap:
        _, i, j, merge = heapq.heappop(heap)
        if not symbols[i] or not symbols[j] or symbols[i] + separator + symbols[j] != merge:
            continue  # outdated: one of the two has been merged with its other neighbour

        symbols[i], symbols[j] = symbols[i] + symbols[j], ""
        right[i] = right[j]
        if right[j] < len(symbols):
            left[right[j]] = i
        propose(left[i], i)
        propose(i, right[i])
    return [symbol for symbol in symbols if symbol]


def count_words(lines: Iterable[str]) -> Counter:
    """How often each word occurs; "" is a space without a word behind it. Lines are streamed."""
    counts = Counter()
    lines = filter(None, (line.rstrip("\r\n") for line in lines))
    while batch := list(islice(lines, 10_000)):
        counts.update(re.sub(f"[\r\n{SPACE}]", " ", " ".join(batch)).split(" "))
    return counts


def build_symbol_array(
    words: Counter, character_coverage: float, split_digits: bool, split_scripts: bool
) -> tuple[str, np.ndarray, np.ndarray]:
    """-> alphabet (most frequent first), symbols (N,) int32, weights (N,): counts of their words.

    Symbol i + 1 is alphabet[i]. Symbol 0 is a border that no piece crosses: a rare character, or
    a slot put in where a word begins and where `split_word` cuts. Empties `words`.
    """
    text = SPACE + SPACE.join(words)
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    word_counts = np.fromiter(words.values(), np.int64, len(words))
    if word_counts.max() < 2**31:
        word_counts = word_counts.astype(np.int32)
    words.clear()
    del text

    # Each character has the count of its word.
    starts_word = codes == ord(SPACE)
    weights = word_counts[np.cumsum(starts_word, dtype=np.int32) - 1]

    # The alphabet: the most frequent characters, until they cover enough of the text.
    counts = np.zeros(0x110000)
    for i in range(0, len(codes), 1 << 20):  # in blocks, as bincount makes float64 of the weights
        counts += np.bincount(codes[i : i + (1 << 20)], weights[i : i + (1 << 20)], len(counts))
    found = np.flatnonzero(counts)
    found = found[np.argsort(-counts[found], kind="stable")]  # among equals by code points
    before = np.cumsum(counts[found]) - counts[found]
    found = found[(before < character_coverage * counts.sum()) & (found != 0)]
    alphabet = "".join(map(chr, found))
    symbol_of = np.zeros(len(counts), np.int32)
    symbol_of[found] = np.arange(1, len(found) + 1)
    symbols = symbol_of[codes]
    del codes

    # The borders, as in `split_word`: before a word, around a digit, where the script changes.
    kinds = [script(char) if split_scripts else "" for char in alphabet]
    kinds = ["digit" if split_digits and c.isdecimal() else k for c, k in zip(alphabet, kinds)]
    number_of = {kind: i for i, kind in enumerate(sorted({"digit", *kinds}))}
    kind_of = np.array([number_of[kind] for kind in ["digit", *kinds]], np.int16)
    kind = kind_of[symbols]
    border = starts_word.copy()
    border[1:] |= (kind[1:] != kind[:-1]) & ~starts_word[:-1] | (kind[1:] == number_of["digit"])
    del kind
    borders = np.append(np.flatnonzero(border), len(border))
    return alphabet, np.insert(symbols, borders, 0), np.insert(weights, borders, 0)


class PairQueue:
    """Pairs of neighbouring symbols, the most frequent first; then shorter, then by code points.

    A heap of (-count, length, piece, tie_breaker, item). Pairs are added in groups. As most pairs
    never come up, a group is one entry: a generator, with the count of its next pair and length 0,
    so that it comes up before all pairs of that count.
    """

    def __init__(self, text: list[str], size: np.ndarray, starts: np.ndarray, weights: np.ndarray):
        self.text, self.size, self.starts, self.weights = text, size, starts, weights
        self.heap = []
        self.tie_breaker = count()

    def push(self, n: int, piece: str, item: tuple) -> None:
        heapq.heappush(self.heap, (-n, len(piece), piece, next(self.tie_breaker), item))

    def push_group(self, group: Iterator[tuple]) -> None:
        if pair := next(group, None):
            self.push(pair[0], "", (pair, group))

    def pop(self) -> tuple | None:
        """(count, piece, a, b, slots) of the best pair of symbols (a, b), or None."""
        while self.heap:
            neg_count, _, piece, _, item = heapq.heappop(self.heap)
            if piece:
                return -neg_count, piece, *item
            # The next pair of a group becomes an entry of its own.
            (n, a, b, slots), group = item
            self.push(n, self.text[a] + self.text[b], (a, b, slots))
            self.push_group(group)
        return None

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add the pairs that begin at these slots. Pairs with equal keys, of 32 bits, are equal."""
        self.push_group(self.group(keys, slots))

    def group(self, keys, slots):
        """Yield (count, a, b, slots) of each distinct pair, the most frequent first."""
        if len(slots) == 0:
            return

        # Key and slot share a number, so one sort groups the pairs, with their slots ascending.
        packed = keys.astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= slots.astype(np.uint64)
        packed.sort()
        slots = packed.astype(np.uint32).astype(np.int32)
        packed >>= np.uint64(32)
        first = np.append(0, np.flatnonzero(packed[1:] != packed[:-1]) + 1)
        del packed, keys  # the generator lives on

        last = np.append(first[1:], len(slots))
        counts = np.add.reduceat(self.weights[slots], first, dtype=np.int64)
        order = np.argsort(-counts, kind="stable")
        first, last, counts = first[order], last[order], counts[order]
        a = self.starts[slots[first]]
        b = self.starts[slots[first] + self.size[a]]
        for i in range(len(counts)):
            yield int(counts[i]), int(a[i]), int(b[i]), slots[first[i] : last[i]]


def drop_overlaps(slots: np.ndarray, size: int) -> np.ndarray:
    """Of overlapping pairs (the two "aa" in "aaa") every second one, from the left."""
    index = np.arange(len(slots))
    run = np.maximum.accumulate(np.where(np.diff(slots, prepend=-size - 1) != size, index, 0))
    return slots[(index - run) % 2 == 0]


def initial_pairs(starts, letters, num_symbols, max_piece_length):
    """(keys, slots) of the pairs that the text begins with. Key of a, b: a · num_symbols + b."""
    slots = np.flatnonzero((starts[:-1] > 0) & (starts[1:] > 0)).astype(np.int32)
    slots = slots[letters[starts[slots]] + letters[starts[slots + 1]] <= max_piece_length]
    keys = starts[slots].astype(np.uint64) * np.uint64(num_symbols)
    keys += starts[slots + 1].astype(np.uint64)
    return keys, slots


def learn_merges(
    alphabet: Iterable[str],
    starts: np.ndarray,
    weights: np.ndarray,
    n_pieces: int,
    max_piece_length: int,
    progress: bool = False,
    accept: Callable[[str], bool] | None = None,
) -> list[str]:
    """`learn_merges_textbook` on the arrays of `build_symbol_array`. Overwrites `starts`.

    starts[i] is the symbol that begins at slot i, -1 inside one; ends[i] the one that ends there.
    accept: asked about each new piece, at its turn; a pair that it refuses is never merged.
    """
    text = ["", *alphabet]  # of each symbol
    size = np.ones(len(text) + min(n_pieces, len(starts)), np.int32)  # slots of each symbol
    letters = size.copy()
    letters[: len(text)] = list(map(len, text))
    ends = starts.copy()
    pieces = []

    queue = PairQueue(text, size, starts, weights)
    queue.add(*initial_pairs(starts, letters, len(text), max_piece_length))
    bar = tqdm(total=n_pieces, desc="merges", unit="", disable=not progress)
    while len(pieces) < n_pieces and (pair := queue.pop()):
        # Recount. If the count has fallen, the pair goes back with the true one.
        old_n, piece, a, b, slots = pair
        size_a, size_c = size[a], size[a] + size[b]
        slots = slots[(starts[slots] == a) & (starts[slots + size_a] == b)]
        places = drop_overlaps(slots, size_a) if a == b else slots
        n = int(weights[places].sum(dtype=np.int64))
        if n < old_n:
            if n:
                queue.push(n, piece, (a, b, slots))
            continue
        if accept and not accept(piece):
            continue

        # Merge: the new symbol c replaces a and b.
        c = len(text)
        text.append(piece)
        pieces.append(piece)
        size[c], letters[c] = size_c, len(piece)
        starts[places] = c
        starts[places + size_a] = -1
        ends[places + size_c - 1] = c

        # New pairs: c with its neighbours. (c, c) is added twice, and found merged the second time.
        before, after = ends[places - 1], starts[places + size_c]
        fits = (before > 0) & (letters[before] + len(piece) <= max_piece_length)
        queue.add(before[fits], places[fits] - size[before[fits]])
        fits = (after > 0) & (letters[after] + len(piece) <= max_piece_length)
        queue.add(after[fits], places[fits])
        bar.update()
    bar.close()
    return pieces
