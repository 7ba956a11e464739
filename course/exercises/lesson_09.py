"""Lesson 9: shares of a batch, packing, padding micro-batches, LoRA and merging it."""

import random

import torch

from course.exercise import Check, Exercise, expect
from course.exercises import tiny
from course.exercises.tiny import near, randn

TITLE = "Many processes: DDP, sharding, LoRA, packing"


# ------------------------------------------------------------------------- shares
class Numbers:
    """A data set whose sample i is the token i + 10."""

    def __init__(self, size):
        self.sort_keys, self.sizes = [0] * size, [size]

    def sample(self, i):
        from data import Sample

        return Sample([1, i + 10, 2], [0, 1, 1], [])


def shares(size, batch_size, **options):
    """The micro-batches' sample indices of the step that `step` names, and the batches."""
    from training.sampler import MicroBatchDataset

    step = options.pop("step", 0)
    batches = MicroBatchDataset(Numbers(size), batch_size, 0, **options)
    return [batch["sample_indices"] for batch in batches[step]]


def one_process_takes_all():
    found = shares(8, 8)
    expect("micro-batches of one process", len(found), 1)
    expect("its samples", sorted(found[0]), list(range(8)))


def ranks_share_a_batch():
    found = [shares(12, 12, rank=rank, world_size=3) for rank in range(3)]
    expect("micro-batches of each rank", [len(each) for each in found], [1, 1, 1])
    expect("samples of each rank", [len(each[0]) for each in found], [4, 4, 4])
    expect("all samples", sorted(i for each in found for i in each[0]), list(range(12)))


def micro_batches_share_a_rank():
    options = {"world_size": 2, "micro_batch_size": 3}
    found = [shares(12, 12, rank=rank, **options) for rank in range(2)]
    for each in found:
        expect("samples of a rank's micro-batches", [len(own) for own in each], [3, 3])
    indices = sorted(i for each in found for own in each for i in own)
    expect("all samples", indices, list(range(12)))


def a_short_batch_is_shared_too():
    # 13 samples in batches of 8: one of the two has 5.
    options = {"world_size": 2, "micro_batch_size": 2}
    for step in range(2):
        found = [shares(13, 8, rank=rank, step=step, **options) for rank in range(2)]
        counts = [len(each) for each in found]
        assert counts == [2, 2], (
            f"the ranks have {counts[0]} and {counts[1]} micro-batches, must both have 2: "
            "each backward is done by all ranks together"
        )
        loads = [sum(map(len, each)) for each in found]
        assert abs(loads[0] - loads[1]) <= 1, f"the ranks have {loads} samples"


def a_run_goes_on_where_it_stopped():
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "steps": 7}
        whole = [shares(24, 8, step=n, **options) for n in range(7)]
        resumed = [shares(24, 8, step=n, start=4, **options) for n in range(3)]
        assert resumed == whole[4:], "batches[0] of a run that starts at step 4 is not step 4's"


def vision_contrasts_all_ranks():
    from training.phrases import PhraseDataset
    from training.sampler import MicroBatchDataset

    class Phrases(PhraseDataset):
        """Its batch is what it was asked for."""

        def __init__(self):
            self.sort_keys, self.sizes = [0] * 8, [8]

        def batch(self, indices, rank=0, world_size=1, seed=0):
            return sorted(indices), rank, world_size, seed

    for n in range(2):
        batches = MicroBatchDataset(Phrases(), 4, 7, rank=1, world_size=2, start=1, steps=3)
        found, want = batches[n], [(sorted(batches.sampler[1 + n]), 1, 2, f"7 {1 + n}")]
        expect(
            "PhraseDataset.batch was asked for (indices, rank, world_size, seed), and", found, want
        )


def few_shapes_are_rounded():
    from training.graphs import round_shapes
    from training.sampler import MicroBatchDataset

    for few_shapes in (False, True):
        batches = MicroBatchDataset(Numbers(4), 4, 0, micro_batch_size=2, few_shapes=few_shapes)
        exact = [batches.build(batches.sampler[0][first::2])[0] for first in range(2)]
        want = [tuple((round_shapes(b) if few_shapes else b)["ids"].shape) for b in exact]
        found = [tuple(batch["ids"].shape) for batch in batches[0]]
        expect(f"shapes of the ids with few_shapes={few_shapes}", found, want)


