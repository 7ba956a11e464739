"""Lesson 2, a new language: fertility, unreachable pieces, merging vocabularies, new rows."""

import itertools
import random

import torch

from course.exercise import Check, Exercise, expect
from course.exercises.vocabularies import byte_level_model, sentencepiece_model

TITLE = "A new language"
SPACE = "▁"


# ------------------------------------------------------------------------- fertility
def counts_of(tokenizer, lines):
    from vocabulary.report import fertility_counts

    return fertility_counts(tokenizer, lines)


def letters(*texts):
    """A model of these pieces, of all their beginnings, and of their letters."""
    names = [text[:n] for text in texts for n in range(2, len(text) + 1)]
    names = dict.fromkeys([*names, *SPACE, *"".join(texts)])
    return sentencepiece_model([(name, -float(i)) for i, name in enumerate(names)])


def test_counts_tokens():
    counts, pieces = counts_of(letters("▁cat"), ["cat cat ca"])
    expect("tokens of ▁cat ▁cat ▁ca", counts["tokens"], 3)
    expect("how often ▁cat came", pieces["▁cat"], 2)


def test_counts_characters_words_and_bytes():
    counts, _ = counts_of(letters("▁", "고양이"), ["고양이 고양", "이"])
    expect("characters of two lines, the space too,", counts["characters"], 7)
    expect("words of two lines", counts["words"], 3)
    expect("UTF-8 bytes of two lines", counts["bytes"], 19)


def test_leaves_out_line_ends():
    for end in ("\n", "\r\n"):
        counts, _ = counts_of(letters("▁ab"), [f"ab{end}", f"ab{end}"])
        expect(f"characters of two lines that end in {end!r}", counts["characters"], 4)
        expect(f"tokens of two lines that end in {end!r}", counts["tokens"], 2)


def test_counts_byte_tokens():
    model = sentencepiece_model([(SPACE, -1.0), ("a", -2.0)], byte_fallback=True)
    counts, _ = counts_of(model, ["a가é"])
    expect("tokens of ▁ a and 3 + 2 bytes", counts["tokens"], 7)
    expect("byte tokens of a가é", counts["byte_tokens"], 5)
    expect("characters that no token holds whole", counts["unknown"], 2)
    expect("byte tokens of a", counts_of(model, ["a"])[0]["byte_tokens"], 0)


def test_counts_unknown_characters():
    counts, _ = counts_of(letters("▁a"), ["a가나"])
    expect("unknown characters of a가나, a model without bytes,", counts["unknown"], 2)
    expect("its byte tokens", counts["byte_tokens"], 0)


def test_counts_bytes_of_byte_level():
    from vocabulary.byte_level import to_letters

    a, b, c = to_letters("가")
    first, rest = f"{a} {b}", f"{a}{b} {c}"
    for merges, tokens, of_bytes, unknown in (
        ((), 3, 3, 1),
        ((first,), 2, 2, 1),
        ((first, rest), 1, 0, 0),
    ):
        counts, _ = counts_of(byte_level_model(merges), ["가"])
        found = counts["tokens"], counts["byte_tokens"], counts["unknown"]
        name = f"가 with {len(merges)} merges of its bytes: tokens, byte tokens, unknown"
        expect(name, found, (tokens, of_bytes, unknown))

    # 가가 as 가 + first byte, then the other two.
    counts, _ = counts_of(byte_level_model((first, rest, f"{a}{b}{c} {a}")), ["가가"])
    found = counts["tokens"], counts["byte_tokens"], counts["unknown"]
    assert found[0] >= 2 and found[2] <= 1, f"가가 with a piece that ends inside: {found}"


