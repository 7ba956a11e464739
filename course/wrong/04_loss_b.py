from torch.nn import functional as F


def phrase_loss(logits, is_true, is_known):
    # A mean, over all pairs.
    return F.binary_cross_entropy_with_logits(
        logits, is_true.to(logits.dtype), is_known.to(logits.dtype)
    )
