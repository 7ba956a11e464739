"""How a question may be worded: patterns that stand for many templates, and how people type.

    [What|Which] @colour is {it}?

[a|b|] stands for one of its alternatives, which may be empty and may hold brackets themselves.
So does a|b without brackets.
@name stands for one of the list of that name in the language's table `grammar`. Placeholders in
braces are left for `words.fill`.
"""

import re

REFERENCE = re.compile(r"@([a-z_]+)")
MARKS = re.compile(r"(@[a-z_]+|[][|])")
# A word of a template: letters that are neither in a placeholder nor in a form such as a/an.
WORD = re.compile(r"(?<![^\W\d_])(?<!/)[^\W\d_]+(?![^\W\d_/]*/|[^{}]*\})")


def all_templates(pattern, grammar):
    """Every template of a pattern, sorted. A bracket that has no other one stays in the text."""
    found = read_alternatives(iter(MARKS.split(pattern)), grammar)
    return sorted({" ".join(template.split()) for template in found})


def read_alternatives(marks, grammar, is_inside=False):
    """What a pattern stands for, from here to the bracket that closes: the texts of its
    alternatives. marks: an iterator over a pattern that is cut at MARKS."""
    found, texts = set(), {""}
    for mark in marks:
        if mark == "]" and is_inside:
            return found | texts
        if mark == "|":
            found, texts = found | texts, {""}
            continue

        if mark == "[":
            choices = read_alternatives(marks, grammar, is_inside=True)
        elif mark.startswith("@"):
            choices = set()
            for own in grammar[mark[1:]]:
                choices |= read_alternatives(iter(MARKS.split(own)), grammar)
        else:
            choices = [mark]
        texts = {text + choice for text in texts for choice in choices}
    return {"[" * is_inside + text for text in found | texts}


def make_word(nouns, known, script, rng):
    """A word that means nothing: halves of two nouns, or any two letters of the language's script
    (a range of characters, "가-힣") if it has one of its own. No known word is a part of it."""
    while True:
        if script and rng.random() < 0.25:
            word = "".join(chr(rng.randint(ord(script[0]), ord(script[-1]))) for _ in range(2))
        else:
            first, second = rng.sample(nouns, 2)
            word = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
        if not any(other in word for other in known):
            return word


def with_unknown_word(template, nouns, known, script, rng):
    """A template in which a word, or a part of one, is replaced by a word that means nothing."""
    found = list(WORD.finditer(template))
    if not found:
        return template
    word = rng.choice(found)
    start = rng.randrange(word.start(), word.end())
    end = min(word.end(), start + len(rng.choice(nouns)))
    changed = template[:start] + make_word(nouns, known, script, rng) + template[end:]
    is_known = any(other in changed and other not in template for other in known)
    return template if is_known else changed


def capital(text, capitals):
    """A text whose first letter is a capital. capitals: {letter: capital} where they are not those
    of Unicode."""
    return capitals.get(text[:1], text[:1].upper()) + text[1:]


def as_typed(text, rng, capitals):
    """A question as somebody may type it: without capitals, without its marks."""
    text = capital(text, capitals)
    if rng.random() < 0.25:
        text = text.translate({ord(large): small for small, large in capitals.items()}).lower()
    # Who leaves out the mark at the end leaves out that at the beginning, too: ¿Qué es?
    return re.sub("[¿¡]|[?.!？。！؟]+$", "", text) if rng.random() < 0.25 else text
