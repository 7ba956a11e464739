"""Lesson 4, seeing by contrast: phrases and patches, their score, the loss, labels, many ranks."""

import math

import torch

from course.exercise import Check, Exercise, expect
from course.exercises.lesson_03 import near

TITLE = "Seeing by contrast"


# ------------------------------------------------------------------------- embed_phrases
TABLE = [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [-3.0, 2.0]]


def embed(ids, offsets, table=None):
    from training.objectives import embed_phrases

    table = torch.tensor(TABLE) if table is None else table
    return embed_phrases(table, torch.tensor(ids), torch.tensor(offsets))


def test_one_token_is_its_direction():
    near("the token (3, 4)", embed([0], [0]), torch.tensor([[0.6, 0.8]]))


def test_a_phrase_is_the_sum_of_its_tokens():
    # (3, 4) + (0, 2) + (0, 2) = (3, 8)
    expected = torch.tensor([[3.0, 8.0]]) / math.sqrt(73)
    near("(3, 4) + (0, 2) + (0, 2)", embed([0, 1, 1], [0]), expected)


def test_several_phrases():
    expected = torch.tensor([[0.6, 0.8], [1.0, 2.0], [0.0, 1.0]])
    expected[1] /= math.sqrt(5)
    near("phrases (0), (2, 1), (3, 0)", embed([0, 2, 1, 3, 0], [0, 1, 3]), expected)


def test_bf16_tables_give_exact_lengths():
    torch.manual_seed(0)
    found = embed([0, 1, 2, 3], [0, 2], torch.randn(4, 64).bfloat16())
    expect("the type for a bf16 table", found.dtype, torch.float32)
    near("the lengths", found.double().norm(dim=1), torch.ones(2, dtype=torch.float64), 1e-6)


def test_only_the_tokens_of_phrases_learn():
    table = torch.tensor(TABLE, requires_grad=True)
    embed([0, 2], [0], table)[0, 1].backward()
    touched = table.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    expect("rows with a gradient", touched, [0, 2])


EMBED = Exercise(
    "embed_phrases",
    "A phrase as one vector",
    "training/objectives.py",
    ["embed_phrases"],
    20,
    [
        Check(
            1, "one token: a vector of length 1", "F.normalize.", test_one_token_is_its_direction
        ),
        Check(
            1,
            "a phrase is the sum of its tokens",
            "Sum first, then divide by the length of the sum.",
            test_a_phrase_is_the_sum_of_its_tokens,
        ),
        Check(
            1,
            "several phrases end to end",
            "offsets say where each begins; the last one ends with the ids. F.embedding_bag.",
            test_several_phrases,
        ),
        Check(
            1,
            "a table in bf16 gives lengths of 1, too",
            "bf16 keeps 8 bits. In which type should the division be?",
            test_bf16_tables_give_exact_lengths,
        ),
        Check(
            1,
            "only tokens of phrases get a gradient",
            "The rows must come from the table itself.",
            test_only_the_tokens_of_phrases_learn,
        ),
    ],
    {"04_embed_a.py": 1, "04_embed_b.py": 3},
)


# ------------------------------------------------------------------------- PhraseScore.forward
def scorer(scale=0.0, bias=0.0):
    from training.objectives import PhraseScore

    score = PhraseScore()
    with torch.no_grad():
        score.logit_scale.fill_(scale)
        score.bias.fill_(bias)
    return score


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_a_number_for_each_pair():
    expect("3 phrases, 2 images", tuple(scorer()(unit(3, 4), unit(2, 5, 4)).shape), (3, 2))


def test_scale_and_bias():
    phrases, patches = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.6, 0.8]], [[-1.0, 0.0]]])
    found = scorer(math.log(10), -10.0)(phrases, patches)
    near("cosines 0.6 and −1, scale e^log(10), bias −10", found, torch.tensor([[-4.0, -20.0]]))


def test_the_best_patch_counts():
    phrases = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    patches = torch.tensor([[[1.0, 0.0], [0.0, -1.0]], [[-0.6, 0.8], [-0.8, 0.6]]])
    expected = torch.tensor([[1.0, -0.6], [0.0, 0.8]])
    near("two phrases, two images of two patches", scorer()(phrases, patches), expected)


