from tokenizer import NORMAL, bpe


def find_unreachable(tokenizer):
    # What is cut out before the merges is forgotten.
    normal = [piece.text for piece in tokenizer.pieces if piece.type == NORMAL]
    return [text for text in normal if len(bpe(text, tokenizer.scores)) > 1]


def is_blocked(piece, tokenizer):
    return False
