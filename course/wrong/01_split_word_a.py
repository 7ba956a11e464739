from vocabulary.scripts import script


def split_word(word, split_digits=True, split_scripts=True):
    # A number is one part.
    parts, last = [], None
    for char in word:
        kind = script(char) if split_scripts else ""
        if split_digits and char.isdecimal():
            kind = "digit"
        if kind != last and (parts != ["▁"] or kind == "digit"):
            parts.append("")
        parts[-1] += char
        last = kind
    return parts
