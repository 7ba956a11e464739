"""What a step computes: the losses of the stages."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from model import IGNORE_INDEX


class PhraseScore(nn.Module):
    """Says how well phrases fit pictures, from the patches as the projector gives them and the words' rows of the embedding table.

    CLIP has a text tower of its own and throws it away. Here patches are compared with the very rows that the decoder reads words
    from: what the stage learns stays, and a patch that shows a big red cat ends up near "big" + "red" + "cat". A decoder that has learnt
    from text to find the word that a question names then finds the patch in the same way.

    A phrase is a *bag* of tokens, the sum of their rows. Word order adds nothing to "a big red cat", and a sum makes the score linear
    in the words, so that a patch has to carry kind, colour, size and place side by side.
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(
            torch.tensor(2.3)
        )  # exp(2.3) ≈ 10 and −10 are SigLIP's start: every pair looks like a miss
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, patches, rows, ids, offsets, gather=lambda image: image):
        """patches (B, N, C), rows (V, C), phrases as flat ids with the offset where each starts -> logits (F, B) that a phrase is true of a picture.
        gather: adds the other processes' pictures, (B, N, C) -> (B of all, N, C)."""
        text = self.bags(rows, ids, offsets)
        image = gather(F.normalize(patches.float(), dim=-1))
        B, N, C = image.shape
        best = (
            (text @ image.view(B * N, C).T).view(-1, B, N).amax(dim=2)
        )  # (F, B·N) -> (F, B): the best patch of each picture
        return best * self.log_scale.exp() + self.bias

    def words(self, rows, ids, offsets):
        """The same between words: logits (F, F) that two mean the same. With a dictionary a thing that pictures name in one language is found by its name in
        another, too (AltCLIP, arXiv 2211.06679, teaches a text tower new languages from translations alone)."""
        text = self.bags(rows, ids, offsets)
        return text @ text.T * self.log_scale.exp() + self.bias

    @staticmethod
    def bags(rows, ids, offsets):
        """Phrases -> (F, C) of length 1."""
        return F.normalize(F.embedding_bag(ids, rows, offsets, mode="sum").float(), dim=-1)


def phrase_loss(logits, is_true, is_known):
    """Sigmoid loss over every phrase × every picture (SigLIP eq. 1), with as many positives as there are, and only where the truth is known.

    logits, is_true and is_known (bool): (F, B). The sum over all of them; a scalar."""
    return F.binary_cross_entropy_with_logits(
        logits, is_true.to(logits.dtype), is_known.to(logits.dtype), reduction="sum"
    )


class NextTokenObjective(nn.Module):
    """The model as text, align and instruct train it: a batch -> (sum of token losses, number of target tokens)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        loss = self.model.loss(batch["ids"], batch["targets"], batch.get("pixels"), batch["layout"])
        return loss, (batch["targets"] != IGNORE_INDEX).sum()


class PhraseContrastObjective(nn.Module):
    """ViT, projector and word rows as the vision stage trains them: a batch -> (sum of phrase losses, number of phrases)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.score = model, PhraseScore()

    def forward(self, batch):
        gather = (
            (lambda image: AllGatherWithGrad.apply(image, batch["images_per_rank"]))
            if len(batch["images_per_rank"]) > 1
            else (lambda image: image)
        )
        patches, rows = (
            self.model.encode_images(batch["pixels"]),
            self.model.decoder.embed_tokens.weight,
        )
        logits = self.score(patches, rows, batch["ids"], batch["offsets"], gather)
        usable = gather(batch["usable"][:, None].float())[:, 0] > 0
        loss = phrase_loss(logits, batch["is_true"], batch["is_known"] & usable)
        if "word_ids" in batch:
            loss = loss + phrase_loss(
                self.score.words(rows, batch["word_ids"], batch["word_offsets"]),
                batch["word_true"],
                batch["word_known"],
            )
        return loss, torch.tensor(len(logits), device=logits.device)


class AllGatherWithGrad(torch.autograd.Function):
    """The pictures of all processes, (B, N, W) -> (B of all, N, W): a phrase's negatives are the whole global batch, however it is spread.
    Backward, each process gets back the sum of what all of them found out about its own."""

    @staticmethod
    def forward(ctx, image, counts):
        ctx.counts, most = counts, max(counts)
        padded = torch.cat(
            [image, image.new_zeros(most - len(image), *image.shape[1:])]
        )  # all_gather wants equal shapes
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None