SHARES = Exercise(
    "shares",
    "The micro-batches of one rank",
    "training/sampler.py",
    ["MicroBatchDataset.__getitem__", "MicroBatchDataset.draw"],
    30,
    [
        Check(
            1,
            "one process gets the whole batch",
            "self.sampler[step] has the samples of a step; build makes a list of micro-batches.",
            one_process_takes_all,
        ),
        Check(
            1,
            "three ranks share a batch: each sample once",
            "A rank can take every third sample, or a third of the list.",
            ranks_share_a_batch,
        ),
        Check(
            1,
            "micro-batches share what a rank has",
            "self.num_micro_batches is worked out already.",
            micro_batches_share_a_rank,
        ),
        Check(
            2,
            "a short last batch gives all ranks as many micro-batches",
            "Cutting a list into blocks leaves the last rank with less. Deal it out like cards.",
            a_short_batch_is_shared_too,
        ),
        Check(
            1,
            "a resumed run goes on with the next step",
            "n counts from the step at which this run began.",
            a_run_goes_on_where_it_stopped,
        ),
        Check(
            1,
            "the vision stage: one batch, made from the samples of all ranks",
            "If the dataset is a PhraseDataset, its method `batch` does all the rest.",
            vision_contrasts_all_ranks,
        ),
        Check(
            1,
            "few_shapes: each micro-batch is rounded",
            "round_shapes is imported already.",
            few_shapes_are_rounded,
        ),
    ],
    {
        "09_shares_a.py": 3,
        "09_shares_b.py": 4,
        "09_shares_c.py": 3,
        "09_shares_d.py": 5,
        "09_shares_e.py": 6,
    },
)


# ------------------------------------------------------------------------- pad
def padded(counts, lengths):
    """What pad_micro_batches makes of `lengths` micro-batches while other ranks have `counts`."""
    from training import distributed

    batches = []
    for n in range(lengths):
        targets = torch.tensor([[-100, 5 + n, 2]])
        batch = {"ids": torch.tensor([[1, 7, 5 + n]]), "targets": targets}
        batches.append(batch | {"num_tokens": 3, "attention_pairs": 9})

    def reduce_over_ranks(values, process, op=torch.distributed.ReduceOp.SUM):
        is_max = op == torch.distributed.ReduceOp.MAX
        reduce = max if is_max else sum
        return [float(reduce([value, *counts])) for value in values]

    real, distributed.all_reduce = distributed.all_reduce, reduce_over_ranks
    try:
        process = distributed.Process(0, 1 + len(counts), torch.device("cpu"), torch.float32)
        return distributed.pad_micro_batches(batches, process), batches
    finally:
        distributed.all_reduce = real


def nothing_is_missing():
    found, batches = padded([2, 3], 3)
    assert len(found) == 3 and all(a is b for a, b in zip(found, batches)), (
        "this rank has the most micro-batches: they should come back as they are"
    )


def as_many_as_the_largest():
    found, batches = padded([5, 3], 3)
    expect("micro-batches where another rank has 5", len(found), 5)
    assert all(a is b for a, b in zip(found, batches)), "the first three are not the rank's own"


def added_ones_count_nothing():
    from model import IGNORE_INDEX

    found, _ = padded([4, 1], 2)
    for extra in found[2:]:
        left = int((extra["targets"] != IGNORE_INDEX).sum())
        expect("targets of an added micro-batch", left, 0)
        expect("its tokens and pairs", (extra["num_tokens"], extra["attention_pairs"]), (0, 0))


def own_ones_are_as_before():
    _, batches = padded([4, 1], 2)
    expect("the rank's own last targets", batches[-1]["targets"].tolist(), [[-100, 6, 2]])
    expect("its tokens", batches[-1]["num_tokens"], 3)


