"""Any base that a user may bring: it is built, or one line says what it is and what to do."""

import json
import sys

import pytest
import torch
from conftest import LINES
from test_build import FIRST_LLAVA, SIZES, VISION_SIZES, base_tokenizer
from test_build import write_config as write_json_config

import checkpoint
import tokenizer as tokenizer_module
import train
from checkpoint.__main__ import main
from checkpoint.build import check_rows
from model import XLlava
from tokenizer import Piece, Tokenizer


@pytest.fixture
def folders(tmp_path):
    """(Llama's folder, CLIP's folder): configs, and a tokenizer of 350 pieces for 350 rows."""
    llm, clip = tmp_path / "llm", tmp_path / "clip"
    write_json_config(llm, {**SIZES, "model_type": "llama"})
    write_json_config(clip, {"model_type": "clip", "vision_config": VISION_SIZES})
    base_tokenizer().save(llm / "tokenizer.model")
    return llm, clip


def build(llm, clip, *flags, out="out"):
    """python -m checkpoint build … -o OUT, beside llm. -> OUT."""
    parts = ["--llm", llm, *(["--vision", clip] if clip else [])]
    main(["build", *map(str, [*parts, *flags, "-o", llm.parent / out])])
    return llm.parent / out


def refusal(llm, clip, *flags):
    """The one line with which both the build and its dry run refuse, before they write anything."""
    messages = []
    for dry in ([], ["--dry-run"]):
        with pytest.raises(ValueError) as error:
            build(llm, clip, *flags, *dry)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert not list((llm.parent / "out").glob("*"))
    return messages[0]


# ------------------------------------------------------------------------------------ rows
@pytest.mark.parametrize(
    "rows, pieces",
    [
        (32_000, 32_000),  # Llama-2
        (32_064, 32_002),  # LLaVA-1.5: a multiple of 64
        (32_128, 32_001),  # a multiple of 128
        (384, 350),
        (32_001, 32_000),  # Alpaca: [PAD] is in no file
        (151_936, 151_669),  # Qwen3: room for more
        (152_064, 151_665),  # Qwen2.5-7B: a multiple of 512
    ],
)
def test_a_few_rows_may_be_padding(rows, pieces):
    check_rows(rows, pieces, "x")


