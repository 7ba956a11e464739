from vocabulary.scripts import script


def split_word(word, split_digits=True, split_scripts=True):
    # A digit is a script of its own even where split_digits is off.
    parts, last = [], None
    for char in word:
        kind = script(char) if split_scripts else ""
        if char.isdecimal():
            kind = "digit"
        is_digit = split_digits and kind == "digit"
        if is_digit or (kind != last and parts != ["▁"]):
            parts.append("")
        parts[-1] += char
        last = kind
    return parts
