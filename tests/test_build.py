"""python -m checkpoint build: published parts become one folder, and new pieces get rows."""

import json

import pytest
import torch
from conftest import LINES

import checkpoint
import tokenizer as tokenizer_module
import vision
from checkpoint.__main__ import main
from checkpoint.build import build, expand_rows, plan_build
from checkpoint.names import EMBEDDING, HEAD, hf_name
from checkpoint.safetensors import load_weights, save_safetensors
from model import XLlava

NEW_PIECES = ["▁고슴도치", "햄버거"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 350,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# The config.json of LLaVA-1.5 as first published: Llama's and more.
FIRST_LLAVA = {
    **SIZES,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
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


def build_folder(out, *flags, **options):
    """What `python -m checkpoint build` does. options: init and seed."""
    arguments = dict(zip(flags[::2], flags[1::2]))
    names = ("--llm", "--vision", "--projector", "--tokenizer", "--dtype")
    build(plan_build(*map(arguments.get, names)), out, **options)


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def base_tokenizer():
    return tokenizer_module.train(LINES * 50, 350)


# ------------------------------------------------------------------------------------ rows
def test_new_rows_start_at_the_mean_of_their_spelling_and_old_ones_stay(config, tokenizer):
    torch.manual_seed(0)
    decoder = XLlava(config).init_weights().decoder
    new = tokenizer_module.merge_vocabularies(
        tokenizer, NEW_PIECES, unreachable="repair", control=()
    )
    n = tokenizer.vocab_size
    for before in (decoder.embed_tokens.weight.detach(), decoder.lm_head.weight.detach()):
        after = expand_rows(before, tokenizer, new)
        assert after.shape[0] == new.vocab_size > n
        assert torch.equal(before, after[:n])
        for piece in NEW_PIECES:
            text = piece.replace("▁", " ")
            # The package puts a ▁ of its own before the text.
            spelt = tokenizer.sp_processor.encode(text.strip())
            if not text.startswith(" "):
                assert tokenizer.piece(spelt[0]) == "▁"
                spelt = spelt[1:]
            assert torch.allclose(after[new.id(piece)], before[spelt].mean(0), atol=1e-6), piece

        generator = torch.Generator().manual_seed(0)
        drawn = expand_rows(before, tokenizer, new, "random", generator)
        assert torch.equal(drawn[:n], before) and 0.5 < drawn[n:].std() / before.std() < 2
        with pytest.raises(
            ValueError, match="is not the tokenizer of the old one with pieces appended"
        ):
            expand_rows(after, new, tokenizer)
        with pytest.raises(ValueError, match=f"the model has {n - 1} rows"):
            expand_rows(before[:-1], tokenizer, new)

        # Padding rows: the new rows take their place, the rest stays.
        padded = expand_rows(torch.cat([before, before[:500] + 7]), tokenizer, new)
        assert torch.equal(padded[: new.vocab_size], after)
        assert torch.equal(padded[new.vocab_size :], before[new.vocab_size - n : 500] + 7)


def test_random_rows_are_as_wide_as_the_old_ones_and_control_pieces_are_their_mean(tokenizer):
    base = base_tokenizer()  # tokenizer is base with <image> and <pad>
    rows = 3 + 0.5 * torch.randn(base.vocab_size, 400)
    after = expand_rows(rows, base, tokenizer)
    padded = expand_rows(torch.cat([rows, rows[:9] + 50]), base, tokenizer)
    for i in (tokenizer.image_id, tokenizer.pad_id):
        assert torch.allclose(after[i], rows.mean(0), atol=1e-5)
        assert torch.equal(padded[i], after[i])  # padding rows count for nothing
    pieces = [f"고{a}{b}" for a in "는무슨색" for b in "파란개은"]
    new = tokenizer_module.merge_vocabularies(base, pieces, unreachable="keep", control=())
    drawn = expand_rows(rows, base, new, "random", torch.Generator().manual_seed(0))
    drawn = drawn[base.vocab_size :]
    assert len(drawn) >= len(pieces) and abs(drawn.mean()) < 0.05
    assert drawn.std().item() == pytest.approx(rows.std().item(), rel=0.05)


def test_rows_for_a_model_in_bfloat16_are_means_in_float32(tokenizer):
    base = base_tokenizer()
    new = tokenizer_module.merge_vocabularies(base, NEW_PIECES, unreachable="repair", control=())
    rows = torch.randn(base.vocab_size, 32)
    after = expand_rows(rows, base, new, dtype=torch.bfloat16)
    assert after.dtype == torch.bfloat16 and torch.equal(
        after, expand_rows(rows, base, new).bfloat16()
    )


# ------------------------------------------------------------------------------------ own parts
@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Random parts as they are published, and all their tensors by our names."""
    root = tmp_path_factory.mktemp("parts")
    llama, clip = root / "llama", root / "clip"
    write_config(llama, {**SIZES, "model_type": "llama", "torch_dtype": "float32"})
    base_tokenizer().save(llama / "tokenizer.model")
    write_config(clip, {"model_type": "clip", "vision_config": VISION_SIZES})
    plan = plan_build(llm=llama, vision=clip)
    torch.manual_seed(0)
    state = XLlava(plan.published).init_weights().state_dict()

    names = find_published_names(state)
    tensors = {"llama": {}, "clip": {"logit_scale": torch.ones(())}, "projector": {}}
    for name, tensor in state.items():
        part = {"decoder": "llama", "vision": "clip"}.get(name.split(".")[0], "projector")
        tensors[part][names[name]] = tensor.clone()
    for folder in (llama, clip):
        part = tensors[folder.name]
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in part.items()}
        save_safetensors(specs, part.items(), folder)
    torch.save(tensors["projector"], root / "mm_projector.bin")
    merged = tokenizer_module.merge_vocabularies(base_tokenizer(), NEW_PIECES, unreachable="repair")
    merged.save(root / "merged.model")
    return root, state, merged


def find_published_names(state, vision="vision_model."):
    """{our name: the name in Llama's, CLIP's and LLaVA's projector files}."""
    prefixes = {"decoder.lm_head.": "lm_head.", "decoder.": "model.", "vision.": vision}
    prefixes |= {f"projector.{i}.": f"model.mm_projector.{i}." for i in (0, 2)}
    names = {}
    for name in state:
        module = max((m for m in prefixes if name.startswith(m)), key=len)
        names[name] = hf_name(name, prefixes[module])
    return names


def test_build_takes_every_tensor_from_its_part(parts, tmp_path, monkeypatch):
    root, state, merged = parts
    llama, clip, projector = root / "llama", root / "clip", root / "mm_projector.bin"
    flags = ["--llm", llama, "--vision", clip, "--projector", projector]
    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 30_000)
    build_folder(tmp_path / "m", *flags, "--tokenizer", root / "merged.model")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model = checkpoint.load_model(tmp_path / "m")
    old = checkpoint.load_tokenizer(llama)
    for name, tensor in model.state_dict().items():
        want = state[name]
        if name in (EMBEDDING, HEAD):
            want = expand_rows(want, old, merged)
        assert torch.equal(tensor, want), name
    assert model.config.image_token_id == merged.image_id
    assert model.config.pad_token_id == merged.pad_id
    assert checkpoint.load_tokenizer(tmp_path / "m").to_bytes() == merged.to_bytes()


def test_a_llava_as_first_published_keeps_the_vision_encoder_that_it_holds(parts, tmp_path, capsys):
    root, state, _ = parts
    inside, vision_prefix = tmp_path / "inside", "model.vision_tower.vision_tower.vision_model."
    write_config(inside, FIRST_LLAVA)
    base_tokenizer().save(inside / "tokenizer.model")
    names = find_published_names(state, vision_prefix)
    tuned = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(
        {names[name]: tensor for name, tensor in tuned.items()}, inside / "pytorch_model.bin"
    )
    build_folder(tmp_path / "m", "--llm", inside, "--vision", root / "clip")
    assert "the weights are those in" in capsys.readouterr().out
    for name, tensor in checkpoint.load_model(tmp_path / "m").state_dict().items():
        assert torch.equal(tensor[: len(tuned[name])], tuned[name]), name


def test_a_fresh_projector_and_random_rows_depend_on_the_seed_alone(parts, tmp_path):
    root, _, _ = parts
    flags = ["--llm", root / "llama", "--vision", root / "clip"]
    flags += ["--tokenizer", root / "merged.model"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        build_folder(tmp_path / name, *flags, init="random", seed=seed)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    models = [checkpoint.load_model(tmp_path / name) for name in "ac"]
    for name in (EMBEDDING, HEAD, "projector.0.weight", "projector.2.weight"):
        assert not torch.equal(*(model.get_parameter(name) for model in models)), name
    first = models[0].projector[0]
    assert not first.bias.any() and 0.1 < first.weight.std() < 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
def test_the_type_of_the_weights_is_the_one_asked_for_or_the_llms(parts, tmp_path, dtype):
    root, state, _ = parts
    flags = ["--llm", root / "llama", "--vision", root / "clip"]
    build_folder(tmp_path / "m", *flags, *(("--dtype", dtype) if dtype else ()))
    stored = load_weights(tmp_path / "m").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, dtype or "float32")}
    config = checkpoint.read_json(tmp_path / "m" / "config.json")
    assert config["torch_dtype"] == config["dtype"] == (dtype or "float32")


def test_the_command_line_prints_a_plan_builds_and_shows(parts, tmp_path, capsys):
    root, _, merged = parts
    argv = ["build", "--llm", str(root / "llama"), "--vision", str(root / "clip")]
    argv += ["--tokenizer", str(root / "merged.model"), "-o", str(tmp_path / "m")]
    main([*argv, "--dry-run"])
    planned, arrow, written = capsys.readouterr().out.partition("→ " + str(tmp_path / "m"))
    assert arrow and written == ": without weights, for train.py … --estimate\n"
    assert "projector: fresh" in planned and f"350 rows → {merged.vocab_size}" in planned
    main(argv)  # into the folder of the dry run
    assert capsys.readouterr().out == planned + f"→ {tmp_path / 'm'}\n"
    for again in (argv, [*argv, "--dry-run"]):
        with pytest.raises(ValueError, match="there is something already; give another -o"):
            main(again)

    main(["show", str(tmp_path / "m")])
    shown = capsys.readouterr().out
    assert f'"vocab_size": {merged.vocab_size}' in shown
    total = sum(tensor.numel() for tensor in load_weights(tmp_path / "m").values())
    assert f"{total:,} parameters, {4 * total:,} bytes" in shown


def filled_tokenizer(size):
    """The tests' tokenizer with pieces that nothing uses, then <image> and <pad>."""
    base = base_tokenizer()
    filler = [f"가{i}" for i in range(size - base.vocab_size - 2)]
    return tokenizer_module.merge_vocabularies(base, filler, unreachable="keep")


def test_a_dry_run_of_13_billion_needs_configs_and_a_tokenizer_only(tmp_path, capsys):
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
    llm, clip, out = (str(tmp_path / name) for name in ("llm", "clip", "out"))
    write_config(tmp_path / "llm", llama)
    write_config(tmp_path / "clip", {"model_type": "clip", "vision_config": large})
    argv = ["build", "--llm", llm, "--vision", clip, "--tokenizer", str(tmp_path / "t.model")]
    filled_tokenizer(31_990).save(tmp_path / "t.model")
    main([*argv, "-o", out, "--dry-run"])
    told = capsys.readouterr().out
    count = 13_015_864_320 + 303_507_456 + (1025 + 5121) * 5120
    assert f"{count:,} parameters, {2 * count:,} bytes" in told and "6 file(s)" in told
    assert "language_model.model.layers.*.mlp.down_proj.weight" in told
    assert "40 × [5120, 13824]       F16     5,662,310,400 bytes" in told
    # 32,000 × 5,120 × 2 bytes, and 4 × 31,467,520 of a projector.
    assert "memory for tensors at most 0.454 GB beyond the mapped files" in told
    assert checkpoint.load_config(out).text.num_hidden_layers == 40
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ------------------------------------------------------------------------------------ theirs
@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random LLaVA, and its parts in the four kinds of folder that are published."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    base = base_tokenizer()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    text_encoder = {**VISION_SIZES, "num_hidden_layers": 1}
    del text_encoder["image_size"], text_encoder["patch_size"]
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=VISION_SIZES, text_config=text_encoder)
    )
    llama.save_pretrained(root / "llama", max_shard_size="20KB")
    base.save(root / "llama" / "tokenizer.model")
    clip.save_pretrained(root / "clip")
    layers = {"0": torch.nn.Linear(16, 32), "2": torch.nn.Linear(32, 32)}
    projector = {
        f"{i}.{name}": tensor.detach()
        for i, layer in layers.items()
        for name, tensor in layer.named_parameters()
    }
    in_llava = {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save(in_llava, root / "mm_projector.bin")

    # LLaVA-1.5 as first published: two .bin shards; the vision encoder elsewhere.
    old = root / "old"
    write_config(old, FIRST_LLAVA)
    base.save(old / "tokenizer.model")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors = list({**llama.state_dict(), **in_llava, **inv_freq}.items())
    weight_map = {}
    for i, part in enumerate((dict(tensors[:9]), dict(tensors[9:])), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save(part, old / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")

    merged = tokenizer_module.merge_vocabularies(base, NEW_PIECES, unreachable="repair")
    merged.save(root / "merged.model")
    return root, llama.eval(), clip.eval(), projector, merged


def check_against_transformers(model, published, projector=None):
    """The built model computes what transformers' Llama and CLIP compute, on old pieces and on
    images."""
    _, llama, clip, _, _ = published
    ids = torch.tensor([[1, 20, 21, 22, 300, 23]])
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits = model.logits(model(ids))[..., :350]
        assert torch.allclose(logits, llama(ids).logits, rtol=1e-4, atol=1e-5)
        encoded = clip.vision_model(vision.normalise(pixels), output_hidden_states=True)
        features = encoded.hidden_states[-2]
        assert torch.allclose(model.vision(pixels, -2), features, atol=1e-5)
        if projector:
            x = features[:, 1:] @ projector["0.weight"].T + projector["0.bias"]
            x = torch.nn.functional.gelu(x) @ projector["2.weight"].T + projector["2.bias"]
            assert torch.allclose(model.encode_images(pixels), x, atol=1e-5)


def test_build_joins_llama_and_the_vision_half_of_clip_under_a_merged_tokenizer(
    published, tmp_path, monkeypatch
):
    root, llama, _, projector, merged = published
    flags = ["--llm", root / "llama", "--vision", root / "clip"]
    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 30_000)
    build_folder(tmp_path / "m", *flags, "--tokenizer", root / "merged.model")
    model = checkpoint.load_model(tmp_path / "m")
    assert checkpoint.load_tokenizer(tmp_path / "m").to_bytes() == merged.to_bytes()
    assert model.config.image_token_id == merged.image_id
    assert model.config.pad_token_id == merged.pad_id
    table, old = model.decoder.embed_tokens.weight, llama.model.embed_tokens.weight
    assert torch.equal(table[:350], old) and table.shape[0] == merged.vocab_size
    assert torch.allclose(table[merged.image_id], old.mean(0), atol=1e-6)
    check_against_transformers(model, published)
    assert model.projector[0].weight.std() > 0.1 and not model.projector[0].bias.any()

    flags += ["--projector", root / "mm_projector.bin", "--dtype", "bfloat16"]
    build_folder(tmp_path / "p", *flags)
    assert checkpoint.read_json(tmp_path / "p" / "config.json")["torch_dtype"] == "bfloat16"
    got = checkpoint.load_model(tmp_path / "p").projector[2].weight
    assert torch.equal(got, projector["2.weight"].bfloat16().float())


def test_build_reads_llava_as_first_published_with_its_vision_encoder_elsewhere_or_inside(
    published, tmp_path, capsys
):
    root, _, clip, projector, _ = published
    old, vision_flags = root / "old", ["--vision", root / "clip"]
    reason = r"names openai/clip-vit-large-patch14-336\): give CLIP's folder with --vision"
    with pytest.raises(ValueError, match=reason):
        build_folder(tmp_path / "m", "--llm", old)
    build_folder(tmp_path / "m", "--llm", old, *vision_flags)
    model = checkpoint.load_model(tmp_path / "m")
    check_against_transformers(model, published, projector)
    assert model.config.image_aspect_ratio == "pad" and model.config.vision_feature_layer == -2

    inside = tmp_path / "inside"
    write_config(inside, FIRST_LLAVA)
    (inside / "tokenizer.model").write_bytes((old / "tokenizer.model").read_bytes())
    encoder = {
        f"model.vision_tower.vision_tower.vision_model.{name}": tensor + 1
        for name, tensor in clip.vision_model.state_dict().items()
    }
    torch.save({**load_weights(old), **encoder}, inside / "pytorch_model.bin")
    build_folder(tmp_path / "i", "--llm", inside, *vision_flags)
    got = checkpoint.load_model(tmp_path / "i").vision.class_embed
    assert torch.equal(got, clip.vision_model.embeddings.class_embedding + 1)
    assert "the weights are those in" in capsys.readouterr().out


def test_build_takes_a_llava_as_it_is_and_says_what_does_not_fit(published, tmp_path):
    root = published[0]
    llama, clip = root / "llama", root / "clip"
    built, again = tmp_path / "m", tmp_path / "again"
    build_folder(built, "--llm", root / "old", "--vision", clip)
    build_folder(again, "--llm", built)
    for a, b in zip(sorted(built.iterdir()), sorted(again.iterdir()), strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name

    own = llama / "tokenizer.model"
    for flags, reason in (
        (["--llm", built, "--vision", clip], "brings its own vision: leave out --vision"),
        (["--llm", llama, "--vision", llama], "model_type is 'llama', supported: 'clip_vision_mod"),
        (["--llm", clip, "--vision", clip], "model_type is 'clip', supported: 'llama'"),
        (["--llm", llama, "--vision", clip, "--tokenizer", own], "no control piece <image>"),
        (
            ["--llm", llama, "--vision", clip, "--projector", root / "nothing.bin"],
            "nothing.bin: no such file",
        ),
        (["--llm", root, "--vision", clip], "it has no config.json"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_folder(tmp_path / "x", *flags)
    assert not (tmp_path / "x" / "config.json").exists()
    with pytest.raises(ValueError, match="python -m checkpoint build --llm"):
        checkpoint.load_model(llama)