def test_only_the_best_patch_learns():
    torch.manual_seed(0)
    patches = unit(1, 6, 4).requires_grad_()
    scorer()(unit(1, 4), patches).sum().backward()
    expect("patches with a gradient", int((patches.grad.abs().sum(dim=2) > 0).sum()), 1)


def test_random_scores():
    torch.manual_seed(1)
    phrases, patches, score = unit(4, 6), unit(3, 5, 6), scorer(1.5, 0.25)
    found = score(phrases, patches)
    for f in range(4):
        for b in range(3):
            best = max(float(phrases[f] @ patch) for patch in patches[b])
            near(
                f"phrase {f}, image {b}",
                found[f, b],
                torch.tensor(best * math.exp(1.5) + 0.25),
                1e-4,
            )


SCORE = Exercise(
    "phrase_score",
    "How well a phrase describes an image",
    "training/objectives.py",
    ["PhraseScore.forward"],
    20,
    [
        Check(
            1,
            "a number for each pair",
            "(F, C) and (B, N, C) -> (F, B).",
            test_a_number_for_each_pair,
        ),
        Check(
            1,
            "scale and bias",
            "logit_scale is a logarithm: it can't make the scale negative.",
            test_scale_and_bias,
        ),
        Check(
            1,
            "the best patch of each image counts",
            "Along which dimension is the maximum?",
            test_the_best_patch_counts,
        ),
        Check(
            1,
            "only the best patch gets a gradient",
            "A mean or a softmax would teach all patches.",
            test_only_the_best_patch_learns,
        ),
        Check(
            1,
            "random numbers, pair by pair",
            "Which images do the patches of your rows belong to?",
            test_random_scores,
        ),
    ],
    {"04_score_a.py": 2, "04_score_b.py": 1},
)


# ------------------------------------------------------------------------- phrase_loss
def loss_of(logits, is_true, is_known):
    from training.objectives import phrase_loss

    return phrase_loss(logits, torch.tensor(is_true), torch.tensor(is_known))


def test_no_opinion_costs_log_2():
    found = loss_of(torch.zeros(1, 1), [[True]], [[True]])
    near("a logit of 0", found, torch.tensor(math.log(2)))


def test_right_is_cheap_and_wrong_is_dear():
    for logit, truth, expected in ((2.0, True, 0.126928), (2.0, False, 2.126928)):
        found = loss_of(torch.tensor([[logit]]), [[truth]], [[True]])
        near(f"logit {logit}, truth {truth}: log(1 + e^∓2)", found, torch.tensor(expected))


def test_sums_what_is_known():
    logits = torch.zeros(2, 3)
    found = loss_of(logits, [[True, False, False]] * 2, [[True, True, False], [False] * 3])
    near("six pairs, two known: 2 · log 2", found, torch.tensor(2 * math.log(2)))
    near("nothing known", loss_of(logits, [[False] * 3] * 2, [[False] * 3] * 2), torch.tensor(0.0))


def test_large_logits_are_finite():
    logits = torch.tensor([[3000.0, -3000.0]], requires_grad=True)
    found = loss_of(logits, [[False, True]], [[True, True]])
    near(
        "the sum over two pairs with logits 3000 and −3000, both wrong,",
        found,
        torch.tensor(6000.0),
        1e-3,
    )
    found.backward()
    near("their gradients", logits.grad, torch.tensor([[1.0, -1.0]]))


def test_gradients_by_differences():
    torch.manual_seed(2)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    is_true, is_known = (torch.rand(3, 4) > 0.5 for _ in range(2))
    from training.objectives import phrase_loss

    phrase_loss(logits, is_true, is_known).backward()
    with torch.no_grad():
        for i in range(12):
            step = torch.zeros(12, dtype=torch.float64)
            step[i] = 1e-5
            step = step.view(3, 4)
            pair = [phrase_loss(logits + s * step, is_true, is_known) for s in (1, -1)]
            slope = (pair[0] - pair[1]) / 2e-5
            near(f"the slope at pair {divmod(i, 4)}", logits.grad.flatten()[i], slope, 1e-6)


