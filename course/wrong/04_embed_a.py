from torch.nn import functional as F


def embed_phrases(embeddings, ids, offsets):
    # Each token gets length 1 before the sum: a long vector weighs no more than a short one.
    rows = F.normalize(embeddings.float(), dim=-1)
    return F.normalize(F.embedding_bag(ids, rows, offsets, mode="sum"), dim=-1)