@pytest.mark.parametrize(
    "rows, pieces, reason",
    [
        (49_152, 32_000, "17,152 rows without a piece"),  # SmolLM2, Llama-2's tokenizer
        (32_768, 32_000, "768 rows without a piece"),  # Mistral 0.3
        (64_000, 32_000, "32,000 rows without a piece"),  # Yi
        (55_296, 32_000, "23,296 rows without a piece"),  # Chinese-LLaMA-2
        (400, 350, "50 rows without a piece"),
        (32_000, 32_003, "3 without a row"),
        (32_000, 64_000, "32,000 without a row"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_rows_is_refused(rows, pieces, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check_rows(rows, pieces, "the base")
    counts = f"the base: {rows:,} rows in the embeddings, its tokenizer has {pieces:,} pieces"
    assert str(error.value).startswith(counts)


def test_another_models_tokenizer_is_refused_in_a_dry_run_too(folders):
    llm, clip = folders
    write_json_config(llm, {**SIZES, "model_type": "llama", "vocab_size": 1_000})
    told = refusal(llm, clip)
    assert told.startswith(f"{llm}: 1,000 rows") and "650 rows without a piece" in told
    build(llm, clip, "--dry-run", "--padding-rows", 650, out="advice")

    write_json_config(llm, {**SIZES, "model_type": "llama", "vocab_size": 349})
    assert "1 without a row: take the tokenizer of these weights" in refusal(llm, clip)

    # Baichuan-2's added_tokens.json names a piece that the model never had.
    write_json_config(llm, {**SIZES, "model_type": "llama"})
    checkpoint.write_json(llm / "added_tokens.json", {"<pad>": 350})
    told = refusal(llm, clip)
    assert "1 without a row" in told and told.endswith("and tokenizer_config.json")
    (llm / "added_tokens.json").unlink()
    build(llm, clip, "--dry-run", out="advice-2")

    # Merged from another base: the first piece that differs is named, and the advice helps.
    write_json_config(llm, {**SIZES, "model_type": "llama"})
    other = tokenizer_module.train(LINES * 50, 351, split_scripts=False)
    tokenizer_module.merge_vocabularies(other, []).save(llm.parent / "other.model")
    told = refusal(llm, clip, "--tokenizer", llm.parent / "other.model")
    assert f"other.model: it is not the tokenizer of {llm} with pieces appended: piece " in told
    assert f"python tokenizer.py merge {llm} … makes one" in told


def test_merging_a_folder_keeps_what_transformers_files_added(folders, monkeypatch):
    """A LLaVA from Hugging Face has <image> and <pad> behind Llama's pieces, in a JSON file."""
    llm, clip = folders
    write_json_config(llm, {**SIZES, "model_type": "llama", "vocab_size": 384})
    added = {"added_tokens_decoder": {"350": {"content": "<image>"}, "351": {"content": "<pad>"}}}
    checkpoint.write_json(llm / "tokenizer_config.json", added)
    tokenizer_module.train(LINES * 50, 350).save(llm.parent / "alone.model")
    words = llm.parent / "words.txt"
    words.write_text("햄버\n햄버거", encoding="utf-8")

    def merge(base, out):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", "merge", base, str(words), "-o", out])
        tokenizer_module.main()

    merge(str(llm.parent / "alone.model"), str(llm.parent / "wrong.model"))
    told = refusal(llm, clip, "--tokenizer", llm.parent / "wrong.model")
    assert "piece 350 is '햄버', not '<image>'" in told
    merge(str(llm), str(llm.parent / "right.model"))
    out = build(llm, clip, "--dry-run", "--tokenizer", llm.parent / "right.model")
    config, tokenizer = checkpoint.load_config(out), checkpoint.load_tokenizer(out)
    assert (config.image_token_id, config.pad_token_id) == (350, 351)
    assert tokenizer.id("햄버거") == 353 and config.text.vocab_size == 384


# ------------------------------------------------------------------------------- control pieces
def test_an_unreachable_pad_among_the_pieces_of_a_base_keeps_its_row(folders, capsys):
    """Chinese-LLaMA-2: 55,296 rows, and <pad> is one of the ordinary pieces."""
    llm, clip = folders
    pieces = base_tokenizer().pieces
    pieces[300] = Piece("<pad>", 0.0)
    base = Tokenizer(pieces, base_tokenizer().fields)
    assert 300 not in base.sp_processor.encode("<pad> x<pad>")
    base.save(llm / "tokenizer.model")
    out = build(llm, clip, "--dry-run")
    assert checkpoint.load_config(out).pad_token_id == 300
    assert "<pad>: piece 300 of the base becomes a control piece" in capsys.readouterr().out


def test_a_base_that_names_begin_and_end_otherwise_is_built_trained_and_opened_by_transformers(
    folders, world, monkeypatch
):
    llm, clip = folders
    pieces = base_tokenizer().pieces
    for i, name in ((1, "<|start|>"), (2, "<|end|>")):
        pieces[i] = pieces[i]._replace(text=name, raw=b"")
    Tokenizer(pieces, base_tokenizer().fields).save(llm / "tokenizer.model")
    out = build(llm, clip, "--dry-run")
    tokenizer = checkpoint.load_tokenizer(out)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)

    # What it wrote says so, to transformers as well.
    names = checkpoint.read_json(out / "special_tokens_map.json")
    assert (names["bos_token"], names["eos_token"]) == ("<|start|>", "<|end|>")
    template = (out / "chat_template.jinja").read_text(encoding="utf-8")
    assert "'<|end|>'" in template and "</s>" not in template

    # A model of these pieces trains: begin and end are ids, not None.
    config = checkpoint.load_config(out)
    torch.manual_seed(0)
    state = XLlava(config).init_weights().state_dict()
    start = llm.parent / "start"
    checkpoint.write_model(config, state.items(), tokenizer, start)
    argv = ["train.py", "text", "--model", start, "--data", world / "text.txt", "--steps", 1]
    argv += ["-o", llm.parent / "trained", "--batch-size", 2, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    train.main()
    assert checkpoint.load_tokenizer(llm.parent / "trained").eos_piece == "<|end|>"

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(start)
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat", bos=True)
    chat = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "red"}]
    assert theirs.apply_chat_template(chat, tokenize=True, return_dict=False)[-1] == 2


def test_a_base_without_begin_and_end_is_refused_before_anything_is_written(folders):
    llm, clip = folders
    pieces = base_tokenizer().pieces
    for i in (1, 2):
        pieces[i] = Piece(f"<w{i}>", -1e9)
    Tokenizer(pieces, base_tokenizer().fields).save(llm / "tokenizer.model")
    told = refusal(llm, clip)
    assert f"{llm}: no control piece begins a sequence: python tokenizer.py merge {llm} " in told


def test_a_tokenizer_without_image_or_pad_is_sent_to_merge_and_then_fits(folders, monkeypatch):
    llm, clip = folders
    own = llm / "tokenizer.model"
    told = refusal(llm, clip, "--tokenizer", own)
    assert f"{own}: no control piece <image>: python tokenizer.py merge {own} -o NEW.model" in told
    new = str(llm.parent / "new.model")
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "merge", str(own), "-o", new])
    tokenizer_module.main()
    build(llm, clip, "--tokenizer", new, "--dry-run")