LOSS = Exercise(
    "phrase_loss",
    "The sigmoid loss",
    "training/objectives.py",
    ["phrase_loss"],
    20,
    [
        Check(
            1, "no opinion costs log 2", "Cross-entropy of two cases.", test_no_opinion_costs_log_2
        ),
        Check(
            1,
            "what is true wants a large logit, what is false a small one",
            "−log σ(z) where it is true, −log σ(−z) where it is false.",
            test_right_is_cheap_and_wrong_is_dear,
        ),
        Check(
            1,
            "a sum over the known pairs",
            "An unknown pair weighs nothing. The loop divides later.",
            test_sums_what_is_known,
        ),
        Check(
            1,
            "logits of 300 and 3000 are no problem",
            "σ(−300) is 0 in float32, and log 0 is −∞. torch has a loss that takes logits.",
            test_large_logits_are_finite,
        ),
        Check(
            1,
            "the gradient, by finite differences",
            "Do true and false pairs both have a slope?",
            test_gradients_by_differences,
        ),
    ],
    {"04_loss_a.py": 3, "04_loss_b.py": 2},
)


# ------------------------------------------------------------------------- PhraseDataset.label
def label(phrases, indices, *described):
    """described: (positives, record types) of each image."""
    from training.phrases import DescribedImage, PhraseDataset

    data = PhraseDataset.__new__(PhraseDataset)
    data.images = [DescribedImage("x.png", {}, set(p), set(t), "") for p, t in described]
    is_true, is_known = data.label(phrases, indices)
    for each, name in ((is_true, "is_true"), (is_known, "is_known")):
        found = getattr(each, "dtype", type(each)), tuple(getattr(each, "shape", ()))
        expect(f"{name}: type and shape", found, (torch.bool, (len(phrases), len(indices))))
    return is_true.int().tolist(), is_known.int().tolist()


EN, KO = ("en", "caption"), ("ko", "caption")
RED = (EN, "a red cat")
CAT_IMAGE = ([("en", "a red cat"), ("en", "grass")], [EN])
DOG_IMAGE = ([("en", "a blue dog")], [EN])
KOREAN_IMAGE = ([("ko", "빨간 고양이")], [KO])


def test_what_an_image_says_is_true():
    found = label([RED], [0], CAT_IMAGE)
    expect('"a red cat" and its image: is_true, is_known', found, ([[1]], [[1]]))


def test_what_it_does_not_say_is_false():
    found = label([RED, (EN, "grass")], [1, 0], CAT_IMAGE, DOG_IMAGE)
    expected = [[0, 1], [0, 1]], [[1, 1], [1, 1]]
    expect("a red cat, grass; the dog's image, the cat's", found, expected)


def test_another_language_tells_nothing():
    found = label([RED, (KO, "빨간 고양이")], [0, 1], CAT_IMAGE, KOREAN_IMAGE)
    expected = [[1, 0], [0, 1]], [[1, 0], [0, 1]]
    expect("English and Korean phrases; images with one language each", found, expected)


def test_an_empty_place_tells_nothing():
    found = label([RED], [0, None], CAT_IMAGE)
    expect("a red cat; its image, and None", found, ([[1, 0]], [[1, 0]]))


def test_kinds_of_record():
    about = ("en", "answer")
    answers = ([("en", "a red cat")], [about])
    found = label([RED, (EN, "grass"), (about, "grass")], [0], answers)
    expected = [[1], [0], [0]], [[1], [0], [1]]
    expect("phrases of captions and of answers; an image with answers only", found, expected)


LABEL = Exercise(
    "label",
    "True, false or unknown",
    "training/phrases.py",
    ["PhraseDataset.label"],
    30,
    [
        Check(
            1,
            "what a record of the image says is true",
            "positives holds (language, phrase).",
            test_what_an_image_says_is_true,
        ),
        Check(
            1,
            "what its records do not say is false",
            "Rows are phrases, columns are images.",
            test_what_it_does_not_say_is_false,
        ),
        Check(
            1,
            "without a record in the language nothing is known",
            "record_types holds (language, kind).",
            test_another_language_tells_nothing,
        ),
        Check(
            1, "None is no image", "Leave its column as it is.", test_an_empty_place_tells_nothing
        ),
        Check(
            1,
            "what is true is known, whatever kind of record says so",
            "Which pairs are known although the kind is missing?",
            test_kinds_of_record,
        ),
    ],
    {"04_label_a.py": 2, "04_label_b.py": 4},
)


