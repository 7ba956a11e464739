"""Preferences and grades by another model (X-LLaVA's preference test, LLaVA-Bench's method).

Pipeline: answer → **judge**. The judge is any OpenAI-compatible endpoint (evaluation/client.py).

    python -m evaluation judge pairwise A B --base-url URL --model NAME --dry-run
    python -m evaluation judge pairwise A B --base-url URL --model NAME -o judge.json
    python -m evaluation judge grade    A   --base-url URL --model NAME -o grade.json
    python -m evaluation judge pairwise A A:blind …       # against the model without the image

A and B are files of answers, such as a.answers.jsonl. Judges favour a place, so each question is
asked twice, with the two answers in both orders. A question's points are the mean of both: 1 for
better, 0 for worse, ½ for a tie. The judge gets the image, the question and both answers, in the
question's language (judge_prompts.json). pairwise adds the reference; grade, where the reference is
one of the two answers, does not say which.

Every reply is in the journal (OUT.journal.jsonl) before it is read: a second run asks only for what
is missing. A reply without a verdict is asked for again; a question that has none in the end is
counted as refused or malformed and left out of the figures, never guessed.
"""

import hashlib
import json
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.answer import answers_path, image_path, read_answers
from evaluation.client import (
    Endpoint,
    Request,
    add_client_arguments,
    check_options,
    encode_jpeg,
    estimate_tokens,
    has_prices,
    is_local,
    price,
    print_troubles,
    run_jobs,
)
from evaluation.journal import Journal
from evaluation.metrics import (
    bootstrap,
    format_interval,
    make_row,
    permutation_p,
    ratio,
    sums_per_image,
    write_results,
)
from evaluation.questions import earlier_turns, image_names, question_name, reference_answer
from vocabulary import flags
from vocabulary.files import read_json, sibling
from vocabulary.identity import describe_files, digest_text

MAX_SIDE = 512  # pixels of the image that the judge gets
MAX_UNREADABLE = 3  # replies without a verdict that are paid for per request

PROMPTS = read_json(Path(__file__).with_name("judge_prompts.json"))
REFUSAL = re.compile(
    r"can(?:no|['’])t (?:help|assist|comply|judge|answer)|unable to (?:help|assist|comply)"
    r"|도와드릴 수 없|답변할 수 없|无法(?:协助|回答|提供|评判)",
    re.IGNORECASE,
)
VERDICT = re.compile(r"VERDICT\s*[:：]\s*\**\s*(1|2|TIE)\b", re.IGNORECASE)
SCORES = re.compile(
    r"SCORES\s*[:：]\s*\**\s*(\d+)(?:/10)?\**[\s,;、，]+(?:and\s+)?\**(\d+)(?:/10)?(?![\d/]|\.\d)",
    re.IGNORECASE,
)


# ------------------------------------------------------------------------------------ a request
def read_verdict(mode, text):
    """A reply's verdict: pairwise 1, 2 or 0 for a tie; grade the two grades; None if the judge
    refuses. ValueError for a reply without any of these."""
    # The last one counts: a judge may quote the task before it answers.
    if mode == "pairwise":
        if found := VERDICT.findall(text):
            return {"1": 1, "2": 2}.get(found[-1], 0)
    elif found := SCORES.findall(text):
        grades = tuple(map(int, found[-1]))
        if all(1 <= grade <= 10 for grade in grades):
            return grades

    if REFUSAL.search(text):
        return None
    raise ValueError(f"no verdict in {text[:80]!r}")