FERTILITY = Exercise(
    "fertility",
    "What a text costs",
    "vocabulary/report.py",
    ["fertility_counts"],
    40,
    [
        Check(1, "tokens, and how often each piece came", "encode each line.", test_counts_tokens),
        Check(
            1,
            "characters, words and bytes",
            "len of a str counts characters, of .encode() bytes; .split() makes words.",
            test_counts_characters_words_and_bytes,
        ),
        Check(
            1,
            "the end of a line is no text",
            "A line ends in a newline, on Windows in two characters. Other spaces are text.",
            test_leaves_out_line_ends,
        ),
        Check(
            1,
            "byte tokens, and the characters they spell",
            "A piece has a type. In UTF-8 all bytes of a character but the first are 10xxxxxx.",
            test_counts_byte_tokens,
        ),
        Check(
            1,
            "characters that no piece knows",
            "sp_processor.encode(line, out_type=str) returns them as they are: not in `ids`.",
            test_counts_unknown_characters,
        ),
        Check(
            2,
            "byte-level vocabularies: tokens that end inside a character",
            "raw_bytes(id) are a token's bytes. Do they decode?",
            test_counts_bytes_of_byte_level,
        ),
    ],
    {"02_fertility_a.py": 2, "02_fertility_b.py": 3},
)


# ------------------------------------------------------------------------- find_unreachable
def unreachable(*pieces):
    from tokenizer import find_unreachable

    return sorted(find_unreachable(sentencepiece_model(pieces)))


SINGLES = [(char, -90.0) for char in "abcd"]


def test_a_chain_is_missing():
    expect("pieces ab, abc", unreachable(*SINGLES, ("ab", -1.0), ("abc", -2.0)), [])
    expect("pieces bc, abcd", unreachable(*SINGLES, ("bc", -1.0), ("abcd", -2.0)), ["abcd"])


def test_a_better_merge_breaks_the_chain():
    pieces = [*SINGLES, ("ab", -2.0), ("cd", -3.0), ("bc", -1.0), ("abcd", -4.0)]
    expect("abcd = ab + cd, but bc scores better: the unreachable", unreachable(*pieces), ["abcd"])
    pieces = [*SINGLES, ("ab", -2.0), ("bc", -1.0), ("abc", -3.0)]
    expect("abc = a + bc", unreachable(*pieces), [])


def test_only_ordinary_pieces_count():
    from tokenizer import CONTROL, UNUSED

    pieces = [*SINGLES, ("abcd", -1.0, CONTROL), ("abcc", -2.0, UNUSED)]
    expect("a control piece and an unused one", unreachable(*pieces), [])


def test_cut_before_any_merge():
    from tokenizer import USER_DEFINED

    pieces = [*SINGLES, ("ab", -1.0), ("abc", -2.0), ("bc", 0.0, USER_DEFINED)]
    expect(
        "user-defined bc is cut out of abc first: the unreachable", unreachable(*pieces), ["abc"]
    )
    pieces = [*SINGLES, (" ", -8.0), ("a ", -1.0)]
    expect("a space becomes ▁ before encoding: the unreachable", unreachable(*pieces), [" ", "a "])


def test_byte_level_does_it_itself():
    from tokenizer import find_unreachable

    model = byte_level_model(("b c", "a b", "ab c"))
    expect("byte-level, merges b c, a b, ab c", find_unreachable(model), ["abc"])


def test_all_short_texts():
    """The truth by trying: what the package makes of every text of up to six letters."""
    texts = ["".join(t) for n in range(1, 7) for t in itertools.product("ab", repeat=n)]
    rng = random.Random(6)
    for _ in range(60):
        names = sorted({"".join(rng.choices("ab", k=rng.randrange(2, 5))) for _ in range(5)})
        pieces = [("a", -90.0), ("b", -90.0), (SPACE, -90.0)]
        pieces += [(name, -float(rng.randrange(9))) for name in names]
        library = sentencepiece_model(pieces).sp_processor
        made = {piece for text in texts for piece in library.encode(text, out_type=str)}
        expected = [name for name in names if name not in made]
        expect(f"pieces with scores {pieces[3:]}: the unreachable", unreachable(*pieces), expected)


