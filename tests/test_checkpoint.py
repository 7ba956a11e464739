"""Folders: what is written is read back, opens in safetensors and transformers, and what is damaged is refused in one line."""

import dataclasses
import json
import random
import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import generate
import tokenizer as tokenizer_module
import vision
from model import XLlava, parameter_counts


def write(tensors, folder, **options):
    checkpoint.save_safetensors(
        {n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.items(), folder, **options
    )


@pytest.fixture
def folder(config, tokenizer_file, tmp_path):
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
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
    model.decoder.norm.weight.data += 1
    checkpoint.save_model(model, path / "tokenizer.model", path)
    assert (
        torch.equal(checkpoint.load_model(path).decoder.norm.weight, model.decoder.norm.weight)
        and (path / "log.jsonl").read_text() == "kept"
    )


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
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "c": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    safetensors.save_file(tensors, tmp_path / "t.safetensors")
    ours = checkpoint.load_safetensors(tmp_path / "t.safetensors")
    assert all(
        torch.equal(tensors[n], ours[n]) and tensors[n].dtype == ours[n].dtype for n in tensors
    )


def test_a_hand_made_file_is_read_as_the_format_says(tmp_path):
    head = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "x").write_bytes(
        len(head).to_bytes(8, "little") + head + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    )
    assert checkpoint.load_safetensors(tmp_path / "x")["x"].tolist() == [1.0, -2.0]


def mutants(good, count, seed=0):
    """Damaged copies of a safetensors file: bytes of the header changed, the file cut, or a number in the header replaced by a tempting one."""
    rng, length = random.Random(seed), int.from_bytes(good[:8], "little")
    for _ in range(count):
        bad = bytearray(good)
        if rng.random() < 0.4:
            head = good[8 : 8 + length].decode()
            numbers = list(re.finditer(r"\d+", head))
            for spot in sorted(rng.sample(numbers, rng.randint(1, 2)), key=lambda m: -m.start()):
                head = (
                    head[: spot.start()]
                    + rng.choice(
                        [
                            "0",
                            "-1",
                            "1",
                            "2",
                            "6",
                            "24",
                            "56",
                            "1e3",
                            "99999999999999999999",
                            str(2**63),
                            str(2**31),
                            "2.0",
                            "null",
                        ]
                    )
                    + head[spot.end() :]
                )
            bad = len(head.encode()).to_bytes(8, "little") + head.encode() + good[8 + length :]
        else:
            for _ in range(rng.randint(1, 3)):
                bad[rng.randrange(8 + length)] = rng.choice(b'0123456789[]{},:"FIU\x00\xff')
        yield bytes(bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))])