def judge_request(args, question, earlier, image, first, second):
    """The request for one question with its two answers in one order. earlier: the questions of
    the conversation before it, which the models were asked with their references."""
    # A language without prompts of its own is judged in English.
    prompts = PROMPTS.get(question.language, PROMPTS["en"])
    turns = [f"{q.question}\n{reference_answer(q)}\n" for q in earlier]
    asked = "\n".join([*turns, question.question])
    # A grader that knew the reference would find it among the two answers.
    reference = prompts["reference"].format(truth=reference_answer(question))
    if args.mode == "grade":
        reference = ""
    user = prompts["question"].format(
        question=asked, reference=reference, first=first, second=second
    )
    user += prompts[args.mode]

    # Whatever the judge gets is part of the journal's key: who edits a prompt asks something new.
    content = [args.model, prompts["system"], user]
    if image:
        content.append(hashlib.sha256(image.read_bytes()).hexdigest())
    return Request(
        key=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32],
        name=str(image or ""),
        system=prompts["system"],
        user=user,
        parse=partial(read_verdict, args.mode),
        temperature=0,
        max_unreadable=MAX_UNREADABLE,
    )


def make_jpeg(image):
    """The JPEG of a path, or None."""
    return image and encode_jpeg(image, MAX_SIDE)


# ------------------------------------------------------------------------------------ figures
def judge_rows(mode, questions, verdicts):
    """Rows of results from [(verdict in the first order, verdict in the other)] per question."""
    rows = []
    for language in (*sorted({question.language for question in questions}), "all"):
        chosen = [i for i, q in enumerate(questions) if language in (q.language, "all")]
        own = [questions[i] for i in chosen]
        forward = [verdicts[i][0] for i in chosen]
        reverse = [verdicts[i][1] for i in chosen]
        measures = pairwise_measures if mode == "pairwise" else grade_measures

        # Questions about one image are not independent: images are drawn, not questions.
        for name, statistic, columns in measures(forward, reverse):
            interval = bootstrap(sums_per_image(own, *columns), statistic)
            rows.append(make_row(interval, len(own), measure=name, language=language))
            if name.startswith("points of the first model"):
                differences = sums_per_image(own, columns[0] - 0.5)[:, 0]
                rows[-1]["p"] = permutation_p(differences)
    return rows


def pairwise_measures(forward, reverse):
    """[(name, statistic, columns)] of verdicts: 1, 2, or 0 for a tie."""
    a = np.array([{1: 1, 2: 0, 0: 0.5}[verdict] for verdict in forward])
    b = np.array([{1: 0, 2: 1, 0: 0.5}[verdict] for verdict in reverse])
    return [
        ("points of the first model (½: no difference)", ratio, [(a + b) / 2]),
        ("same verdict in both orders", ratio, [a == b]),
        ("points of the answer shown first (½: no bias)", ratio, [(a + 1 - b) / 2]),
    ]


def grade_measures(forward, reverse):
    """[(name, statistic, columns)] of verdicts (grade of answer 1, of answer 2): the mean grades of
    the model and of the reference, the quotient of their sums, and the share of questions in which
    the model's two grades differ by at most one."""
    # The model's answer stands first in the one order, second in the other.
    model = np.array([v[0] for v in forward]) + [v[1] for v in reverse]
    reference = np.array([v[1] for v in forward]) + [v[0] for v in reverse]
    change = abs(np.array([v[0] for v in forward]) - [v[1] for v in reverse])

    def mean(sums):  # not `ratio`, as grades are no proportions
        return sums[..., 0] / sums[..., -1]

    def quotient(sums):
        return sums[..., 0] / sums[..., 1]

    return [
        ("grade of the model, 1 – 10", mean, [model / 2]),
        ("grade of the reference, 1 – 10", mean, [reference / 2]),
        ("the model's grades over the reference's", quotient, [model, reference]),
        ("both orders within one grade", ratio, [change <= 1]),
    ]


