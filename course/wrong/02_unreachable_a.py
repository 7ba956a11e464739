def find_unreachable(tokenizer):
    # Two halves that are pieces seem enough.
    def has_halves(text):
        return any(
            text[:i] in tokenizer.scores and text[i:] in tokenizer.scores
            for i in range(1, len(text))
        )

    return [
        p.text
        for p in tokenizer.pieces
        if p.type == 1 and len(p.text) > 1 and not has_halves(p.text)
    ]
