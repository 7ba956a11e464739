"""Model folders: what is written is read back and opens in transformers; what is not whole is
refused in one line."""

import dataclasses
import json
import os
import weakref

import pytest
import torch
from conftest import LINES, save_model

import checkpoint
import tokenizer as tokenizer_module
from checkpoint.safetensors import save_safetensors
from model import XLlava
from vision import normalise


def read_all(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same_weights(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_saved_model_comes_back_to_the_bit(saved_model, config):
    model, path = saved_model
    again = checkpoint.load_model(path)
    assert again.config == config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_tied_head_is_written_once_and_stays_tied(config, tokenizer_file, tmp_path):
    text = dataclasses.replace(config.text, tie_word_embeddings=True)
    model = XLlava(dataclasses.replace(config, text=text)).init_weights()
    save_model(model, tokenizer_file, tmp_path)
    names = checkpoint.load_safetensors(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "lm_head" in name]
    again = checkpoint.load_model(tmp_path)
    assert again.decoder.lm_head.weight is again.decoder.embed_tokens.weight
    assert same_weights(model, again)


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_weights_are_rounded_to_the_type_asked_for(saved_model, tokenizer_file, dtype, name):
    model, path = saved_model
    save_model(model, tokenizer_file, path, dtype=dtype)
    assert json.loads((path / "config.json").read_text(encoding="utf-8"))["dtype"] == name
    stored = checkpoint.load_safetensors(path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    again = checkpoint.load_model(path)
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert b.dtype == torch.float32 and torch.equal(a.to(dtype).float(), b), key


def test_saving_over_a_model_in_its_own_folder_keeps_its_other_files(saved_model):
    model, path = saved_model
    (path / "log.jsonl").write_text("kept", encoding="utf-8")
    model.decoder.norm.weight.data += 1
    save_model(model, path / "tokenizer.model", path)
    again = checkpoint.load_model(path)
    assert torch.equal(again.decoder.norm.weight, model.decoder.norm.weight)
    assert (path / "log.jsonl").read_text(encoding="utf-8") == "kept"


def test_a_model_that_was_being_written_is_no_model(saved_model):
    _, path = saved_model
    (path / "config.json").unlink()  # it goes first and comes last
    with pytest.raises(ValueError, match="it has no config.json"):
        checkpoint.load_model(path)


def test_missing_unknown_and_misshaped_tensors_are_listed(saved_model):
    _, path = saved_model
    mapped = checkpoint.load_safetensors(path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    del tensors["language_model.model.norm.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    save_safetensors(specs, tensors.items(), path)
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path)
    for part in (
        "left over surprise",
        "missing language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias is [3], must be [32]",
    ):
        assert part in str(error.value)


def test_transformers_opens_the_folder_and_computes_the_same(saved_model, config):
    transformers = pytest.importorskip("transformers")
    model, path = saved_model
    kind = transformers.LlavaForConditionalGeneration
    theirs = kind.from_pretrained(path, attn_implementation="eager").eval()
    image = [config.image_token_id] * config.vision.num_patches
    ids = torch.tensor([[1, 20, *image, 21, 22, 23]])
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=normalise(pixels)).logits
        got = model.logits(model(ids, pixels))
    assert (got - want).norm() / want.norm() < 1e-5
    written = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert written["image_token_index"] == config.image_token_id


# ------------------------------------------------------------------------------------ shards
def test_shards_are_cut_at_the_size_asked_for_and_read_by_transformers(
    saved_model, tokenizer_file, tmp_path, monkeypatch
):
    model, _ = saved_model
    folder = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors, "SHARD_SIZE", 20_000)
        save_model(model, tokenizer_file, folder)
    files = sorted(folder.glob("*.safetensors"))
    index = checkpoint.read_json(folder / "model.safetensors.index.json")
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        assert file.stat().st_size < 24_000 or len(checkpoint.load_safetensors(file)) == 1
    assert same_weights(model, checkpoint.load_model(folder))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())

    # One file now: no shard of the old kind is left behind.
    save_model(model, tokenizer_file, folder)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]

    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 20_000)
    save_model(model, tokenizer_file, folder)
    files[1].unlink()
    with pytest.raises(
        ValueError, match=f"1 of 8 files are missing, copy them there: {files[1].name}$"
    ):
        checkpoint.load_model(folder)

    transformers = pytest.importorskip("transformers")
    save_model(model, tokenizer_file, folder)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, model.decoder.lm_head.weight)


