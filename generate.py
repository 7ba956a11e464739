"""Answers questions about images: one question, a chat, or a file of questions one by one.

Reading order: tokenizer → vision → model → data → train → **generate**.
Prompts and training samples both come from `data.encode_chat`.

    python generate.py --model out/demo/instruct --image photo.jpg "What is at the top left?"
    python generate.py --model out/demo/instruct --image photo.jpg --chat
    python generate.py --model out/demo/instruct --batch questions.json -o answers.jsonl

A streamed text has whole characters only: a Hangul syllable may be three tokens. What a user types
is plain text, "<image>" too.

Dimensions: B prompts, T tokens of the longest prompt, C width, V vocabulary, I images.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import vision
from checkpoint import load_config, load_model, load_tokenizer, require_fit
from kernels.device import DEVICES, pick_device, pick_precision
from model import KVCache
from tokenizer import StreamDecoder
from vocabulary import flags
from vocabulary.command import Parser, enable_line_editing, run_main
from vocabulary.conversations import leave_out, read_conversations, record_id, record_name
from vocabulary.files import lock_file
from vocabulary.identity import claim_run, describe_files, describe_images, describe_model
from vocabulary.records import read_complete_lines


# ---------------- generation
class Sampling(NamedTuple):
    """How the next token is chosen (nucleus sampling, arXiv 1904.09751)."""

    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities add up to this
    generator: torch.Generator | None = None
    vocab_size: int | None = None  # the number of pieces: rows of the table behind them are padding


@torch.inference_mode()
def generate(
    model, prompts, pixels=None, max_new_tokens=128, eos_id=2, image_indices=None, **sampling
):
    """Yields the answers to B prompts token by token: lists of B ids, None from an answer's
    eos on.

    prompts: B lists of ids. pixels: their images in reading order, uint8 (I, 3, S, S), or None.
    image_indices: B lists of indices into `pixels`, for prompts that share images.
    sampling: the fields of Sampling."""
    choice = Sampling(**sampling)
    B, T = len(prompts), max(map(len, prompts))

    # At first there is room for a short answer.
    size = T + min(max_new_tokens, 16)
    cache, hidden = prefill(model, prompts, pixels, image_indices, size)
    prompt_of_row = list(range(B))  # the prompt of each cache row; None: its answer has ended

    for n in range(1, max_new_tokens + 1):
        new_ids = sample_tokens(model.logits(hidden), choice)

        step = [None] * B
        for row, token in enumerate(new_ids.tolist()):
            if token == eos_id:
                prompt_of_row[row] = None
            elif prompt_of_row[row] is not None:
                step[prompt_of_row[row]] = token
        yield step

        running = [row for row, prompt in enumerate(prompt_of_row) if prompt is not None]
        if not running or n == max_new_tokens:
            return

        # Grow a full cache. Rows of ended answers leave it, a quarter at a time.
        is_full = T + n > cache.size
        if is_full or len(running) < 0.75 * len(prompt_of_row):
            size = cache.size + 32 if is_full else cache.size
            cache = select_cache_rows(cache, running, size, model.config.text)
            new_ids, prompt_of_row = new_ids[running], [prompt_of_row[row] for row in running]

        # One new token per row, (rows, 1) -> (rows, C).
        hidden = model(new_ids[:, None], cache=cache)[:, 0]
        cache.lengths = cache.lengths + 1


def prefill(model, prompts, pixels, image_indices, size):
    """Runs the prompts through the model: (cache for `size` tokens per row, last hidden states
    (B, C)). Prompts are padded on the right. No query attends to padding: a row's length in the
    cache is its prompt's, and the answer overwrites the padding after it."""
    config, device = model.config, model.device
    dtype = model.decoder.norm.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)

    prefix = shared_prefix_length(prompts, image_indices, config) if image_indices else 0
    if prefix:
        # Run the shared prefix once per image, then copy its keys and values to each prompt.
        first = list(dict.fromkeys(indices[0] for indices in image_indices))
        cache = KVCache(config.text, len(first), prefix, device, dtype)
        model(ids[:1, :prefix].expand(len(first), prefix), pixels[first], cache=cache)
        cache.lengths = cache.lengths + prefix
        source = [first.index(indices[0]) for indices in image_indices]
        cache = select_cache_rows(cache, source, size, config.text)
        image_indices = [indices[1:] for indices in image_indices]
    else:
        cache = KVCache(config.text, len(prompts), size, device, dtype)

    # The rest of all prompts in one batch, with the images that are left.
    if image_indices:
        flat = [index for indices in image_indices for index in indices]
        pixels = pixels[flat] if flat else None
    hidden = model(ids[:, prefix:], pixels, cache=cache)
    cache.lengths = lengths
    last = torch.arange(len(prompts), device=device), lengths - prefix - 1
    return cache, hidden[last]  # (B, T, C) -> (B, C)


