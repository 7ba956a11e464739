"""Training as a user runs it, in small: what each stage trains, what is logged, what is refused."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import (
    ROOT,
    command,
    losses,
    rows,
    run,
    same_weights,
    weights,
    write_captions,
)

import checkpoint
import data
import train
import vision
from model import IGNORE_INDEX, XLlava
from training.distributed import Process
from training.objectives import NextTokenObjective
from training.run_log import RunLog
from training.sampler import MicroBatchDataset

CPU, BF16 = torch.device("cpu"), torch.bfloat16


class NoSignals:
    count = 0


# ------------------------------------------------------------------------------------ what trains
def test_gradients_do_not_depend_on_how_a_batch_is_cut(config, tokenizer, world):
    """The sum of token losses over the global number of targets: written by hand as one mean over
    all targets of all samples."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    samples = [dataset.sample(i) for i in range(8)]  # texts among the images, all lengths
    whole = data.collate(samples, tokenizer.pad_id)
    hidden = model(whole["ids"], whole["pixels"])
    torch.nn.functional.cross_entropy(
        model.decoder.lm_head(hidden).flatten(0, 1),
        whole["targets"].flatten(),
        ignore_index=IGNORE_INDEX,
    ).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for accumulate, ranks in ((1, 1), (4, 1), (2, 2)):
        model.zero_grad()
        num_targets = 0
        for rank in range(ranks):
            for n in range(accumulate):
                part = data.collate(samples[rank::ranks][n::accumulate], tokenizer.pad_id)
                NextTokenObjective(model)(part).backward()
                num_targets += (part["targets"] != IGNORE_INDEX).sum()
        for name, grad in want.items():
            got = dict(model.named_parameters())[name].grad / num_targets
            assert (got - grad).norm() <= 1e-6 * grad.norm() + 1e-12, (accumulate, ranks, name)


@pytest.mark.parametrize(
    "stage, file, trained",
    [
        ("vision", "captions.json", {"vision_tower", "multi_modal_projector", "language_model"}),
        ("text", "text.txt", {"language_model"}),
        ("align", "captions.json", {"multi_modal_projector"}),
        ("instruct", "chats.json", {"multi_modal_projector", "language_model"}),
    ],
)
def test_each_stage_changes_its_own_parts_and_no_other(
    stage, file, trained, start, world, tmp_path
):
    done = run(stage, start, world / file, tmp_path / "out", "--batch-size", 4, "--steps", 3)
    assert done.returncode == 0, done.stderr
    before, after = weights(start), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == trained
    if stage == "vision":  # of the language model the token embeddings alone
        language = {name for name in changed if name.startswith("language_model")}
        assert language == {"language_model.model.embed_tokens.weight"}