# ------------------------------------------------------------------------------------ dry runs
def test_a_dry_run_leaves_what_an_estimate_needs_and_nothing_else_takes_it_for_a_model(
    folders, world, monkeypatch, capsys
):
    out = build(*folders, "--dry-run")
    capsys.readouterr()
    argv = ["train.py", "instruct", "--model", out, "--data", world / "chats.json"]
    argv += ["-o", out.parent / "trained", "--batch-size", 4, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--estimate", "2", "--gpu", "L4"])
    train.main()
    told = capsys.readouterr().out
    assert "hours on 2 × L4" in told and "fits on a L4 of 24 GiB" in told

    reason = f"{out}: no weights: build --dry-run wrote it, for --estimate only"
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    for use in (train.main, lambda: main(["show", str(out)]), lambda: checkpoint.load_model(out)):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value).startswith(reason) and "\n" not in str(error.value)


def test_a_dry_run_of_a_llava_as_first_published_needs_its_vision_encoder(folders):
    llm, clip = folders
    write_json_config(llm, FIRST_LLAVA)
    assert checkpoint.load_config(build(llm, clip, "--dry-run")).image_aspect_ratio == "pad"
    for change, reason in (
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', supported: 'pad', 's"),
        ({"mm_projector_type": None}, "mm_projector_type is 'linear', supported: 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, supported: False"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints is [[336, 672]]"),
        ({"s2_scales": "336,672"}, "s2_scales is '336,672', which may change the model"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but"),
    ):
        write_json_config(llm, FIRST_LLAVA | change)
        with pytest.raises(ValueError) as error:
            build(llm, clip, "--dry-run", out="other")
        assert str(error.value).startswith(f"{llm / 'config.json'}: {reason}")

    # Without the field, LLaVA's own code crops.
    write_json_config(llm, {k: v for k, v in FIRST_LLAVA.items() if k != "image_aspect_ratio"})
    out = build(llm, clip, "--dry-run", out="square")
    assert checkpoint.load_config(out).image_aspect_ratio == "square"


def test_a_vision_encoder_whose_pixels_are_normalised_otherwise_is_refused(folders):
    llm, clip = folders
    settings = {"image_mean": [0.5, 0.5, 0.5], "size": {"shortest_edge": 16}}
    checkpoint.write_json(clip / "preprocessor_config.json", settings)
    assert "preprocessor_config.json: image_mean is [0.5, 0.5, 0.5]" in refusal(llm, clip)


# ------------------------------------------------------------------------------------ other files
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476839424\n"
NO_CONFIG = "not a model folder: "
OTHERS = {
    "adapter_config.json": (NO_CONFIG + "adapters (LoRA) without their base", "merge_and_unload"),
    "ggml-model-q4_0.gguf": (NO_CONFIG + "GGUF is llama.cpp's format", "original safetensors"),
    "params.json": (NO_CONFIG + "Meta's own files", "-hf folder"),
    "nothing.txt": (NO_CONFIG + "it has no config.json", ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_kind_is_called_what_it_is(folders, name):
    llm, clip = folders
    (llm / "config.json").unlink()
    (llm / name).write_text("{}", encoding="utf-8")
    what, advice = OTHERS[name]
    told = refusal(llm, clip)
    assert told.startswith(f"{llm}: {what}") and advice in told
    with pytest.raises(ValueError, match="not a model folder"):
        checkpoint.load_model(llm)


def test_a_file_in_place_of_a_folder_is_called_what_it_is(folders):
    llm, clip = folders
    for name, reason in (
        ("model.gguf", "GGUF is llama.cpp's format"),
        ("model.safetensors", "it is a file, not the folder with config.json"),
    ):
        (llm.parent / name).write_bytes(b"GGUF")
        assert f"{name}: not a model folder: {reason}" in refusal(llm.parent / name, clip)


def weights_error(llm, clip):
    """The one line with which a build ends when it reads the weights."""
    with pytest.raises(ValueError) as error:
        build(llm, clip)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_are_missing_or_stand_for_others_are_called_what_they_are(folders):
    llm, clip = folders
    assert f"{llm}: no weights: none of model.safetensors, " in weights_error(llm, clip)
    (llm / "model-00001-of-00002.safetensors").write_bytes(b"")
    told = weights_error(llm, clip)
    assert told.endswith("none of model.safetensors.index.json, pytorch_model.bin.index.json")
    (llm / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert f"{llm}: no weights: adapters (LoRA)" in weights_error(llm, clip)

    # An index whose files are not all there, then pointers in their place.
    files = [f"model-{i:05}-of-00020.safetensors" for i in range(1, 21)]
    index = {"weight_map": {f"t{i}": file for i, file in enumerate(files)}}
    checkpoint.write_json(llm / "model.safetensors.index.json", index)
    (llm / files[0]).write_text(POINTER, encoding="utf-8")
    told = weights_error(llm, clip)
    assert "index.json: 19 of 20 files are missing, copy them there: model-00002-of" in told
    assert told.endswith("model-00009-of-00020.safetensors and 11 more")
    for file in files:
        (llm / file).write_text(POINTER, encoding="utf-8")
    assert f"{llm / files[0]}: a Git LFS pointer, not the file; " in weights_error(llm, clip)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    "content, reason",
    [
        (POINTER, "a Git LFS pointer, not the file; `git lfs pull` fetches it"),
        ("<!DOCTYPE html>\n<html>…", "a web page, not the file; log in"),
        ("Entry not found", "a web page, not the file; log in"),
    ],
)
def test_what_was_downloaded_in_place_of_a_file_is_called_what_it_is(
    folders, name, content, reason
):
    llm, clip = folders
    (llm / name).write_text(content, encoding="utf-8")
    assert weights_error(llm, clip).startswith(f"{llm / name}: {reason}")
    for other in ("config.json", "tokenizer.model"):
        (llm / other).write_text(content, encoding="utf-8")
        assert refusal(llm, clip).startswith(f"{llm / other}: {reason}")
        base_tokenizer().save(llm / "tokenizer.model")
        write_json_config(llm, {**SIZES, "model_type": "llama"})


def test_quantised_weights_are_refused_in_the_config(folders):
    llm, clip = folders
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    write_json_config(llm, {**SIZES, "model_type": "llama", **quantised})
    told = refusal(llm, clip)
    assert "quantization_config is {'quant_method': 'gptq'" in told
    assert told.endswith("quantised weights are not read: take those that were quantised")


def test_a_pytorch_bin_alone_is_read(folders):
    llm, clip = folders
    (llm / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert f"{llm / 'pytorch_model.bin'}: can't be read as weights" in weights_error(llm, clip)
    assert json.loads((llm / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
