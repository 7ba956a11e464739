"""How likely the model finds the reference answers, and plain text.

    python -m evaluation likelihood --model out/demo/instruct --data unseen_images.json

Perplexity is per token; bits per byte also compare models of different vocabularies. Beside it:
the model without the image (blind), and chance: all tokens equally likely.
"""

import math
from pathlib import Path

import numpy as np
import torch

import data
from evaluation.batching import (
    Batcher,
    add_model_arguments,
    add_question_arguments,
    question_options,
)
from evaluation.questions import Question, read_questions, reference_answer
from evaluation.scores import count_languages, metric_rows
from evaluation.tables import show_results
from generate import load_for_inference
from model import IGNORE_INDEX
from vocabulary import flags
from vocabulary.chat_markers import encode_answer
from vocabulary.files import read_lines

LIKELIHOOD = (
    ("nll", "tokens", "bytes"),  # nll: negative log-likelihood
    {
        "perplexity": lambda sums: np.exp(sums[..., 0] / sums[..., 1]),
        "bits per byte": lambda sums: sums[..., 0] / sums[..., 2] / math.log(2),
    },
)


@torch.inference_mode()
def log_likelihoods(model, samples, batcher):
    """log P(answer | prompt, images) of each sample: (prompt ids, image paths, answer ids)."""
    results = np.zeros(len(samples))
    lengths = [len(prompt) + len(answer) for prompt, _, answer in samples]
    for indices in batcher.batches(lengths, [paths for _, paths, _ in samples]):
        log_probs, rows = target_log_probs(model, [samples[i] for i in indices], batcher)

        # Sums in float64, which MPS devices lack: on the CPU.
        sums = torch.zeros(len(indices), dtype=torch.float64)
        results[indices] = sums.index_add_(0, rows.cpu(), log_probs.cpu().double())
    return results


def target_log_probs(model, samples, batcher):
    """The log-probabilities of a batch's answer tokens, float32 (n,), and their samples (n,)."""
    sequences = [
        data.Sample(prompt + answer, [0] * len(prompt) + [1] * len(answer), [])
        for prompt, _, answer in samples
    ]
    batch = data.collate(sequences, model.config.pad_token_id)
    ids, targets = (batch[key].to(batcher.device) for key in ("ids", "targets"))
    pixels, image_indices = batcher.load_images([paths for _, paths, _ in samples])
    with batcher.autocast():
        x = model.decoder.embed_tokens(ids)  # (B, T, C)
        if pixels is not None:
            # Each image is encoded once, however many samples show it.
            features = model.encode_images(pixels)[sum(image_indices, [])]
            image_mask = (ids == model.config.image_token_id)[..., None]
            x = x.masked_scatter(image_mask, features.to(x.dtype))

        is_target = targets != IGNORE_INDEX
        logits = model.logits(model.decoder(x)[is_target])  # (n, V)
    log_probs = logits.log_softmax(-1).gather(1, targets[is_target][:, None])[:, 0]
    return log_probs, is_target.nonzero()[:, 0]


def likelihood_rows(questions, log_probs, num_tokens, vocab_size):
    """Rows of perplexity and bits per byte. log_probs: {model: of each reference}. They and
    num_tokens include </s>; bytes are those of the text."""
    log_probs["chance"] = [-count * math.log(vocab_size) for count in num_tokens]
    num_bytes = [len(reference_answer(q).encode()) for q in questions]
    rows = []
    for model, values in log_probs.items():
        columns = zip([-value for value in values], num_tokens, num_bytes)
        scores = [dict(zip(LIKELIHOOD[0], column)) for column in columns]
        rows += metric_rows(model, questions, scores, [LIKELIHOOD])

    # With one language, "all" would be the same again.
    num_languages = count_languages(questions)
    return [row for row in rows if row["language"] != "all" or num_languages[row["split"]] > 1]


def make_batcher(model, samples, args):
    longest = max(len(prompt) + len(answer) for prompt, _, answer in samples)
    return Batcher(model, args.precision, args.batch_size, longest)


def measure(model, questions, samples, args):
    """The rows of questions. samples: {model name: of log_likelihoods}."""
    batcher = make_batcher(model, sum(samples.values(), []), args)
    log_probs = {name: log_likelihoods(model, own, batcher) for name, own in samples.items()}
    num_tokens = [len(answer) for _, _, answer in samples["full"]]
    return likelihood_rows(questions, log_probs, num_tokens, model.config.text.vocab_size)


def measure_questions(model, tokenizer, args):
    """The rows of --data, with the images and without them."""
    questions = read_questions(
        args.data, tokenizer, model.config, with_reference=True, **question_options(args)
    )
    samples = {"full": [], "blind": []}
    for q in questions:
        answer = encode_answer(reference_answer(q), tokenizer)
        samples["full"].append((q.prompt, q.image_paths, answer))
        samples["blind"].append((q.blind_prompt, [], answer))
    return measure(model, questions, samples, args)


def measure_text(model, tokenizer, path, args):
    """The rows of a text file, without images."""
    max_length = model.config.text.max_position_embeddings
    name, questions, samples = Path(path).stem, [], []
    for text in filter(None, map(str.strip, read_lines([path]))):
        # A long one is cut; each part begins with the last token of the one before.
        document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(document) - 1, max_length - 1):
            ids = document[start : start + max_length]
            samples.append((ids[:1], [], ids[1:]))
            truth = tokenizer.decode(ids)
            questions.append(Question(name, len(questions), name, "text", "", truth))
    if not samples:
        raise ValueError(f"{path}: no text")
    return measure(model, questions, {"full": samples}, args)


def add_arguments(parser):
    add_model_arguments(parser, needs_data=False)
    add_question_arguments(parser)
    about = "documents, one a line; a file's name is its language"
    file = {"type": flags.file, "metavar": "FILE"}
    parser.add_argument("--text", nargs="+", **file, default=[], help=about)


def run(args):
    if not args.data and not args.text:
        raise ValueError("give --data, --text or both")
    model, tokenizer = load_for_inference(args.model, args.device, args.precision)
    rows = measure_questions(model, tokenizer, args) if args.data else []
    for path in args.text:
        rows += measure_text(model, tokenizer, path, args)
    show_results({"model": args.model, "likelihood": rows}, args.out)
