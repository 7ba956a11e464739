import torch

from checkpoint.build import require_extension, spell


def expand_rows(rows, old, new, init="mean", generator=None, dtype=None):
    # The mean and the width are those of all rows, padding too.
    n, m = old.vocab_size, new.vocab_size
    require_extension(old, new, "the new tokenizer", "the old one")
    if len(rows) < n:
        raise ValueError("too few rows")
    out = torch.empty(max(m, len(rows)), rows.shape[1], dtype=dtype or rows.dtype)
    out[: len(rows)] = rows
    for i in range(n, m):
        if new.pieces[i].type == 3:
            out[i] = rows.float().mean(dim=0)
        elif init == "mean":
            out[i] = rows[spell(new.piece(i), old)].float().mean(dim=0)
        else:
            out[i].normal_(0, rows.float().std().item(), generator=generator)
    return out