def try_mutants(folder, count, seed=0):
    """(loaded, refused). What loads must be what the safetensors package reads, where that is at hand, and cover the file to the byte."""
    try:
        import safetensors.torch as package
    except ImportError:
        package = None
    write(
        {
            "a": torch.arange(6.0).view(2, 3),
            "b": torch.arange(4),
            "e": torch.zeros(0, 5),
            "h": torch.ones(2, 2).bfloat16(),
        },
        folder,
    )
    file, loaded, refused = folder / "model.safetensors", 0, 0
    for bad in mutants(file.read_bytes(), count, seed):
        file.unlink()  # the old one may still be mapped
        file.write_bytes(bad)
        try:
            tensors = checkpoint.load_safetensors(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(
            bad
        ) - 8 - int.from_bytes(bad[:8], "little")
        if package:
            theirs = package.load(bad)
            assert theirs.keys() == tensors.keys()
            for name, t in tensors.items():
                assert (
                    t.dtype == theirs[name].dtype
                    and t.shape == theirs[name].shape
                    and t.reshape(-1)
                    .view(torch.uint8)
                    .equal(theirs[name].reshape(-1).view(torch.uint8))
                ), name
    return loaded, refused


def test_headers_that_lie_are_refused_and_never_crash(tmp_path):
    loaded, refused = try_mutants(tmp_path, 10_000)
    assert refused > 9000 and loaded > 100


@pytest.mark.parametrize(
    "lie, reason",
    [
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12), "c": ("F32", [1], 12, 16)}, "overlap"),
        ({"a": ("F32", [1], 0, 4), "b": ("F32", [2], 8, 16)}, "leave a gap"),
        ({"a": ("F32", [4], 0, 16), "b": ("F32", [1], 16, 20)}, "outside the file"),
        ({"a": ("F32", [5], 0, 16)}, r"bytes 0–16 don't hold F32 \[5\]"),
        ({"a": ("F32", [2], 0, 8)}, "8 bytes that belong to no tensor"),
        ({"a": ("F8_E4M3", [16], 0, 16)}, "tensor a is 'F8_E4M3', supported: F32"),
        ({"a": ("F32", [-4], 0, 16)}, "not a whole number"),
        ({"a": ("F32", [1] * 65 + [4], 0, 16)}, "more than 64"),
        ({"a\nb": ("F32", [5], 0, 16)}, r"bad header .*the name 'a\\nb'"),
        (
            {"a": ("F32", [4], 0, 16), "b": ("F32", [2**47, 2**47, 0], 16, 16)},
            "no tensor has the shape|",
        ),
    ],
)
def test_each_kind_of_lie_is_named(tmp_path, lie, reason):
    head = json.dumps(
        {
            n: {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            for n, (dtype, shape, start, end) in lie.items()
        }
    ).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    if reason.endswith("|"):  # no elements: PyTorch may have such a shape or not
        try:
            assert checkpoint.load_safetensors(tmp_path / "x.safetensors")["b"].numel() == 0
        except ValueError as error:
            assert reason[:-1] in str(error)
        return
    with pytest.raises(ValueError, match=reason) as error:
        checkpoint.load_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_missing_unknown_and_misshaped_tensors_are_listed(folder):
    _, path = folder
    tensors = {
        n: t.clone() for n, t in checkpoint.load_safetensors(path / "model.safetensors").items()
    }
    del tensors["language_model.model.norm.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    write(tensors, path)
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path)
    for part in (
        "left over surprise",
        "missing language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias is [3], must be [32]",
    ):
        assert part in str(error.value)


def test_transformers_opens_the_folder_and_computes_the_same(folder, config):
    transformers = pytest.importorskip("transformers")
    model, path = folder
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, attn_implementation="eager"
    ).eval()
    ids = torch.tensor(
        [[1, 20] + [config.image_token_id] * config.vision.num_patches + [21, 22, 23]]
    )
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    from vision import normalise

    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=normalise(pixels)).logits
        got = model.logits(model(ids, pixels))
    assert (got - want).norm() / want.norm() < 1e-5
    assert (
        json.loads((path / "config.json").read_text())["image_token_index"] == config.image_token_id
    )


def test_new_rows_start_at_the_mean_of_their_spelling_and_old_ones_stay(config, tokenizer):
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    new = tokenizer_module.merge_vocabularies(
        tokenizer, ["▁고슴도치", "햄버거"], dead="repair", control=()
    )
    n = tokenizer.vocab_size
    for before in (
        model.decoder.embed_tokens.weight.detach(),
        model.decoder.lm_head.weight.detach(),
    ):
        after = checkpoint.expand_rows(before, tokenizer, new)
        assert after.shape[0] == new.vocab_size > n
        assert torch.equal(before, after[:n])
        for piece in ("▁고슴도치", "햄버거"):
            text = piece.replace("▁", " ")
            spelt = tokenizer.sp_processor.encode(
                text.strip()
            )  # puts a ▁ of its own before the text
            if not text.startswith(" "):
                assert tokenizer.piece(spelt[0]) == "▁"
                spelt = spelt[1:]
            assert torch.allclose(after[new.id(piece)], before[spelt].mean(0), atol=1e-6), piece
        drawn = checkpoint.expand_rows(
            before, tokenizer, new, "random", torch.Generator().manual_seed(0)
        )
        assert torch.equal(drawn[:n], before) and 0.5 < drawn[n:].std() / before.std() < 2
        with pytest.raises(ValueError, match="is not the old one"):
            checkpoint.expand_rows(after, new, tokenizer)
        padded = checkpoint.expand_rows(
            torch.cat([before, before[:500] + 7]), tokenizer, new
        )  # padding: the new rows take its place, the rest stays
        assert torch.equal(padded[: new.vocab_size], after) and torch.equal(
            padded[new.vocab_size :], before[new.vocab_size - n : 500] + 7
        )


