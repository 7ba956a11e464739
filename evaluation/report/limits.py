"""What the numbers alone don't show: what the model gets wrong, and how to read some of them."""

import random
from collections import Counter, defaultdict

from evaluation.metrics import clauses, normalise, score_answer
from evaluation.questions import reference_answer
from evaluation.report.gallery import card, earlier_turns, shown_image, spoken
from evaluation.scores import accuracy_row, most_frequent_answers
from evaluation.tables import Table, language_name, plain_name, row_number

MIN_QUESTIONS = 20  # of a group whose share of right answers means something
FEW_ANSWERS = 3  # different references, at most, among which a model could guess


def is_right(question):
    return score_answer(question, question.full)["accuracy"] >= 0.5


def weakest_groups(questions, count):
    """[((split, skill), right, wrong)]: lists of questions. The skills with the lowest accuracy, of
    those below 95%. Captions count only where any is right: elsewhere none can be told right."""
    groups = defaultdict(lambda: ([], []))
    for question in questions:
        groups[question.split, question.skill][not is_right(question)].append(question)

    found = []
    for group, (right, wrong) in groups.items():
        n, metric = len(right) + len(wrong), (right + wrong)[0].metric
        if n >= MIN_QUESTIONS and len(right) < 0.95 * n and (right or metric != "caption"):
            found.append((len(right) / n, group, right, wrong))
    found.sort(key=lambda each: each[:2])
    return [each[1:] for each in found[:count]]


def weakest_gallery(header, questions, seed, count):
    """Cards: of each of the weakest skills one wrong answer, drawn by seed. "" if there is none."""
    rng, cards = random.Random(seed), ""
    with_image = [question for question in questions if question.image]
    for _, right, wrong in weakest_groups(with_image, count):
        question, n = rng.choice(wrong), len(right) + len(wrong)
        note = f"<br><b>{len(right):,} of {n:,} right</b>"
        image = shown_image(header, question)
        cards += card(question, image, earlier_turns(question, questions), note)
    return f'<div class="gallery">{cards}</div>' if cards else ""


def few_answers(questions):
    """HTML for each skill with few possible answers, in which the model often says something else:
    there "chance", which always says one of the few, is no measure of having seen nothing."""
    groups = defaultdict(list)
    for question in questions:
        if question.metric == "exact":
            groups[question.split, question.skill].append(question)

    parts = []
    for (split, skill), own in groups.items():
        references = defaultdict(Counter)
        for question in own:
            references[question.language][normalise(reference_answer(question))] += 1
        if len(own) < MIN_QUESTIONS or max(map(len, references.values())) > FEW_ANSWERS:
            continue

        answers = {
            "full": [question.full for question in own],
            "blind": [question.blind for question in own],
            "chance": most_frequent_answers(own),
        }
        lines = [(model, sort_answers(own, given, references)) for model, given in answers.items()]
        if lines[0][1]["else"].total() >= 0.1 * len(own):
            parts.append(few_answers_table(split, skill, references, len(own), lines))
    return "".join(parts)


def sort_answers(questions, answers, references):
    """{"right", "other": an answer that is right elsewhere, "else": Counter of answers}."""
    found = {"right": Counter(), "other": Counter(), "else": Counter()}
    for question, answer in zip(questions, answers):
        key = "else"
        if normalise(answer) == normalise(reference_answer(question)):
            key = "right"
        elif normalise(answer) in references[question.language]:
            key = "other"
        found[key][answer] += 1
    return found


def few_answers_table(split, skill, references, n, lines):
    rows = []
    for model, found in lines:
        shares = [f"{found[key].total() / n:.1%}" for key in ("right", "other", "else")]
        often = [f"{spoken(a)} {count}" for a, count in found["else"].most_common(3)]
        rows.append(("", [model, *shares, ", ".join(often)]))
    head = ["", "the right one", "another of the few", "something else", "most often"]
    title = f"{plain_name(split)}, {plain_name(skill)}: few answers are possible"
    few = "; ".join(", ".join(map(spoken, own)) for own in references.values())
    text = (
        f"Only these are ever right: {few}. Chance always says one of them, so it is right often "
        "without having seen anything. Compare how often a model says the wrong one of them: who "
        "only guesses says it about as often as the right one."
    )
    return Table(title, head, rows).as_html().replace("</h3>", f"</h3><p>{text}</p>", 1)


def caption_table(questions):
    """Captions by language and number of clauses, as HTML; "" where none is ever right."""
    groups = defaultdict(list)
    for question in questions:
        if question.metric == "caption":
            num_clauses = len(clauses(reference_answer(question)))
            for language in (question.language, "all"):
                groups[question.split, language, num_clauses].append(question)
    if not any(is_right(question) for own in groups.values() for question in own):
        return ""

    lines = []
    order = sorted(groups, key=lambda group: (group[0], group[1] == "all", *group[1:]))
    for split, language, num_clauses in order:
        own = groups[split, language, num_clauses]
        scores = [score_answer(question, question.full) for question in own]
        cells = [plain_name(split), language_name(language), str(num_clauses), f"{len(own):,}"]
        cells.append(row_number(accuracy_row(own, [score["accuracy"] for score in scores])))
        exact = [score.get("exact", score["accuracy"]) for score in scores]
        cells.append(row_number(accuracy_row(own, exact)))
        lines.append(("sum" if language == "all" else "", cells))
    head = ["", "language", "clauses", "n", "all clauses right % (95%)", "same text % (95%)"]
    return Table("Captions by number of clauses", head, lines).as_html()