def test_two_processes_reach_the_losses_and_weights_of_one(start, world, tmp_path):
    more = ("--batch-size", 4, "--steps", 4, "--lr", 1e-3)
    for n in (1, 2):
        done = run("instruct", start, world / "chats.json", tmp_path / str(n), *more, processes=n)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_two_processes_contrast_the_whole_batch_in_the_vision_stage(start, world, tmp_path):
    """Every image of the global batch is a negative of every phrase, whichever rank holds it; each
    pair of the dictionary counts once."""
    dictionary = tmp_path / "dictionary.txt"
    dictionary.write_text("red = 빨간색\nblue = 파란색\ncat = 고양이 = 猫\n", encoding="utf-8")
    more = ("--batch-size", 4, "--steps", 3, "--dictionary", dictionary)
    for n in (1, 2):
        done = run("vision", start, world / "captions.json", tmp_path / str(n), *more, processes=n)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_lora_trains_adapters_that_are_merged_and_saved_by_themselves(
    train_here, start, tmp_path, config
):
    more = ("--steps", 3, "--lr", 1e-2, "--lora-rank", 2)
    text, code = train_here("instruct", "chats.json", *more)
    assert code == 0
    shape = config.text
    C, F = shape.hidden_size, shape.intermediate_size
    K = shape.num_key_value_heads * shape.head_dim
    # Rank 2 times in + out: q and o, k and v, then gate, up and down; two layers.
    adapters = 2 * 2 * (2 * 2 * C + 2 * (C + K) + 3 * (C + F))
    projector = sum(weight.numel() for weight in XLlava(config).projector.parameters())
    assert f"{adapters + projector:,} of " in text

    before, after = weights(start), weights(tmp_path / "out")
    linears = (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    prefix = "language_model.model.layers"
    names = {f"{prefix}.{n}.{linear}_proj.weight" for n in range(2) for linear in linears}
    names |= {name for name in before if name.startswith("multi_modal_projector")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == names

    saved = torch.load(tmp_path / "out" / "adapters.pt", weights_only=True)
    layer, name = "decoder.layers.1.attn.q_proj", f"{prefix}.1.self_attn.q_proj.weight"
    up, down = saved["adapters"][f"{layer}.up"], saved["adapters"][f"{layer}.down"]
    change = after[name] - before[name]
    assert up.any() and torch.allclose(change, 2 * up @ down, atol=1e-6)
    assert torch.linalg.matrix_rank(change, atol=1e-5) <= 2


def test_beside_adapters_the_embeddings_train_whole_if_they_are_named(train_here, start, tmp_path):
    """So a new vocabulary is learned with LoRA, too."""
    whole = ("embed_tokens", "lm_head")
    names = ("projector", "decoder", *(f"decoder.{name}" for name in whole))
    more = ("--steps", 2, "--lr", 1e-2, "--lora-rank", 2, "--trainable", *names)
    text, code = train_here("instruct", "chats.json", *more)
    assert code == 0, text
    before, after = weights(start), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(any(part in name for name in changed) for part in (*whole, "q_proj"))
    assert not any("layernorm" in name or name.endswith("model.norm.weight") for name in changed)


@pytest.mark.parametrize("bias", [False, True])  # Qwen2's q, k and v have one
def test_a_merged_adapter_computes_what_it_computed_in_training(bias):
    from training.lora import LoRALinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6, bias=bias)
    lora, x = LoRALinear(linear, 2), torch.randn(5, 8)
    assert torch.equal(lora(x), linear(x)), "it starts as the frozen layer"
    torch.nn.init.normal_(lora.up)
    merged = lora.weight + 2 * lora.up @ lora.down
    expected = x @ merged.T + (linear.bias if bias else 0)
    assert torch.allclose(lora(x), expected, atol=1e-5)


def test_the_first_adapter_is_the_first_draw_of_the_seed(start):
    """So what is checked before the weights are read draws nothing."""
    nothing = {"preset": None, "tokenizer": None, "estimate": None}
    args = SimpleNamespace(model=start, trainable=["decoder"], lora_rank=2, **nothing)
    torch.manual_seed(5)
    _, model = train.build_model(args)
    torch.manual_seed(5)
    C = model.config.text.hidden_size
    assert torch.equal(model.decoder.layers[0].attn.q_proj.down, torch.randn(2, C) * C**-0.5)


def test_lora_under_fsdp_is_lora_on_one_process(start, world, tmp_path):
    """The adapters start from the same random weights, and are gathered to be merged. The model
    is in bfloat16, as published ones are, and read by another way in each."""
    model, folder = checkpoint.load_model(start), tmp_path / "model"
    tokenizer = checkpoint.load_tokenizer(start)
    checkpoint.write_model(model.config, model.state_dict().items(), tokenizer, folder, BF16)
    more = ("--batch-size", 4, "--steps", 3, "--lr", 1e-2, "--lora-rank", 2)
    args = ("instruct", folder, world / "chats.json")
    for n, fsdp in ((1, ()), (2, ("--fsdp",))):
        done = run(*args, tmp_path / str(n), *more, *fsdp, processes=n)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    # Three steps of AdamW move a weight by up to 0.03; where its gradient is near 0, sums in
    # another order change a little of that.
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    head = "language_model.lm_head.weight"
    assert torch.equal(two[head], weights(folder)[head].float())
    saved = torch.load(tmp_path / "2" / "adapters.pt", weights_only=True)["adapters"]
    assert saved["decoder.layers.1.mlp.up_proj.up"].shape == (48, 2)


def test_a_models_files_may_be_replaced_once_its_weights_are_copied(start):
    model, process = checkpoint.load_model(start, None), Process(0, 1, CPU, torch.float32)
    mapped = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    train.copy_weights(model, process)
    expected = checkpoint.load_model(start).state_dict()
    for name, weight in model.named_parameters():
        assert weight.data_ptr() != mapped[name] and torch.equal(weight, expected[name])


def test_the_vision_stage_takes_whole_batches_only(train_here):
    for more in (("--micro-batch-size", 1), ("--pack", 99), ("--fsdp",)):
        message = train_here("vision", "captions.json", *more)[1]
        assert "the vision stage contrasts the whole batch" in message


def test_weights_epochs_and_micro_batches_reach_the_sampler(train_here, world, monkeypatch):
    """12 records in batches of 4: one and a half epochs are 4.5 steps, so five."""
    made, real = [], train.MicroBatchDataset

    def observed(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(train, "MicroBatchDataset", observed)
    monkeypatch.setattr(train, "train_loop", lambda *_: False)
    train_here("align", "captions.json", "--epochs", 1.5, "--micro-batch-size", 2)
    data_file = world / "captions.json"
    data_files = f"{data_file}:0.5", f"{data_file}:1.5"
    train_here("align", "captions.json", "--data", *data_files, out="weighted")
    first, weighted = made
    assert first.steps == 5 and first.micro_batch_size == 2 and first.weights is None
    assert weighted.weights == [0.5, 1.5] and weighted.sampler.quotas == [6, 18]


def test_a_signal_in_the_last_step_changes_nothing(train_here, tmp_path, monkeypatch):
    class Late:
        steps = 0

        @property
        def count(self):
            self.steps += 1
            return self.steps == 2

    monkeypatch.setattr(train, "StopSignals", Late)
    assert train_here("align", "captions.json", "--steps", 2)[1] == 0
    assert (tmp_path / "out" / "config.json").exists() and len(rows(tmp_path / "out")) == 2


def test_a_checkpoint_is_saved_after_every_nth_step(train_here, tmp_path):
    more = ("--steps", 5, "--save-every", 2, "--keep-checkpoints", 9)
    assert train_here("align", "captions.json", *more)[1] == 0
    names = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000004"]


def test_a_gradient_is_clipped_to_its_norm_before_the_step(train_here, monkeypatch):
    """One that is smaller stays as it is."""
    norms, step = [], torch.optim.AdamW.step

    def observed(optimizer, *args):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad.double().flatten() for p in weights if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", observed)
    args, out = ("align", "captions.json", "--steps", 2), train_here.tmp_path / "whole"
    assert train_here(*args, "--grad-clip", 1e6, out="whole")[1] == 0
    assert norms == pytest.approx([row["grad_norm"] for row in rows(out)], rel=1e-5)
    norms.clear()
    assert train_here(*args, "--grad-clip", 1e-3, out="clipped")[1] == 0
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def test_packing_checkpointing_and_micro_batches_change_no_loss(train_here, tmp_path):
    ways = {
        "plain": (),
        "packed": ("--pack", 80, "--max-length", 80),
        "micro": ("--micro-batch-size", 1, "--activation-checkpointing"),
    }
    for name, more in ways.items():
        assert train_here("align", "captions.json", "--steps", 1, *more, out=name)[1] == 0
    first = {name: rows(tmp_path / name)[0] for name in ways}
    assert first["packed"]["non_padding_share"] == 1 > first["plain"]["non_padding_share"]
    assert first["micro"]["non_padding_share"] == 1, "a sample alone needs no padding"
    assert first["micro"]["loss"] == pytest.approx(first["plain"]["loss"], rel=1e-6)


def test_bf16_rounds_matrix_products_and_keeps_weights_and_gradients_in_float32(
    config, tokenizer, world
):
    dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    batches = MicroBatchDataset(dataset, 4, 0, pad_id=tokenizer.pad_id)
    loss = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        objective = NextTokenObjective(XLlava(config).init_weights()).train()
        process = Process(0, 1, torch.device("cpu"), dtype)
        _, (loss_sum,) = train.accumulate_gradients(objective, batches[0], process, NoSignals())
        grads = train.gradients(objective)
        loss[dtype] = loss_sum.item()
        assert grads and all(grad.dtype == torch.float32 for grad in grads)
    assert loss[torch.bfloat16] != loss[torch.float32]
    assert loss[torch.bfloat16] == pytest.approx(loss[torch.float32], rel=1e-2)


def test_the_gradients_of_a_step_are_freed_before_the_next_one_begins(train_here, monkeypatch):
    """Else they would be in memory twice."""
    real, before, alive = train.accumulate_gradients, [], []

    def observed(wrapped, *args):
        alive.append(sum(not storage.expired() for storage in before))
        result = real(wrapped, *args)
        before[:] = [StorageWeakRef(g.untyped_storage()) for g in train.gradients(wrapped)]
        return result

    monkeypatch.setattr(train, "accumulate_gradients", observed)
    assert train_here("align", "captions.json", "--steps", 3)[1] == 0
    assert before and alive == [0, 0, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_rounds_each_trained_weight_to_bf16_once(config, tokenizer, world, checkpointing):
    """Whatever the number of micro-batches. The gradients are those of a cast in each of them."""
    dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    batches = MicroBatchDataset(dataset, 4, 0, pad_id=tokenizer.pad_id, micro_batch_size=1)
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    model.decoder.activation_checkpointing = checkpointing
    objective = NextTokenObjective(model).train()

    num_targets = sum((batch["targets"] != IGNORE_INDEX).sum().item() for batch in batches[0])
    for batch in batches[0]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch)
        (loss / num_targets).backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    process = Process(0, 1, torch.device("cpu"), torch.bfloat16)
    shape, casts = model.decoder.layers[0].mlp.up_proj.weight.shape, []

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].shape == shape:
                casts.append(result.dtype)
            return result

    with CountCasts():
        stats, _ = train.accumulate_gradients(objective, batches[0], process, NoSignals())
    grads = train.gradients(objective)
    assert stats.num_targets == num_targets and len(batches[0]) == 4
    assert all(torch.allclose(*pair, rtol=1e-6, atol=0) for pair in zip(grads, want))
    # Up and gate of two layers; in the backward the gradients of each micro-batch come back.
    assert casts.count(torch.bfloat16) == 2 * 2


@pytest.mark.parametrize(
    "stage, file, more",
    [
        ("align", "captions.json", ()),
        ("instruct", "chats.json", ("--lora-rank", 2, "--activation-checkpointing")),
    ],
)
def test_frozen_weights_in_bf16_compute_what_autocast_computes_and_are_saved_exactly(
    train_here, start, tmp_path, monkeypatch, stage, file, more
):
    more = ("--steps", 4, "--lr", 1e-2, "--precision", "bf16", "--save-every", 2, *more)
    real, dtypes = train.copy_weights, []

    def observed(model, *args):
        real(model, *args)
        dtypes.extend(p.dtype for p in model.parameters() if not p.requires_grad and p.dim() == 2)

    monkeypatch.setattr(train, "copy_weights", observed)
    assert train_here(stage, file, *more, "--snapshots", 2)[1] == 0
    out = tmp_path / "out"
    assert dtypes.count(torch.bfloat16) >= 0.8 * len(dtypes), "all but the embeddings"

    # The same run with frozen weights in float32, and the run that goes on from its middle.
    wide = Process(0, 1, CPU, torch.float32)
    monkeypatch.setattr(train, "copy_weights", lambda model, _: real(model, wide))
    assert train_here(stage, file, *more, "--snapshots", 2, out="wide")[1] == 0
    for name in ("", "snapshots/2"):
        assert same_weights(out / name, tmp_path / "wide" / name)
    assert losses(out) == losses(tmp_path / "wide")
    (out / "config.json").unlink()
    monkeypatch.setattr(train, "copy_weights", real)
    assert train_here(stage, file, *more, "--resume")[1] == 0
    assert same_weights(out, tmp_path / "wide")

    before, after = weights(start), weights(out)
    frozen = [name for name in before if name.startswith("vision_tower")]
    frozen += [name for name in before if "lm_head" in name or "embed_tokens" in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)


# ------------------------------------------------------------------------------------ what is said
@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--batch-size", "4", "--estimate", "5", "--precision", "auto"],
            "--batch-size 4: too few for 5 processes",
        ),
        (["--pack", "30"], "--pack 30: must hold the longest sample; --max-length is "),
        (["--pack", "300", "--micro-batch-size", "2"], "--pack replaces --micro-batch-size"),
        (["--dictionary", str(ROOT / "README.md")], "--dictionary: for the vision stage"),
        (["--data", "a.json:0.7", "b.json"], "--data: 1 of 2 files have a weight; all must"),
        (
            ["--pack", "2048", "--records-per-sample", "2"],
            "--pack 2048 puts samples end to end, --records-per-sample 2 puts records side by side",
        ),
        (["--fsdp"], "--fsdp needs torchrun"),
        (["--data", "nowhere.json"], "nowhere.json: no such file"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--model", str(ROOT / "docs")], "docs: not a model folder: it has no"),
        (["--trainable", "projektor"], "the model has no module projektor, but vision, projector"),
        (["--trainable", "decoder.layer.1"], "decoder has no module layer, but norm, embed_tokens"),
        (["--trainable", "projector", "projector.1"], "projector.1: nothing in it trains"),
        (["--device", "mps"], "--device mps: PyTorch finds none here"),
        (["--lora-rank", "2", "--trainable", "projector"], "--lora-rank: needs decoder in"),
        (
            ["--lora-rank", "2", "--trainable", "decoder", "decoder.layers.0"],
            "--lora-rank: adapts the blocks, so no decoder.layers in --trainable decoder",
        ),
    ],
)
def test_a_users_mistake_gets_one_clear_line(run_here, start, world, tmp_path, args, message):
    words = command("instruct", start, world / "chats.json", tmp_path / "out")[1:]
    status, error = run_here(*words, *args)
    assert status in (1, 2) and message in error
    assert len(error.strip().splitlines()) == 1