def shared_prefix_length(prompts, image_indices, config):
    """The number of ids up to the end of the first image, if all prompts begin with the same ids
    and at least two share the image; else 0. Data sets ask many questions about each image."""
    first_images = {indices[0] for indices in image_indices if indices}
    if not all(image_indices) or len(first_images) == len(prompts):
        return 0
    end = prompts[0].index(config.image_token_id) + config.vision.num_patches
    return end if all(prompt[:end] == prompts[0][:end] for prompt in prompts) else 0


def select_cache_rows(cache, rows, size, config):
    """A cache for `size` tokens per row with these rows of `cache`, each any number of times."""
    selected = KVCache(config, len(rows), size, cache.k.device, cache.k.dtype)
    n = min(size, cache.size)
    selected.k[:, :, :n] = cache.k[:, rows, :n]
    selected.v[:, :, :n] = cache.v[:, rows, :n]
    selected.lengths = cache.lengths[rows]
    return selected


def sample_tokens(logits, sampling):
    """logits (rows, V) -> ids (rows,), chosen as `sampling` says."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature < 1e-3:  # a quotient would overflow, and draw the same
        return logits.argmax(dim=-1)

    p, order = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # A token stays if those before it have less than top_p. The first one always does.
    is_dropped = p.cumsum(dim=-1) - p >= sampling.top_p
    is_dropped[:, 0] = False
    p[is_dropped] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=sampling.generator))[:, 0]


# ---------------- answers
def answer_batch(model, tokenizer, prompts, pixels=None, **options):
    """The answers to B prompts, as texts. Options: those of `generate`."""
    answers = [[] for _ in prompts]
    options |= {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    for step in generate(model, prompts, pixels, **options):
        for answer, token in zip(answers, step):
            if token is not None:
                answer.append(token)
    return [tokenizer.decode(ids).strip() for ids in answers]


def stream_answer(model, tokenizer, turns, pixels=None, **options):
    """Yields pieces of the answer to the last question of `turns` (see data.encode_chat)."""
    prompt, _ = data.encode_chat(turns, tokenizer, model.config.vision.num_patches)
    for _, piece in stream_tokens(model, tokenizer, prompt, pixels, **options):
        yield piece


def stream_tokens(model, tokenizer, prompt, pixels=None, **options):
    """Yields (id, the text that it completes) for each token of the answer to a prompt. At the end
    (eos_id, the text that is left), or (None, …) if the answer was cut off."""
    limit = model.config.text.max_position_embeddings
    if len(prompt) >= limit:
        length = f"the conversation has {len(prompt)} tokens"
        raise ValueError(f"{length}, the model reads {limit}: start a new one")

    options["max_new_tokens"] = min(options.get("max_new_tokens", 128), limit - len(prompt))
    # Tokens of one byte are held back until their character is complete.
    decoder = StreamDecoder(tokenizer)
    options |= {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    for (token,) in generate(model, [prompt], pixels, **options):
        if token is not None:
            yield token, decoder.push(token)
    yield tokenizer.eos_id if token is None else None, decoder.flush()


def question_parts(question, num_images):
    """A typed question as `encode_chat` takes it: images, a line break, the text."""
    if not question.strip():
        raise ValueError("the question is empty")
    return [""] * num_images + ["\n" + question.strip()] if num_images else question.strip()


def load_for_inference(folder, device="auto", precision="auto"):
    """(model, tokenizer) of a model folder. precision "auto": bf16 on a GPU that has it. On other
    devices the weights are fp32, whatever the precision of products."""
    device = pick_device(device)
    dtype = pick_precision(precision, device) if device.type == "cuda" else torch.float32
    tokenizer = load_tokenizer(folder)
    require_fit(load_config(folder), tokenizer, folder)
    return load_model(folder, dtype).to(device).eval(), tokenizer


# ---------------- command line
def answer_file(model, tokenizer, args, options):
    """Answers the first question of each record of a LLaVA file. A second run continues where the
    first one stopped."""
    # All records are checked before the first is answered.
    config, folder = model.config, Path(args.images or Path(args.batch).parent)
    load_image = data.ImageCache(config.vision.image_size, config.image_aspect_ratio)
    questions = read_batch(args, tokenizer, config, folder, load_image)
    images = [path for *_, paths in questions for path in paths]
    claim_run(args.out, batch_identity(args, images), fresh=args.fresh)
    source = {"model": args.model, "data": args.batch}

    # A record that was left out has no line: what is done is known by its number.
    done = {json.loads(line)["index"] for line in read_complete_lines(args.out)}
    left = [row for row in questions if row[0] not in done]
    bar = {"initial": len(questions) - len(left), "total": len(questions), "unit": "question"}
    with open(args.out, "a", encoding="utf-8", errors="backslashreplace") as file:
        lock_file(file, args.out)
        for i, number, question, paths in tqdm(left, **bar):
            # Draws of their own: they don't depend on where the first run stopped.
            options["generator"].manual_seed(random.Random(f"{args.seed} {i}").getrandbits(63))
            pixels = list(map(load_image, paths))
            pixels = torch.stack(pixels).to(model.device) if pixels else None
            pieces = stream_answer(model, tokenizer, [(question, None)], pixels, **options)
            answer = "".join(pieces).strip()
            row = {**source, "index": i, "id": number, "answer": answer}
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


def read_batch(args, tokenizer, config, folder, load_image):
    """[(number, id, first question, its images' paths)] of the records of --batch. What can't be
    answered is left out, or ends the run, as --bad-samples says."""
    bad, questions = [], []
    for number, record, conversation in read_conversations(args.batch, bad, needs_answers=False):
        question = conversation.turns[0][0]
        paths = [folder / name for name in conversation.images[: len(question) - 1]]
        prompt, _ = data.encode_chat([(question, None)], tokenizer, config.vision.num_patches)
        try:
            # The answer needs a token.
            data.check_length([*prompt, None], config)
            for path in paths:
                load_image(path)
        except ValueError as error:
            bad.append(f"{record_name(args.batch, number, record)}: {error}")
            continue
        questions.append((number, record_id(record), question, paths))
    leave_out(bad, args.bad_samples)
    if not questions:
        raise ValueError(f"{args.batch}: no question in it")
    return questions


def batch_identity(args, images):
    """What the answers to a file depend on. images: the files that are asked about."""
    names = ["max_new_tokens", "temperature"] + ["top_p", "seed"] * (args.temperature > 0)
    return {
        "command": "generate.py --batch",
        **{name: getattr(args, name) for name in names},
        "files": {
            "model": describe_model(args.model),
            "data": describe_files([args.batch]),
            "images": describe_images(images),
        },
    }


def chat(model, tokenizer, args, images, options):
    """Answers the question of the command line; with --chat, more questions."""
    size, ratio = model.config.vision.image_size, model.config.image_aspect_ratio
    pixels = [vision.preprocess(image, size, ratio) for image in images]
    pixels = torch.stack(pixels).to(model.device) if images else None

    enable_line_editing()
    turns, question = [], args.question or read_question()
    while question:
        # Only the first question has the images.
        turns.append([question_parts(question, 0 if turns else len(images)), None])
        answer = ""
        for piece in stream_answer(model, tokenizer, turns, pixels, **options):
            piece = piece if answer else piece.lstrip()
            answer += piece
            print(piece, end="", flush=True)
        print()

        turns[-1][1] = answer.strip()
        question = read_question() if args.chat else ""


def read_question():
    """A typed line; "" at the end of the input."""
    try:
        return input("you: ").removeprefix("\ufeff").strip()  # a piped file's byte order mark
    except EOFError:
        return ""


def parse_args():
    parser = Parser(prog="generate.py", description=__doc__)
    add = parser.add_argument
    file = {"type": flags.file, "metavar": "FILE"}
    add("question", nargs="?", help="about the images, if there are any")
    add("--model", type=flags.folder, required=True, help="the model folder")
    add("--image", **file, action="append", default=[], help="may be given several times")
    add("--chat", action="store_true", help="more questions, until an empty line or Ctrl-D")
    add("--batch", **file, help="answer the first question of each record, one by one")
    folder = {"type": flags.folder, "metavar": "FOLDER"}
    add("--images", **folder, help="of the images of --batch (default: the folder of FILE)")
    add("-o", "--out", type=flags.text, default="answers.jsonl", help="of --batch")
    add("--fresh", action="store_true", help="set aside what another --batch left in -o")
    about = "records that can't be answered: stop, or leave them out"
    add("--bad-samples", choices=["error", "skip"], default="error", help=about)
    add("--max-new-tokens", type=flags.count, default=128, help="of an answer")
    temperature = "of the draws; 0: always the most probable token"
    add("--temperature", type=flags.at_least(0, float, 100), default=0.0, help=temperature)
    top_p = "probability of the tokens drawn from"
    add("--top-p", type=flags.share, default=1.0, help=top_p)
    add("--seed", type=flags.seed, default=0, help="of the draws")
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU, else the CPU")
    args = parser.parse_args()
    if not (args.question or args.chat or args.batch):
        parser.error('give a "question", --chat or --batch FILE')
    if args.batch and (args.question or args.chat or args.image):
        parser.error("--batch has its questions and images from FILE: give it alone")
    return args


def main():
    args = parse_args()
    # Refuse what is wrong before the model is loaded.
    if args.question is not None:
        question_parts(args.question, len(args.image))
    images = [vision.load_image(path) for path in args.image]

    model, tokenizer = load_for_inference(args.model, args.device)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "generator": torch.Generator(model.device).manual_seed(args.seed),
    }

    if args.batch:
        answer_file(model, tokenizer, args, options)
    else:
        chat(model, tokenizer, args, images, options)


if __name__ == "__main__":
    run_main(main, "generate.py")
