"""Looking at a set: counts, lengths, random samples; and what a run would send and cost."""

import base64
import html
import json
import random
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path
from string import Template

import numpy as np

from annotation.build import cached_jpeg, count_names, print_filters
from annotation.prompts import generation_request
from evaluation.client import estimate_tokens, has_prices, make_body, price
from vocabulary.command import text_width
from vocabulary.conversations import read_conversations
from vocabulary.files import claim_output, sibling, write_atomically

MARK = b'content="annotation stats"'  # in the first line of sheet.html


def dry_run(items, args):
    """Prints one whole request per kind, and what all of them would cost; sends nothing."""
    # The first images may be broken.
    estimates = []
    for item in items:
        request = generation_request(item, args)
        try:
            jpeg = cached_jpeg(item.path, args.max_side)
        except ValueError:
            continue

        body = make_body(request, args, f"({len(jpeg):,} bytes of {item.name})")
        print(f"\nPOST {args.base_url.rstrip('/')}/chat/completions")
        print(f"Authorization: Bearer ${args.key_env}")
        lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in body.items()]
        print("{" + ",\n ".join(lines) + "}")
        estimates.append(estimate_tokens(request, jpeg))
        if len(estimates) == len(args.kinds):
            break

    if not estimates:
        raise ValueError(f"{args.folder}: none of its images can be read")

    # Each shown request stands for all of its kind. --verify asks about each reply once more.
    passes = 2 if args.verify else 1
    times = len(items) // len(estimates) * passes
    tokens_in, tokens_out = (times * sum(estimate[i] for estimate in estimates) for i in (0, 1))
    cost = "give --price-in and --price-out for the cost"
    if has_prices(args):
        most = price((tokens_in, len(items) * passes * args.max_tokens), args)
        likely = price((tokens_in, tokens_out), args)
        cost = f"cost about {likely:,.2f}, {most:,.2f} if every reply were --max-tokens long"
        cost += f", {args.tries} times as much if none could be read"
    print(
        f"\n{len(items) * passes:,} requests, about {tokens_in:,} tokens in and {tokens_out:,} out "
        f"(guessed from one image): {cost}. Nothing was sent."
    )
    return 0


def print_stats(args):
    """Prints counts, lengths, first words and the share rejected of a set; with --sheet writes a
    page of random samples."""
    if args.sheet:
        claim_output(args.sheet, lambda path: MARK in path.read_bytes()[:100], [args.file])
    records, bad = [], []
    for _, record, conversation in read_conversations(args.file, bad):
        about = conversation._asdict() | {"image": next(iter(conversation.images), None)}
        records.append(record | about)
    if bad:
        raise ValueError(bad[0])
    if args.sheet:
        write_sheet(records, args)
    num_images = len({record["image"] for record in records})
    sources = count_names(str(record.get("source")) for record in records)
    print(f"{args.file}: {len(records):,} records, {num_images:,} images; made by {sources}")
    print_counts(records)
    num_pairs = print_lengths(records)

    # Who shares a set may leave out what was rejected.
    rejected, side = [], sibling(args.file, ".rejected.jsonl")
    if side.is_file():
        rejected = [json.loads(line) for line in side.read_bytes().split(b"\n") if line]
    print_share_rejected(records, rejected, num_pairs)
    if args.sheet:
        print(f"\n{args.sheet}: random samples, to look over")
    return 0


def print_counts(records):
    """A table: records by language and kind."""
    table = Counter((record["language"], record["kind"]) for record in records)
    kinds = sorted({kind for _, kind in table})
    print("\nrecords   " + "".join(f"{kind:>14}" for kind in kinds))
    for language in sorted({language for language, _ in table}):
        cells = "".join(f"{table[language, kind]:>14,}" for kind in kinds)
        print(f"{language:<10}{cells}")