# ------------------------------------------------------------------------- AllGatherWithGrad
class Ranks:
    """Stands for torch.distributed: what this rank gives, and what the others would."""

    def __init__(self, rank, sizes, gradients=()):
        self.rank, self.sizes, self.gradients = rank, sizes, gradients
        self.tensors = [100.0 * r + torch.arange(2.0 * n).view(n, 2) for r, n in enumerate(sizes)]

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return len(self.sizes)

    def all_gather(self, outputs, tensor):
        expect("how many tensors all_gather fills", len(outputs), len(self.sizes))
        most = max(self.sizes)
        expect("the shape that all ranks must agree on", tuple(tensor.shape), (most, 2))
        for r, (output, own) in enumerate(zip(outputs, self.tensors)):
            expect("the shape of each output", tuple(output.shape), (most, 2))
            output.copy_(tensor if r == self.rank else torch.full((most, 2), math.nan))
            if r != self.rank:
                output[: len(own)] = own

    def all_reduce(self, tensor, *_, **__):
        for other in self.gradients:
            tensor += other


def gathered(rank, sizes, gradients=(), own_gradient=None):
    """What AllGatherWithGrad gives on this rank, and the gradient of its tensor."""
    from training import objectives

    ranks, real = Ranks(rank, sizes, gradients), objectives.dist
    objectives.dist = ranks
    try:
        tensor = ranks.tensors[rank].clone().requires_grad_()
        out = objectives.AllGatherWithGrad.apply(tensor, list(sizes))
        if own_gradient is not None:
            out.backward(own_gradient.clone())  # all_reduce may write into it
        return out.detach(), tensor.grad, torch.cat(ranks.tensors)
    finally:
        objectives.dist = real


def test_gathers_equal_parts():
    for rank in range(2):
        out, _, expected = gathered(rank, (2, 2))
        near(f"two ranks of two images, on rank {rank}", out, expected)


def test_gathers_unequal_parts():
    for sizes in ((1, 3), (3, 1, 2)):
        for rank in range(len(sizes)):
            out, _, expected = gathered(rank, sizes)
            assert not out.isnan().any(), f"ranks of {sizes} images: padding came through"
            near(f"ranks of {sizes} images, on rank {rank}", out, expected)


def test_returns_the_gradient_of_its_own_images():
    gradient = torch.randn(4, 2)
    _, found, _ = gathered(1, (1, 3), own_gradient=gradient)
    near("rank 1 of (1, 3) images, no other rank uses them", found, gradient[1:])


def test_adds_what_other_ranks_found():
    own, other = torch.randn(5, 2), torch.randn(5, 2)
    for rank, rows in ((0, slice(0, 2)), (1, slice(2, 5))):
        _, found, _ = gathered(rank, (2, 3), [other], own)
        near(f"rank {rank} of (2, 3): own + other gradient", found, (own + other)[rows])


GATHER = Exercise(
    "gather",
    "Negatives from all GPUs",
    "training/objectives.py",
    ["AllGatherWithGrad.forward", "AllGatherWithGrad.backward"],
    90,
    [
        Check(1, "equal parts, in the order of the ranks", "torch.cat.", test_gathers_equal_parts),
        Check(
            1,
            "unequal parts: all_gather needs equal shapes",
            "Pad to the largest, and cut afterwards. images_per_rank has the numbers.",
            test_gathers_unequal_parts,
        ),
        Check(
            1,
            "backward: the rows of this rank",
            "ctx remembers what forward puts on it. dist.get_rank().",
            test_returns_the_gradient_of_its_own_images,
        ),
        Check(
            2,
            "backward: what all ranks found about these rows, summed",
            "Each rank's loss uses all images.",
            test_adds_what_other_ranks_found,
        ),
    ],
    {"04_gather_a.py": 3, "04_gather_b.py": 1},
)

EXERCISES = [EMBED, SCORE, LOSS, LABEL, GATHER]