UNREACHABLE = Exercise(
    "unreachable",
    "Find the pieces that no text can produce",
    "tokenizer.py",
    ["find_unreachable", "is_blocked"],
    20,
    [
        Check(
            1, "a chain of merges is missing", "Encode the piece alone.", test_a_chain_is_missing
        ),
        Check(
            1,
            "a better merge breaks the chain",
            "Two halves that are pieces are not enough. `bpe` does what encoding does.",
            test_a_better_merge_breaks_the_chain,
        ),
        Check(
            1, "only pieces of type NORMAL", "Look at piece.type.", test_only_ordinary_pieces_count
        ),
        Check(
            1,
            "spaces, and user-defined pieces, are cut out before any merge",
            "See `user_defined`, and what encode_reference does first.",
            test_cut_before_any_merge,
        ),
        Check(
            1,
            "a byte-level vocabulary",
            "isinstance(tokenizer, ByteLevelTokenizer): that class has find_unreachable itself.",
            test_byte_level_does_it_itself,
        ),
        Check(
            2,
            "random vocabularies: the same as trying all texts",
            "Which text would produce the piece of the message?",
            test_all_short_texts,
        ),
    ],
    {"02_unreachable_a.py": 1, "02_unreachable_b.py": 3},
)


# ------------------------------------------------------------------------- select_pieces
def select(base, new, **options):
    from tokenizer import select_pieces

    added, left_out = select_pieces(sentencepiece_model(base), new, **options)
    return added, {reason: names for reason, names in left_out.items() if names}


BASE = [(SPACE, -9.0), ("a", -8.0), ("b", -7.0), ("ab", -1.0), ("가", -5.0)]


def test_leaves_out_what_is_known_or_english():
    added, left_out = select(BASE, ["가", "나", "ba", "나", ""])
    expect("가 나 ba 나, where 가 is known and ba is English,", added, ["나"])
    expect("what is left out", left_out, {"known": ["가"], "english": ["ba"]})
    added, left_out = select(BASE, ["ba", "나"], foreign_only=False)
    expect("ba 나 without foreign_only", (added, left_out), (["ba", "나"], {}))


def test_keeps_the_order_and_what_merges_reach():
    names = ["나", "다", "나다", "가나다"]
    expect("나 다 나다 가나다", select(BASE, names), (names, {}))
    names = ["나", "다", "라", "나다라"]
    found = select(BASE, names)
    expect("나 다 라 나다라: no chain", found, (names[:3], {"unreachable": ["나다라"]}))


def test_goes_on_while_it_adds():
    added, left_out = select(BASE, ["가나다라", "가나다", "가나", "나", "다", "라"])
    expect("가나다라 가나다 가나, the long ones first", left_out, {})
    assert sorted(added, key=len)[-1] == "가나다라", f"added {added}"
    assert added.index("가나") < added.index("가나다") < added.index("가나다라"), f"added {added}"


def test_new_pieces_rank_below():
    base = [*BASE, ("나", -3.0), ("다", -4.0), ("라", -3.5), ("나다", -6.0)]
    found = select(base, ["가나", "다라", "가나다라"])
    expected = ["가나", "다라"], {"unreachable": ["가나다라"]}
    expect("가나 다라 가나다라, where the base has 나다,", found, expected)


def test_other_choices():
    found = select(BASE, ["나다라", "나"], unreachable="keep")
    expect('"keep"', found, (["나다라", "나"], {}))
    added, left_out = select(BASE, ["나다라"], unreachable="repair")
    expect('"repair" of 나다라: pieces that were added', added, ["나다", "나다라"])
    expect('"repair": what was unreachable', left_out, {"unreachable": ["나다라"]})
    try:
        select(BASE, ["나"], unreachable="maybe")
    except ValueError:
        pass
    else:
        raise AssertionError('unreachable="maybe" is taken, should be a ValueError')


def test_takes_a_model_and_what_is_blocked():
    from tokenizer import USER_DEFINED

    new = sentencepiece_model([("나", -1.0), ("가", -2.0), ("다", 0.0, USER_DEFINED)])
    added, left_out = select(BASE, new)
    expect("a model with 나 가 다", added, ["나", "다"])
    expect("its special pieces", left_out["special"], ["<unk>", "<s>", "</s>"])
    found = select([*BASE, ("나다", 0.0, USER_DEFINED)], ["가나다라", "라", "가 나"])
    expect(
        "pieces with 나다, which is cut out, or a space", found[1]["blocked"], ["가나다라", "가 나"]
    )


