"""Lesson 8: the loop. Global token mean, mixed precision, accumulation, exact resume."""

import types

import numpy as np
import torch
from torch.nn import functional as F

from course.exercise import Check, Exercise
from course.exercises import tiny
from course.exercises.tiny import near

TITLE = "The training loop"


# ------------------------------------------------------------------------------------ schedule
def schedule(total, warmup, *decay):
    from training.optimizers import lr_multiplier

    return [lr_multiplier(step, total, warmup, *decay) for step in range(total)]


def reaches_peak():
    values = schedule(100, 0.1)
    assert max(values) == 1, f"the largest multiplier is {max(values)}, must be 1"
    assert min(values) >= 0, f"the smallest multiplier is {min(values)}"


def warms_up_from_first_step():
    got, want = schedule(100, 0.1)[:11], [n / 10 for n in range(1, 11)] + [1]
    wrong = [step for step in range(11) if abs(got[step] - want[step]) > 1e-9]
    assert not wrong, f"step {wrong[0]} of 100, 10 of warm-up: {got[wrong[0]]}"


def falls_as_cosine():
    values = schedule(100, 0.1)
    # 45 of the 90 steps after the warm-up are half a turn of the cosine: 1/2. 30 are 60°: 3/4.
    for step, want in ((55, 0.5), (40, 0.75), (70, 0.25)):
        assert abs(values[step] - want) < 1e-9, f"step {step}: {values[step]}, must be {want}"


def stays_at_peak():
    values = schedule(100, 0.1, 0.4)
    assert values[9:61] == [1] * 52, "a decay of 0.4: steps 9 to 60 of 100 have the full rate"
    assert abs(values[80] - 0.5) < 1e-9, f"half of the decay, step 80: {values[80]}, must be 0.5"


def bears_extremes():
    assert schedule(1, 0.03) == [1], f"a run of one step: {schedule(1, 0.03)}, must be [1]"
    assert schedule(4, 0)[0] == 1, "without warm-up the first step has the full rate"
    assert schedule(4, 1) == [0.25, 0.5, 0.75, 1], "warm-up all the way"


# ------------------------------------------------------------------------------------ the loss
def loss_of(targets, layout=None, head=None):
    """(XLlava.loss, the cross-entropy of each position in float64) for random ids (2, 6)."""
    from model import Layout

    model, ids = tiny.model(), torch.arange(10, 22).view(2, 6)
    if head is not None:
        model.decoder.lm_head.weight.data.fill_(head)
    got = model.loss(ids, targets, None, layout or Layout())
    hidden = model.decoder(model.decoder.embed_tokens(ids))
    logits = hidden.double() @ model.decoder.lm_head.weight.double().T
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return got, each


def some_targets(count):
    targets = torch.full((2, 6), -100)
    for position in [4, 7, 8, 10, 2][:count]:
        targets.view(-1)[position] = 30 + position
    return targets


def loss_of_a_guess():
    got, _ = loss_of(some_targets(1), head=0.0)
    # A head of zeros gives each of the 64 pieces the same probability.
    near(got, torch.tensor(64.0).log(), "one target, all 64 pieces equally probable")


def loss_of_one_target():
    got, each = loss_of(some_targets(1))
    near(got, each.sum(), "one target")


def loss_is_a_sum():
    got, each = loss_of(some_targets(5))
    near(got, each.sum(), "five targets")


def loss_without_targets():
    got, _ = loss_of(some_targets(0))
    assert got.item() == 0, f"no target: the loss is {got.item()}, must be 0"
    got.backward()


def loss_at_positions():
    from model import Layout

    layout = Layout(loss_positions=torch.tensor([2, 4, 7, 8, 10, 0, 0]))
    got, each = loss_of(some_targets(5), layout)
    near(got, each.sum(), "only 5 of 12 positions, and one ignored twice as filler")


# ------------------------------------------------------------------------------------ gradients
class SumObjective(torch.nn.Module):
    """A tiny model with the sum of torch's own cross-entropy, as NextTokenObjective returns it."""

    def __init__(self):
        super().__init__()
        self.model = tiny.model()

    def forward(self, batch):
        logits = self.model.logits(self.model(batch["ids"])).flatten(0, 1)
        targets = batch["targets"].flatten()
        return F.cross_entropy(logits, targets, reduction="sum")


