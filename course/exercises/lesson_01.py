"""Lesson 1, bytes to pieces: the textbook's BPE, cutting text into words, a fast BPE."""

import random
import string

from course.exercise import Check, Exercise, expect
from course.exercises.vocabularies import sentencepiece_model

TITLE = "Bytes to pieces (BPE)"
SPACE = "▁"


# ------------------------------------------------------------------------- merge_pair
def test_merges_one_pair():
    from tokenizer import merge_pair

    expect("l o w with the pair (l, o)", merge_pair(("l", "o", "w"), ("l", "o")), ("lo", "w"))


def test_merges_everywhere():
    from tokenizer import merge_pair

    found = merge_pair(tuple("banana"), ("a", "n"))
    expect("b a n a n a with the pair (a, n)", found, ("b", "an", "an", "a"))


def test_merges_without_overlap():
    from tokenizer import merge_pair

    found = merge_pair(("a",) * 5, ("a", "a"))
    expect("a a a a a with the pair (a, a)", found, ("aa", "aa", "a"))
    found = merge_pair(("ab", "a", "b", "ab"), ("a", "b"))
    expect("ab a b ab with the pair (a, b)", found, ("ab", "ab", "ab"))


def test_compares_symbols():
    from tokenizer import merge_pair

    found = merge_pair(("a", "bc", "ab", "c"), ("ab", "c"))
    expect("a bc ab c with the pair (ab, c)", found, ("a", "bc", "abc"))

    # Each symbol in bars: then joining the pair is replacing a text.
    rng = random.Random(1)
    for _ in range(300):
        symbols = tuple(rng.choice(["a", "b", "ab", "ba"]) for _ in range(rng.randrange(9)))
        pair = rng.choice(["a", "b", "ab"]), rng.choice(["a", "b"])
        text = "".join(f"|{symbol}|" for symbol in symbols)
        text = text.replace(f"|{pair[0]}||{pair[1]}|", f"|{pair[0]}{pair[1]}|")
        expected = tuple(text.strip("|").split("||")) if text else ()
        expect(f"{symbols} with the pair {pair}", merge_pair(symbols, pair), expected)


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
        Check(1, "the pair is joined wherever it is", "The loop goes on.", test_merges_everywhere),
        Check(
            1,
            "a symbol is used once only: a a a a a becomes aa aa a",
            "After a merge, at which index does the next pair begin?",
            test_merges_without_overlap,
        ),
        Check(
            1,
            "only the pair itself is joined, not all that reads the same",
            "The text abc comes from (a, bc) as well as from (ab, c).",
            test_compares_symbols,
        ),
    ],
    {"01_merge_pair_a.py": 1, "01_merge_pair_b.py": 3},
)

# ------------------------------------------------------------------------- learn_merges_textbook
HUGS = {"hug": 10, "pug": 5, "pun": 12, "bun": 14, "hugs": 5}


def test_learns_from_one_word():
    from tokenizer import learn_merges_textbook

    expect("the word abab, 2 pieces", learn_merges_textbook({"abab": 1}, 2, 16), ["ab", "abab"])


def test_counts_words_by_frequency():
    from tokenizer import learn_merges_textbook

    # u n: 12 + 14. u g: 10 + 5 + 5. Then h ug: 10 + 5.
    found = learn_merges_textbook(dict(HUGS), 3, 16)
    expect(f"{HUGS}, 3 pieces", found, ["un", "ug", "hug"])


def test_stops_where_no_pair_is_left():
    from tokenizer import learn_merges_textbook

    found = learn_merges_textbook({"abab": 3}, 10, 2)
    expect("abab with pieces of at most 2 characters", found, ["ab"])
    expect("one letter", learn_merges_textbook({"a": 3}, 10, 16), [])


def test_breaks_ties():
    from tokenizer import learn_merges_textbook

    for words in ({"cd": 1, "ab": 1}, {"ab": 1, "cd": 1}):
        found = learn_merges_textbook(words, 2, 16)
        expect(f"{words}, where both pairs come once,", found, ["ab", "cd"])
    words = {"abc": 2, "de": 2}
    found = learn_merges_textbook(words, 3, 16)
    expect(f"{words}: all pairs come twice, which", found, ["ab", "de", "abc"])


