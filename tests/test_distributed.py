"""Several processes: the same gradients however a batch is spread, sharded state, changes of their number. On gloo, two CPU processes.

Run under torchrun, the file is what those processes do: they compute gradients and print how far they are from a float64 reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from model import IGNORE_INDEX, XLlava  # noqa: E402

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(*args, processes=2):
    return subprocess.run(
        [*(TORCHRUN if processes == 2 else [sys.executable]), *map(str, args)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory, config, tokenizer_file):
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(0)
    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, folder)
    return folder


def reference(model, samples, pad_id, chosen):
    """Loss and gradients of the mean over all target tokens, in float64, from PyTorch's cross-entropy over one padded batch."""
    whole = data.collate([samples.sample(i) for i in chosen], pad_id)
    hidden = model(whole["ids"], whole.get("pixels"))
    loss = torch.nn.functional.cross_entropy(
        model.decoder.lm_head(hidden).flatten(0, 1),
        whole["targets"].flatten(),
        ignore_index=IGNORE_INDEX,
    )
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def far(got, want):
    """The largest relative distance of any tensor's gradient; one that the reference has not must be zero."""
    assert want.keys() <= got.keys() and not any(
        got[name].any() for name in got.keys() - want.keys()
    )
    return max(
        ((got[name] - grad).norm() / grad.norm()).item()
        for name, grad in want.items()
        if grad.any()
    )


def spread_out(folder, file):
    """What each of two processes does: a global batch of 8, in the ways that train.py knows.
    Prints {way: [distance of the loss from float64, of the gradients from the first way's, and from float64's]}."""
    rank, world, device = train.start_processes()
    tokenizer = checkpoint.load_tokenizer(folder)
    samples = data.ConversationDataset([file], tokenizer, checkpoint.load_config(folder), 256)
    recipe, result, first = train.RECIPES["instruct"], {}, {}
    for way, micro, budget, shard, only in [
        ("one process, 8", 0, 0, False, True),
        ("one process, 4 × 2", 2, 0, False, True),
        ("DDP, 2 × 4", 0, 0, False, False),
        ("DDP, 2 × 2 × 2", 2, 0, False, False),
        ("FSDP2", 0, 0, True, False),
        ("FSDP2, recomputing, 2 × 2 × 2", 2, 0, True, False),
        ("DDP, packed", 0, 60, False, False),
        ("FSDP2, packed", 0, 60, True, False),
    ]:
        ours, of = (0, 1) if only else (rank, world)
        batches = sampler.MicroBatchDataset(
            samples,
            8,
            seed=5,
            pad_id=tokenizer.pad_id,
            micro=micro,
            rank=ours,
            world=of,
            budget=budget,
        )
        batches.plan = sampler.LengthGroupedSampler(
            samples.lengths, 8, 5
        )  # packed, the order is another: here the same samples
        for step in (0, 1):  # eight samples, and the one that is left
            model = checkpoint.load_model(folder)
            train.choose_parts(model, recipe, 0)
            exact = checkpoint.load_model(folder).double()
            train.choose_parts(exact, recipe, 0)
            loss, want = reference(exact, samples, tokenizer.pad_id, batches.plan[step])
            model.always_encode, model.decoder.activation_checkpointing = (
                shard,
                "recomputing" in way,
            )
            learner = train.NextTokenObjective(model).train()
            engine = learner if only else train.spread(learner, device, torch.float32, shard)
            params = [p for p in learner.parameters() if p.requires_grad]
            sums, _ = train.backward(engine, params, batches[step], device, torch.float32, of)
            frozen = [p for p in learner.parameters() if not p.requires_grad and p.grad is not None]
            assert not frozen, "frozen modules cost no gradients"
            got = {
                n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            distance = [
                abs(sums[0] / sums[1] - loss) / loss,
                far(got, first.setdefault(step, got)),
                far(got, want),
            ]
            result[way] = [max(a, b) for a, b in zip(distance, result.get(way, distance))]
            if way == "FSDP2":  # Muon on sharded matrices and on whole ones
                whole = [torch.nn.Parameter(p.full_tensor()) for p in params]
                for p, q in zip(params, whole):
                    q.grad = p.grad.full_tensor()
                for muon in (
                    train.Muon([p for p in params if p.dim() == 2], lr=0.01),
                    train.Muon([p for p in whole if p.dim() == 2], lr=0.01),
                ):
                    muon.step()
                assert all(torch.equal(p.full_tensor(), q) for p, q in zip(params, whole))
    if rank == 0:
        print(json.dumps(result))
    train.dist.barrier()
    train.dist.destroy_process_group()


def test_gradients_do_not_depend_on_processes_micro_batches_sharding_or_packing(
    start, world, tmp_path
):
    """Mixed lengths, text-only samples among pictures, a last batch of one sample (so that a process has none), packed rows of which one process needs more than the other."""
    records = json.loads((world / "chats.json").read_text())[:9]
    for record in records:
        if "image" in record:
            record["image"] = str(world / record["image"])
    (tmp_path / "nine.json").write_text(json.dumps(records))
    done = launch(__file__, start, tmp_path / "nine.json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result) == 8
    for way, (loss, from_one, from_exact) in result.items():
        assert loss < 1e-6 and from_one < 1e-6 and from_exact < 5e-6, (
            way,
            loss,
            from_one,
            from_exact,
        )


def command(start, world, out, *more):
    return (
        ROOT / "train.py",
        "instruct",
        "--model",
        start,
        "--data",
        world / "chats.json",
        "-o",
        out,
        "--precision",
        "fp32",
        "--batch",
        4,
        "--steps",
        8,
        "--lr",
        1e-3,
        *more,
    )


def test_a_sharded_run_goes_on_with_another_number_of_processes(start, world, tmp_path):
    """16 samples, 4 a step: 2 processes with sharding for 5 steps, then one without; against one process all the way."""
    whole = launch(*command(start, world, tmp_path / "whole"), processes=1)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "cut"
    first = launch(*command(start, world, out, "--shard", "--save-every", 5))
    assert first.returncode == 0, first.stderr
    sharded = checkpoint.load_safetensors(out / "model.safetensors")
    (out / "config.json").unlink()  # as if it had been stopped after step 5
    second = launch(*command(start, world, out, "--resume"), processes=1)
    assert second.returncode == 0 and "from step 5" in second.stderr, second.stderr
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    want = [
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == list(range(1, 9)), "the log has every step once"
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in want], rel=1e-5)
    one, two = (
        checkpoint.load_safetensors(tmp_path / "whole" / "model.safetensors"),
        checkpoint.load_safetensors(out / "model.safetensors"),
    )
    assert all(
        torch.allclose(one[n], two[n], atol=1e-5) and torch.allclose(one[n], sharded[n], atol=1e-5)
        for n in one
    )


if __name__ == "__main__":
    spread_out(sys.argv[1], sys.argv[2])