def test_help_shows_the_recipe_of_the_stage(monkeypatch, capsys):
    for stage, recipe in train.RECIPES.items():
        monkeypatch.setattr("sys.argv", ["train.py", stage, "--help"])
        with pytest.raises(SystemExit) as exit_code:
            train.main()
        text = " ".join(capsys.readouterr().out.split())
        assert exit_code.value.code == 0
        assert f"peak learning rate of AdamW (default: {recipe.lr})" in text
        assert f"(default: {' '.join(recipe.trainable)})" in text


def test_files_can_be_weighted(tmp_path):
    split = train.split_weights
    assert split(["a.json", "b:c.json"]) == (["a.json", "b:c.json"], None)
    assert split(["a.json:0.7", r"C:\b.json:3e-1"]) == (["a.json", r"C:\b.json"], [0.7, 0.3])
    (tmp_path / "odd:1").touch()
    assert split([f"{tmp_path}/odd:1"]) == ([f"{tmp_path}/odd:1"], None)
    for weight in ("0", "-1", "1e999"):
        with pytest.raises(ValueError, match="2 of 2 files have a weight; all must, above 0"):
            split([f"a.json:{weight}", "b.json:1"])


def test_a_sample_left_out_is_counted_and_named(train_here, world, tmp_path):
    write_captions(world, tmp_path)
    args = ("align", tmp_path / "set.json", "--steps", 3)
    text, code = train_here(*args, "--bad-samples", "skip")
    assert code == 0 and "1 bad samples left out" in text
    (line,) = re.findall("left out: .*", text)
    assert re.search(r"set.json: record 3 \(id 'c3'\): .*lost3.png: no such image", line)
    assert "lost3.png: no such image" in train_here(*args, out="strict")[1]


