"""Seeing a run learn: a validation every N steps, and the models of chosen steps. Neither changes
what trains.

    python train.py instruct … --validate validation.json --validate-every 100
    python train.py instruct … --snapshots 100 300 1000    # → OUT/snapshots/100 …, model folders

A validation asks the last question of a few records, with the image and without it ("blind").
Its row in log.jsonl has the shares of exact answers, by skill (`measure`).
"""

import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from data import ConversationDataset, encode_chat
from generate import answer_batch
from model import XLlava
from training.distributed import full_tensor, is_rank0, print_rank0
from training.lora import export_model, set_trainable
from vocabulary import flags
from vocabulary.conversations import read_conversation, without_images
from vocabulary.scripts import normalise

BATCH_SIZE, MAX_NEW_TOKENS = 32, 64
CACHE_BYTES = 2**30  # of keys and values, at most; twice as many while the cache grows


def add_arguments(parser):
    add = parser.add_argument_group("watching it learn").add_argument
    about = "LLaVA records: questions to ask while it trains"
    add("--validate", type=flags.file, metavar="FILE", help=about)
    count = {"type": flags.count, "default": 200, "metavar": "N"}
    add("--validate-every", **count, help="steps between two validations")
    add("--validate-samples", **count, help="records drawn from FILE, always the same")
    about = "keep the models of these steps, in OUT/snapshots"
    add("--snapshots", nargs="+", type=flags.count, default=[], metavar="STEP", help=about)


class Question(NamedTuple):
    skill: str
    prompt: list  # token ids
    blind_prompt: list  # the same without the images
    pixels: list  # of the images, uint8 (3, S, S) each
    truth: str


class Observer:
    """Validates and keeps snapshots, at the steps that were asked for."""

    def __init__(self, args, process, model, tokenizer):
        self.args, self.process, self.model, self.tokenizer = args, process, model, tokenizer
        if args.validate and args.stage == "vision":
            raise ValueError(
                "--validate: the vision stage has no decoder that answers; keep --snapshots and "
                "compare them with python -m evaluation probe"
            )
        self.questions = draw_questions(args, tokenizer, model.config) if args.validate else []

        if (last := max(args.snapshots, default=0)) > args.steps:
            raise ValueError(f"--snapshots {last}: the run has {args.steps:,} steps")

    def observe(self, step, log):
        """What is due after a step. All ranks must call it; the files are rank 0's."""
        if step in self.args.snapshots:
            folder = Path(self.args.out) / "snapshots" / str(step)
            try:
                export_model(self.model, self.tokenizer, folder)
            except OSError as error:  # a full disk: training goes on without
                print_rank0(f"{folder}: the snapshot could not be saved ({error})")
            log.restart_clock()

        is_due = step % self.args.validate_every == 0 or step == self.args.steps
        if self.questions and is_due:
            start, accuracy = time.perf_counter(), self.validate()
            if is_rank0():
                log.write_validation(step, accuracy, time.perf_counter() - start)
            log.restart_clock()

    def validate(self):
        """What `measure` returns on rank 0, None on the others."""
        weights = ((name, full_tensor(w)) for name, w in self.model.state_dict().items())
        if not is_rank0():
            for _ in weights:
                pass  # takes part in gathering
            return None

        # The weights in a second model: the one that trains keeps its mode, its compiled blocks and
        # its shards. Tensors that are whole on this rank are shared, not copied.
        args, device, dtype = self.args, self.process.device, self.process.dtype
        with torch.device("meta"):
            model = XLlava(self.model.config).eval()
            set_trainable(model, args.trainable, args.lora_rank)  # for the adapters
        if args.fsdp:
            weights = ((name, weight.to(device, dtype)) for name, weight in weights)
        model.load_state_dict(dict(weights), assign=True)
        if model.config.text.tie_word_embeddings:
            model.decoder.lm_head.weight = model.decoder.embed_tokens.weight

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return measure(model, self.tokenizer, self.questions)


def draw_questions(args, tokenizer, config):
    """The last questions of --validate-samples records of the file --validate."""
    files, images = [args.validate], args.images
    dataset = ConversationDataset(files, tokenizer, config, args.max_length, images=images)
    if not len(dataset):
        raise ValueError(f"{args.validate}: no questions to validate with")

    # The same records in each run.
    count = min(args.validate_samples, len(dataset))
    questions, num_patches = [], config.vision.num_patches
    for i in sorted(random.Random("validation").sample(range(len(dataset)), count)):
        pixels = dataset.sample(i).pixels  # BadSample is a ValueError
        conversation = read_conversation(dataset.record(i))
        # The last answer is the truth: the model is to give it.
        turns = conversation.turns
        truth, turns[-1][1] = turns[-1][1], None
        prompt, _ = encode_chat(turns, tokenizer, num_patches)
        blind_prompt, _ = encode_chat(without_images(turns), tokenizer, num_patches)
        skill = conversation.skill or conversation.kind
        questions.append(Question(skill, prompt, blind_prompt, pixels, truth))
    return questions


def measure(model, tokenizer, questions):
    """The shares of exact answers, {"n", "full", "blind": {skill: number}}."""
    full = answer_all(model, tokenizer, [(q.prompt, q.pixels) for q in questions])
    blind = answer_all(model, tokenizer, [(q.blind_prompt, []) for q in questions])

    # "all" and each skill for itself.
    counts = Counter(q.skill for q in questions)
    accuracy = {"n": {"all": len(questions)} | dict(sorted(counts.items()))}
    for name, given in (("full", full), ("blind", blind)):
        right = Counter()
        for question, answer in zip(questions, given):
            if normalise(answer) == normalise(question.truth):
                right.update(("all", question.skill))
        accuracy[name] = {skill: round(right[skill] / n, 4) for skill, n in accuracy["n"].items()}
    return accuracy


def num_at_once(config, length):
    """How many prompts of this length are answered at a time: their keys and values, 2 bytes a
    number, are to fit into CACHE_BYTES."""
    per_token = 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return max(1, min(BATCH_SIZE, CACHE_BYTES // (per_token * (length + MAX_NEW_TOKENS))))


def answer_all(model, tokenizer, questions):
    """Greedy answers to questions, each (prompt, its images)."""
    answers, size = [], num_at_once(model.config.text, max(len(prompt) for prompt, _ in questions))
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        prompts, images = [prompt for prompt, _ in batch], [i for _, own in batch for i in own]
        pixels = torch.stack(images).to(model.device) if images else None
        answers += answer_batch(model, tokenizer, prompts, pixels, max_new_tokens=MAX_NEW_TOKENS)
    return answers
