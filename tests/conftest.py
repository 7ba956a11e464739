"""What several tests share: a throw-away tokenizer, a tiny model shape and a tiny data set.

Without a GPU the Triton kernels run in Triton's interpreter. It must be asked for before triton is
imported."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

# The interpreter multiplies with numpy: on small tiles, threads make it 5 to 13 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Commands that a test starts write UTF-8, whatever the machine's locale.
os.environ.pop("PYTHONIOENCODING", None)
os.environ["PYTHONUTF8"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

import checkpoint  # noqa: E402
import tokenizer as tokenizer_module  # noqa: E402
from model import DecoderConfig, ModelConfig, XLlava  # noqa: E402
from training.resume import STOP_SIGNALS  # noqa: E402
from vision import VisionConfig  # noqa: E402

LINES = [
    "What colour is the cat? red",
    "USER: ASSISTANT: the blue dog is left of a big red cat",
    "고양이는 무슨 색인가요? 빨간색",
    "파란 개는 왼쪽에 있어요",
    "猫是什么颜色？红色",
    "蓝色的狗在左边",
]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training in this process takes the signals over. Worker processes of a later test would
    inherit that, and never end."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    for number, handler in zip(STOP_SIGNALS, before):
        signal.signal(number, handler or signal.SIG_DFL)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs `python WORDS` in this process: (exit status, what it wrote to stderr). To start Python
    and torch anew takes three to five seconds."""

    def run(*words):
        if words[0] == "-m":
            words = [Path(__file__).parent.parent / words[1] / "__main__.py", *words[2:]]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    base = tokenizer_module.train(LINES * 50, 350)
    tokenizer_module.merge_vocabularies(base, []).save(folder / "tokenizer.model")
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return tokenizer_module.Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="session")
def config(tokenizer):
    """16-pixel images of 4 patches; grouped queries; nothing tied."""
    return ModelConfig(
        VisionConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        DecoderConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, max_position_embeddings=256),
        vision_feature_layer=-2,
        image_token_id=tokenizer.image_id,
        pad_token_id=tokenizer.pad_id,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with 12 one-coloured images and the three kinds of file that training reads."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    captions, chats, texts = [], [], []
    for i in range(12):
        colour = ("red", "blue")[i % 2]
        pixels = np.full(
            (20, 24, 3), (220, 30, 30) if colour == "red" else (30, 30, 220)
        ) + rng.integers(-20, 20, (20, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        human = lambda text: {"from": "human", "value": text}
        gpt = lambda text: {"from": "gpt", "value": text}
        captions.append(
            {
                "id": f"c{i}",
                "image": f"{i}.png",
                "conversations": [
                    human("<image>\nDescribe it."),
                    gpt(f"a {colour} cat, {colour}, number {i}"),
                ],
            }
        )
        chats.append(
            {
                "id": f"q{i}",
                "image": f"{i}.png",
                "language": "en",
                "kind": "object",
                "conversations": [
                    human("<image>\nWhat colour is the cat?"),
                    gpt(colour),
                    human("And what " + "is it " * (i % 4) + "?"),
                    gpt("a cat"),
                ],
            }
        )
        if i % 3 == 0:
            chats.append(
                {
                    "id": f"t{i}",
                    "language": "ko",
                    "kind": "text",
                    "conversations": [human("고양이는 무슨 색인가요?"), gpt("빨간색")],
                }
            )
        texts.append(LINES[i % len(LINES)] * (1 + i % 3))
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    (folder / "chats.json").write_text(json.dumps(chats, ensure_ascii=False), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def save_model(model, tokenizer_file, folder, dtype=torch.float32):
    """Writes a whole model as a folder."""
    checkpoint.write_model(model.config, model.state_dict().items(), tokenizer_file, folder, dtype)


@pytest.fixture
def saved_model(config, tokenizer_file, tmp_path):
    """(a random model, the folder that it was saved to)."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    save_model(model, tokenizer_file, tmp_path / "m")
    return model, tmp_path / "m"


@pytest.fixture(scope="module")
def start(tmp_path_factory, config, tokenizer_file):
    """A model folder with random weights."""
    from training_helpers import write_random_model

    return write_random_model(config, tokenizer_file, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def train_here(start, world, tmp_path, monkeypatch, capsys):
    """Runs train.py in this process."""
    from training_helpers import TrainHere

    return TrainHere(start, world, tmp_path, monkeypatch, capsys)
