"""demo.expand on a tiny base: three models of equal compute, and a table of bits per byte."""

import json
import sys
from importlib import import_module

import pytest
from bpe_models import ENGLISH, KOREAN, byte_level_model
from training_helpers import write_random_model

import checkpoint
from checkpoint.safetensors import load_weights, save_safetensors
from demo import expand
from model import DecoderConfig, ModelConfig
from vision import VisionConfig
from vocabulary.extend import learn_pieces


@pytest.fixture
def words(tmp_path):
    """The command line: a byte-level Llama and a CLIP with random weights, and texts."""
    tokenizer = byte_level_model("SmolLM2")
    tokenizer = tokenizer.with_pieces(learn_pieces(tokenizer, ENGLISH, 20, foreign_only=False))
    with_roles = tokenizer.with_control(["<image>", "<pad>"])
    config = ModelConfig(
        VisionConfig(16, 8, 16, 32, 2, 2),
        DecoderConfig(with_roles.vocab_size, 32, 48, 2, 4, 2, 8, max_position_embeddings=256),
        image_token_id=with_roles.image_id,
        pad_token_id=with_roles.pad_id,
    )
    whole = write_random_model(config, with_roles, tmp_path / "whole")

    # The parts, as they are published.
    written = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    weights = load_weights(whole)
    for name, key, prefix in (
        ("llm", "text_config", "language_model."),
        ("clip", "vision_config", "vision_tower."),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(written[key]), encoding="utf-8")
        own = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
        save_safetensors({k: (x.dtype, x.shape) for k, x in own.items()}, own.items(), folder)
    with_roles.save(tmp_path / "llm" / "tokenizer.json")

    texts = {"ko.txt": KOREAN, "ko-unseen.txt": KOREAN[:2], "en-unseen.txt": ENGLISH[:3]}
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [str(tmp_path / name) for name in texts]
    flags = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "clip"), "--text", files[0]]
    flags += ["--unseen", *files[1:], "--pieces", "20", "--steps", "2", "--precision", "fp32"]
    return [*flags, "--out", str(tmp_path / "run")]


def test_three_models_of_equal_compute_and_a_table(words, tmp_path, monkeypatch, capsys):
    commands = []

    def run_here(command):
        commands.append(command)
        module = command[1] + ".__main__" if command[0] == "-m" else command[0].removesuffix(".py")
        monkeypatch.setattr(sys, "argv", command[1:] if command[0] == "-m" else command)
        import_module(module).main()
        return 0

    expand.main(words, run_here)
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0] == (
        "| model | tokens | ko-unseen: before | after | en-unseen: before | after |"
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]
    assert [row[0] for row in rows] == ["base", "mean", "random"]
    assert all(len(row) == 6 and "–" in row[5] for row in rows)
    # Random weights find all tokens about equally likely: log2 of the pieces, for each token.
    assert float(rows[0][2].split()[0]) > float(rows[1][2].split()[0])

    # FLOPs of a step, by hand: 6 a weight and token (the head's table counts, the input's doesn't).
    flops = {}
    for command in commands:
        if command[0] == "train.py":
            name = command[-1].rpartition("/")[2].rpartition("\\")[2]
            batch = int(command[command.index("--batch-size") + 1])
            tokenizer = checkpoint.load_tokenizer(tmp_path / "run" / f"{name}.start")
            tokens = sum(len(tokenizer.encode(line)) + 2 for line in KOREAN) / len(KOREAN)
            block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
            flops[name] = batch * tokens * (2 * block + 32 * tokenizer.vocab_size)
    assert flops["mean"] == flops["random"] == pytest.approx(flops["base"], rel=0.1)

    # What is done is not done again.
    expand.main(words, lambda command: pytest.fail(f"ran {command}"))
    assert capsys.readouterr().out.splitlines()[-4:] == table
