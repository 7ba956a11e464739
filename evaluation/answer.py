"""The model's answers to questions, and their accuracy beside two baselines.

    python -m evaluation answer --model out/demo/instruct \\
        --data unseen_images.json unseen_combinations.json -o eval.json

--data: see questions.py. Every number has its n, its 95% interval over images, and two others:

    full    the model with the image
    blind   the same without the image: what the text alone reveals. For a model that says when an
            image is missing, --blind other-image: with another image of the split
    chance  always the most frequent answer to that skill in that language

OUT.json holds the tables, OUT.answers.jsonl every answer, for compare, judge and report. After an
interruption the same command answers only what is missing. OUT.run.json notes what the answers
depend on: with other questions, images, weights or flags it refuses to go on (--fresh sets them
aside).
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

from evaluation.batching import (
    Batcher,
    add_model_arguments,
    add_question_arguments,
    question_options,
)
from evaluation.metrics import score_answer
from evaluation.questions import Question, image_names, question_name, read_questions
from evaluation.scores import FAMILIES, accuracy_rows, metric_rows, most_frequent_answers
from evaluation.tables import show_results
from generate import answer_batch, load_for_inference
from vocabulary import flags
from vocabulary.files import lock_file, sibling
from vocabulary.formats import find_file
from vocabulary.records import read_complete_lines

# The fields of a Question that an answer file holds
FIELDS = "split id image turn language kind skill metric question truth full blind".split()
SETTINGS = "max_new_tokens precision suffix data images blind".split()


def answer_questions(model, tokenizer, questions, batcher, max_new_tokens=128, on_answer=None):
    """Sets .full and .blind of each question, then calls on_answer(question)."""
    answer = partial(answer_batch, model, tokenizer, max_new_tokens=max_new_tokens)
    blind_answers = {}  # {(prompt, image paths): answer}
    lengths = [len(q.prompt) for q in questions]
    for indices in batcher.batches(lengths, [q.image_paths for q in questions]):
        batch = [questions[i] for i in indices]
        pixels, image_indices = batcher.load_images([q.image_paths for q in batch])

        # Without the image many questions are the same. Each is answered once.
        new = sorted({blind_key(q) for q in batch} - blind_answers.keys())
        blind_pixels, blind_indices = batcher.load_images([list(paths) for _, paths in new])
        with batcher.autocast():
            answers = answer([q.prompt for q in batch], pixels, image_indices=image_indices)
            if new:
                prompts = [list(prompt) for prompt, _ in new]
                given = answer(prompts, blind_pixels, image_indices=blind_indices)
                blind_answers.update(zip(new, given))

        for q, text in zip(batch, answers):
            q.full, q.blind = text, blind_answers[blind_key(q)]
            if on_answer:
                on_answer(q)


def blind_key(question):
    return tuple(question.blind_prompt), tuple(question.blind_paths)


def swap_images(questions):
    """Blind questions become the same questions about another image, half a split further on.

    Raises ValueError if a split has one image alone."""
    pools = defaultdict(dict)  # {(split, number of images): {image paths: their place}}
    with_image = [q for q in questions if q.image_paths]
    for q in with_image:
        pool = pools[q.split, len(q.image_paths)]
        pool.setdefault(tuple(q.image_paths), len(pool))

    in_order = {key: list(pool) for key, pool in pools.items()}
    for q in with_image:
        pool, paths = (table[q.split, len(q.image_paths)] for table in (pools, in_order))
        if len(pool) == 1:
            raise ValueError(f"{q.where}: no other image in {q.split}; leave out --blind")
        place = pool[tuple(q.image_paths)] + len(pool) // 2
        q.blind_prompt, q.blind_paths = q.prompt, list(paths[place % len(pool)])


class AnswerFile:
    """OUT.answers.jsonl: a header, then a line per answered question."""

    def __init__(self, path, header):
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")
        lock_file(self.file, path)
        rows = list(map(json.loads, read_complete_lines(path)))
        if not rows:
            self.write(header)
        given = [Question(**row) for row in rows[1:]]
        self.answers = {question_name(q): (q.full, q.blind) for q in given}

    def restore(self, questions):
        """Sets the answers that are there; returns the questions without one."""
        for q in questions:
            q.full, q.blind = self.answers.get(question_name(q), (None, None))
        return [q for q in questions if q.full is None]

    def add(self, question):
        self.write({key: getattr(question, key) for key in FIELDS})

    def write(self, row):
        print(json.dumps(row, ensure_ascii=False), file=self.file, flush=True)


def answers_path(path):
    """The answer file beside an -o of `answer`; or the path itself."""
    path, answers = Path(path), sibling(path, ".answers.jsonl")
    return answers if path.suffix == ".json" or answers.is_file() else path


def read_answers(path):
    """(header, questions with their answers) of an answer file. path: its own, or OUT.json."""
    path = answers_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; python -m evaluation answer -o writes it")
    try:
        # A file that is cut off would be compared on fewer questions than it says.
        header, *rows = map(json.loads, path.read_bytes().splitlines())
        questions = [Question(**row) for row in rows]
        if all(None not in (q.full, q.blind) for q in questions):
            return header, questions
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path}: not an answer file, or cut off; run its command again")


def image_path(header, question):
    """The first image of an answered question; None if it has none or it is gone."""
    files = map(Path, header["data"])
    # Splits may have images of the same name, each in the folder of its file.
    folders = [header.get("images")] if header.get("images") else []
    folders = folders or [file.parent for file in files if file.stem == question.split]
    paths = [Path(folder, name) for folder in folders for name in image_names(question)[:1]]
    return next((path for path in map(find_file, paths) if path.is_file()), None)


def add_arguments(parser):
    add_model_arguments(parser)
    add_question_arguments(parser)
    about = "of an answer"
    parser.add_argument("--max-new-tokens", type=flags.count, default=128, metavar="N", help=about)
    about = "what the blind row is asked with"
    parser.add_argument(
        "--blind", choices=["no-image", "other-image"], default="no-image", help=about
    )


def run(args):
    model, tokenizer = load_for_inference(args.model, args.device, args.precision)
    questions = missing = read_questions(
        args.data, tokenizer, model.config, **question_options(args)
    )
    if args.blind == "other-image":
        swap_images(questions)
    settings = {key: getattr(args, key) for key in SETTINGS}

    # What an earlier run has answered is kept.
    on_answer = None
    if args.out:
        path = sibling(args.out, ".answers.jsonl")
        answer_file = AnswerFile(path, {"model": args.model, **settings})
        missing, on_answer = answer_file.restore(questions), answer_file.add
        if done := len(questions) - len(missing):
            print(f"{done:,} of {len(questions):,} questions were answered before")

    if missing:
        # The cache must hold the longest answer, too.
        longest = max(len(q.prompt) for q in missing) + args.max_new_tokens
        batcher = Batcher(model, args.precision, args.batch_size, longest)
        answer_questions(model, tokenizer, missing, batcher, args.max_new_tokens, on_answer)

    # The tables, beside those of the baselines
    answers = {
        "full": [q.full for q in questions],
        "blind": [q.blind for q in questions],
        "chance": most_frequent_answers(questions),
    }
    rows, others = [], []
    for name, texts in answers.items():
        scores = list(map(score_answer, questions, texts))
        rows += accuracy_rows(name, questions, scores)
        others += metric_rows(name, questions, scores, FAMILIES)

    results = {"model": args.model, "rows": rows, "scores": others, "settings": settings}
    show_results(results, args.out)
    if args.out:
        answer_file.file.close()
        print(f"{len(questions):,} questions; tables in {args.out}, answers in {path}")
