"""CUDA graphs: more padding changes no loss and no gradient; and, on a GPU, a run that replays its
steps is the run that launches them kernel by kernel."""

import json

import pytest
import torch
from training_helpers import losses, run, write_random_model

from data import ConversationDataset
from model import XLlava
from training.graphs import pad_phrases
from training.objectives import NextTokenObjective, PhraseContrastObjective
from training.phrases import PhraseDataset
from training.sampler import MicroBatchDataset
from training.texts import TextDataset


@pytest.fixture
def datasets(world, tokenizer, config, tmp_path):
    """Each kind of batch. In "side by side" an image has several records, of several lengths."""
    records = json.loads((world / "chats.json").read_text(encoding="utf-8"))
    for record in list(records):
        turns = [turn | {"value": turn["value"] + " red" * 9} for turn in record["conversations"]]
        records += [record, record | {"conversations": turns}]
    many = world / "many.json"
    many.write_text(json.dumps(records), encoding="utf-8")
    words = tmp_path / "words.txt"
    words.write_text("cat = 고양이 = 猫\nred = 빨간색\nblue = 파란색 = 蓝色\n", encoding="utf-8")
    return {
        "plain": ConversationDataset([world / "chats.json"], tokenizer, config, 256),
        "side by side": ConversationDataset([many], tokenizer, config, 256, 3),
        "text": TextDataset([world / "text.txt"], tokenizer, 64, tmp_path / "cache"),
        "vision": PhraseDataset([world / "captions.json"], tokenizer, config, words),
    }


@pytest.mark.parametrize("kind", ["plain", "side by side", "text", "vision"])
def test_rounder_shapes_change_neither_loss_nor_gradients(kind, datasets, tokenizer, config):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    objective = PhraseContrastObjective if kind == "vision" else NextTokenObjective
    objective, pad = objective(model).double().train(), {"pad_id": tokenizer.pad_id}
    exact = MicroBatchDataset(datasets[kind], 6, 0, **pad)
    rounded = MicroBatchDataset(datasets[kind], 6, 0, **pad, few_shapes=True)
    # The phrases are compared in fp32.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "vision" else {"rtol": 1e-9, "atol": 1e-12}
    for step in range(3):
        found = []
        for batches in (exact, rounded):
            objective.zero_grad()
            loss = objective(batches[step][0])
            loss.backward()
            found.append([loss, *(p.grad for p in objective.parameters() if p.grad is not None)])
        assert loss > 0
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_sizes_are_rounded_up(datasets, tokenizer):
    options = {"pad_id": tokenizer.pad_id, "few_shapes": True}
    batches = MicroBatchDataset(datasets["side by side"], 6, 0, **options)
    for batch in [batch for n in range(len(batches)) for batch in batches[n]]:
        layout, T = batch["layout"], batch["ids"].shape[1]
        is_shared = layout.split_index is not None
        assert T % (512 if is_shared else 32) == 0 and len(layout.loss_positions) % 512 == 0
        assert batch["padded_tokens"] == batch["ids"].numel() == batch["targets"].numel()
        assert not is_shared or all(len(own) % 16 == 0 for own, _ in layout.split_index[1])
    phrases = MicroBatchDataset(datasets["vision"], 6, 0, **options)[0][0]
    assert len(phrases["ids"]) % 512 == 0 and len(phrases["is_known"]) % 64 == 0
    assert len(phrases["offsets"]) > phrases["num_targets"], "a phrase that takes the padding"
    assert len(phrases["word_ids"]) % 512 == 0 and phrases["word_known"].shape == (64, 64)
    # There is one for the padding even if the phrases come in a round number.
    batch = {"ids": torch.arange(64), "offsets": torch.arange(64)}
    assert pad_phrases(batch, "ids", "offsets")["offsets"].tolist() == [*range(64), *[64] * 64]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage,file", [("instruct", "many.json"), ("vision", "captions.json")])
def test_replayed_steps_train_as_launched_ones(
    stage, file, datasets, config, tokenizer_file, world, tmp_path
):
    start = write_random_model(config, tokenizer_file, tmp_path / "start")
    more = "--batch-size 6 --steps 30 --lr 1e-3 --muon-lr 1e-2".split()
    more += ["--records-per-sample", "3"] if stage == "instruct" else []
    for choice in ("auto", "off"):
        out = tmp_path / choice
        done = run(stage, start, world / file, out, *more, "--cuda-graphs", choice)
        assert done.returncode == 0, done.stderr
    # Sums of atomic additions differ in the last bits.
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "off"), rel=1e-2)