PAD = Exercise(
    "pad",
    "As many micro-batches as the other ranks",
    "training/distributed.py",
    ["pad_micro_batches"],
    20,
    [
        Check(
            1,
            "the rank with the most adds none",
            "all_reduce with dist.ReduceOp.MAX tells the largest number.",
            nothing_is_missing,
        ),
        Check(
            1,
            "a rank with fewer adds some at the end",
            "The last micro-batch is there to be repeated.",
            as_many_as_the_largest,
        ),
        Check(
            2,
            "an added micro-batch has no targets, tokens or pairs",
            "What would the loss and the number of targets be if the last one counted twice?",
            added_ones_count_nothing,
        ),
        Check(
            1,
            "the rank's own micro-batches keep their targets",
            "Two names for one tensor: what changes one changes the other.",
            own_ones_are_as_before,
        ),
    ],
    {"09_pad_a.py": 2, "09_pad_b.py": 3},
)


# ------------------------------------------------------------------------- bins
def bins(lengths, budget):
    """The loads of pack_into_bins, after the least that must hold."""
    from training.sampler import pack_into_bins

    groups = pack_into_bins(list(lengths), budget)
    indices = sorted(i for group in groups for i in group)
    expect(f"all indices in the groups of {list(lengths)}", indices, list(range(len(lengths))))
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert max(loads) <= budget, f"{list(lengths)}: loads {loads} exceed the budget of {budget}"
    assert min(map(len, groups)) > 0, f"{list(lengths)}: an empty group"
    return loads


def every_sample_once_within_budget():
    rng = random.Random(0)
    for _ in range(50):
        bins([rng.randint(1, 20) for _ in range(rng.randint(1, 60))], 100)


def few_groups():
    # 8 + 2, 7 + 3, 5 + 4 + 1
    expect("groups of 2 5 4 7 1 3 8, at most 10 each", len(bins([2, 5, 4, 7, 1, 3, 8], 10)), 3)


def equally_full():
    expect("loads of ten samples of length 1, at most 8", sorted(bins([1] * 10, 8)), [5, 5])
    rng = random.Random(1)
    for _ in range(20):
        loads = bins([rng.randint(1, 30) for _ in range(60)], 200)
        assert max(loads) - min(loads) <= 30, f"loads {loads}: a rank with 200 waits for nobody"


def more_groups_if_need_be():
    # The sum, 18, would fit into two groups of 10.
    expect("groups of 6 6 6, at most 10", sorted(bins([6, 6, 6], 10)), [6, 6, 6])
    expect("groups of 10 and 10, at most 10", sorted(bins([10, 10], 10)), [10, 10])


BINS = Exercise(
    "bins",
    "Samples into as few bins as possible",
    "training/sampler.py",
    ["pack_into_bins"],
    40,
    [
        Check(
            1,
            "each sample is in one group, no group exceeds the budget",
            "Begin with one group for each sample, then improve.",
            every_sample_once_within_budget,
        ),
        Check(
            1,
            "seven samples fit into three groups",
            "Which sample is hardest to place? Begin with it.",
            few_groups,
        ),
        Check(
            2,
            "groups are about equally full",
            "Begin with empty groups, the fewest possible. Which of them gets the next sample?",
            equally_full,
        ),
        Check(
            1,
            "where the fewest possible do not hold all, there is one more",
            "The sum of lengths over the budget is only the least number.",
            more_groups_if_need_be,
        ),
    ],
    {"09_bins_a.py": 1, "09_bins_b.py": 2, "09_bins_c.py": 3},
)


# ------------------------------------------------------------------------- pack
def two_samples():
    from data import Sample

    return [Sample([1, 5, 6, 2], [0, 0, 1, 1], []), Sample([1, 7, 2], [0, 1, 1], [])]


def end_to_end():
    from training.sampler import pack

    batch = pack(two_samples())
    expect("ids", batch["ids"].tolist(), [[1, 5, 6, 1, 7]])
    expect("targets", batch["targets"].tolist(), [[-100, 6, 2, 7, 2]])


def positions_restart():
    from training.sampler import pack

    positions = pack(two_samples())["layout"].positions
    expect("positions", positions.tolist(), [[0, 1, 2, 0, 1]])