def test_counts_what_would_be_merged():
    from tokenizer import learn_merges_textbook

    words = {"aaa": 3, "bc": 4}
    found = learn_merges_textbook(words, 1, 16)
    expect(f"{words}: a a can be merged once in aaa, so 3 times, which", found, ["bc"])


def test_learns_from_random_words():
    from tokenizer import learn_merges_textbook

    rng = random.Random(2)
    for _ in range(60):
        words = {
            "".join(rng.choices("abc", k=rng.randrange(1, 7))): rng.randrange(1, 5)
            for _ in range(5)
        }
        before = dict(words)
        pieces = learn_merges_textbook(words, 6, 4)
        assert words == before, "the dictionary that was given has changed"
        replay(words, pieces, 6, 4)


def replay(words, pieces, most, longest):
    """Each piece must be the best pair of its step. Words are texts here, symbols in bars."""
    texts = {"".join(f"|{c}|" for c in word): n for word, n in words.items()}
    for step in range(most):
        counts = {}
        for text, n in texts.items():
            symbols = text.strip("|").split("||")
            for pair in {f"|{a}||{b}|" for a, b in zip(symbols, symbols[1:])}:
                if len(pair) - 4 <= longest:
                    counts[pair] = counts.get(pair, 0) + n * text.count(pair)
        if not counts:
            assert len(pieces) == step, f"{words}: after {pieces[:step]} no pair is left"
            return
        assert len(pieces) > step, f"{words}: after {pieces} there still is a pair"
        names = {pair: pair.replace("|", "") for pair in counts}
        best = min(counts, key=lambda pair: (-counts[pair], len(pair), names[pair], pair))
        expect(f"{words}, piece {step + 1},", pieces[step], names[best])
        same = [p for p in counts if names[p] == names[best] and counts[p] == counts[best]]
        if len(same) > 1:  # two pairs make one piece: either may go first
            return
        texts = {text.replace(best, f"|{names[best]}|"): n for text, n in texts.items()}


LEARN = Exercise(
    "learn_merges",
    "Learn a vocabulary",
    "tokenizer.py",
    ["learn_merges_textbook"],
    30,
    [
        Check(
            1,
            "two merges of one word",
            "Count pairs; join the best; repeat.",
            test_learns_from_one_word,
        ),
        Check(
            1,
            "a word that is frequent counts more",
            "The values of the dictionary are counts.",
            test_counts_words_by_frequency,
        ),
        Check(
            1,
            "it stops when no pair is left, or all are too long",
            "What is in your counter when nothing can be merged?",
            test_stops_where_no_pair_is_left,
        ),
        Check(
            1,
            "ties: the shorter piece first, then by code points",
            "min and max take a key with several parts, a tuple.",
            test_breaks_ties,
        ),
        Check(
            1,
            "a pair counts as often as it can be merged",
            "How many symbols fewer does the word have after the merge?",
            test_counts_what_would_be_merged,
        ),
        Check(
            1,
            "random words: each piece is the best pair of its step",
            "Print the counts of the step that the message names, and count by hand.",
            test_learns_from_random_words,
        ),
    ],
    {"01_learn_a.py": 3, "01_learn_b.py": 1, "01_learn_c.py": 4},
)


# ------------------------------------------------------------------------- both encoders
def examples(bpe):
    """Hand-worked encodings."""
    expect('"버거" with the piece 버거', bpe("버거", {"버거": -1.0}), ["버거"])
    scores = {"버거": -1.0, "햄버거": -2.0}
    expect('"햄버거" with the pieces 버거, 햄버거', bpe("햄버거", scores), ["햄버거"])
    expect('"xyz" without pieces', bpe("xyz", {}), ["x", "y", "z"])


