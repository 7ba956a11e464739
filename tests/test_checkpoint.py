"""Folders: what is written is read back, opens in safetensors and transformers, and what is damaged is refused in one line."""

import json
import random

import pytest
import torch

import checkpoint
from model import Model


def write(tensors, folder, **options):
    checkpoint.save_safetensors({n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.items(), folder, **options)


@pytest.fixture
def folder(config, tokenizer_file, tmp_path):
    torch.manual_seed(0)
    model = Model(config).init_weights()
    checkpoint.save_model(model, tokenizer_file, tmp_path / "m")
    return model, tmp_path / "m"


def test_a_saved_model_comes_back_to_the_bit(folder, config):
    model, path = folder
    again = checkpoint.load_model(path)
    assert again.config == config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_saving_over_a_model_in_its_own_folder_keeps_its_other_files(folder):
    model, path = folder
    (path / "log.jsonl").write_text("kept")
    model.decoder.norm.data += 1
    checkpoint.save_model(model, path / "tokenizer.model", path)
    assert torch.equal(checkpoint.load_model(path).decoder.norm, model.decoder.norm) and (path / "log.jsonl").read_text() == "kept"


def test_a_model_that_was_being_written_is_no_model(folder):
    _, path = folder
    (path / "config.json").unlink()  # it goes first and comes last
    with pytest.raises(ValueError, match="it has no config.json"):
        checkpoint.load_model(path)


def test_the_safetensors_package_reads_our_file_and_we_read_its(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, path = folder
    theirs = safetensors.load_file(path / "model.safetensors")
    ours = checkpoint.load_safetensors(path / "model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    safetensors.save_file(tensors, tmp_path / "t.safetensors")
    ours = checkpoint.load_safetensors(tmp_path / "t.safetensors")
    assert all(torch.equal(tensors[n], ours[n]) and tensors[n].dtype == ours[n].dtype for n in tensors)


def test_a_hand_made_file_is_read_as_the_format_says(tmp_path):
    head = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "x").write_bytes(len(head).to_bytes(8, "little") + head + b"\x00\x00\x80\x3f\x00\x00\x00\xc0")
    assert checkpoint.load_safetensors(tmp_path / "x")["x"].tolist() == [1.0, -2.0]


def test_headers_that_lie_are_refused_and_never_crash(tmp_path):
    file = tmp_path / "model.safetensors"
    write({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4)}, tmp_path)
    good, rng, refused = file.read_bytes(), random.Random(0), 0
    length = int.from_bytes(good[:8], "little")
    for n in range(1500):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(8 + length)] = rng.choice(b"0123456789[]{},:\"FIU\x00\xff")
        bad = bytes(bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))])
        file.unlink()  # the old one may still be mapped
        file.write_bytes(bad)
        try:
            tensors = checkpoint.load_safetensors(file)
            assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(bad) - 8 - int.from_bytes(bad[:8], "little")
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused > 1000


def test_missing_unknown_and_misshaped_tensors_are_listed(folder):
    _, path = folder
    tensors = {n: t.clone() for n, t in checkpoint.load_safetensors(path / "model.safetensors").items()}
    del tensors["language_model.model.norm.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    write(tensors, path)
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path)
    for part in ("left over surprise", "missing language_model.model.norm.weight", "multi_modal_projector.linear_1.bias is [3], must be [32]"):
        assert part in str(error.value)


def test_transformers_opens_the_folder_and_computes_the_same(folder, config):
    transformers = pytest.importorskip("transformers")
    model, path = folder
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(path, attn_implementation="eager").eval()
    ids = torch.tensor([[1, 20] + [config.image_token_id] * config.vision.num_patches + [21, 22, 23]])
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    from vision import normalise

    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=normalise(pixels)).logits
        got = model.logits(model(ids, pixels))
    assert (got - want).norm() / want.norm() < 1e-5
    assert json.loads((path / "config.json").read_text())["image_token_index"] == config.image_token_id


def test_new_rows_start_at_the_mean_of_their_spelling_and_old_ones_stay(config, tokenizer):
    import tokenizer as tokenizer_module

    torch.manual_seed(0)
    model = Model(config).init_weights()
    new = tokenizer_module.merge(tokenizer, ["▁고슴도치", "햄버거"], dead="repair", control=())
    n = tokenizer.vocab_size
    for before in (model.decoder.embed_tokens.weight.detach(), model.decoder.lm_head.weight.detach()):
        after = checkpoint.expand_rows(before, tokenizer, new)
        assert after.shape[0] == new.vocab_size > n
        assert torch.equal(before, after[:n])
        for piece in ("▁고슴도치", "햄버거"):
            text = piece.replace("▁", " ")
            spelt = tokenizer.package.encode(text.strip())  # puts a ▁ of its own before the text
            if not text.startswith(" "):
                assert tokenizer.piece(spelt[0]) == "▁"
                spelt = spelt[1:]
            assert torch.allclose(after[new.id(piece)], before[spelt].mean(0), atol=1e-6), piece
        drawn = checkpoint.expand_rows(before, tokenizer, new, "random", torch.Generator().manual_seed(0))
        assert torch.equal(drawn[:n], before) and 0.5 < drawn[n:].std() / before.std() < 2
        with pytest.raises(ValueError, match="is not the old one"):
            checkpoint.expand_rows(after, new, tokenizer)
        padded = checkpoint.expand_rows(torch.cat([before, before[:500] + 7]), tokenizer, new)  # padding: the new rows take its place, the rest stays
        assert torch.equal(padded[: new.vocab_size], after) and torch.equal(padded[new.vocab_size :], before[new.vocab_size - n : 500] + 7)
