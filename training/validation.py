"""Seeing a run learn: a small validation every N steps, and the models of chosen steps.

Pipeline: generate → **training/validation.py** → train.py. It changes nothing that trains.

    python train.py instruct … --validate validation.json --validate-every 100
    python train.py instruct … --snapshots 100 300 1000    # → OUT/snapshots/100 …, model folders

A validation asks the last question of a few records, with the image and without it ("blind").
Its row in log.jsonl has the shares of exact answers, by skill:

    {"step": 100, "validation": {"n": {"all": 200, "colour": 31, …},
                                 "full": {"all": 0.62, …}, "blind": {"all": 0.21, …}}}
"""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import write_model
from data import ConversationDataset, encode_chat
from generate import answer_batch
from model import XLlava
from training.distributed import is_rank0, print_rank0
from training.lora import merged_weights
from vocabulary import flags
from vocabulary.conversations import read_conversation, without_images
from vocabulary.scripts import normalise

BATCH_SIZE, MAX_NEW_TOKENS = 32, 64


def add_arguments(parser):
    add = parser.add_argument_group("watching it learn").add_argument
    about = "LLaVA records: questions to ask while it trains"
    add("--validate", type=flags.file, metavar="FILE", help=about)
    count = {"type": flags.count, "metavar": "N"}
    add("--validate-every", **count, default=200, help="steps between two validations")
    about = "records drawn from FILE, always the same"
    add("--validate-samples", **count, default=200, help=about)
    kept = "keep the models of these steps, in OUT/snapshots"
    add("--snapshots", nargs="+", type=flags.count, default=[], metavar="STEP", help=kept)


class Question(NamedTuple):
    skill: str
    prompt: list  # token ids
    blind_prompt: list  # the same without the images
    pixels: list  # of the images, uint8 (3, S, S) each
    truth: str


class Observer:
    """Validates and keeps snapshots, at the steps that were asked for."""

    def __init__(self, args, process, model, tokenizer, start):
        """start: the steps that are done. ValueError where `args` can't be followed."""
        self.args, self.process, self.model, self.tokenizer = args, process, model, tokenizer
        self.questions = []
        if args.validate and args.stage == "vision":
            raise ValueError(
                "--validate: the vision stage has no decoder that answers; keep --snapshots and "
                "compare them with python -m evaluation probe"
            )
        if args.validate:
            self.questions = draw_questions(args, tokenizer, model.config)

        # A step that is done again writes its snapshot again; an earlier one's stays.
        self.snapshots = {step for step in args.snapshots if step > start}
        if (last := max(args.snapshots, default=0)) > args.steps:
            raise ValueError(f"--snapshots {last}: the run has {args.steps:,} steps")
        for step in set(args.snapshots) - self.snapshots:
            if not snapshot_folder(args.out, step).exists():
                print_rank0(f"--snapshots {step}: no longer possible after step {start}")

    def observe(self, step, log):
        """What is due after a step. All ranks must call it; the files are rank 0's."""
        every, is_last = self.args.validate_every, step == self.args.steps
        if step in self.snapshots:
            save_snapshot(self.model, self.tokenizer, snapshot_folder(self.args.out, step))
            log.restart_clock()
        if self.questions and (is_last or step % every == 0):
            start, accuracy = time.time(), self.validate()
            if is_rank0():
                log.write_validation(step, accuracy, time.time() - start)
            log.restart_clock()

    def validate(self):
        """{"n", "full", "blind": {skill: number}} on rank 0, None on the others."""
        tensors = merged_weights(self.model, {})
        if not is_rank0():
            for _ in tensors:
                pass  # takes part in gathering
            return None

        # The weights in a second model: the one that trains keeps its mode, its compiled blocks and
        # its shards. Tensors that are whole on this rank are shared, not copied.
        dtype = self.process.dtype if self.args.fsdp else torch.float32
        with torch.device("meta"):
            model = XLlava(self.model.config).eval()
        state = {name: tensor.to(self.process.device, dtype) for name, tensor in tensors}
        model.load_state_dict(state, assign=True)
        if model.config.text.tie_word_embeddings:
            model.decoder.lm_head.weight = model.decoder.embed_tokens.weight

        use_autocast = self.process.dtype != torch.float32
        with torch.autocast(self.process.device.type, self.process.dtype, enabled=use_autocast):
            return measure(model, self.tokenizer, self.questions)


def draw_questions(args, tokenizer, config):
    """The last questions of --validate-samples records of the file --validate."""
    files = {"images": args.images}
    dataset = ConversationDataset([args.validate], tokenizer, config, args.max_length, **files)
    if not len(dataset):
        raise ValueError(f"{args.validate}: no questions to validate with")
    count = min(args.validate_samples, len(dataset))

    questions, num_patches = [], config.vision.num_patches
    for i in sorted(random.Random("validation").sample(range(len(dataset)), count)):
        pixels, record = dataset.sample(i).pixels, dataset.record(i)  # BadSample is a ValueError
        conversation = read_conversation(record)
        turns = conversation.turns
        truth, turns[-1][1] = turns[-1][1], None
        skill, both = conversation.skill or conversation.kind, (turns, without_images(turns))
        prompts = (encode_chat(each, tokenizer, num_patches)[0] for each in both)
        questions.append(Question(skill, *prompts, pixels, truth))
    return questions


def measure(model, tokenizer, questions):
    """The shares of exact answers: {"n", "full", "blind": {skill: number}}, "all" first."""
    prompts = [question.prompt for question in questions]
    full = answer_all(model, tokenizer, prompts, [question.pixels for question in questions])

    # Without the image many questions are the same.
    blind_prompts = [list(ids) for ids in sorted({tuple(q.blind_prompt) for q in questions})]
    answers = answer_all(model, tokenizer, blind_prompts, [[]] * len(blind_prompts))
    blind_answers = {tuple(ids): answer for ids, answer in zip(blind_prompts, answers)}
    blind = [blind_answers[tuple(question.blind_prompt)] for question in questions]

    counts = Counter(skill for q in questions for skill in ("all", q.skill))
    skills = ["all", *sorted(counts.keys() - {"all"})]
    accuracy = {"n": {skill: counts[skill] for skill in skills}}
    for name, given in (("full", full), ("blind", blind)):
        right = Counter()
        for question, answer in zip(questions, given):
            if normalise(answer) == normalise(question.truth):
                right.update(("all", question.skill))
        accuracy[name] = {skill: round(right[skill] / counts[skill], 4) for skill in skills}
    return accuracy


def answer_all(model, tokenizer, prompts, pixels):
    """Greedy answers to all prompts, those of similar length together. pixels: lists of images."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        images = [image for i in batch for image in pixels[i]]
        images = torch.stack(images).to(model.device) if images else None
        own = [prompts[i] for i in batch]
        texts = answer_batch(model, tokenizer, own, images, max_new_tokens=MAX_NEW_TOKENS)
        for i, text in zip(batch, texts):
            answers[i] = text
    return answers


def snapshot_folder(out, step):
    return Path(out) / "snapshots" / str(step)


def save_snapshot(model, tokenizer, folder):
    """Writes a model folder beside `folder`, then renames it. If the disk is full, training goes on
    without. All ranks must call it."""
    temporary, tensors = folder.with_name(folder.name + ".tmp"), merged_weights(model, {})
    try:
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
            write_model(model.config, tensors, tokenizer, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        print_rank0(f"{folder}: the snapshot could not be saved ({error})")
    for _ in tensors:
        pass  # all ranks take part in gathering, to the end