def test_a_gathered_model_is_written_one_tensor_at_a_time_in_any_order(
    saved_model, tokenizer_file, tmp_path, monkeypatch
):
    model, _ = saved_model
    state, alive, most = model.state_dict(), set(), 0

    def gathered():
        nonlocal most
        for name in reversed(list(state)):
            tensor = state[name].clone().double()  # as a gather makes it: new memory
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    folder = tmp_path / "g"
    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 20_000)
    checkpoint.write_model(model.config, gathered(), tokenizer_file, folder)
    assert most <= 2
    assert same_weights(model, checkpoint.load_model(folder))


# ------------------------------------------------------------------------------------ failures
def test_a_stream_that_breaks_off_leaves_the_old_model_whole(saved_model, tokenizer_file):
    model, path = saved_model
    state, before = dict(model.state_dict()), read_all(path)
    cut = {name: tensor + 1 for name, tensor in list(state.items())[:-1]}
    misshaped = {**state, "decoder.norm.weight": torch.zeros(5)}
    doubled = [*state.items(), *state.items()]
    for broken, reason in (
        (cut.items(), "missing: language_model.lm_head.weight"),
        (misshaped.items(), r"norm.weight \[5\]: it must be \[32\]"),
        (doubled, "it was saved before"),
    ):
        with pytest.raises(ValueError, match=reason):
            checkpoint.write_model(model.config, broken, tokenizer_file, path)
        assert read_all(path) == before


def test_a_save_that_dies_between_two_renames_leaves_no_folder_that_looks_whole(
    saved_model, tokenizer_file, monkeypatch
):
    model, path = saved_model
    rename, done = os.replace, []

    def dies(source, target):
        if done:
            raise OSError("the power went")
        done.append(rename(source, target))

    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 20_000)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="the power went"):
        save_model(model, tokenizer_file, path)
    with pytest.raises(ValueError, match="it has no config.json"):
        checkpoint.load_model(path)
    assert not list(path.glob("*.tmp"))


def test_config_json_is_the_last_file_that_gets_its_name(saved_model, tokenizer_file, monkeypatch):
    model, path = saved_model
    rename, renamed = os.replace, []

    def record(source, target):
        renamed.append(os.path.basename(target))
        assert not (path / "config.json").exists()
        rename(source, target)

    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 20_000)
    monkeypatch.setattr(os, "replace", record)
    save_model(model, tokenizer_file, path)
    assert renamed[-1] == "config.json" and "tokenizer.model" in renamed


# ------------------------------------------------------------------------------------ tokenizers
def test_control_pieces_that_only_transformers_files_know_are_appended(tmp_path):
    def write_added(added):
        content = json.dumps({"added_tokens_decoder": added})
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")

    base = tokenizer_module.train(LINES * 50, 350)
    base.save(tmp_path / "tokenizer.model")
    image, pad = {"content": "<image>"}, {"content": "<pad>"}
    write_added({"0": {"content": "<unk>"}, "351": pad, "350": image})
    got = checkpoint.load_tokenizer(tmp_path)
    assert (got.image_id, got.pad_id, got.vocab_size) == (350, 351, 352)
    assert got.encode("the cat") == base.encode("the cat")

    write_added({"360": image})
    reason = "<image> is number 360, which does not fit the 350 pieces"
    with pytest.raises(ValueError, match=reason):
        checkpoint.load_tokenizer(tmp_path)