def test_random_vocabularies_have_no_unreachable_piece():
    from tokenizer import bpe_textbook

    rng = random.Random(7)
    for _ in range(80):
        base = [(char, -90.0) for char in SPACE + "ab가나"]
        base += [(rng.choice("ab가나") + rng.choice("ab가나"), -float(i)) for i in range(3)]
        base = list({text: (text, score) for text, score in base}.values())
        new = ["".join(rng.choices("ab가나", k=rng.randrange(2, 5))) for _ in range(8)]
        added, left_out = select(base, new, unreachable="drop", foreign_only=False)
        lost = left_out.get("unreachable", [])
        longer = sentencepiece_model([*base, *((text, -200.0 - i) for i, text in enumerate(added))])
        library = longer.sp_processor
        for text in added:
            name = f"base {base[5:]}, new {new}: {text!r}, which was added, encoded alone,"
            found = library.encode(text, out_type=str)
            found = found[1:] if found[0] == SPACE else found
            expect(name, found, [text])
        for text in lost:
            symbols = bpe_textbook(text, longer.scores)
            name = f"base {base[5:]}, new {new}: {text!r} was left out, but"
            assert len(symbols) > 2, f"{name} {' + '.join(symbols)} makes it"


SELECT = Exercise(
    "select_pieces",
    "Which pieces to append",
    "tokenizer.py",
    ["select_pieces"],
    120,
    [
        Check(
            1,
            "known and English pieces are left out, each piece comes once",
            "`is_foreign` knows English. The keys are those of REASONS in vocabulary/report.py.",
            test_leaves_out_what_is_known_or_english,
        ),
        Check(
            1,
            "the order stays; what no merges reach is left out",
            "How many symbols may the merges before leave of a piece, so that one more makes it?",
            test_keeps_the_order_and_what_merges_reach,
        ),
        Check(
            1,
            "a piece may need one that comes later",
            "Do it again while it adds something.",
            test_goes_on_while_it_adds,
        ),
        Check(
            1,
            "the base's merges come first",
            "`scores_below(base)` yields scores for new pieces.",
            test_new_pieces_rank_below,
        ),
        Check(
            1,
            '"keep", "repair", and a word that is neither',
            "Repair: join the first two symbols that are left until the piece is there.",
            test_other_choices,
        ),
        Check(
            1,
            "a whole model; pieces that are blocked",
            "Of a model, only NORMAL and USER_DEFINED pieces are words. See `is_blocked`.",
            test_takes_a_model_and_what_is_blocked,
        ),
        Check(
            2,
            "random vocabularies: all that is added can be reached, nothing is lost",
            "Encode the piece of the message by hand, with the base's merges before the new ones.",
            test_random_vocabularies_have_no_unreachable_piece,
        ),
    ],
    {"02_select_a.py": 2, "02_select_b.py": 3},
)


# ------------------------------------------------------------------------- new rows
def grow(old, new, rows, **options):
    from checkpoint.build import expand_rows

    return expand_rows(rows, old, new, **options)


OLD = [(SPACE, -9.0), ("a", -8.0), ("b", -7.0), ("c", -6.0), ("ab", -1.0)]


def test_old_rows_stay():
    old, new = sentencepiece_model(OLD), sentencepiece_model([*OLD, ("abc", -99.0)])
    rows = torch.randn(old.vocab_size, 4)
    out = grow(old, new, rows)
    expect("the shape for one more piece", tuple(out.shape), (old.vocab_size + 1, 4))
    assert torch.equal(out[: len(rows)], rows), "an old row has changed"


def test_a_new_row_is_the_mean_of_what_spelled_it():
    old = sentencepiece_model(OLD)
    new = sentencepiece_model([*OLD, ("abc", -99.0), ("▁cab", -100.0), ("abcab", -101.0)])
    rows = torch.randn(old.vocab_size, 4)
    out = grow(old, new, rows)
    spelled = {"abc": ["ab", "c"], "▁cab": [SPACE, "c", "ab"], "abcab": ["ab", "c", "ab"]}
    for piece, parts in spelled.items():
        expected = torch.stack([rows[old.id(part)] for part in parts]).double().mean(dim=0)
        gap = (out[new.id(piece)].double() - expected).abs().max().item()
        assert gap < 1e-6, f"{piece} should be the mean of {parts}; it differs by {gap:.2g}"


