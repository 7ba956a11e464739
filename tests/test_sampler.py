"""Which samples make up which step, micro-batches, packing."""

import random
import signal

import pytest
import torch

import data
from model import XLlava
from training import sampler
from training.phrases import PhraseDataset


@pytest.fixture
def chats(tokenizer, config, world):
    return data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)


# ------------------------------------------------------------------------------------ steps
@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (2, 2), (4, 1)])
def test_every_sample_comes_once_an_epoch_on_any_number_of_ranks(world_size, accumulate):
    steps = sampler.LengthGroupedSampler([i % 7 for i in range(53)], 8, seed=3)
    seen = []
    for step in range(steps.per_epoch):
        for rank in range(world_size):
            for first in range(accumulate):
                seen += steps[step][rank::world_size][first::accumulate]
    assert sorted(seen) == list(range(53))


def test_a_step_depends_on_seed_and_epoch_alone():
    lengths = [i % 7 for i in range(53)]
    steps = sampler.LengthGroupedSampler(lengths, 8, seed=3)
    epochs = [[steps[epoch * 7 + n] for n in range(7)] for epoch in range(2)]
    assert epochs[0] != epochs[1], "the next epoch has another order"
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(53))

    again = sampler.LengthGroupedSampler(lengths, 8, seed=3)
    assert again[9] == epochs[1][2], "a step's samples do not depend on what was read before"
    assert again[2] == epochs[0][2]
    assert sampler.LengthGroupedSampler(lengths, 8, seed=4)[2] != again[2]


def test_samples_of_similar_length_share_a_batch():
    rng = random.Random(0)
    lengths = [rng.randrange(1000) for _ in range(400)]
    steps = sampler.LengthGroupedSampler(lengths, 8, seed=0)
    batches = [[lengths[i] for i in steps[n]] for n in range(steps.per_epoch)]
    assert max(max(batch) - min(batch) for batch in batches) < 100
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts), "batches are not in the order of their length"


def test_weights_give_each_file_its_share_and_every_sample_its_turn():
    def new_sampler():
        return sampler.LengthGroupedSampler([0] * 100, 10, seed=1, sizes=[80, 20], weights=[1, 3])

    steps = new_sampler()  # 25 and 75 samples an epoch
    seen = [i for step in range(4 * steps.per_epoch) for i in steps[step]]
    assert steps.per_epoch == 10
    assert len(seen) == 400
    assert sum(i < 80 for i in seen) == 100
    counts = [seen.count(i) for i in range(100)]
    assert set(counts[:80]) == {1, 2}, "none comes again before all others have come"
    assert set(counts[80:]) == {15}
    assert new_sampler()[17] == steps[17], "a step does not depend on what was read before"
    first, second = steps.draw_file_share(1, 0)[:20], steps.draw_file_share(1, 0)[20:40]
    assert first != second and sorted(first) == sorted(second), "another order each time"


def test_a_file_of_little_weight_gives_one_sample_and_none_is_lost():
    """A part in a thousand of ten samples is none: it gives one beside the ten of the other."""
    steps = sampler.LengthGroupedSampler([0] * 10, 10, 0, sizes=[5, 5], weights=[1, 999])
    epoch = [i for step in range(steps.per_epoch) for i in steps[step]]
    assert (len(epoch), sum(i < 5 for i in epoch)) == (11, 1)


def test_packed_samples_are_not_sorted_by_length(chats):
    packed = sampler.MicroBatchDataset(chats, 8, 5, token_budget=300)
    assert packed.sampler[0] == sampler.LengthGroupedSampler([0] * len(chats), 8, 5)[0]
    assert packed.sampler[0] != sampler.MicroBatchDataset(chats, 8, 5).sampler[0]


