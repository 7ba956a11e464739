"""Several processes: the same gradients however a batch is distributed, sharded state, and going on
with another number of processes. On gloo, two CPU processes.

Under torchrun this file is what those processes run: they compute gradients and print how far they
are from a float64 reference.
"""

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training_helpers import (  # noqa: E402
    ENVIRONMENT,
    command,
    losses,
    rows,
    run,
    weights,
)

import checkpoint  # noqa: E402
import data  # noqa: E402
from model import IGNORE_INDEX  # noqa: E402
from train import RECIPES, accumulate_gradients  # noqa: E402
from training.distributed import (  # noqa: E402
    Process,
    all_reduce,
    close_distributed,
    full_tensor,
    init_distributed,
    wrap_distributed,
)
from training.lora import set_trainable  # noqa: E402
from training.objectives import NextTokenObjective  # noqa: E402
from training.optimizers import Muon  # noqa: E402
from training.sampler import LengthGroupedSampler, MicroBatchDataset  # noqa: E402


# ------------------------------------------------------------------------------------ gradients
class Way(NamedTuple):
    """One way of computing a global batch of 8."""

    name: str
    alone: bool = False  # each process computes the whole batch
    micro_batch_size: int = 0
    token_budget: int = 0
    fsdp: bool = False
    activation_checkpointing: bool = False


WAYS = (
    Way("one process, 8", alone=True),
    Way("one process, 4 × 2", alone=True, micro_batch_size=2),
    Way("DDP, 2 × 4"),
    Way("DDP, 2 × 2 × 2", micro_batch_size=2),
    Way("FSDP2", fsdp=True),
    Way("FSDP2, 2 × 2 × 2", micro_batch_size=2, fsdp=True, activation_checkpointing=True),
    Way("DDP, packed", token_budget=100),
    Way("FSDP2, packed", token_budget=100, fsdp=True),
)


class NoSignals:
    count = 1  # as if each process had received one