def test_a_step_without_a_usable_sample_has_no_loss(train_here, tmp_path, monkeypatch):
    lines = []
    show = lambda self, step, learning, speed: lines.append(learning)  # noqa: E731
    monkeypatch.setattr(RunLog, "show_progress", show)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}]
    lost = [{"id": i, "image": "lost.png", "conversations": turns} for i in range(3)]
    good = {"id": "good", "conversations": [turns[0] | {"value": "What?"}, turns[1]]}
    (tmp_path / "few.json").write_text(json.dumps([good, *lost]), encoding="utf-8")
    more = "--steps", 4, "--batch-size", 1, "--bad-samples", "skip"
    text, code = train_here("instruct", tmp_path / "few.json", *more)
    found = [row["loss"] for row in rows(tmp_path / "out")]
    (loss,) = [loss for loss in found if loss is not None]
    assert code == 0 and len(found) == 4 and f"loss {loss:.4f} after 4 steps" in text
    assert sum(line.startswith("no targets, lr ") for line in lines) == 3


@pytest.mark.parametrize("part", ["projector.2", "vision.layers"])
def test_a_part_of_projector_or_vit_has_a_gradient_from_text_alone(train_here, tmp_path, part):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "cat"}]
    (tmp_path / "text.json").write_text(
        json.dumps([{"id": 0, "conversations": turns}]), encoding="utf-8"
    )
    more = "--steps", 1, "--batch-size", 1, "--trainable", part
    assert train_here("instruct", tmp_path / "text.json", *more)[1] == 0