def own_document_only():
    from training.sampler import pack

    start, end = pack(two_samples())["layout"].key_ranges
    expect("the first key of each query", start.tolist(), [[0, 0, 0, 3, 3]])
    expect("the key after its last", end.tolist(), [[1, 2, 3, 4, 5]])
    expect("their type", (start.dtype, end.dtype), (torch.int32, torch.int32))


def same_loss_as_alone():
    from data import Sample, collate
    from training.sampler import pack

    model = tiny.model()
    image, pixels = [60] * 4, tiny.images(2)
    samples = [
        Sample([1, *image, 5, 6, 2], [0] * 6 + [1, 1], [pixels[0]]),
        Sample([1, 9, 8, 7, 2], [0, 0, 1, 1, 1], []),
        Sample([1, 4, *image, 3, 2], [0] * 6 + [1, 1], [pixels[1]]),
    ]

    def loss(batch):
        return model.loss(batch["ids"], batch["targets"], batch.get("pixels"), batch["layout"])

    with torch.no_grad():
        alone = sum(loss(collate([sample], pad_id=61)) for sample in samples)
        packed = loss(pack(samples))
    assert abs(packed - alone) < 1e-3 * alone, (
        f"three samples cost {alone:.4f} one by one, {packed:.4f} when packed"
    )


PACK = Exercise(
    "pack",
    "Documents end to end in one row",
    "training/sampler.py",
    ["pack"],
    40,
    [
        Check(
            1,
            "ids and targets stand end to end, without padding",
            "collate([sample], pad_id=0, T=…) makes a row of one sample.",
            end_to_end,
        ),
        Check(
            1,
            "positions begin at 0 in each document",
            "A token's position is its index less that of its document's first token.",
            positions_restart,
        ),
        Check(
            1,
            "a token attends to its own document, up to itself",
            "The docstring of kernels/attention.py draws key ranges of two documents.",
            own_document_only,
        ),
        Check(
            2,
            "the loss is the sum of the samples' own losses, with images",
            "A batch also has pixels, and its layout loss_positions.",
            same_loss_as_alone,
        ),
    ],
    {"09_pack_a.py": 1, "09_pack_b.py": 2, "09_pack_c.py": 3},
)


# ------------------------------------------------------------------------- lora
def adapter(rank, inputs, outputs, bias=False):
    """(the linear layer, its LoRALinear)."""
    from training.lora import LoRALinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias).requires_grad_(False)
    return linear, LoRALinear(linear, rank)


def by_hand():
    linear, lora = adapter(1, 2, 1)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    lora.weight.data = torch.tensor([[1.0, 2.0]])
    lora.down.data, lora.up.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]])
    # W·x = 3, down·x = 2, up·2 = 6, and twice that is added.
    near(lora(torch.ones(1, 2)), torch.tensor([[15.0]]), "W (1, 2), down (1, 1), up 3, x (1, 1)")


def begins_as_the_layer():
    for bias in (False, True):
        linear, lora = adapter(4, 16, 8, bias)
        x = randn(3, 5, 16)
        near(lora(x), linear(x), f"a new adapter of a layer with bias={bias}", 0.0)


def can_learn():
    linear, lora = adapter(4, 16, 8)
    shapes = {name: tuple(each.shape) for name, each in lora.named_parameters()}
    expect("parameters", shapes, {"weight": (8, 16), "down": (4, 16), "up": (8, 4)})
    trained = {name for name, each in lora.named_parameters() if each.requires_grad}
    expect("trained parameters", trained, {"down", "up"})

    lora(randn(3, 16)).square().sum().backward()
    assert lora.up.grad.abs().max() > 0, "the gradient is zero everywhere: it never learns"


def same_scale_for_each_rank():
    for rank in (1, 2, 8):
        linear, lora = adapter(rank, 16, 8, True)
        lora.up.data = randn(8, rank, seed=rank)
        x = randn(3, 16, seed=1)
        delta = 2 * (lora.up.data.double() @ lora.down.data.double())
        want = x.double() @ (linear.weight.double() + delta).T + linear.bias.double()
        near(lora(x), want, f"rank {rank}", 1e-4)


