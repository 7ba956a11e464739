"""Images with their questions and the model's answers, drawn at random."""

import base64
import io
import random
from collections import defaultdict

from PIL import Image

import vision
from evaluation.answer import image_path
from evaluation.metrics import score_answer
from evaluation.questions import earlier_turns, reference_answer
from evaluation.tables import escape, language_name, plain_name

PLURALS = {"right": "right", "wrong": "wrong", "caption": "captions"}  # of the verdicts


def image_tag(image, alt=""):
    """An <img> that holds the Pillow image itself."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=86)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{content}" alt="{alt}">'


def preprocessed(path, image_aspect_ratio):
    """The image as the model gets it, larger."""
    pixels = vision.preprocess(vision.load_image(path), 336, image_aspect_ratio)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def verdict(question):
    """ "right", "wrong" or "caption"."""
    if question.metric == "caption":
        return "caption"
    return "right" if score_answer(question, question.full)["accuracy"] >= 0.5 else "wrong"


def div(style, text):
    return f'<div class="{style}">{text}</div>'


def spoken(text):
    """A text of any language as HTML: it runs from the right where its letters do."""
    return f"<bdi>{escape(text)}</bdi>"


def card(question, image, earlier=(), note=""):
    """An image (HTML) with a question, the earlier ones of its record, and its answers."""
    tags = [language_name(question.language), *map(plain_name, (question.split, question.skill))]
    if question.turn:
        tags.append(f"turn {question.turn + 1}")
    lines = [div("tag", " · ".join(tags) + note)]
    for before in earlier:
        text = escape(f"{before.question} {reference_answer(before)}")
        lines.append(f'<div class="tag" dir="auto">{text}</div>')
    lines.append(f'<div class="question" dir="auto">{escape(question.question)}</div>')

    # Captions are neither right nor wrong.
    answer, found = spoken(question.full or "(nothing)"), verdict(question)
    if found == "caption":
        score = 100 * score_answer(question, question.full)["chrf"]
        lines.append(f"<div><b>{answer}</b> · chrF {score:.1f}</div>")
    else:
        mark = "✓" if found == "right" else "✗"
        lines.append(f'<div><span class="{found}">{mark} {answer}</span></div>')
    if found != "right":
        lines.append(f"<div>reference: {spoken(reference_answer(question))}</div>")
    lines.append(div("tag", "blind: " + spoken(question.blind or "(nothing)")))

    text = image + div("text", "\n".join(lines))
    return f'<div class="card" lang="{escape(question.language)}">{text}</div>\n'


def gallery(header, questions, seed, per_group):
    """For each language `per_group` right answers, wrong answers and captions, drawn by seed."""
    # The page picks none by hand.
    groups = defaultdict(list)
    for question in questions:
        if question.image:
            groups[question.language, verdict(question)].append(question)

    rng, parts = random.Random(seed), []
    for language in sorted({language for language, _ in groups}):
        cards, counts = "", []
        for group, plural in PLURALS.items():
            pool = groups[language, group]
            drawn = rng.sample(pool, min(per_group, len(pool)))
            if drawn:
                counts.append(f"{len(drawn)} of {len(pool):,} {plural}")
            for question in drawn:
                image = shown_image(header, question)
                cards += card(question, image, earlier_turns(question, questions))
        note = f'<span class="soft small">shown: {", ".join(counts)}</span>'
        parts += [f"<h3>{language_name(language)} {note}</h3>", div("gallery", cards)]
    return "".join(parts)


def shown_image(header, question):
    """The question's image, or a note that it is gone."""
    path = image_path(header, question)
    if path:
        return image_tag(preprocessed(path, "pad"))
    return div("missing", escape(question.image) + "<br>is not where it was")