# ------------------------------------------------------------------------------------ micro-batches
@pytest.mark.parametrize("world_size", [2, 3])  # 3: ranks of three and two samples
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"token_budget": 120}])
def test_ranks_and_micro_batches_have_each_sample_of_a_step_once_with_its_numbers(
    chats, tokenizer, options, world_size
):
    whole, most = sampler.MicroBatchDataset(chats, 8, 5), options.get("micro_batch_size", 8)
    for step in range(whole.steps):
        seen = []
        for rank in range(world_size):
            batches = sampler.MicroBatchDataset(
                chats, 8, 5, pad_id=tokenizer.pad_id, rank=rank, world_size=world_size, **options
            )
            if not options.get("token_budget"):
                assert len(batches[step]) == batches.num_micro_batches
            for batch in batches[step]:
                lengths = [len(chats.sample(i).ids) - 1 for i in batch["sample_indices"]]
                assert batch["num_tokens"] == sum(lengths) and len(lengths) <= most
                masks = [chats.sample(i).loss_mask for i in batch["sample_indices"]]
                assert batch["num_targets"] == sum(map(sum, masks))
                assert batch["attention_pairs"] == sum(length**2 for length in lengths)
                assert (batch["ids"] != tokenizer.pad_id).sum() == sum(lengths)
                assert batch["ids"].numel() <= options.get("token_budget", 1000)
            indices = [i for batch in batches[step] for i in batch["sample_indices"]]
            if not options.get("token_budget"):  # packing draws from another order
                assert sorted(indices) == sorted(whole.sampler[step][rank::world_size])
            seen += indices
        assert len(set(seen)) == len(seen) == min(8, len(chats) - 8 * step)


def test_a_rank_without_samples_takes_part_with_nothing_to_learn(chats, tokenizer):
    batches = sampler.MicroBatchDataset(
        chats, 3, 0, pad_id=tokenizer.pad_id, rank=3, world_size=4, micro_batch_size=1
    )
    (batch,) = batches[0]
    assert batch["sample_indices"] == []
    assert batch["num_tokens"] == batch["attention_pairs"] == 0
    assert (batch["targets"] < 0).all()


def test_a_run_that_starts_later_gives_the_same_steps(chats):
    whole = sampler.MicroBatchDataset(chats, 4, 1, steps=9)
    rest = sampler.MicroBatchDataset(chats, 4, 1, steps=9, start=6)
    assert (len(whole), len(rest)) == (9, 3)
    for n in range(3):
        assert rest[n][0]["sample_indices"] == whole[6 + n][0]["sample_indices"]


def test_the_vision_stage_draws_by_seed_and_step(tokenizer, config, world):
    dataset = PhraseDataset([world / "captions.json"], tokenizer, config)
    batches = sampler.MicroBatchDataset(dataset, 4, 7, steps=9, rank=1, world_size=2)
    (batch,) = batches[5]
    expected = dataset.batch(batches.sampler[5], 1, 2, "7 5")
    assert batch["sample_indices"] == expected["sample_indices"]
    assert torch.equal(batch["ids"], expected["ids"])
    assert batch["num_tokens"] == len(batch["ids"])


def test_a_worker_leaves_signals_to_the_trainer_and_takes_one_core():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sampler.ignore_signals(0)
        assert torch.get_num_threads() == 1
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        torch.set_num_threads(before)


def test_workers_change_nothing(chats):
    batches = sampler.MicroBatchDataset(chats, 4, 1, steps=6)
    loaders = sampler.make_loader(batches), sampler.make_loader(batches, num_workers=2)
    compared = 0
    for (one,), (other,) in zip(*loaders):
        assert torch.equal(one["ids"], other["ids"])
        assert torch.equal(one["targets"], other["targets"])
        compared += 1
    assert compared == 6


# ------------------------------------------------------------------------------------ packing
def test_packed_documents_do_not_see_each_other_and_cost_what_they_cost_alone(
    chats, tokenizer, config
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    samples = [chats.sample(i) for i in range(5)]
    packed, padded = sampler.pack(samples), data.collate(samples, tokenizer.pad_id)
    # RoPE is relative: the loss would not tell.
    positions = [n for sample in samples for n in range(len(sample.ids) - 1)]
    assert packed["layout"].positions[0].tolist() == positions

    losses = []
    for batch in (packed, padded):
        loss = model.loss(batch["ids"], batch["targets"], batch["pixels"], batch["layout"])
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)

    # A change of a token is felt by later tokens of its own document, and by no other document.
    layout = packed["layout"]._replace(loss_positions=None)
    start = len(samples[0].ids) - 1
    end = start + len(samples[1].ids) - 1
    changed = packed["ids"].clone()
    changed[0, start + 8] += 1
    before, after = (model(ids, packed["pixels"], layout)[0] for ids in (packed["ids"], changed))
    moved = (before != after).any(dim=1).nonzero()[:, 0]
    assert moved.min() == start + 8
    assert moved.max() < end


def test_bins_hold_everything_once_within_the_budget_and_evenly():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        groups = sampler.pack_into_bins(lengths, 150)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in group) for group in groups) <= 150
        assert len(groups) <= 2 * sum(lengths) / 150 + 1