@pytest.mark.parametrize("stage", ["align", "vision"])
def test_images_may_lie_in_a_folder_of_their_own(train_here, world, tmp_path, stage):
    file = tmp_path / "elsewhere" / "captions.json"
    file.parent.mkdir()
    shutil.copy(world / "captions.json", file)
    text, code = train_here(stage, file, "--steps", 2, out="lost")
    assert "no such image" in text + str(code)
    assert train_here(stage, file, "--steps", 2, "--images", world)[1] == 0
    assert train_here(stage, "captions.json", "--steps", 2, out="beside")[1] == 0
    here, beside = weights(tmp_path / "out"), weights(tmp_path / "beside")
    assert all(torch.equal(here[name], beside[name]) for name in beside)


@pytest.mark.parametrize("stage", ["align", "vision"])
def test_a_second_run_reads_the_images_that_the_first_one_kept(
    train_here, tmp_path, monkeypatch, stage
):
    cache = tmp_path / "cache"
    assert train_here(stage, "captions.json", "--steps", 2, "--cache", cache)[1] == 0
    monkeypatch.setattr(vision, "load_image", None)  # to decode one would be an error
    words = "--steps", 2, "--cache", cache, "--workers", 0
    assert train_here(stage, "captions.json", *words, out="again")[1] == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "out")

    # A folder that can't be written to is refused before the work.
    _, message = train_here(stage, "captions.json", *words[:3], next(cache.iterdir()), out="third")
    assert message.endswith("is a file, must be a folder")