def test_bytes_and_unknown_spell_too():
    for fallback in (True, False):
        old = sentencepiece_model(OLD, byte_fallback=fallback)
        new = sentencepiece_model([*OLD, ("a가", -99.0)], byte_fallback=fallback)
        rows = torch.randn(old.vocab_size, 4)
        spelled = [f"<0x{byte:02X}>" for byte in "가".encode()] if fallback else ["<unk>"]
        expected = rows[[old.id("a"), *map(old.id, spelled)]].double().mean(dim=0)
        gap = (grow(old, new, rows)[-1].double() - expected).abs().max().item()
        assert gap < 1e-6, f"a가 was spelled a, {', '.join(spelled)}; its row differs by {gap:.2g}"


def test_a_control_piece_has_the_mean_of_all():
    from tokenizer import CONTROL

    old = sentencepiece_model(OLD)
    new = sentencepiece_model([*OLD, ("<image>", 0.0, CONTROL)])
    padded = torch.randn(old.vocab_size + 3, 4)
    padded[old.vocab_size :] = 1000.0  # rows behind the pieces: no piece has them
    given = padded.clone()
    out = grow(old, new, padded)
    assert torch.equal(padded, given), "the old table itself was changed"
    expected = padded[: old.vocab_size].double().mean(dim=0)
    gap = (out[old.vocab_size].double() - expected).abs().max().item()
    assert gap < 1e-5, f"<image> should be the mean of the {old.vocab_size} pieces' rows: {gap:.3g}"
    expect("the number of rows, where 3 were padding,", len(out), old.vocab_size + 3)


def test_random_rows_are_as_wide_as_the_old():
    old = sentencepiece_model(OLD)
    new = sentencepiece_model([*OLD, *((f"가{i}", -99.0 - i) for i in range(400))])
    torch.manual_seed(0)
    rows = 0.05 * torch.randn(old.vocab_size, 16) + 0.5
    results = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        results.append(grow(old, new, rows, init="random", generator=generator)[old.vocab_size :])
    width, center = results[0].std().item(), results[0].mean().item()
    assert 0.04 < width < 0.06, f"the standard deviation is {width:.4f}, of the old rows 0.05"
    assert abs(center) < 0.005, f"the mean is {center:.4f}, should be 0"
    assert torch.equal(results[0], results[1]), "the same generator gives other rows"
    assert not torch.equal(results[0], results[2]), "another seed gives the same rows"


def test_another_type_and_a_stranger():
    old, new = sentencepiece_model(OLD), sentencepiece_model([*OLD, ("abc", -99.0)])
    rows = torch.randn(old.vocab_size, 4).bfloat16()
    expect(
        "dtype float32 for bf16 rows",
        grow(old, new, rows, dtype=torch.float32).dtype,
        torch.float32,
    )
    expect("no dtype for bf16 rows", grow(old, new, rows).dtype, torch.bfloat16)
    expected = (rows[old.id("ab")].float() + rows[old.id("c")].float()) / 2
    exact = torch.equal(grow(old, new, rows, dtype=torch.float32)[-1], expected)
    assert exact, "a float32 row from bf16 rows was rounded to bf16 on the way"
    for wrong, why in ((sentencepiece_model(OLD[::-1]), "pieces in another order"), (old, None)):
        try:
            grow(old, wrong, rows if why else rows[:-1])
        except ValueError:
            continue
        raise AssertionError(f"{why or 'fewer rows than pieces'}: should be a ValueError")


