"""Lesson 1, bytes to pieces: the textbook's BPE, cutting text into words, a fast BPE."""

from course.exercise import Check, Exercise

TITLE = "Bytes to pieces (BPE)"


# ------------------------------------------------------------------------- merge_pair
def test_merges_one_pair():
    from tokenizer import merge_pair

    found = merge_pair(("l", "o", "w"), ("l", "o"))
    assert found == ("lo", "w"), f'("l", "o", "w") with the pair ("l", "o") gives {found}'


def test_merges_everywhere():
    from tokenizer import merge_pair

    found = merge_pair(("b", "a", "n", "a", "n", "a"), ("a", "n"))
    assert found == ("b", "an", "an", "a"), f"banana with the pair (a, n) gives {found}"


def test_merges_without_overlap():
    from tokenizer import merge_pair

    found = merge_pair(("a",) * 5, ("a", "a"))
    assert found == ("aa", "aa", "a"), f"aaaaa with the pair (a, a) gives {found}"
    symbols = ("ab", "a", "b", "ab")
    found = merge_pair(symbols, ("a", "b"))
    assert found == ("ab", "ab", "ab"), f"{symbols} with the pair (a, b) gives {found}"


def test_compares_symbols():
    from tokenizer import merge_pair

    symbols = ("a", "bc", "ab", "c")
    found = merge_pair(symbols, ("ab", "c"))
    assert found == ("a", "bc", "abc"), f"{symbols} with the pair (ab, c) gives {found}"


MERGE_PAIR = Exercise(
    "merge_pair",
    "Join a pair of symbols",
    "tokenizer.py",
    ["merge_pair"],
    20,
    [
        Check(
            1,
            "one pair becomes one symbol",
            "Compare two neighbours at a time.",
            test_merges_one_pair,
        ),
        Check(
            1, "the pair is joined wherever it is", "The loop must go on.", test_merges_everywhere
        ),
        Check(
            1,
            "a symbol is used once only: aaaaa is aa, aa, a",
            "After a merge, where does the next pair begin?",
            test_merges_without_overlap,
        ),
        Check(
            1,
            "only the pair itself is joined, not all that reads the same",
            "The text abc can come from (a, bc) as well as from (ab, c).",
            test_compares_symbols,
        ),
    ],
    {"01_merge_pair_a.py": 1, "01_merge_pair_b.py": 3},
)

EXERCISES = [MERGE_PAIR]