def batches_of(*answers):
    """A micro-batch of one sample each, with these numbers of targets."""
    from data import Sample, collate

    batches = []
    for n, count in enumerate(answers):
        ids = [(7 * n + 3 * i) % 50 + 5 for i in range(9)]
        batch = collate([Sample(ids, [0] * (9 - count) + [1] * count, [])], pad_id=61)
        counts = {"num_targets": count, "num_tokens": 8, "padded_tokens": 8, "num_images": 0}
        batches.append(batch | counts | {"attention_pairs": 64})
    return batches


def accumulate(batches, dtype=torch.float32, world_size=1):
    """(gradients of one step, its StepStats, the objective)."""
    import train
    from training.distributed import Process

    objective = SumObjective()
    process = Process(0, world_size, torch.device("cpu"), dtype)
    signals = types.SimpleNamespace(count=0)
    stats, _ = train.accumulate_gradients(objective, batches, process, signals)
    return gradients(objective), stats, objective


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def gradient_of_mean(batches):
    """The gradient of the mean over all targets, by torch's own cross-entropy, all at once."""
    model = tiny.model()
    ids = torch.cat([batch["ids"] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    logits = model.logits(model(ids))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return gradients(model)


def steps_on_one_micro_batch():
    batches = batches_of(4)
    near(accumulate(batches)[0], gradient_of_mean(batches), "4 targets in one micro-batch", 1e-5)


def steps_on_equal_micro_batches():
    batches = batches_of(3, 3, 3)
    near(accumulate(batches)[0], gradient_of_mean(batches), "3 micro-batches of 3 targets", 1e-5)


def steps_on_unequal_micro_batches():
    batches = batches_of(1, 8, 2)
    got, stats, _ = accumulate(batches)
    assert (stats.num_targets, stats.num_tokens) == (11, 24), f"{stats}: 11 targets, 24 tokens"
    near(got, gradient_of_mean(batches), "micro-batches of 1, 8 and 2 targets", 1e-5)


def steps_without_targets():
    got, stats, _ = accumulate(batches_of(0, 0))
    assert got.isfinite().all() and not got.any(), "no targets: the gradient must be 0, not NaN"
    assert stats.num_targets == 0, f"no targets: {stats}"


def steps_in_bf16():
    from model import MLP

    seen, old = [], MLP.forward

    def watch(self, x):
        out = old(self, x)
        seen.append((out.dtype, self.gate_proj.weight.dtype))
        return out

    MLP.forward = watch
    try:
        batches = batches_of(4, 5)
        got, _, objective = accumulate(batches, torch.bfloat16)
    finally:
        MLP.forward = old
    assert set(seen) == {(torch.bfloat16, torch.float32)}, (
        f"matrix products and weights are {set(seen)}: bf16 products of float32 weights are wanted"
    )
    assert got.dtype == torch.float32, f"gradients are {got.dtype}, must be float32"
    near(got, gradient_of_mean(batches), "in bf16, roughly", 0.05)


def steps_on_two_ranks():
    # The other rank is an echo of this one: sums are doubled, and DDP's mean changes nothing.
    import train
    from training import distributed

    def echo(values, process, op=None):
        return list(values) if op is not None else [2 * value for value in values]

    batches, old = batches_of(2, 6), distributed.all_reduce
    train.all_reduce = distributed.all_reduce = echo
    try:
        got, stats, _ = accumulate(batches, world_size=2)
    finally:
        train.all_reduce = distributed.all_reduce = old
    assert stats.num_targets == 16, f"{stats.num_targets} targets on two ranks of 8"
    near(got, gradient_of_mean(batches), "two ranks with the same 8 targets", 1e-5)


def steps_as_often_as_other_rank():
    # The other rank has 4 micro-batches, with as many targets in all.
    import train
    from training import distributed

    def reduce(values, process, op=torch.distributed.ReduceOp.SUM):
        if op == torch.distributed.ReduceOp.MAX:
            return [max(value, 4) for value in values]
        return [2 * value for value in values]

    forwards, old_forward = [], SumObjective.forward

    def watch(self, batch):
        forwards.append(int((batch["targets"] != -100).sum()))
        return old_forward(self, batch)

    batches, old = batches_of(2, 6), distributed.all_reduce
    train.all_reduce = distributed.all_reduce = reduce
    SumObjective.forward = watch
    try:
        got, stats, _ = accumulate(batches, world_size=2)
    finally:
        train.all_reduce = distributed.all_reduce = old
        SumObjective.forward = old_forward
    assert len(forwards) == 4, (
        f"this rank has 2 micro-batches, the other one 4: {len(forwards)} forward passes here, "
        "must be 4; with FSDP the other rank would wait for ever"
    )
    assert stats.num_targets == 16, f"{stats.num_targets} targets on two ranks of 8"
    near(got, gradient_of_mean(batches), "2 micro-batches here, 4 on the other rank", 1e-5)


# ------------------------------------------------------------------------------------ the order
def sampler(count=1000, batch_size=16, seed=0, **options):
    from training.sampler import LengthGroupedSampler

    keys = np.random.default_rng(5).integers(10, 500, count)
    return LengthGroupedSampler(keys, batch_size, seed, **options), keys


def draws_each_once():
    one, _ = sampler(count=50)
    batches = [one[step] for step in range(4)]
    assert sorted(len(batch) for batch in batches) == [2, 16, 16, 16], "50 samples in batches of 16"
    drawn = sorted(i for batch in batches for i in batch)
    assert drawn == list(range(50)), "an epoch has each sample once"


def draws_from_step_number():
    walked, _ = sampler()
    history = [walked[step] for step in range(150)]  # more than two epochs
    resumed, _ = sampler()
    assert resumed[140] == history[140], "step 140 is another one if the run starts there"
    assert history[0] != history[63], "the second epoch begins as the first one"
    other, _ = sampler(seed=1)
    assert other[0] != history[0], "another seed gives the same order"


def draws_similar_lengths():
    one, keys = sampler()
    waste = [
        len(batch) * keys[batch].max() - keys[batch].sum()
        for batch in map(one.__getitem__, range(62))
    ]
    share = sum(waste) / (sum(waste) + keys.sum())
    assert share < 0.1, f"{share:.0%} padding: a batch must have samples of similar length"


def draws_lengths_in_random_order():
    one, keys = sampler(count=3000)
    means = [keys[one[step]].mean() for step in range(one.per_epoch)]
    trend = abs(np.corrcoef(means, np.arange(len(means)))[0, 1])
    assert trend < 0.4, f"the lengths follow the step (correlation {trend:.2f})"


def draws_by_weight():
    one, _ = sampler(count=1000, sizes=[900, 100], weights=[0.5, 0.5])
    drawn = np.array([i for step in range(one.per_epoch) for i in one[step]])
    assert len(drawn) == 1000, f"an epoch has {len(drawn)} samples, must have 1,000"
    assert (drawn >= 900).sum() == 500, "half of the samples come from the second file"
    counts = np.bincount(drawn[drawn >= 900] - 900, minlength=100)
    assert counts.tolist() == [5] * 100, "each of its 100 samples must come 5 times"


# ------------------------------------------------------------------------------------ resume
def start_training(muon_lr=0.01):
    from training.optimizers import make_optimizers

    recipe = types.SimpleNamespace(lr=0.01, beta2=0.95, weight_decay=0.1, muon_lr=muon_lr)
    objective = SumObjective().train()
    objective.model.vision.requires_grad_(False)
    return objective, make_optimizers(objective, recipe)


def train_steps(objective, optimizers, steps):
    from training.optimizers import set_learning_rate

    for step in steps:
        set_learning_rate(optimizers, 1 - step / 10)
        (batch,) = batches_of(2 + step % 5)
        (objective(batch) / batch["num_targets"]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def saves_what_trains():
    from training.resume import training_state

    objective, optimizers = start_training()
    state = training_state(objective, optimizers)
    want = {f"weight.{name}" for name, p in objective.named_parameters() if p.requires_grad}
    missing, more = sorted(want - set(state)), sorted(set(state) - want)
    assert not missing and not more, f"missing {missing[:3]}, too many {more[:3]}"
    name, parameter = next((n, p) for n, p in objective.named_parameters() if p.requires_grad)
    same = state[f"weight.{name}"].data_ptr() == parameter.data_ptr()
    assert same, "loading fills these tensors: they must be the weights, not copies"


def saves_optimizers():
    from training.resume import training_state

    objective, optimizers = start_training()
    train_steps(objective, optimizers, range(2))
    kinds = {name.split(".")[0] for name in training_state(objective, optimizers)}
    want = {"weight", "exp_avg", "exp_avg_sq", "step", "momentum_buffer"}
    assert kinds == want, f"saved are {sorted(kinds)}, must be {sorted(want)}"


def makes_state_of_one():
    from training.resume import create_optimizer_state

    objective, optimizers = start_training(muon_lr=0.0)
    create_optimizer_state(optimizers)
    kept, trained = len(optimizers[0].state), len(optimizers[0].param_groups[0]["params"])
    assert kept == trained, f"AdamW has a state for {kept} of {trained} parameters"


def makes_state_of_all():
    from training.resume import create_optimizer_state

    objective, optimizers = start_training()
    create_optimizer_state(optimizers)
    for optimizer in optimizers:
        kept, trained = len(optimizer.state), len(optimizer.param_groups[0]["params"])
        name = type(optimizer).__name__
        assert kept == trained, f"{name} has a state for {kept} of {trained} parameters"


def changes_no_weight():
    from training.resume import create_optimizer_state

    objective, optimizers = start_training()
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    create_optimizer_state(optimizers)
    after = list(objective.parameters())
    assert all(map(torch.equal, before, after)), "making room for the state changed the weights"
    assert all(p.grad is None for p in after), "gradients are left behind"


def resumes_bit_for_bit():
    from training.resume import create_optimizer_state, training_state

    objective, optimizers = start_training()
    train_steps(objective, optimizers, range(3))
    state = training_state(objective, optimizers)
    saved = {name: tensor.detach().clone() for name, tensor in state.items()}
    train_steps(objective, optimizers, range(3, 6))

    resumed, new_optimizers = start_training()
    create_optimizer_state(new_optimizers)
    with torch.no_grad():
        for name, tensor in training_state(resumed, new_optimizers).items():
            tensor.copy_(saved[name])
    train_steps(resumed, new_optimizers, range(3, 6))
    for (name, one), two in zip(objective.named_parameters(), resumed.parameters()):
        assert torch.equal(one, two), f"{name} differs from that of the run without a stop"


# ------------------------------------------------------------------------------------ exercises
EXERCISES = [
    Exercise(
        name="schedule",
        title="The learning rate: warm-up and cosine",
        file="training/optimizers.py",
        functions=["lr_multiplier"],
        minutes=15,
        checks=[
            Check(
                1,
                "the peak is 1",
                "Print all multipliers of a run of 10 steps.",
                reaches_peak,
            ),
            Check(
                1,
                "the first step learns already",
                "Steps count from 0. What would a rate of 0 in step 0 be good for?",
                warms_up_from_first_step,
            ),
            Check(
                2,
                "a cosine over what is left",
                "At which step does the cosine begin, and with which angle?",
                falls_as_cosine,
            ),
            Check(
                1,
                "the full rate, then a shorter decay",
                "The decay begins at the end of the warm-up, or later.",
                stays_at_peak,
            ),
            Check(
                1,
                "one step, no warm-up, nothing but warm-up",
                "Look for a division by zero.",
                bears_extremes,
            ),
        ],
        wrong={"08_schedule_a.py": 1, "08_schedule_b.py": 2},
    ),
    Exercise(
        name="loss",
        title="The loss is a sum",
        file="model.py",
        functions=["XLlava.loss"],
        minutes=15,
        checks=[
            Check(
                1,
                "a model that knows nothing",
                "The cross-entropy of one among 64 equal chances is log 64 = 4.16.",
                loss_of_a_guess,
            ),
            Check(
                1,
                "one target",
                "Position t of `targets` is what position t of `ids` must predict: no shift here.",
                loss_of_one_target,
            ),
            Check(
                2,
                "five targets: their sum",
                "Who divides, and by what? Read the docstring.",
                loss_is_a_sum,
            ),
            Check(
                1,
                "no target: zero, and a backward pass",
                "The mean of nothing is NaN. The sum of nothing is 0.",
                loss_without_targets,
            ),
            Check(
                1,
                "at the layout's positions only",
                "hidden has (n, C) then. Which of the targets belong to it?",
                loss_at_positions,
            ),
        ],
        wrong={"08_loss_a.py": 1, "08_loss_b.py": 2},
    ),
    Exercise(
        name="accumulate",
        title="One step from many micro-batches",
        file="train.py",
        functions=["accumulate_gradients"],
        minutes=60,
        checks=[
            Check(
                1,
                "one micro-batch",
                'wrapped(batch) is the sum of the losses, batch["num_targets"] their number.',
                steps_on_one_micro_batch,
            ),
            Check(
                1,
                "three of the same size",
                "backward() adds to .grad. Divide once, at the end.",
                steps_on_equal_micro_batches,
            ),
            Check(
                2,
                "three of different sizes: the mean over targets",
                "Is the mean of (1) and (2, 2, 2) equal to the mean of three means? To 1.75?",
                steps_on_unequal_micro_batches,
            ),
            Check(
                1,
                "no target at all",
                "What is 0 / 0?",
                steps_without_targets,
            ),
            Check(
                2,
                "bf16 for matrix products only",
                "torch.autocast around the forward pass. The weights stay as they are.",
                steps_in_bf16,
            ),
            Check(
                2,
                "two ranks",
                "DDP has divided the gradients by world_size. The count is that of all ranks.",
                steps_on_two_ranks,
            ),
            Check(
                1,
                "a rank with fewer micro-batches",
                "Packed ranks may have 2 and 4. pad_micro_batches adds what is missing.",
                steps_as_often_as_other_rank,
            ),
        ],
        wrong={
            "08_accumulate_a.py": 2,
            "08_accumulate_b.py": 3,
            "08_accumulate_c.py": 5,
            "08_accumulate_d.py": 6,
        },
    ),
    Exercise(
        name="order",
        title="Which samples make up a step",
        file="training/sampler.py",
        functions=["LengthGroupedSampler.draw_epoch"],
        minutes=40,
        checks=[
            Check(
                1,
                "an epoch has each sample once",
                "A permutation, cut into batches. The last one may be short.",
                draws_each_once,
            ),
            Check(
                2,
                "the step number says it all",
                "A random generator that goes on from epoch to epoch has a memory.",
                draws_from_step_number,
            ),
            Check(
                1,
                "similar lengths in a batch",
                "Sort by self.sort_keys within windows of many batches.",
                draws_similar_lengths,
            ),
            Check(
                1,
                "the order of lengths is random",
                "After sorting, all short batches come first. What does the model learn last?",
                draws_lengths_in_random_order,
            ),
            Check(
                1,
                "files with weights",
                "self.quotas and draw_file_share are there.",
                draws_by_weight,
            ),
        ],
        wrong={"08_order_a.py": 1, "08_order_b.py": 2, "08_order_c.py": 3},
    ),
    Exercise(
        name="resume",
        title="What a checkpoint holds",
        file="training/resume.py",
        functions=["training_state", "create_optimizer_state"],
        minutes=40,
        checks=[
            Check(
                1,
                "the weights that train",
                "named_parameters() has the frozen ones, too. parameter.detach() is no copy.",
                saves_what_trains,
            ),
            Check(
                1,
                "room for the state of AdamW",
                "An optimizer makes its state in its first step. A step needs gradients.",
                makes_state_of_one,
            ),
            Check(
                1,
                "room for the state of Muon",
                "optimizers is a list.",
                makes_state_of_all,
            ),
            Check(
                2,
                "making room changes no weight",
                "Weight decay acts without a gradient, too. What does it get multiplied with?",
                changes_no_weight,
            ),
            Check(
                2,
                "the state of the optimizers is saved",
                "optimizer.state maps each parameter to a dict of tensors.",
                saves_optimizers,
            ),
            Check(
                3,
                "three steps, a stop, three steps: the same weights to the bit",
                "What does AdamW know after three steps that a new AdamW does not?",
                resumes_bit_for_bit,
            ),
        ],
        wrong={"08_resume_a.py": 2, "08_resume_b.py": 3, "08_resume_c.py": 4},
    ),
]