def best_first(bpe):
    found = bpe("abc", {"ab": -2.0, "bc": -1.0})
    expect("a b c, where bc scores better than ab,", found, ["a", "bc"])
    expect("a a a with the piece aa", bpe("aaa", {"aa": -1.0}), ["aa", "a"])
    found = bpe("abxab", {"ab": -1.0, "abx": -2.0, "xab": -2.0})
    expect("a b x a b, where abx and xab score the same,", found, ["abx", "ab"])


def looks_again(bpe):
    """A merge may make a pair that scores better than all before."""
    found = bpe("abc", {"abc": -1.0, "ab": -2.0})
    expect("a b c, where abc scores better than ab,", found, ["abc"])
    found = bpe("abab", {"aba": -1.0, "ab": -2.0})
    expect("a b a b, where aba scores better than ab,", found, ["aba", "b"])


def separated(bpe):
    found = bpe("abc", {"a b": -1.0, "ab c": -2.0}, " ")
    expect('a b c, the merges being "a b" and "ab c",', found, ["abc"])
    found = bpe(iter(["a", "bc", "ab", "c"]), {"ab c": -1.0}, " ")
    expect('a bc ab c, the only merge being "ab c",', found, ["a", "bc", "abc"])


def as_the_library(bpe, rounds=150):
    """Random vocabularies and texts, against the package sentencepiece."""
    rng = random.Random(3)
    for _ in range(rounds):
        texts = {"".join(rng.choices("abc", k=rng.randrange(2, 5))) for _ in range(12)}
        names = [*sorted(texts), SPACE, "a", "b", "c"]
        scores = {text: -float(rng.randrange(9)) for text in names}
        library = sentencepiece_model(scores.items()).sp_processor
        text = "".join(rng.choices("abc", k=rng.randrange(1, 12)))
        expected = library.encode(text, out_type=str)
        expect(f"{' '.join(SPACE + text)} with {scores}", bpe(SPACE + text, scores), expected)


def encoder_checks(name, module):
    """The checks that both encoders must pass: {name of the helper: function}."""

    def made(helper):
        def test():
            helper(getattr(__import__(module, fromlist=[name]), name))

        return test

    return [
        Check(1, "it joins what is a piece", "Look at all neighbours.", made(examples)),
        Check(
            1,
            "the best score first, among equals the leftmost",
            "A higher score is better. Sort by two things.",
            made(best_first),
        ),
        Check(
            1,
            "after each merge it looks at the new neighbours",
            "The first merge of a b c is ab. What can be merged then, and how good is it?",
            made(looks_again),
        ),
        Check(
            1,
            "merges with a separator, as byte-level vocabularies have them",
            'A merge is looked up as "a b", but the symbol that it makes is "ab".',
            made(separated),
        ),
        Check(
            2,
            "random vocabularies: the same as the package sentencepiece",
            "Do the message's example by hand: write all candidates with their scores.",
            made(as_the_library),
        ),
    ]


ENCODE = Exercise(
    "encode",
    "Encode a word",
    "tokenizer.py",
    ["bpe_textbook"],
    20,
    encoder_checks("bpe_textbook", "tokenizer"),
    {"01_encode_a.py": 2, "01_encode_b.py": 1, "01_encode_c.py": 3},
)


class CountingScores(dict):
    """Scores that count how often they are looked up."""

    lookups = 0

    def __contains__(self, key):
        self.lookups += 1
        return super().__contains__(key)

    def __getitem__(self, key):
        self.lookups += 1
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.lookups += 1
        return super().get(key, default)


def test_few_lookups():
    from vocabulary.fast_bpe import bpe

    rng = random.Random(4)
    names = ["".join(rng.choices("abcd", k=n)) for n in (2, 2, 2, 3, 3, 4, 4, 5, 6, 8) * 20]
    scores = CountingScores({name: -float(i) for i, name in enumerate(names)})
    text = "".join(rng.choices("abcd", k=3000))
    symbols = bpe(text, scores)
    assert "".join(symbols) == text, "the symbols joined are not the text"
    lookups = scores.lookups
    assert lookups < 40 * len(text), (
        f"{len(text):,} characters took {lookups:,} look-ups in the scores: that grows with the "
        "square of the length"
    )