def print_lengths(records):
    """A table by language: pairs, widths of questions and answers, first words of questions.
    Returns the mean number of pairs per language."""
    questions, answers, first_words = defaultdict(list), defaultdict(list), defaultdict(Counter)
    for record in records:
        language = record["language"]
        for parts, answer in record["turns"]:
            question = "".join(parts).strip()
            questions[language].append(text_width(question))
            answers[language].append(text_width(answer))
            # Chinese writes no spaces: its first two characters stand for the first word.
            first = question.split()[0] if " " in question else question[:2]
            first_words[language][first] += 1

    # Percentiles, as a few very long answers would rule a mean.
    print("\ncolumns, 5% / median / 95%       pairs      questions        answers")
    for language in sorted(questions):
        spreads = ""
        for widths in (questions[language], answers[language]):
            low, median, high = np.percentile(widths, (5, 50, 95))
            spreads += f"{f'{low:.0f} / {median:.0f} / {high:.0f}':>15}"

        count = len(questions[language])
        common = first_words[language].most_common(6)
        words = ", ".join(f"{word} {n / count:.0%}" for word, n in common)
        print(f"{language:<28}{count:>10,}{spreads}\n  most frequent first words: {words}")
    return sum(map(len, questions.values())) / max(1, len(questions))


def print_share_rejected(records, rejected, num_pairs):
    """How many whole replies and pairs were rejected, and by which filter."""
    replies = len({(record["image"], record["kind"]) for record in records})
    # Of replies that never came nothing was rejected.
    never_read = ("image", "no reply")
    whole = sum(row["pair"] is None and row["filter"] not in never_read for row in rejected)
    dropped = sum(row["pair"] is not None for row in rejected)
    print(
        f"\nrejected: {whole:,} whole replies ({whole / max(1, whole + replies):.1%}) and "
        f"{dropped:,} pairs ({dropped / max(1, dropped + num_pairs):.1%} of those that were judged)"
    )
    print_filters(rejected)


# ------------------------------------------------------------------------------------ the sheet
NUM_SAMPLES = 40


def write_sheet(records, args):
    """A self-contained page of random samples, an image's languages next to each other. All texts
    are escaped, and sheet.html forbids scripts."""
    groups = defaultdict(dict)  # (image, kind, pair) -> {language: record}
    for record in records:
        key = record["image"], record["kind"], str(record.get("pair"))
        groups[key][record["language"]] = record

    # Random ones, as the first ones of a set are alike.
    count = min(NUM_SAMPLES, len(groups))
    chosen = random.Random(0).sample(list(groups.items()), count)
    cards = [sample_card(args, image, kind, group) for (image, kind, _), group in chosen]
    drawn = f"{count} of {len(groups):,} samples, drawn at random"
    head = Template(Path(__file__).with_name("sheet.html").read_text(encoding="utf-8"))
    page = head.substitute(title=html.escape(f"{args.file.name}: {drawn}")) + "\n".join(cards)
    content = page.encode("utf-8", "backslashreplace")
    write_atomically(args.sheet, lambda file: file.write(content))


def sample_card(args, image, kind, group):
    """The HTML of one sample: the image, and a row per turn with a cell per language."""
    picture = ""
    if image is not None:
        try:
            jpeg = cached_jpeg(args.file.parent / image, 320)
        except ValueError as error:
            raise ValueError(f"{args.file}: {error}") from None
        source = base64.b64encode(jpeg).decode()
        picture = f'<img src="data:image/jpeg;base64,{source}">'

    rows, conversations = "", [record["turns"] for record in group.values()]

    # A set that was edited by hand may have fewer turns in one language.
    for turns in zip_longest(*conversations, fillvalue=([""], "")):
        rows += "<tr>"
        for code, (parts, answer) in zip(group, turns):
            question = html.escape("".join(parts).strip())
            rows += f'<td lang="{html.escape(code)}" dir=auto>'
            rows += f"<b>{question}</b><br>{html.escape(answer)}</td>"

    caption = html.escape(f"{image or 'no image'} · {kind}")
    figure = f"<figure>{picture}<small>{caption}</small></figure>"
    return f"<section>{figure}<table>{rows}</table></section>"