def down_keeps_the_size():
    _, lora = adapter(64, 1024, 8)
    size = (lora.down.data @ randn(1024, seed=2)).square().mean().sqrt().item()
    assert 0.7 < size < 1.4, f"down·x is {size:.2f} times as large as x, should be about as large"


LORA = Exercise(
    "lora",
    "An adapter of low rank",
    "training/lora.py",
    ["LoRALinear.__init__", "LoRALinear.forward"],
    30,
    [
        Check(
            1,
            "a layer of two numbers is right",
            "Keep the frozen layer's weight and bias under these names; SCALE is 2.",
            by_hand,
        ),
        Check(
            1,
            "a new adapter changes nothing",
            "Of a product of two matrices one may be zero.",
            begins_as_the_layer,
        ),
        Check(
            1,
            "only the two new matrices train, and they can",
            "If both are zero, what is the gradient of each?",
            can_learn,
        ),
        Check(
            1,
            "the scale is 2 whatever the rank, also with a bias",
            "alpha / rank is constant, because alpha grows with the rank.",
            same_scale_for_each_rank,
        ),
        Check(
            1,
            "down·x is about as large as x",
            "A sum of n products of unit size is about √n. What must the numbers of down be?",
            down_keeps_the_size,
        ),
    ],
    {"09_lora_a.py": 1, "09_lora_b.py": 2, "09_lora_c.py": 3},
)


# ------------------------------------------------------------------------- merge
def adapted():
    """The tiny model with adapters of rank 2 that are no longer zero."""
    from training.lora import set_trainable

    model = tiny.model()
    set_trainable(model, ["projector", "decoder"], 2)
    for n, (name, weight) in enumerate(model.named_parameters()):
        if name.endswith(".up"):
            weight.data = 0.1 * randn(*weight.shape, seed=n)
    return model


def without_adapters():
    from training.lora import merged_weights

    model, adapters = tiny.model(), {}
    model.exact_weights = {}  # as set_trainable leaves it
    found = dict(merged_weights(model, adapters))
    expect("adapters of a model without any", adapters, {})
    assert found.keys() == model.state_dict().keys(), "the names are not those of the model"
    for name, tensor in model.state_dict().items():
        near(found[name], tensor, name, 0.0)


def without_the_adapters_names():
    from training.lora import merged_weights

    found = dict(merged_weights(adapted(), {}))
    assert found.keys() == tiny.model().state_dict().keys(), "not the names of a model as it began"


def answers_as_before():
    from model import XLlava
    from training.lora import merged_weights

    model, ids = adapted(), torch.tensor([[1, 5, 9, 3, 2]])
    with torch.no_grad():
        want = model(ids)
        merged = XLlava(model.config)
        merged.load_state_dict(dict(merged_weights(model, {})))
        near(merged.eval()(ids), want, "hidden states of the merged model", 1e-4)


def model_is_unchanged():
    from training.lora import merged_weights

    model, adapters = adapted(), {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in merged_weights(model, adapters):
        pass
    for name, tensor in model.state_dict().items():
        near(tensor, before[name], f"{name} of the model itself, after merging", 0.0)
    names = {name for name in before if name.endswith((".down", ".up"))}
    expect("names of the adapters that were put aside", set(adapters), names)


MERGE = Exercise(
    "merge",
    "Adapters merged into their weights",
    "training/lora.py",
    ["merged_weights"],
    40,
    [
        Check(
            1,
            "a model without adapters comes out as it is",
            "Yield the pairs of model.state_dict().",
            without_adapters,
        ),
        Check(
            1,
            "no adapter is among the names",
            "Names that end in .down or .up are left out.",
            without_the_adapters_names,
        ),
        Check(
            2,
            "the merged model computes what the adapted one does",
            "Compare LoRALinear.forward: W·x + 2·up·(down·x) is one matrix times x.",
            answers_as_before,
        ),
        Check(
            2,
            "the model stays as it was, and the adapters are put aside",
            "state_dict() gives the model's own tensors, not copies.",
            model_is_unchanged,
        ),
    ],
    {"09_merge_a.py": 2, "09_merge_b.py": 3},
)

EXERCISES = [SHARES, PAD, BINS, PACK, LORA, MERGE]