def reference(folder, dataset, pad_id, indices):
    """Loss and gradients of the mean over all targets, in float64, from PyTorch's cross-entropy
    over one padded batch."""
    model = checkpoint.load_model(folder).double()
    set_trainable(model, RECIPES["instruct"].trainable)
    batch = data.collate([dataset.sample(i) for i in indices], pad_id)
    hidden = model(batch["ids"], batch.get("pixels"))
    loss = torch.nn.functional.cross_entropy(
        model.decoder.lm_head(hidden).flatten(0, 1),
        batch["targets"].flatten(),
        ignore_index=IGNORE_INDEX,
    )
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    """{name: whole gradient}."""
    return {n: full_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def distance(got, want):
    """The largest relative distance of any tensor's gradient; one that the reference lacks must be
    zero."""
    assert want.keys() <= got.keys()
    assert not any(got[name].any() for name in got.keys() - want.keys())
    return max(
        ((got[name] - grad).norm() / grad.norm()).item()
        for name, grad in want.items()
        if grad.any()
    )


def compute_gradients(way, folder, dataset, tokenizer, process, step):
    """(model, mean loss, StepStats, indices of the samples) after the backward of a step."""
    if way.alone:
        process = Process(0, 1, process.device, process.dtype)
    batches = MicroBatchDataset(
        dataset,
        8,
        2,
        pad_id=tokenizer.pad_id,
        micro_batch_size=way.micro_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        token_budget=way.token_budget,
    )
    # The same samples for padded and packed batches, in an order in which packing needs four
    # micro-batches on rank 0 and two on rank 1.
    batches.sampler = LengthGroupedSampler([0] * len(dataset), 8, 2)
    if way.token_budget and step == 0:
        assert len(batches[0]) == (4, 2)[process.rank]
    model = checkpoint.load_model(folder)
    set_trainable(model, RECIPES["instruct"].trainable)
    model.always_encode = way.fsdp
    model.decoder.activation_checkpointing = way.activation_checkpointing
    wrapped = wrap_distributed(NextTokenObjective(model).train(), process, way.fsdp)
    stats, losses = accumulate_gradients(wrapped, batches[step], process, NoSignals())
    (loss_sum,) = all_reduce([sum(losses).item()], process)

    assert stats.stop_requests == process.world_size
    frozen = [p for p in model.parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen, "frozen modules have no gradients"
    return model, loss_sum / stats.num_targets, stats, batches.sampler[step]


def check_sharded_muon(model):
    """Muon on sharded matrices moves them as on whole ones."""
    sharded = [p for p in model.parameters() if p.grad is not None and p.dim() == 2]
    whole = [torch.nn.Parameter(full_tensor(p).clone()) for p in sharded]
    for ours, theirs in zip(sharded, whole):
        theirs.grad = full_tensor(ours.grad)
    Muon(sharded, lr=0.01).step()
    Muon(whole, lr=0.01).step()
    assert all(torch.equal(full_tensor(ours), theirs) for ours, theirs in zip(sharded, whole))


def compare_ways(folder, file):
    """What each of two processes does. Prints {way: [distance of the loss from float64, of the
    gradients from the first way's, and from float64's]}."""
    process = init_distributed("cpu", "fp32")
    tokenizer = checkpoint.load_tokenizer(folder)
    dataset = data.ConversationDataset([file], tokenizer, checkpoint.load_config(folder), 256)
    result, first, exact = {}, {}, {}
    for way in WAYS:
        for step in (0, 1):  # eight samples, and the one that is left
            model, found, stats, indices = compute_gradients(
                way, folder, dataset, tokenizer, process, step
            )
            if step not in exact:
                exact[step] = reference(folder, dataset, tokenizer.pad_id, indices)
            loss, want = exact[step]
            got = gradients(model)
            first.setdefault(step, got)
            distances = [
                abs(found - loss) / loss,
                distance(got, first[step]),
                distance(got, want),
            ]
            before = result.get(way.name, distances)
            result[way.name] = [max(pair) for pair in zip(distances, before)]
            check_counts(stats, [dataset.sample(i) for i in indices])
            if way.name == "FSDP2":
                check_sharded_muon(model)
    if process.rank == 0:
        print(json.dumps(result))
    close_distributed()


def check_counts(stats, samples):
    """The sums of a step, each sample once."""
    assert stats.num_targets == sum(sum(sample.loss_mask) for sample in samples)
    assert stats.num_tokens == sum(len(sample.ids) - 1 for sample in samples)
    assert stats.num_images == sum(len(sample.pixels) for sample in samples)
    assert stats.attention_pairs == sum((len(sample.ids) - 1) ** 2 for sample in samples)
    assert stats.padded_tokens >= stats.num_tokens


def test_gradients_do_not_depend_on_processes_micro_batches_sharding_or_packing(
    start, world, tmp_path
):
    """Mixed lengths, texts among images, a last batch of one sample (so that a rank has none),
    packed rows of which one rank needs more than the other."""
    records = json.loads((world / "chats.json").read_text("utf-8"))[:9]
    for record in records:
        with contextlib.suppress(KeyError):
            record["image"] = str(world / record["image"])
    (tmp_path / "nine.json").write_text(json.dumps(records), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, start, tmp_path / "nine.json"],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result) == len(WAYS)
    for way, (loss, from_one, from_exact) in result.items():
        assert loss < 1e-6 and from_one < 1e-6 and from_exact < 5e-6, (way, result[way])


def test_two_nodes_of_one_process_each_train_as_one_process(start, world, tmp_path):
    """A launcher per node, as on two machines; here on one, over its loopback interface."""
    args = ("instruct", start, world / "chats.json")
    more = ("--batch-size", 4, "--steps", 3, "--lr", 1e-3)
    done = run(*args, tmp_path / "one", *more)
    assert done.returncode == 0, done.stderr

    for name, option in (("ddp", ()), ("fsdp", ("--fsdp",))):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = command(*args, tmp_path / name, *more, *option)[1:]
        nodes = []
        for node in range(2):
            torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
            torchrun += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
            words = [sys.executable, *torchrun, *program]
            nodes.append(subprocess.Popen(words, stderr=subprocess.PIPE, env=ENVIRONMENT))
        errors = [node.communicate()[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], errors

        (start_row,) = (tmp_path / name / "runs.jsonl").read_text("utf-8").splitlines()
        assert json.loads(start_row)["world_size"] == 2
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        one, two = weights(tmp_path / "one"), weights(tmp_path / name)
        assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


# ------------------------------------------------------------------------------------ resuming
def test_a_sharded_run_goes_on_with_another_number_of_processes(start, world, tmp_path):
    """16 samples, 4 a step: 2 processes with FSDP2 for 5 steps, then 3 with DDP, of which one has
    two samples; against one process all the way."""
    args = ("instruct", start, world / "chats.json")
    more = ("--batch-size", 4, "--steps", 8, "--lr", 1e-3)
    whole, out = tmp_path / "whole", tmp_path / "cut"
    done = run(*args, whole, *more)
    assert done.returncode == 0, done.stderr
    first = run(*args, out, *more, "--fsdp", "--save-every", 5, processes=2)
    assert first.returncode == 0, first.stderr
    sharded = weights(out)

    (out / "config.json").unlink()  # as if it had been stopped after step 5
    second = run(*args, out, *more, "--resume", processes=3)
    assert second.returncode == 0 and "from step 5" in second.stderr, second.stderr
    assert [row["step"] for row in rows(out)] == list(range(1, 9)), "every step once"
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    one, two = weights(whole), weights(out)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5)
        assert torch.allclose(one[name], sharded[name], atol=1e-5)


if __name__ == "__main__":
    compare_ways(sys.argv[1], sys.argv[2])