ROWS = Exercise(
    "expand_rows",
    "Embeddings for new pieces",
    "checkpoint/build.py",
    ["expand_rows", "spell"],
    45,
    [
        Check(1, "old rows stay to the bit", "Copy them first.", test_old_rows_stay),
        Check(
            1,
            "a new row is the mean of the pieces that spelled it",
            "`bpe` with the old scores gives the spelling.",
            test_a_new_row_is_the_mean_of_what_spelled_it,
        ),
        Check(
            1,
            "bytes spell, and so does <unk>",
            "What does encode do with a character that is no piece?",
            test_bytes_and_unknown_spell_too,
        ),
        Check(
            1,
            "a control piece gets the mean of all pieces' rows",
            "Some rows belong to no piece. `row_statistics` helps.",
            test_a_control_piece_has_the_mean_of_all,
        ),
        Check(
            1,
            "random rows are as wide as the old ones",
            "normal_ takes a generator.",
            test_random_rows_are_as_wide_as_the_old,
        ),
        Check(
            1,
            "types, and what does not fit",
            "`require_extension` compares two tokenizers.",
            test_another_type_and_a_stranger,
        ),
    ],
    {"02_expand_rows_a.py": 2, "02_expand_rows_b.py": 3},
)


# ------------------------------------------------------------------------- byte-level pieces
def append(merges, *pieces):
    return byte_level_model(merges).with_pieces(pieces)


def test_appends_a_piece_of_two_bytes():
    base = byte_level_model(("a b",))
    longer = base.with_pieces(["bc"])
    expect("the merges", longer.merges, ["a b", "b c"])
    expect("the id of the new piece", longer.id("bc"), base.vocab_size)
    assert longer.pieces[: base.vocab_size] == base.pieces, "an old piece has another id"


def test_joins_what_the_merges_leave():
    longer = append(("b c", "a b"), "abc")
    expect("abc behind the merges b c, a b", longer.merges, ["b c", "a b", "a bc"])
    expect("the text abc", [longer.piece(i) for i in longer.encode("abc")], ["abc"])


def test_pieces_build_on_each_other():
    longer = append((), "ab", "abc", "abcd")
    expect("ab abc abcd", longer.merges, ["a b", "ab c", "abc d"])


def test_refuses_what_no_merge_reaches():
    try:
        append((), "ab", "abcd")
    except ValueError as error:
        assert "abcd" in str(error), f"the error should name the piece: {error}"
    else:
        raise AssertionError("abcd is left as ab, c, d: should be a ValueError")


def test_korean_and_old_text():
    from vocabulary.byte_level import to_letters

    a, b, c = to_letters("가")
    base = byte_level_model(("l o", "lo w"))
    longer = base.with_pieces([a + b, a + b + c])
    expect("tokens of 가", len(longer.encode("가")), 1)
    expect("low 가 low, decoded", longer.decode(longer.encode("low 가 low")), "low 가 low")
    expect("ids of low, before and after", longer.encode("low"), base.encode("low"))
    expect("merges of the base after it was extended", base.merges, ["l o", "lo w"])


BYTE_LEVEL = Exercise(
    "with_pieces",
    "Extend a byte-level vocabulary",
    "vocabulary/byte_level.py",
    ["ByteLevelTokenizer.with_pieces"],
    20,
    [
        Check(
            1,
            "a piece of two bytes gets the next id and the last merge",
            "file_content(pieces, merges) makes the new tokenizer.json.",
            test_appends_a_piece_of_two_bytes,
        ),
        Check(
            1,
            "the merge joins what the merges above it leave",
            "Which symbols does `bpe` leave of the piece?",
            test_joins_what_the_merges_leave,
        ),
        Check(
            1,
            "pieces build on each other",
            "A piece's merge has a score for the pieces behind it.",
            test_pieces_build_on_each_other,
        ),
        Check(
            1,
            "a piece that no merge reaches is refused",
            "Two symbols make a merge. Three do not.",
            test_refuses_what_no_merge_reaches,
        ),
        Check(
            1,
            "Korean in one token, old text as before",
            "The base must not change: copy before you append.",
            test_korean_and_old_text,
        ),
    ],
    {"02_with_pieces_a.py": 1, "02_with_pieces_b.py": 2},
)

EXERCISES = [FERTILITY, UNREACHABLE, ROWS, BYTE_LEVEL, SELECT]
