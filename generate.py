"""Answers questions about pictures: one question, a chat, or a file full of them.

Where it stands: `data → generate → evaluate`. The prompt comes from `data.encode_chat`, which also makes the training samples.

    python generate.py --model out/demo/instruct --image picture.png "What is at the top left?"
    python generate.py --model out/demo/instruct --image picture.png --chat
    python generate.py --model out/demo/instruct --batch out/demo/data/validation.json -o answers.jsonl

Text streams as it is made, and never shows half a character: a Hangul syllable may take three byte pieces, and is held back
until it is whole. What you type is text, all of it: "<image>" in a question is seven characters, not a picture.

Letters for sizes: B rows, T tokens of the longest prompt, V vocabulary.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import vision
from model import KVCache
from tokenizer import StreamDecoder


def select_cache_rows(cache, rows, size, config):
    """A cache with room for `size` tokens a row whose rows are the given ones of `cache`, in that order; one may be taken several times."""
    new, n = KVCache(config, len(rows), size, cache.k.device, cache.k.dtype), min(size, cache.size)
    new.k[:, :, :n], new.v[:, :, :n], new.lengths = (
        cache.k[:, rows, :n],
        cache.v[:, rows, :n],
        cache.lengths[rows],
    )
    return new


def shared_prefix_length(prompts, pictures, config):
    """How many ids all prompts have in common up to the end of their first picture, if some have that picture in common too; else 0.

    A data set asks many questions about each picture, and "<s>USER: <image> … <image>" is most of every prompt: reading it once a picture is enough."""
    if not all(pictures) or len({own[0] for own in pictures}) == len(prompts):
        return 0
    end = prompts[0].index(config.image_token_id) + config.vision.num_patches
    return end if all(prompt[:end] == prompts[0][:end] for prompt in prompts) else 0


@torch.inference_mode()
def generate(
    model,
    prompts,
    pixels=None,
    max_new_tokens=128,
    temperature=0.0,
    top_p=1.0,
    eos_id=2,
    generator=None,
    pictures=None,
):
    """Yields, token by token, what follows each of B prompts: a list of B ids, None for a row that has ended.

    prompts: B lists of ids, of any lengths; pixels: uint8 (P, 3, S, S), their pictures in reading order, or None.
    pictures: where prompts share pictures, B lists of places in `pixels`, one for each picture of the prompt.
    temperature 0 takes the likeliest token; else one is drawn from the smallest set that holds `top_p` of the probability.
    Prompts are padded on the right. Each row's keys and values stand in the cache at 0 … its own length, so that padding is overwritten by what
    is generated and seen by no one. Rows that have ended leave the cache.
    """
    config, device = model.config.text, model.device
    dtype = (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else model.decoder.norm.weight.dtype
    )
    B, T, N = len(prompts), max(map(len, prompts)), model.config.vision.num_patches
    if pictures is None:
        counts = [prompt.count(model.config.image_token_id) // N for prompt in prompts]
        pictures = [list(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(B)]
    ids = torch.full((B, T), eos_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids, lengths = ids.to(device), torch.tensor([len(p) for p in prompts], device=device)
    room = T + min(
        max_new_tokens, 16
    )  # it grows when it is full: short answers shouldn't pay for long ones
    head = shared_prefix_length(prompts, pictures, model.config)
    if head:
        first = list(dict.fromkeys(own[0] for own in pictures))
        cache = KVCache(config, len(first), head, device, dtype)
        model(ids[:1, :head].expand(len(first), head), pixels[first], cache=cache)
        cache.lengths = cache.lengths + head
        cache = select_cache_rows(cache, [first.index(own[0]) for own in pictures], room, config)
    else:
        cache = KVCache(config, B, room, device, dtype)
    rest = [place for own in pictures for place in own[1 if head else 0 :]]
    hidden = model(ids[:, head:], pixels[rest] if rest else None, cache=cache)
    cache.lengths = lengths
    last = hidden[torch.arange(B, device=device), lengths - head - 1]  # (B, T, C) -> (B, C)
    rows = list(range(B))  # the prompt that each row of the cache belongs to; -1 when it has ended
    for n in range(1, max_new_tokens + 1):
        logits = model.logits(last)  # (rows, V)
        if temperature == 0:
            new = logits.argmax(dim=-1)
        else:
            p, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
            p[p.cumsum(dim=-1) - p > top_p] = (
                0  # a token stays if those before it hold less than top_p: the first always does
            )
            new = order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
        step = [None] * B
        for i, id in enumerate(new.tolist()):
            if id == eos_id:
                rows[i] = -1
            elif rows[i] >= 0:
                step[rows[i]] = id
        yield step
        running = [i for i, row in enumerate(rows) if row >= 0]
        if not running or n == max_new_tokens:
            return
        full = T + n > cache.size  # the longest row has no place for one more
        if full or len(running) < 0.75 * len(rows):
            cache = select_cache_rows(cache, running, cache.size + 32 * full, config)
            new, rows = new[running], [rows[i] for i in running]
        last = model(new[:, None], cache=cache)[:, 0]
        cache.lengths = cache.lengths + 1


def answer_batch(model, tokenizer, prompts, pixels=None, **options):
    """generate() to its end, as B texts."""
    answers = [[] for _ in prompts]
    for step in generate(model, prompts, pixels, eos_id=tokenizer.eos_id, **options):
        for row, id in enumerate(step):
            if id is not None:
                answers[row].append(id)
    return [tokenizer.decode(ids).strip() for ids in answers]


def stream_answer(model, tokenizer, turns, pixels=None, **options):
    """Streams the answer to the last of `turns` (data.encode_chat, its answer None): yields pieces of text."""
    prompt, _ = data.encode_chat(turns, tokenizer, model.config.vision.num_patches)
    room = model.config.text.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(prompt)} tokens, the model reads {model.config.text.max_position_embeddings}: start a new one"
        )
    options["max_new_tokens"] = min(options.get("max_new_tokens", 128), room)
    stream = StreamDecoder(tokenizer)
    for (id,) in generate(model, [prompt], pixels, eos_id=tokenizer.eos_id, **options):
        if id is not None:
            yield stream.push(id)
    yield stream.flush()


def load_for_inference(folder, device=None):
    """(model, tokenizer) of a folder, ready to answer; on the GPU in bfloat16 where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(folder, torch.bfloat16 if device == "cuda" else torch.float32)
    return model.to(device).eval(), checkpoint.load_tokenizer(folder)


