"""How a question may be worded: patterns that stand for many templates, and how people type.

    [What|Which] @colour is {it}?

[a|b|] stands for one of its alternatives, which may be empty and may hold brackets themselves.
@name stands for one of the list of that name in the language's table `grammar`. Placeholders in
braces are left for `words.fill`.
"""

import re

REFERENCE, BRACKETS = re.compile(r"@([a-z_]+)"), re.compile(r"\[([^\[\]]*)\]")


def all_templates(pattern, grammar):
    """Every template of a pattern, sorted."""
    while REFERENCE.search(pattern):
        pattern = REFERENCE.sub(lambda match: f"[{'|'.join(grammar[match[1]])}]", pattern)

    # Replace an innermost bracket by each of its alternatives, until none is left.
    pending, found = [pattern], set()
    while pending:
        template = pending.pop()
        match = BRACKETS.search(template)
        if match:
            before, after = template[: match.start()], template[match.end() :]
            pending += [before + choice + after for choice in match[1].split("|")]
        else:
            found.add(" ".join(template.split()))
    return sorted(found)


def capital(text, capitals):
    """A text whose first letter is a capital. capitals: {letter: capital} where they are not those
    of Unicode."""
    return capitals.get(text[:1], text[:1].upper()) + text[1:]


def as_typed(text, rng, capitals):
    """A question as somebody may type it: without capitals, without a mark at its end."""
    text = capital(text, capitals)
    if rng.random() < 0.25:
        text = text.translate({ord(large): small for small, large in capitals.items()}).lower()
    return text.rstrip("?.!？。！؟") if rng.random() < 0.25 else text