def test_bad_samples_can_be_skipped_in_the_vision_stage(train_here, world, tmp_path):
    write_captions(world, tmp_path, empty=5)
    args = ("vision", tmp_path / "set.json", "--steps", 3)
    assert "no conversations" in train_here(*args)[1]
    text, code = train_here(*args, "--bad-samples", "skip", out="skip")
    assert code == 0 and "lost3.png: no such image" in text and "2 bad samples left out" in text


def test_two_processes_count_each_bad_sample_once(start, world, tmp_path):
    write_captions(world, tmp_path, lost=(1, 4, 6, 9), empty=5)
    more = ("--batch-size", 4, "--steps", 3, "--bad-samples", "skip")
    done = run("vision", start, tmp_path / "set.json", tmp_path / "out", *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out: ") == 5 and "5 bad samples left out" in done.stderr


def test_a_step_that_is_not_finite_is_skipped_and_many_of_them_end_the_run_with_their_samples(
    train_here, tmp_path, monkeypatch
):
    real, calls = train.accumulate_gradients, []

    def spoilt(wrapped, *args):
        result = real(wrapped, *args)
        calls.append(1)
        if len(calls) == 2:
            grads = [weight.grad for weight in wrapped.parameters() if weight.grad is not None]
            grads[0][0] = float("nan")
        return result

    monkeypatch.setattr(train, "accumulate_gradients", spoilt)
    text, code = train_here("instruct", "chats.json", "--steps", 4)
    assert code == 0
    assert "step 2: gradient not finite, the step is skipped (1 in a row). Samples: " in text
    assert text.count("chats.json: record") == 4
    assert [row["skipped"] for row in rows(tmp_path / "out")] == [0, 1, 1, 1]
    assert rows(tmp_path / "out")[1]["loss"] is None
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "out").values())

    # A run whose only step is skipped has trained nothing.
    calls[:] = [1]
    code = train_here("instruct", "chats.json", "--steps", 1, out="nothing")[1]
    assert "no step had a finite loss: nothing was trained, no model is written" in code
    assert not (tmp_path / "nothing" / "config.json").exists()

    monkeypatch.setattr(train, "lr_multiplier", lambda *_: 1e30)
    more = ("--steps", 9, "--lr", 1, "--max-skips", 3)
    text, code = train_here("instruct", "chats.json", *more, out="wild")
    assert "3 steps in a row without a finite loss and gradient" in code
    assert "loss not finite" in text and len(rows(tmp_path / "wild")) < 9


def test_the_log_has_a_row_per_step_with_the_learning_rate_of_that_step(train_here, tmp_path):
    more = ("--steps", 5, "--lr", 1e-3, "--warmup-ratio", 0.4)
    assert train_here("align", "captions.json", *more)[1] == 0
    log = rows(tmp_path / "out")
    keys = (
        "step loss lr grad_norm tokens targets non_padding_share seconds data_wait memory_gib mfu"
    )
    assert [list(row) for row in log] == [[*keys.split(), "skipped"]] * 5
    want = [1e-3 * rate for rate in (0.5, 1, 1, 0.75, 0.25)]
    assert [row["lr"] for row in log] == pytest.approx(want)
    assert all(row["targets"] <= row["tokens"] and row["mfu"] is None for row in log)