# ---------------------------------------------------------------------------------------------- shards and streams
def test_shards_are_cut_at_the_size_asked_for_and_read_by_transformers(
    folder, tokenizer_file, tmp_path
):
    model, whole = folder
    checkpoint.save_model(model, tokenizer_file, tmp_path / "s", shard_size=20_000)
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 24_000 for f in files if len(checkpoint.load_safetensors(f)) > 1)
    again = checkpoint.load_model(tmp_path / "s")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    checkpoint.save_model(
        model, tokenizer_file, tmp_path / "s"
    )  # one file now: no shard of the old kind is left behind
    assert [f.name for f in (tmp_path / "s").glob("model*")] == ["model.safetensors"]
    transformers = pytest.importorskip("transformers")
    checkpoint.save_model(model, tokenizer_file, tmp_path / "s", shard_size=20_000)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "s")
    assert torch.equal(theirs.lm_head.weight, model.decoder.lm_head.weight)
    (files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1].name}: shards that are not there"):
        checkpoint.load_model(tmp_path / "s")


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../secret.safetensors"}}'
    )
    with pytest.raises(ValueError, match="a file beside it"):
        checkpoint.load_weights(tmp_path)


def test_a_gathered_model_is_written_one_tensor_at_a_time_in_any_order(
    folder, tokenizer_file, tmp_path
):
    model, whole = folder
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

    checkpoint.write_model(
        model.config, gathered(), tokenizer_file, tmp_path / "g", shard_size=20_000
    )
    assert most <= 2 and all(
        torch.equal(a, b)
        for a, b in zip(state.values(), checkpoint.load_model(tmp_path / "g").state_dict().values())
    )


