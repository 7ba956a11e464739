"""`python tokenizer.py bench`: time and memory of training a BPE, here and with the libraries."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

TOKENIZER = Path(__file__).resolve().parent.parent / "tokenizer.py"

# Library -> the Python lines that train the same vocabulary, given file, size and out.
PEERS = {
    "sentencepiece": """
import sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=file, model_prefix=out, vocab_size=size, model_type="bpe", character_coverage=0.9995,
    split_digits=True, byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, num_threads=1)""",
    "tokenizers": """
from tokenizers import Tokenizer, models, pre_tokenizers as pre, trainers
tokenizer = Tokenizer(models.BPE(byte_fallback=True))
tokenizer.pre_tokenizer = pre.Sequence([pre.Metaspace(), pre.Digits(individual_digits=True)])
tokenizer.train([file], trainers.BpeTrainer(
    vocab_size=size, max_token_length=16, show_progress=False))""",
}


def run_measured(command: list[str], errors: BinaryIO) -> tuple[int, str]:
    """Run a command on one thread -> (exit status, its time and memory in words). What it says on
    stderr goes into the file `errors`."""
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"
    one_thread = dict.fromkeys(names, "1")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": errors}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | one_thread, **quiet)
    if not hasattr(os, "wait4"):  # Windows
        status = process.wait()
        return status, f"{time.perf_counter() - start:6.1f} seconds"

    # macOS counts memory in bytes, Linux in units of 1,024.
    _, status, usage = os.wait4(process.pid, 0)
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = usage.ru_utime + usage.ru_stime
    return status, f"{seconds:6.1f} CPU-seconds, {memory:5.0f} MB at most"


def bench(file: str, vocab_size: int) -> None:
    """Train on one text with tokenizer.py and each installed library, one after the other. Says why
    one fails, and ends with status 1 then."""
    failed = False
    print(f"{os.path.getsize(file) / 1e6:.1f} MB of text, {vocab_size:,} pieces")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "bench")
        options = ["train", file, "--vocab-size", str(vocab_size), "-o", out]
        commands = {"tokenizer.py": [str(TOKENIZER), *options]}
        settings = f"file, size, out = {file!r}, {vocab_size}, {out!r}"
        commands |= {name: ["-c", settings + code] for name, code in PEERS.items()}

        for name, command in commands.items():
            if name in PEERS and importlib.util.find_spec(name) is None:
                print(f"{name:14} not installed, skipped")
                continue
            with open(os.path.join(folder, "errors"), "w+b") as errors:
                status, cost = run_measured([sys.executable, *command], errors)
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            print(f"{name:14} {cost}" + (f", FAILED: {reason}" if status else ""))
            failed |= status != 0
    if failed:
        sys.exit(1)