def question_parts(question, pictures):
    """A typed question as encode_chat takes it: the pictures first, as LLaVA-1.5 was trained, then a line break and the text."""
    if not question.strip():
        raise ValueError("the question is empty")
    return [""] * pictures + ["\n" + question.strip()] if pictures else question.strip()


def run_batch(model, tokenizer, args, options):
    """Answers the first question of every record of a LLaVA file, a line of JSON each: {"model", "data", "index", "id", "answer"}. A second run goes on where one stopped."""
    out, about = Path(args.out), {"model": args.model, "data": args.batch}
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = data.read_complete_lines(out)
    if lines and (first := json.loads(lines[0])) != first | about:
        raise ValueError(
            f"{out}: holds answers of {first.get('model')} to {first.get('data')}; give another -o"
        )
    samples = data.ConversationDataset(
        [args.batch], tokenizer, model.config, model.config.text.max_position_embeddings
    )
    with open(out, "a", encoding="utf-8") as file:
        for i in tqdm(
            range(len(lines), len(samples)), initial=len(lines), total=len(samples), unit="question"
        ):
            record = samples.record(i)
            turns = data.read_turns(record)[:1]
            pixels = samples.sample(i).pixels
            pixels = (
                torch.stack(pixels[: len(turns[0][0]) - 1]).to(model.device)
                if len(turns[0][0]) > 1
                else None
            )
            text = "".join(
                stream_answer(model, tokenizer, [(turns[0][0], None)], pixels, **options)
            ).strip()
            print(
                json.dumps(
                    {**about, "index": i, "id": record.get("id"), "answer": text},
                    ensure_ascii=False,
                ),
                file=file,
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; may be given several times"
    )
    parser.add_argument(
        "--chat", action="store_true", help="go on asking; an empty line or Ctrl-D ends it"
    )
    parser.add_argument("--batch", help="a LLaVA file of questions")
    parser.add_argument("-o", "--out", default="answers.jsonl", help="where --batch writes")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="tokens of an answer at most"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.question is not None or args.chat or args.batch):
        parser.error('give a "question", --chat or --batch FILE')
    if args.question is not None:
        question_parts(
            args.question, len(args.image)
        )  # refuse an empty one before a model is loaded
    pictures = [vision.load_image(path) for path in args.image]
    model, tokenizer = load_for_inference(args.model)
    device = model.device
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "generator": torch.Generator(device).manual_seed(args.seed),
    }
    if args.batch:
        return run_batch(model, tokenizer, args, options)
    size, mode = model.config.vision.image_size, model.config.image_aspect_ratio
    pixels = (
        torch.stack([vision.preprocess(p, size, mode) for p in pictures]).to(device)
        if pictures
        else None
    )
    turns, question = [], args.question
    while True:
        if question is None:
            try:
                question = input("you: ").strip()
            except EOFError:
                question = ""
            if not question:
                return
        turns.append([question_parts(question, 0 if turns else len(pictures)), None])
        answer = ""
        for piece in stream_answer(model, tokenizer, turns, pixels, **options):
            piece = piece if answer else piece.lstrip()
            answer += piece
            print(piece, end="", flush=True)
        print()
        turns[-1][1], question = answer.strip(), None
        if not args.chat:
            return


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
