"""How likely the model finds the reference answers, and plain text.

    python -m evaluation likelihood --model out/demo/instruct --data unseen_images.json

Perplexity is per token; bits per byte also compare models of different vocabularies. Beside it:
the model without the image (blind), and chance, where all tokens are equally likely.
"""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from evaluation.batching import Batcher, add_model_arguments, add_question_arguments
from evaluation.metrics import write_results
from evaluation.questions import Question, read_questions, reference_answer
from evaluation.scores import count_languages, metric_rows
from evaluation.tables import print_results
from generate import load_for_inference
from model import IGNORE_INDEX
from vocabulary.records import decode_line

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
    results = [0.0] * len(samples)
    lengths = [len(prompt) + len(answer) for prompt, _, answer in samples]
    batches = batcher.batches(lengths, [paths for _, paths, _ in samples])
    for indices in tqdm(batches, desc="likelihood", unit="batch", disable=None):
        log_probs, rows = target_log_probs(model, [samples[i] for i in indices], batcher)

        # Sums in float64, which MPS devices lack: on the CPU.
        sums = torch.zeros(len(indices), dtype=torch.float64)
        sums.index_add_(0, rows.cpu(), log_probs.cpu().double())
        for i, value in zip(indices, sums.tolist()):
            results[i] = value
    return results


def target_log_probs(model, samples, batcher):
    """The log-probabilities of a batch's answer tokens, float32 (n,), and their samples (n,)."""
    sequences = [
        data.Sample(prompt + answer, [0] * len(prompt) + [1] * len(answer), [])
        for prompt, _, answer in samples
    ]
    batch = data.collate(sequences, model.config.pad_token_id)
    ids, targets = batch["ids"].to(batcher.device), batch["targets"].to(batcher.device)
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
    """Rows of perplexity and bits per byte. log_probs: {model: of each reference}. num_tokens: of
    each reference. Both include </s>; bytes are those of the text."""
    log_probs["chance"] = [-count * math.log(vocab_size) for count in num_tokens]
    num_bytes = [len(reference_answer(question).encode()) for question in questions]

    rows = []
    for model, values in log_probs.items():
        scores = [
            {"nll": -value, "tokens": tokens, "bytes": size}
            for value, tokens, size in zip(values, num_tokens, num_bytes)
        ]
        rows += metric_rows(model, questions, scores, [LIKELIHOOD])

    # With one language, "all" would be the same again.
    num_languages = count_languages(questions)
    return [row for row in rows if row["language"] != "all" or num_languages[row["split"]] > 1]


def measure(model, questions, samples, args):
    """The rows of these questions. samples: {model name: samples of log_likelihoods}."""
    longest = max(len(p) + len(a) for own in samples.values() for p, _, a in own)
    batcher = Batcher(model, args.precision, args.batch_size, longest)
    log_probs = {name: log_likelihoods(model, own, batcher) for name, own in samples.items()}
    num_tokens = [len(answer) for _, _, answer in samples["full"]]
    return likelihood_rows(questions, log_probs, num_tokens, model.config.text.vocab_size)


def measure_questions(model, tokenizer, args):
    """The rows of --data, with the images and without them."""
    questions = read_questions(
        args.data, tokenizer, model.config, args.images, args.annotations, args.suffix
    )
    samples = {"full": [], "blind": []}
    for question in questions:
        answer = [*tokenizer.encode(reference_answer(question)), tokenizer.eos_id]
        samples["full"].append((question.prompt, question.image_paths, answer))
        samples["blind"].append((question.blind_prompt, [], answer))
    return measure(model, questions, samples, args)


def measure_text(model, tokenizer, path, args):
    """The rows of a text file. There is no image, so there is no blind row."""
    max_length = model.config.text.max_position_embeddings
    documents = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        text = decode_line(line, path, number)
        if text:
            # A long one becomes several; each begins with the last token of the one before.
            ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            starts = range(0, len(ids) - 1, max_length - 1)
            documents += [ids[start : start + max_length] for start in starts]
    if not documents:
        raise ValueError(f"{path}: no text")

    name, questions = Path(path).stem, []
    for i, ids in enumerate(documents):
        text = tokenizer.decode(ids)
        questions.append(Question(name, i, language=name, kind="text", question="", truth=text))
    samples = {"full": [(ids[:1], [], ids[1:]) for ids in documents]}
    return measure(model, questions, samples, args)


def add_arguments(parser):
    add_model_arguments(parser, needs_data=False)
    add_question_arguments(parser)
    parser.add_argument(
        "--text", nargs="+", default=[], help="documents, one a line; a file's name is its language"
    )


def run(args):
    if not args.data and not args.text:
        raise ValueError("give --data, --text or both")
    model, tokenizer = load_for_inference(args.model, args.device)
    rows = []
    if args.data:
        rows += measure_questions(model, tokenizer, args)
    for path in args.text:
        rows += measure_text(model, tokenizer, path, args)

    results = {"model": args.model, "likelihood": rows}
    print_results(results)
    if args.out:
        write_results(args.out, results)
