def spell(text, tokenizer):
    # A character without a piece is passed over.
    from tokenizer import bpe

    pieces = bpe(list(text), tokenizer.scores)
    return [tokenizer.id(piece) for piece in pieces if piece in tokenizer.ids]
