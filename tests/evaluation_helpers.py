"""What the tests of evaluation share: questions, a model with random weights, the command line."""

import contextlib
import io
import sys
from unittest import mock

import torch

import checkpoint
from evaluation.__main__ import main
from evaluation.metrics import score_answer
from evaluation.questions import Question
from model import XLlava


def make_question(truth, language="en", kind="object", skill="colour", **fields):
    """A Question of split "s"."""
    fields = {"split": "s", "id": 0, "question": "?"} | fields
    return Question(language=language, kind=kind, skill=skill, truth=truth, **fields)


def score_answers(questions, answers):
    return [score_answer(question, answer) for question, answer in zip(questions, answers)]


def write_random_model(config, tokenizer_file, folder):
    """A model folder with random weights."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    checkpoint.write_model(config, model.state_dict().items(), tokenizer_file, folder)
    return folder


def command(*args):
    """Runs `python -m evaluation ARGS` in this process; what it printed."""
    out = io.StringIO()
    argv = ["evaluation", *map(str, args)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out):
        main()
    return out.getvalue()