def test_a_stream_that_breaks_off_leaves_the_old_model_whole(folder, tokenizer_file):
    model, path = folder
    state = dict(model.state_dict())
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    for broken, reason in (
        (
            {n: t + 1 for n, t in list(state.items())[:-1]},
            "language_model.lm_head.weight is missing",
        ),
        ({**state, "decoder.norm.weight": torch.zeros(5)}, r"norm.weight \[5\]: it must be \[32\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            checkpoint.write_model(model.config, broken.items(), tokenizer_file, path)
        assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_a_save_that_dies_between_two_renames_leaves_no_folder_that_looks_whole(
    folder, tokenizer_file, monkeypatch
):
    model, path = folder
    rename, done = checkpoint.os.replace, []

    def dies(source, target):
        if done:
            raise OSError("the power went")
        done.append(rename(source, target))

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(OSError, match="the power went"):
        checkpoint.save_model(model, tokenizer_file, path, shard_size=20_000)
    with pytest.raises(ValueError, match="it has no config.json"):
        checkpoint.load_model(path)
    assert not list(path.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------- other people's folders
@pytest.fixture(scope="module")
def published(config, tokenizer, tmp_path_factory):
    """A random LLaVA, and its parts as the four kinds of folder in which such things are published."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    base = tokenizer_module.train(data_lines(), 350)
    text = transformers.LlamaConfig(
        vocab_size=350,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    sight = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    llama = transformers.LlamaForCausalLM(text)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=sight,
            text_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        )
    )
    llama.save_pretrained(root / "llama", max_shard_size="20KB")
    base.save(root / "llama" / "tokenizer.model")
    clip.save_pretrained(root / "clip")
    first, second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 32)
    projector = {
        "0.weight": first.weight,
        "0.bias": first.bias,
        "2.weight": second.weight,
        "2.bias": second.bias,
    }
    projector = {n: t.detach() for n, t in projector.items()}
    # as LLaVA-1.5 was first published: Llama's config and more; two .bin shards; the tower elsewhere
    old = root / "old"
    old.mkdir()
    base.save(old / "tokenizer.model")
    plain = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 350,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tie_word_embeddings": False,
    }
    (old / "config.json").write_text(json.dumps(plain))
    tensors = {
        **llama.state_dict(),
        **{f"model.mm_projector.{n}": t for n, t in projector.items()},
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    parts = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
    for i, part in enumerate(parts, 1):
        torch.save(part, old / f"pytorch_model-0000{i}-of-00002.bin")
    names = {
        n: f"pytorch_model-0000{i}-of-00002.bin" for i, part in enumerate(parts, 1) for n in part
    }
    (old / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    torch.save(
        {f"model.mm_projector.{n}": t for n, t in projector.items()}, root / "mm_projector.bin"
    )
    merged = tokenizer_module.merge_vocabularies(base, ["▁고슴도치", "햄버거"], dead="repair")
    merged.save(root / "merged.model")
    return root, llama.eval(), clip.eval(), projector, merged


def data_lines():
    from conftest import LINES

    return LINES * 50


def check(model, published, projector=None):
    """The built model computes what transformers' Llama and CLIP compute, on old pieces and on pictures."""
    _, llama, clip, _, _ = published
    ids, pixels = (
        torch.tensor([[1, 20, 21, 22, 300, 23]]),
        torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8),
    )
    with torch.no_grad():
        want = llama(ids).logits
        assert torch.allclose(model.logits(model(ids))[..., :350], want, rtol=1e-4, atol=1e-5)
        seen = clip.vision_model(vision.normalise(pixels), output_hidden_states=True).hidden_states[
            -2
        ]
        assert torch.allclose(model.vision(pixels, -2), seen, atol=1e-5)
        if projector:
            x = (
                torch.nn.functional.gelu(
                    seen[:, 1:] @ projector["0.weight"].T + projector["0.bias"]
                )
                @ projector["2.weight"].T
                + projector["2.bias"]
            )
            assert torch.allclose(model.encode_images(pixels), x, atol=1e-5)


def test_build_joins_llama_and_the_seeing_half_of_clip_under_a_merged_tokenizer(
    published, tmp_path, capsys
):
    root, llama, _, _, merged = published
    checkpoint.build(
        root / "llama",
        tmp_path / "m",
        vision=root / "clip",
        tokenizer=root / "merged.model",
        shard_size=30_000,
    )
    model, tokenizer = (
        checkpoint.load_model(tmp_path / "m"),
        checkpoint.load_tokenizer(tmp_path / "m"),
    )
    assert (
        tokenizer.to_bytes() == merged.to_bytes()
        and model.config.image_token_id == merged.image_id
        and model.config.pad_token_id == merged.pad_id
    )
    table, old = model.decoder.embed_tokens.weight, llama.model.embed_tokens.weight
    assert torch.equal(table[:350], old) and table.shape[0] == merged.vocab_size
    assert torch.allclose(table[merged.image_id], old.mean(0), atol=1e-6)
    check(model, published)
    assert model.projector[0].weight.std() > 0.1 and not model.projector[0].bias.any()
    told = capsys.readouterr().out
    assert "projector: fresh" in told and f"350 rows → {merged.vocab_size}" in told
    checkpoint.build(
        root / "llama",
        tmp_path / "p",
        vision=root / "clip",
        projector=root / "mm_projector.bin",
        dtype="bfloat16",
    )
    assert json.loads((tmp_path / "p" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(
        checkpoint.load_model(tmp_path / "p").projector[2].weight,
        published[3]["2.weight"].bfloat16().float(),
    )


def test_build_reads_llava_as_first_published_with_its_tower_elsewhere_or_inside(
    published, tmp_path, capsys
):
    root, _, clip, projector, _ = published
    with pytest.raises(
        ValueError,
        match=r"its vision tower is not there \(mm_vision_tower: openai/clip-vit-large-patch14-336\): give CLIP's folder with --vision",
    ):
        checkpoint.build(root / "old", tmp_path / "m")
    checkpoint.build(root / "old", tmp_path / "m", vision=root / "clip")
    model = checkpoint.load_model(tmp_path / "m")
    check(model, published, projector)
    assert model.config.image_aspect_ratio == "pad" and model.config.vision_feature_layer == -2
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (inside / name).write_bytes((root / "old" / name).read_bytes())
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{n}": t + 1
        for n, t in clip.vision_model.state_dict().items()
    }
    torch.save({**checkpoint.load_weights(root / "old"), **tower}, inside / "pytorch_model.bin")
    checkpoint.build(inside, tmp_path / "i", vision=root / "clip")
    assert torch.equal(
        checkpoint.load_model(tmp_path / "i").vision.class_embed,
        clip.vision_model.embeddings.class_embedding + 1,
    )
    assert "the weights are those in" in capsys.readouterr().out


def test_build_takes_a_llava_as_it_is_and_says_what_does_not_fit(published, tmp_path):
    root = published[0]
    checkpoint.build(root / "old", tmp_path / "m", vision=root / "clip")
    checkpoint.build(tmp_path / "m", tmp_path / "again")
    for a, b in zip(
        sorted((tmp_path / "m").iterdir()), sorted((tmp_path / "again").iterdir()), strict=True
    ):
        assert a.read_bytes() == b.read_bytes(), a.name
    for arguments, reason in (
        (
            {"llm": tmp_path / "m", "vision": root / "clip"},
            "brings its own vision: leave out --vision",
        ),
        (
            {"llm": root / "llama", "vision": root / "llama"},
            "model_type is 'llama', supported: 'clip_vision_model'",
        ),
        (
            {"llm": root / "clip", "vision": root / "clip"},
            "model_type is 'clip', supported: 'llama'",
        ),
        (
            {
                "llm": root / "llama",
                "vision": root / "clip",
                "tokenizer": root / "llama" / "tokenizer.model",
            },
            "no <image> or no <pad>",
        ),
        (
            {"llm": root / "llama", "vision": root / "clip", "projector": root / "nothing.bin"},
            "nothing.bin: no such file",
        ),
        ({"llm": root, "vision": root / "clip"}, "it has no config.json"),
    ):
        with pytest.raises(ValueError, match=reason):
            checkpoint.build(out=tmp_path / "x", **arguments)
    assert not (tmp_path / "x" / "config.json").exists()
    with pytest.raises(ValueError, match="python checkpoint.py build --llm"):
        checkpoint.load_model(root / "llama")


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("run",)

    for name, content in (
        ("code", {"a": Payload()}),
        ("list", [torch.ones(1)]),
        ("text", {"a": "b"}),
    ):
        torch.save(content, tmp_path / f"{name}.bin")
        with pytest.raises(ValueError, match=f"{name}.bin: ") as error:
            checkpoint.load_weights(tmp_path / f"{name}.bin")
        assert "\n" not in str(error.value)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "list.bin").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut.bin: can't be read as weights"):
        checkpoint.load_weights(tmp_path / "cut.bin")
    torch.save(
        {"a": torch.arange(3.0)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False
    )
    assert checkpoint.load_weights(tmp_path / "legacy.bin")["a"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- configs
def test_a_sparse_config_of_transformers_4_means_what_transformers_takes_it_for():
    transformers = pytest.importorskip("transformers")
    # the published llava-hf/llava-1.5-7b-hf leaves most of Llama's fields out, and the 13B one gives its sizes
    small = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }
    large = {
        **small,
        "text_config": {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "model_type": "llama",
            "vocab_size": 32064,
            "rope_scaling": None,
            "rope_theta": 5e5,
        },
    }
    for published in (
        small,
        large,
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", "vocab_size": 32064},
            "vision_config": {"model_type": "clip_vision_model"},
        },
    ):
        ours, theirs = (
            checkpoint.read_config(published, "x"),
            transformers.LlavaConfig(**json.loads(json.dumps(published))),
        )
        for f in dataclasses.fields(ours.vision):
            assert getattr(ours.vision, f.name) == getattr(theirs.vision_config, f.name), f.name
        for f in dataclasses.fields(ours.text):
            new = f.name == "rope_theta" and hasattr(
                theirs.text_config, "rope_parameters"
            )  # in transformers 5
            assert getattr(ours.text, f.name) == (
                theirs.text_config.rope_parameters["rope_theta"]
                if new
                else getattr(theirs.text_config, f.name)
            ), f.name
        assert (ours.vision_feature_layer, ours.image_token_id) == (
            theirs.vision_feature_layer,
            theirs.image_token_index,
        )
    assert (
        sum(parameter_counts(checkpoint.read_config(small, "x")).values()) == 7_063_427_072
    )  # what llava-hf/llava-1.5-7b-hf holds


@pytest.mark.parametrize(
    "part, change, reason",
    [
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope scaling is 'linear', supported: 'default'",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "rope scaling is 'llama3'",
        ),
        ("text_config", {"attention_bias": True}, "attention_bias is True, supported: False"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        ("text_config", {"model_type": "mistral"}, "model_type is 'mistral', supported: 'llama'"),
        ("text_config", {"hidden_size": "32"}, "hidden_size is '32', must be int"),
        (
            "text_config",
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ("text_config", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        (
            "vision_config",
            {"model_type": "siglip_vision_model"},
            "model_type is 'siglip_vision_model', supported: 'clip_vision_model'",
        ),
        (
            "vision_config",
            {"hidden_act": "relu"},
            "hidden_act 'relu' is not one of quick_gelu, gelu",
        ),
        (
            None,
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full', supported: 'default'",
        ),
        (
            None,
            {"vision_feature_layer": [-2, -5]},
            r"the vision feature layer is \[-2, -5\], must be one of the 2 layers",
        ),
        (
            None,
            {"projector_hidden_act": "relu"},
            "projector_hidden_act is 'relu', supported: 'gelu'",
        ),
        (
            None,
            {"image_token_index": 10**6, "image_token_id": 10**6},
            "image_token_index is 1000000, the vocabulary has",
        ),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(folder, part, change, reason):
    _, path = folder
    stored = json.loads((path / "config.json").read_text())
    (stored[part] if part else stored).update(change)
    if "rope_scaling" in change:
        del stored["text_config"]["rope_parameters"]
    (path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=reason) as error:
        checkpoint.load_model(path)
    assert str(path / "config.json") in str(error.value)


def test_pictures_that_were_normalised_otherwise_are_refused(folder):
    _, path = folder
    stored = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(
        json.dumps({**stored, "image_mean": [0.5, 0.5, 0.5]})
    )
    with pytest.raises(ValueError, match="only CLIP's"):
        checkpoint.load_model(path)


def test_a_dry_run_of_13_billion_needs_configs_only(tokenizer_file, tmp_path, capsys):
    (tmp_path / "llm").mkdir()
    (tmp_path / "clip").mkdir()
    llama = {
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
    }
    large = {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    (tmp_path / "llm" / "config.json").write_text(json.dumps(llama))
    (tmp_path / "clip" / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": large})
    )
    checkpoint.build(
        tmp_path / "llm",
        tmp_path / "out",
        vision=tmp_path / "clip",
        tokenizer=tokenizer_file,
        dry_run=True,
    )
    told = capsys.readouterr().out
    count = 13_015_864_320 + 303_507_456 + (1025 + 5121) * 5120
    assert f"{count:,} parameters, {2 * count:,} bytes" in told and "6 file(s)" in told
    assert (
        "language_model.model.layers.*.mlp.down_proj.weight" in told
        and "40 × [5120, 13824]       F16     5,662,310,400 bytes" in told
    )
    assert (
        "memory for tensors at most 0.454 GB beyond the mapped files" in told
    )  # 32,000 × 5,120 × 2 bytes, and 4 × 31,467,520 of a projector
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- what AutoProcessor needs
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_transformers_generates_the_same_text_about_a_picture_through_its_processor(
    config, tokenizer, tokenizer_file, tmp_path, mode
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    model = XLlava(dataclasses.replace(config, image_aspect_ratio=mode)).init_weights().eval()
    model.decoder.lm_head.weight.data[:259] = (
        0  # no end, and no byte pieces: the two write bytes that are no UTF-8 differently
    )
    checkpoint.save_model(model, tokenizer_file, tmp_path)
    theirs, processor = (
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path),
        transformers.AutoProcessor.from_pretrained(tmp_path),
    )
    pictures = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        for shape in ((23, 40, 3), (30, 17, 3))
    ]
    question = "What colour is the cat? 고양이"
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}],
        }
    ]
    inputs = processor(
        images=pictures,
        text=processor.apply_chat_template(chat, add_generation_prompt=True),
        return_tensors="pt",
    )
    pixels = torch.stack([vision.preprocess(p, 16, mode) for p in pictures])
    assert (inputs["pixel_values"] - vision.normalise(pixels)).abs().max() < 1.01 / 255 / 0.26
    prompt, _ = data.encode_chat(
        [(generate.question_parts(question, 2), None)], tokenizer, config.vision.num_patches
    )
    assert inputs["input_ids"].tolist() == [prompt]
    ids = theirs.generate(**inputs, max_new_tokens=40)[0, len(prompt) :]
    text = processor.decode(ids, skip_special_tokens=True).strip()
    ours = "".join(
        generate.stream_answer(
            checkpoint.load_model(tmp_path).eval(),
            checkpoint.load_tokenizer(tmp_path),
            [(generate.question_parts(question, 2), None)],
            pixels,
            max_new_tokens=40,
        )
    ).strip()
    assert ours == text and len(text) > 20
    theirs.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")  # what transformers writes says the same to us
    assert checkpoint.load_model(tmp_path / "theirs").config == model.config


def test_transformers_tokenizer_and_chat_template_give_the_ids_that_we_train_on(
    folder, tokenizer, config
):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder[1])
    rng = random.Random(0)
    for text in [
        *data_lines()[:6],
        "  two  spaces ",
        "tab\tand\nbreak",
        "햄버거 🍔 café",
        "".join(rng.choices("abc 고양이猫", k=200)),
    ]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)), (
            text
        )
    processor = transformers.AutoProcessor.from_pretrained(folder[1])
    turns = [(["", "\nWhat colour is the cat?"], "red"), ("고양이는?", "빨간색"), ("And?", None)]
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What colour is the cat?"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "고양이는?"},
        {"role": "assistant", "content": [{"type": "text", "text": "빨간색"}]},
        {"role": "user", "content": "And?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert theirs(text)["input_ids"] == data.encode_chat(turns, tokenizer, 1)[0]


def test_a_tokenizer_that_folds_characters_and_spaces_does_so_in_transformers_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("\n".join(data_lines()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=120,
        minloglevel=2,
        hard_vocab_limit=False,
    )  # NFKC, trimmed, no bytes
    tokenizer = tokenizer_module.Tokenizer.load(tmp_path / "t.model")
    assert tokenizer.remove_extra_whitespaces and tokenizer.charsmap and not tokenizer.byte_fallback
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(checkpoint.tokenizer_json(tokenizer)), encoding="utf-8"
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ["  the  ＣＡＴ   is red ", "고양이 ½ x 한", "the blue dog"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), text


def test_control_pieces_that_only_transformers_files_know_are_taken_over(tmp_path):
    base = tokenizer_module.train(data_lines(), 350)
    base.save(tmp_path / "tokenizer.model")
    added = {"0": {"content": "<unk>"}, "350": {"content": "<image>"}, "351": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    got = checkpoint.load_tokenizer(tmp_path)
    assert (got.image_id, got.pad_id, got.vocab_size) == (350, 351, 352) and got.encode(
        "the cat"
    ) == base.encode("the cat")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"360": {"content": "<image>"}}})
    )
    with pytest.raises(
        ValueError, match="<image> is number 360, which does not fit the 350 pieces"
    ):
        checkpoint.load_tokenizer(tmp_path)
