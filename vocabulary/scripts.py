"""Writing systems: tokenizer.py cuts words by them, other parts tell languages apart by them."""

import re
import unicodedata
from collections import Counter

# Language -> pattern of one letter of its script. Korean text may hold Han and Latin letters, and
# Chinese text Latin ones, so `guess_language` tries the languages in this order.
SCRIPTS = {
    "ko": re.compile("[가-힣ㄱ-ㆎ]"),  # Hangul: syllables and letters
    "zh": re.compile("[㐀-䶿一-鿿]"),  # Han
    "ar": re.compile("[\u0621-\u064a]"),
    "en": re.compile("[A-Za-zÀ-ɏ]"),  # Latin
}


def normalise(text: str) -> str:
    """For exact match: Unicode NFKC (a full-width ３ is 3), lower case, single spaces, no full stop
    or exclamation mark at the end."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(" .。．!！")


def guess_language(text: str) -> str:
    """The first language of SCRIPTS with a letter in the text; "en" if it has none of theirs."""
    text = unicodedata.normalize("NFC", text)
    return next((language for language, letter in SCRIPTS.items() if letter.search(text)), "en")


def script(char: str) -> str:
    """A character's script by its Unicode name: "HANGUL", "LATIN" … "COMMON" if it is no letter."""
    name = unicodedata.name(char, "") if unicodedata.category(char)[0] in "LM" else ""
    first = re.split("[ -]", name)[0]
    if first in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC"):
        return "CJK"  # Japanese words mix the three
    if first in ("", "VARIATION", "COMBINING", "MODIFIER"):
        return "COMMON"
    return first


def is_foreign(piece: str) -> bool:
    """Whether plain English can't contain the piece; it can contain "“", "©" and "…".

    Foreign are letters and marks outside ASCII, signs of other scripts, emoji, full-width signs.
    """
    for char in piece:
        if "\u0370" <= char < "\u2000":  # the blocks of scripts, from Greek on
            return True
        category = unicodedata.category(char)
        if char > "\x7f" and category[0] in "LM":
            return True
        if char >= "\u2600" and category == "So":
            return True
        if unicodedata.east_asian_width(char) in "WF":
            return True
    return False


def is_latin(vocabulary) -> bool:
    """Whether the pieces of a model, or a list of pieces, are written in Latin letters, mostly."""
    if hasattr(vocabulary, "scores"):  # without the special pieces: <0x20> is none of a language
        vocabulary = vocabulary.scores
    scripts = Counter(script(char) for piece in vocabulary for char in piece)
    return scripts["LATIN"] > scripts.total() - scripts["COMMON"] - scripts["LATIN"]


def split_word(word: str, split_digits: bool = True, split_scripts: bool = True) -> list[str]:
    """Cut a word around each decimal digit and where the script changes. "▁" stays with letters
    and signs.

    "▁재밌다!!" -> ["▁재밌다", "!!"], "▁3kg" -> ["▁", "3", "kg"].
    """
    parts = []
    last_kind = None
    for char in word:
        kind = script(char) if split_scripts else ""
        is_digit = split_digits and char.isdecimal()
        if is_digit:
            kind = "digit"
        if is_digit or (kind != last_kind and parts != ["▁"]):
            parts.append("")
        parts[-1] += char
        last_kind = kind
    return parts
