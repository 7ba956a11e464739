"""The loss of each stage: a batch -> the sum of the losses of its targets.

Dimensions: B images and F phrases of this rank, B_all images of all ranks, N patches, C width,
V vocabulary, W words of the dictionary.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def build_objective(args, model):
    """The model with the loss of its stage."""
    # With FSDP2, all ranks gather the weights of the ViT, or none does.
    model.always_encode = args.fsdp and args.stage != "text"
    model.decoder.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for block in (*model.vision.layers, *model.decoder.layers):
            block.compile()
    return PhraseContrastObjective(model) if args.stage == "vision" else NextTokenObjective(model)


class NextTokenObjective(nn.Module):
    """Text, align and instruct: cross-entropy of the next token."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch["ids"], batch["targets"], batch.get("pixels"), batch["layout"])


class PhraseContrastObjective(nn.Module):
    """Vision: which phrases describe an image. A phrase of this rank is compared with the images of
    all ranks. With a dictionary, also which words mean the same."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.score = PhraseScore()

    def forward(self, batch):
        embeddings = self.model.decoder.embed_tokens.weight
        images_per_rank = batch["images_per_rank"]
        phrases = embed_phrases(embeddings, batch["ids"], batch["offsets"])
        patches = F.normalize(self.model.encode_images(batch["pixels"]).float(), dim=-1)
        patches = gather_images(patches, images_per_rank)  # (B, N, C) -> (B_all, N, C)
        logits = self.score(phrases, patches)  # (F, B_all)

        # An image that could not be read keeps its place, empty, and is compared with nothing.
        usable = gather_images(batch["usable"][:, None].float(), images_per_rank)[:, 0] > 0
        loss = phrase_loss(logits, batch["is_true"], batch["is_known"] & usable)

        # Words that no caption has are found by those that mean the same (as in AltCLIP, arXiv
        # 2211.06679). To the score, a word is an image of one patch.
        if "word_ids" in batch:
            words = embed_phrases(embeddings, batch["word_ids"], batch["word_offsets"])
            word_logits = self.score(words, words[:, None])  # (W, W)
            loss = loss + phrase_loss(word_logits, batch["word_true"], batch["word_known"])
        return loss


class PhraseScore(nn.Module):
    """How well a phrase describes an image: the cosine of its embedding and the best patch.

    CLIP trains a text tower and throws it away. Here patches are compared with the token embeddings
    that the decoder reads: a patch of a big red cat lies near "big" + "red" + "cat", and the
    decoder finds it as it finds a word in a text."""

    def __init__(self):
        super().__init__()
        # SigLIP's start (exp(2.3) ≈ 10 and −10): every pair looks like a negative.
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, phrases, patches):
        """Unit vectors: phrases (F, C), patches (B, N, C) -> logits (F, B)."""
        B, N, C = patches.shape
        cosines = (phrases @ patches.view(B * N, C).T).view(-1, B, N)  # (F, B·N) -> (F, B, N)
        return cosines.amax(dim=2) * self.logit_scale.exp() + self.bias


def embed_phrases(embeddings, ids, offsets):
    """Token embeddings (V, C), the ids of all phrases end to end, and where each phrase starts ->
    unit vectors (F, C). A phrase is the sum of its tokens, so that a patch has to encode kind,
    colour, size and place side by side."""
    return F.normalize(F.embedding_bag(ids, embeddings, offsets, mode="sum").float(), dim=-1)


def phrase_loss(logits, is_true, is_known):
    """Sigmoid loss of all phrases × all images (SigLIP, arXiv 2303.15343, eq. 1), summed where the
    truth is known. All (F, B), the last two bool."""
    truth, weight = is_true.to(logits.dtype), is_known.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum")


def gather_images(tensor, images_per_rank):
    """(B, …) of this rank -> (B_all, …)."""
    if len(images_per_rank) == 1:
        return tensor
    return AllGatherWithGrad.apply(tensor, images_per_rank)


class AllGatherWithGrad(torch.autograd.Function):
    """Forward: (B, …) of each rank -> (B_all, …) on all. Backward: each rank receives the sum, over
    all ranks, of the gradients of its own images."""

    @staticmethod
    def forward(ctx, tensor, images_per_rank):
        ctx.images_per_rank = images_per_rank
        # all_gather needs equal shapes: pad to the largest rank, cut afterwards.
        padding = tensor.new_zeros(max(images_per_rank) - len(tensor), *tensor.shape[1:])
        padded = torch.cat([tensor, padding])
        gathered = [torch.empty_like(padded) for _ in images_per_rank]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, images_per_rank)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.images_per_rank)[dist.get_rank()], None
