"""The model's answers to questions, and their accuracy beside two baselines.

    python -m evaluation answer --model out/demo/instruct \\
        --data unseen_images.json unseen_combinations.json -o eval.json

--data: LLaVA files with reference answers, or POPE, GQA, xGQA and VQAv2 files as published (see
questions.py). Every number has its n, its 95% interval over images, and two others beside it:

    full    the model with the image
    blind   the same model and question without the image: what the text alone reveals
    chance  always the most frequent answer to that skill in that language

OUT.json holds the tables, OUT.answers.jsonl every answer, for compare, judge and report. After an
interruption the same command answers only what is missing.
"""

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from evaluation.batching import Batcher, add_model_arguments, add_question_arguments
from evaluation.metrics import score_answer, write_results
from evaluation.questions import Question, question_name, read_questions
from evaluation.scores import FAMILIES, accuracy_rows, metric_rows, most_frequent_answers
from evaluation.tables import print_results
from generate import answer_batch, load_for_inference
from vocabulary.records import read_complete_lines

# The fields of a Question that an answer file holds
FIELDS = "split id image turn language kind skill metric question truth full blind".split()
SETTINGS = "max_new_tokens precision suffix data images".split()


def answer_questions(model, tokenizer, questions, batcher, max_new_tokens=128, on_answer=None):
    """Sets .full and .blind of each question, then calls on_answer(question)."""
    blind_answers = {}  # {prompt: answer}
    lengths = [len(question.prompt) for question in questions]
    image_paths = [question.image_paths for question in questions]
    bar = tqdm(total=len(questions), desc="answers", unit="question", disable=None)
    for indices in batcher.batches(lengths, image_paths):
        batch = [questions[i] for i in indices]
        pixels, image_indices = batcher.load_images([q.image_paths for q in batch])

        # Without the image many questions are the same. Each is answered once.
        blind_prompts = sorted({tuple(q.blind_prompt) for q in batch} - blind_answers.keys())
        with batcher.autocast():
            answers = answer_batch(
                model,
                tokenizer,
                [q.prompt for q in batch],
                pixels,
                image_indices=image_indices,
                max_new_tokens=max_new_tokens,
            )
            if blind_prompts:
                prompts = list(map(list, blind_prompts))
                new = answer_batch(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
                blind_answers.update(zip(blind_prompts, new))

        for question, answer in zip(batch, answers):
            question.full, question.blind = answer, blind_answers[tuple(question.blind_prompt)]
            if on_answer:
                on_answer(question)
        bar.update(len(batch))
    bar.close()


class AnswerFile:
    """NAME.answers.jsonl: a header, then a line per question, appended when it is answered. Answers
    under another header are moved to NAME.answers.old.jsonl."""

    def __init__(self, path, header):
        self.path = Path(path)
        lines = read_complete_lines(self.path)
        if lines and json.loads(lines[0]) != header:
            old = self.path.with_suffix(".old.jsonl")
            os.replace(self.path, old)
            note = f"{self.path}: of another model or setting, moved to {old.name}"
            print(note, file=sys.stderr)
            lines = []

        self.file = open(self.path, "a", encoding="utf-8")
        if not lines:
            self.write(header)
        given = [Question(**json.loads(line)) for line in lines[1:]]
        self.answers = {question_name(q): (q.full, q.blind) for q in given}

    def restore(self, questions):
        """Sets the answers of the questions that have some; returns the others."""
        missing = []
        for question in questions:
            if question_name(question) in self.answers:
                question.full, question.blind = self.answers[question_name(question)]
            else:
                missing.append(question)
        return missing

    def add(self, question):
        self.write({key: getattr(question, key) for key in FIELDS})

    def write(self, row):
        print(json.dumps(row, ensure_ascii=False), file=self.file, flush=True)


def read_answers(path):
    """(header, questions with their answers) of an answer file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; python -m evaluation answer -o writes it")
    try:
        header, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        questions = [Question(**row) for row in rows]
        is_complete = all(None not in (q.full, q.blind) for q in questions)
    except (ValueError, TypeError):
        is_complete = False
    if not is_complete:
        raise ValueError(f"{path}: not an answer file, or cut off; run its command again")
    return header, questions


def image_path(header, question):
    """The first image of an answered question; None if it has none or it is gone."""
    names = question.image if isinstance(question.image, list) else [question.image]
    if not names or not names[0]:
        return None
    folders = [Path(path).parent for path in header["data"] if Path(path).stem == question.split]
    if header.get("images"):
        folders = [Path(header["images"])]
    paths = [folder / names[0] for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def add_arguments(parser):
    add_model_arguments(parser)
    add_question_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")


def run(args):
    model, tokenizer = load_for_inference(args.model, args.device)
    questions = read_questions(
        args.data, tokenizer, model.config, args.images, args.annotations, args.suffix
    )
    settings = {key: getattr(args, key) for key in SETTINGS}

    # What an earlier run has answered is kept.
    answer_file, missing = None, questions
    if args.out:
        path = Path(args.out).with_suffix(".answers.jsonl")
        answer_file = AnswerFile(path, make_header(args, settings))
        missing = answer_file.restore(questions)
    if len(missing) < len(questions):
        done = len(questions) - len(missing)
        print(f"{done:,} of {len(questions):,} questions were answered before")

    if missing:
        longest = max(len(question.prompt) for question in missing) + args.max_new_tokens
        batcher = Batcher(model, args.precision, args.batch_size, longest)
        on_answer = answer_file and answer_file.add
        answer_questions(model, tokenizer, missing, batcher, args.max_new_tokens, on_answer)

    # The tables, beside those of the baselines
    answers = {
        "full": [question.full for question in questions],
        "blind": [question.blind for question in questions],
        "chance": most_frequent_answers(questions),
    }
    rows, others = [], []
    for name, texts in answers.items():
        scores = [score_answer(question, text) for question, text in zip(questions, texts)]
        rows += accuracy_rows(name, questions, scores)
        others += metric_rows(name, questions, scores, FAMILIES)

    results = {"model": args.model, "rows": rows, "scores": others, "settings": settings}
    print_results(results)
    if args.out:
        write_results(args.out, results)
        print(f"{len(questions):,} questions; tables in {args.out}, answers in {path}")


def make_header(args, settings):
    """What the answers depend on. Files are known by their size and time."""

    def version(path):
        return [path.stat().st_size, path.stat().st_mtime_ns]

    weights = sorted(Path(args.model).glob("*.safetensors"))
    return {
        "model": args.model,
        "weights": [[path.name, *version(path)] for path in weights],
        "asked": [version(Path(path)) for path in args.data],
        **settings,
    }