def test_a_finished_run_is_not_begun_again_over_itself(train_here, tmp_path):
    args = ("align", "captions.json", "--steps", 1, "--save-every", 0)
    assert train_here(*args)[1] == 0
    log = (tmp_path / "out" / "log.jsonl").read_text("utf-8")
    assert "out: there is a run already" in train_here(*args, "--lr", 1)[1]
    assert (tmp_path / "out" / "log.jsonl").read_text("utf-8") == log


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(train_here, tokenizer, tmp_path):
    from tokenizer import NORMAL, Piece, Tokenizer

    larger = tmp_path / "larger.model"
    Tokenizer([*tokenizer.pieces, Piece("▁more", -1e3, NORMAL)], tokenizer.fields).save(larger)
    code = train_here("text", "text.txt", "--steps", 1, "--tokenizer", larger)[1]
    assert f"larger.model: {tokenizer.vocab_size + 1:,} pieces" in code
    assert f"the model has {tokenizer.vocab_size:,} embeddings" in code


def test_each_start_notes_its_command_and_versions(train_here, tmp_path):
    assert train_here("align", "captions.json", "--steps", 1)[1] == 0
    (row,) = map(json.loads, (tmp_path / "out" / "runs.jsonl").read_text("utf-8").splitlines())
    # The wheel of a CUDA machine calls itself 2.13.0+cu130, its package 2.13.0 or the same.
    version, build = row["packages"]["torch"], torch.__version__
    assert version.partition("+")[0] == build.partition("+")[0]
    assert "--steps 1" in row["command"] and row["settings"]["lr"] == 1e-3


def test_a_machine_without_git_trains(train_here, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert train_here("align", "captions.json", "--steps", 1)[1] == 0
    assert json.loads((tmp_path / "out" / "runs.jsonl").read_text("utf-8"))["commit"] is None


def test_a_machine_without_the_resource_module_trains(train_here, tmp_path, monkeypatch):
    """Windows has none: the memory is not known there."""
    monkeypatch.setattr("training.run_log.resource", None)
    assert train_here("align", "captions.json", "--steps", 1)[1] == 0
    assert rows(tmp_path / "out")[0]["memory_gib"] is None


# ------------------------------------------------------------------------------------ bad samples
@pytest.mark.parametrize("stage", ["vision", "align", "instruct"])
@pytest.mark.parametrize("fields", [{"image": "gone.png"}, {"image": "data:,"}, {"kind": 3}])
def test_where_no_sample_can_be_used_there_is_no_model(train_here, world, tmp_path, stage, fields):
    records = json.loads((world / "captions.json").read_text(encoding="utf-8"))
    file = tmp_path / "set.json"
    file.write_text(json.dumps([each | fields for each in records]), encoding="utf-8")
    text, code = train_here(stage, file, "--steps", "3", "--bad-samples", "skip")
    assert "nothing was trained" in str(code) or "nothing to train on" in str(code)
    assert f"{file}: record " in text + code and "(id 'c" in text + code
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_limit_above_the_models_is_said_and_first_turns_of_the_model_are_counted(
    train_here, world, tmp_path
):
    records = json.loads((world / "captions.json").read_text(encoding="utf-8"))
    for record in records:
        record["image"] = str(world / record["image"])
    records[3]["conversations"].insert(0, {"from": "gpt", "value": "Welcome!"})
    records[5]["conversations"][1]["value"] = "a cat " * 200
    file = tmp_path / "set.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    options = ["--bad-samples", "skip", "--max-length", "1000"]
    text, code = train_here("align", file, *options)
    assert code == 0, code
    assert "--max-length 1000: the model reads 256, so 256" in text
    assert "record 5 (id 'c5'): " in text and "longer than the model reads" in text
    assert "1 bad samples left out, 1 first turns of the model left out" in text


def test_documents_are_cut_where_the_model_stops_reading(train_here, tmp_path):
    (tmp_path / "text.txt").write_text("a red cat " * 300, encoding="utf-8")
    text, code = train_here("text", tmp_path / "text.txt", "--steps", "1", "--batch-size", "1")
    assert code == 0, code
    (row,) = rows(tmp_path / "out")
    assert row["tokens"] <= 255