# ------------------------------------------------------------------------------------ the command
def add_arguments(parser):
    add = parser.add_argument
    add("mode", choices=["pairwise", "grade"], help="which of two answers is better; or grades")
    about = "two answer files, or for grade one"
    add("answers", nargs="+", type=flags.text, metavar="FILE[:blind]", help=about)
    add("-o", "--out", type=flags.text, default="judge.json", metavar="FILE", help="the results")
    add("--fresh", action="store_true", help="set aside what another run left in -o")
    about = "questions, as many of each language"
    add("--limit", type=flags.count, default=200, metavar="N", help=about)
    add("--seed", type=flags.seed, default=0, help="which questions")
    add("--dry-run", action="store_true", help="say what it would cost, ask nothing")
    add_client_arguments(parser, tries=6, max_tokens=1000)


def read_side(given):
    """FILE or FILE:blind -> (header, {name: question}, "full" or "blind")."""
    path, which = given, "full"
    if given.endswith(":blind"):
        path, which = given.removesuffix(":blind"), "blind"
    header, questions = read_answers(path)
    return header, {question_name(question): question for question in questions}, which


def choose_questions(args, first, second):
    """Names of questions that are in both files, drawn by --seed, as many of each language."""
    common = sorted(name for name in first if name in second)
    if not common:
        raise ValueError(f"{args.answers[0]} and {args.answers[-1]} have no question in common")
    if len(common) < max(len(first), len(second)):
        print(f"{len(common):,} questions are in both files ({len(first):,} and {len(second):,})")

    both, common = len(common), [name for name in common if len(image_names(first[name])) < 2]
    if len(common) < both:
        print(f"{both - len(common):,} questions are left out: the judge sees one image")
    if not common:
        raise ValueError(f"{args.answers[0]}: the judge sees one image, all questions have several")

    # The share is rounded up, so that no language gets none.
    random.Random(args.seed).shuffle(common)
    languages = sorted({first[name].language for name in common})
    share, names = -(-args.limit // len(languages)), []
    for language in languages:
        names += [name for name in common if first[name].language == language][:share]
    return names


def judge_identity(args):
    """What the verdicts depend on. How many questions are judged is free to grow."""
    paths = [answers_path(given.removesuffix(":blind")) for given in args.answers]
    return {
        "mode": args.mode,
        "model": args.model,
        "sides": [given.endswith(":blind") for given in args.answers],
        "prompts": digest_text(PROMPTS),
        "files": {"answers": describe_files(paths)},
    }


def make_requests(args):
    """-> (questions, [(request, image path or None)]: both orders of each question, in a row)."""
    if len(args.answers) != (2 if args.mode == "pairwise" else 1):
        raise ValueError("pairwise takes two answer files, grade one")
    if len(set(args.answers)) < len(args.answers):
        raise ValueError(f"{args.answers[0]}: given twice; a model is not judged against itself")
    header, first, which = read_side(args.answers[0])
    _, second, other = read_side(args.answers[-1])
    names = choose_questions(args, first, second)
    questions = [first[name] for name in names]

    # Without its image a question would be judged by guessing.
    images = [image_path(header, question) for question in questions]
    num_lost = sum(bool(q.image) and path is None for q, path in zip(questions, images))
    if num_lost:
        raise ValueError(
            f"{num_lost:,} of {len(questions):,} images are not where they were when "
            f"{args.answers[0]} was written"
        )

    # Grades compare the model with the reference, in the place of a second model.
    requests = []
    for name, question, image in zip(names, questions, images):
        ours, theirs = getattr(question, which), getattr(second[name], other)
        if args.mode == "grade":
            theirs = reference_answer(question)
        earlier = earlier_turns(question, first.values())
        for pair in ((ours, theirs), (theirs, ours)):
            requests.append((judge_request(args, question, earlier, image, *pair), image))
    return questions, requests


def print_plan(args, questions, requests, journal):
    """Says what is left to ask, and about what it will cost. Returns the number of requests."""
    # Equal answers make equal requests, which are asked once.
    different = {request.key: (request, image) for request, image in requests}
    left = [
        estimate_tokens(request, make_jpeg(image))
        for request, image in different.values()
        if journal.outcome(request, args)[0] == "no reply"
    ]
    sent, received = (sum(estimate[i] for estimate in left) for i in (0, 1))
    cost = " (give --price-in and --price-out for the cost)"
    if has_prices(args):
        cost = f", about {price((sent, received), args):.2f}"
    print(
        f"{len(questions):,} questions in 2 orders: {len(different):,} different requests, "
        f"{len(different) - len(left):,} answered before; {len(left):,} to ask: about {sent:,} "
        f"tokens sent, {received:,} received{cost}"
    )
    return len(left)


def run(args):
    key = check_options(args)
    questions, requests = make_requests(args)
    journal = Journal(sibling(args.out, ".journal.jsonl"))
    try:
        with journal.file:
            num_left = print_plan(args, questions, requests, journal)
            if args.dry_run:
                return
            why = ask_judge(args, key, num_left, requests, journal)
    finally:
        # Without a reply nothing is left behind.
        if journal.path.stat().st_size == 0:
            journal.path.unlink()
    if why == "interrupted":
        raise KeyboardInterrupt
    report_results(args, questions, [request for request, _ in requests], journal, why)


def ask_judge(args, key, num_left, requests, journal):
    """Asks for what the journal lacks; returns why it ended early, or None."""
    # A server of this machine mostly wants no key.
    endpoint = Endpoint(args, key, journal)
    if num_left and not key and not is_local(endpoint.url):
        raise ValueError(f"no key: set {args.key_env}, or name another with --key-env")

    jobs = [partial(endpoint.answer, r, partial(make_jpeg, image)) for r, image in requests]
    return run_jobs(jobs, endpoint)


def report_results(args, questions, requests, journal, why):
    """Writes and prints the figures. ValueError if requests got no reply, or none a verdict."""
    outcomes = [journal.outcome(request, args)[:2] for request in requests]
    failed = [outcome for outcome in outcomes if outcome[0] != "good"]
    troubles = Counter(state for state, _ in failed)
    if num_refused := outcomes.count(("good", None)):
        troubles["refused"] = num_refused

    # A question counts if both of its orders have a verdict.
    verdicts = [value if state == "good" else None for state, value in outcomes]
    pairs = list(zip(verdicts[::2], verdicts[1::2]))
    judged = [i for i, pair in enumerate(pairs) if None not in pair]
    rows = []
    if judged:
        rows = judge_rows(args.mode, [questions[i] for i in judged], [pairs[i] for i in judged])
    sent, received = journal.total_tokens()
    results = {
        "mode": args.mode,
        "answers": args.answers,
        "judge_model": args.model,
        "seed": args.seed,
        "questions": len(questions),
        "judged": len(judged),
        "troubles": dict(troubles),
        "tokens": {"prompt_tokens": sent, "completion_tokens": received},
        "judge": rows,
    }
    write_results(args.out, results)

    for i, row in enumerate(rows):
        if i == 0 or row["language"] != rows[i - 1]["language"]:
            print(f"{row['language']}, {row['n']:,} questions")
        scale = 1 if "grade of" in row["measure"] else 100
        interval = format_interval(row["value"], row["low"], row["high"], scale)
        p = f"  p {row['p']:.4f}" if "p" in row else ""
        print(f"  {row['measure']:45} {interval}{p}")
    listed = "".join(f"; {n:,} {trouble}" for trouble, n in troubles.items())
    print(
        f"{len(judged):,} of {len(questions):,} questions judged; tokens paid for so far: "
        f"{sent:,} sent, {received:,} received{listed}"
    )
    print_troubles(failed)

    # Figures without all replies are a beginning, and none at all are no success.
    if troubles["no reply"] or why:
        raise ValueError(
            f"{why or 'some requests were set aside'}: {troubles['no reply']:,} requests have no "
            f"reply; what was answered is kept in {journal.path}: run the same command again"
        )
    if not judged:
        raise ValueError(f"no question was judged{listed}; the replies are in {journal.path}")
