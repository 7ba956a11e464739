"""The losses of the stages, against sums written by hand."""

import math

import pytest
import torch

from model import XLlava
from training.objectives import (
    PhraseContrastObjective,
    PhraseScore,
    embed_phrases,
    phrase_loss,
)


def test_a_phrase_scores_an_image_by_its_best_patch_and_another_phrase_as_it_is():
    torch.manual_seed(0)
    score, embeddings, patches = PhraseScore(), torch.randn(20, 8), torch.randn(3, 5, 8)
    phrases = embed_phrases(embeddings, torch.tensor([1, 2, 3, 7]), torch.tensor([0, 3]))
    logits = score(phrases, torch.nn.functional.normalize(patches, dim=-1))

    def by_hand(cosine):
        return (cosine * score.logit_scale.exp() + score.bias).item()

    sums = [embeddings[1] + embeddings[2] + embeddings[3], embeddings[7]]
    for f, phrase in enumerate(sums):
        for b in range(3):
            best = max(torch.cosine_similarity(phrase, patch, dim=0) for patch in patches[b])
            assert logits[f, b].item() == pytest.approx(by_hand(best), rel=1e-4)

    want = by_hand(torch.cosine_similarity(*sums, dim=0))
    between = score(phrases, phrases[:, None])
    assert between[0, 1].item() == pytest.approx(want, rel=1e-4)
    assert between[1, 0].item() == pytest.approx(want, rel=1e-4)


def test_the_phrase_loss_is_the_sigmoid_loss_by_hand_where_the_truth_is_known():
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    is_true = torch.tensor([[True, False], [False, True]])
    is_known = torch.tensor([[True, True], [False, True]])
    want = -sum(torch.tensor(x).sigmoid().log() for x in (2.0, 1.0, 0.0))
    assert phrase_loss(logits, is_true, is_known).item() == pytest.approx(want.item(), rel=1e-6)


def test_an_image_that_could_not_be_read_is_compared_with_nothing(config):
    torch.manual_seed(0)
    objective = PhraseContrastObjective(XLlava(config).init_weights())
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    batch = {
        "pixels": pixels,
        "usable": torch.tensor([True, False, True]),
        "ids": torch.tensor([5, 6, 7]),
        "offsets": torch.tensor([0, 2]),
        "is_true": torch.tensor([[True, False, False], [False, False, True]]),
        "is_known": torch.ones(2, 3, dtype=torch.bool),
        "images_per_rank": [3],
    }
    loss = objective(batch)
    rest = {key: batch[key][:, [0, 2]] for key in ("is_true", "is_known")}
    rest |= {"pixels": pixels[[0, 2]], "usable": torch.tensor([True, True])}
    want = objective(batch | rest | {"images_per_rank": [2]})
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_vision_loss_is_siglips_on_the_nearest_patch_by_hand(config):
    """In float64, pair by pair: log σ(±(10·cosine − 10)), summed; 10 is about exp(2.3)."""
    torch.manual_seed(0)
    objective = PhraseContrastObjective(XLlava(config).init_weights())
    batch = {
        "pixels": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8),
        "usable": torch.tensor([True, True]),
        "ids": torch.tensor([5, 6, 7]),
        "offsets": torch.tensor([0, 2]),
        "is_true": torch.tensor([[True, False], [True, True]]),
        "is_known": torch.tensor([[True, True], [False, True]]),
        "images_per_rank": [2],
    }
    patches = objective.model.encode_images(batch["pixels"]).double()
    rows = objective.model.decoder.embed_tokens.weight.double()
    phrases, want = [rows[5] + rows[6], rows[7]], 0.0
    for f, i, sign in ((0, 0, 1), (0, 1, -1), (1, 1, 1)):
        cosine = max(torch.cosine_similarity(phrases[f], patch, dim=0) for patch in patches[i])
        want -= (sign * (math.exp(2.3) * cosine - 10)).sigmoid().log().item()
    assert objective(batch).item() == pytest.approx(want, rel=1e-5)


def test_words_of_a_dictionary_add_the_loss_of_their_pairs(config):
    torch.manual_seed(0)
    objective = PhraseContrastObjective(XLlava(config).init_weights())
    batch = {
        "pixels": torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8),
        "usable": torch.tensor([True]),
        "ids": torch.tensor([5]),
        "offsets": torch.tensor([0]),
        "is_true": torch.tensor([[True]]),
        "is_known": torch.tensor([[True]]),
        "images_per_rank": [1],
    }
    words = {
        "word_ids": torch.tensor([8, 9, 10]),
        "word_offsets": torch.tensor([0, 2]),
        "word_true": torch.ones(2, 2, dtype=torch.bool),
        "word_known": torch.tensor([[False, True], [True, False]]),
    }
    embeddings = objective.model.decoder.embed_tokens.weight
    cosine = torch.cosine_similarity(embeddings[8] + embeddings[9], embeddings[10], dim=0)
    logit = cosine * objective.score.logit_scale.exp() + objective.score.bias
    added = objective(batch | words) - objective(batch)
    assert added.item() == pytest.approx(-2 * logit.sigmoid().log().item(), rel=1e-4)