FAST = Exercise(
    "fast_encode",
    "Encode a long word fast",
    "vocabulary/fast_bpe.py",
    ["bpe"],
    120,
    [
        *encoder_checks("bpe", "vocabulary.fast_bpe"),
        Check(
            3,
            "3,000 characters: look-ups in proportion to the length",
            "A heap (heapq) keeps the candidates. A merge touches two neighbours only; candidates "
            "that are outdated may stay on the heap if you notice them when they come up.",
            test_few_lookups,
        ),
    ],
    {"01_fast_a.py": 5, "01_fast_b.py": 1, "01_fast_c.py": 1},
)


# ------------------------------------------------------------------------- split_word
def splits(expected, *options):
    """split_word must cut the joined parts into these."""
    from vocabulary.scripts import split_word

    word = "".join(expected)
    expect(f"split_word({word!r}{', …' if options else ''})", split_word(word, *options), expected)


def test_splits_letters_from_signs():
    splits(["▁재밌다", "!!"])
    splits(["▁word"])
    splits(["▁(", "well", ")"])


def test_splits_digits():
    splits(["▁", "3", "kg"])
    splits(["▁", "2", "0", "2", "6"])
    splits(["a", "1", "b"])
    splits(["▁m", "²²"])  # no decimal digits


def test_splits_scripts():
    splits(["▁Covid", "바이러스", "病毒"])
    splits(["▁カタカナと漢字"])  # Japanese mixes its three scripts
    splits(["▁Привет", "world"])


def test_keeps_the_space_with_what_follows():
    splits(["▁"])
    splits(["▁!!"])
    splits(["▁", "7"])


def test_splits_nothing_when_told_so():
    splits(["▁Covid바이러스!!"], True, False)
    splits(["▁3kg"], False, False)
    splits(["▁", "3", "kg!"], True, False)
    splits(["▁12", "kg"], False, True)


def test_loses_nothing():
    from vocabulary.scripts import split_word

    rng = random.Random(5)
    alphabet = string.ascii_letters + "0123456789!?-가나다漢字カナЖ٣"
    for _ in range(300):
        word = "▁" + "".join(rng.choices(alphabet, k=rng.randrange(10)))
        parts = split_word(word)
        expect(f"joining the parts of {word!r}", "".join(parts), word)
        assert all(parts), f"split_word({word!r}) has an empty part: {parts}"
        digits = [part for part in parts if any(map(str.isdecimal, part)) and len(part) > 1]
        assert not digits, f"split_word({word!r}): a digit is not alone in {digits}"
        again = [split_word(part) for part in parts]
        assert again == [[part] for part in parts], f"the parts of {word!r}, {parts}, split again"


SPLIT = Exercise(
    "split_word",
    "Cut a word where the script changes",
    "vocabulary/scripts.py",
    ["split_word"],
    20,
    [
        Check(
            1,
            "letters and signs part",
            "`script` says what a character is; signs are COMMON.",
            test_splits_letters_from_signs,
        ),
        Check(1, "each digit is alone", "Two digits in a row, too.", test_splits_digits),
        Check(
            1,
            "Latin, Hangul, Han part; Japanese stays together",
            "Compare a character's script with that of the one before.",
            test_splits_scripts,
        ),
        Check(
            1,
            "the space ▁ stays with what follows",
            "What are the parts when the first character has been read?",
            test_keeps_the_space_with_what_follows,
        ),
        Check(
            1,
            "the two options turn the rules off",
            "A digit is an ordinary sign when split_digits is off.",
            test_splits_nothing_when_told_so,
        ),
        Check(
            1,
            "random words: nothing is lost, no part can be cut again",
            "Try the word of the message by hand.",
            test_loses_nothing,
        ),
    ],
    {"01_split_word_a.py": 1, "01_split_word_b.py": 4},
)

EXERCISES = [MERGE_PAIR, LEARN, ENCODE, SPLIT, FAST]
