from torch.nn import functional as F


def embed_phrases(embeddings, ids, offsets):
    # The length is divided out in the type of the table.
    return F.normalize(F.embedding_bag(ids, embeddings, offsets, mode="sum"), dim=-1)
