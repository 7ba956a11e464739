"""The run: asks for what the journal lacks, then makes the set from the journal.

    image → JPEG without metadata → one request per kind, for all languages at once
        → evaluation/client.py: reply, journal → filters.py: which pairs pass → LLaVA records

    set.journal.jsonl     every reply, synced to disk as it arrives: it is what was paid for
    set.json              the pairs that pass: LLaVA records with language, kind, source (the
                          model) and prompt_version
    set.rejected.jsonl    the others, with filter and reason

The last two are made from the journal and may be deleted.
"""

import os
import sys
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from annotation.filters import (
    FILTERS,
    DuplicateFilter,
    Rejected,
    filter_pairs,
    truncate_conversation,
)
from annotation.images import ENDINGS, find_images, read_objects
from annotation.prompts import KINDS, PROMPTS, digest, generation_request, verification_request
from evaluation.client import (
    Endpoint,
    check_options,
    encode_jpeg,
    has_prices,
    print_troubles,
    run_jobs,
)
from evaluation.journal import Journal, is_journal, json_line
from vocabulary.command import first_few
from vocabulary.conversations import IMAGE_TOKEN, read_conversation
from vocabulary.files import claim_output, sibling, write_atomically
from vocabulary.identity import claim_run, digest_text, write_claimed

cached_jpeg = lru_cache(maxsize=32)(encode_jpeg)  # an image's kinds are asked one after another


def process_item(item, args, endpoint):
    """Makes the journal hold what an item needs: a reply, and with --verify the verdict on it."""
    make_jpeg = partial(cached_jpeg, item.path, args.max_side)
    state, pairs = endpoint.answer(generation_request(item, args), make_jpeg)
    if args.verify and state == "good":
        passed, _ = filter_pairs(pairs, item.kind, item.objects)
        if passed:
            endpoint.answer(verification_request(item, args, pairs, passed), make_jpeg)


def filter_item(item, args, journal):
    """-> (pairs, numbers of those that pass, [Rejected]) of one item by itself."""
    state, pairs, _ = journal.outcome(generation_request(item, args), args)
    if state != "good":
        return {}, [], [Rejected(None, state, pairs)]

    # What the filters reject needs no second look.
    passed, rejected = filter_pairs(pairs, item.kind, item.objects)
    if not args.verify or not passed:
        return pairs, passed, rejected

    state, verdicts, _ = journal.outcome(verification_request(item, args, pairs, passed), args)
    # A verdict that is missing comes when the run goes on.
    if state == "no reply":
        return pairs, [], [Rejected(None, state, f"no verdict: {verdicts}")]
    confirmed, reason = [], f"no verdict: {verdicts}"
    if state == "good":
        confirmed, reason = [passed[n] for n in sorted(verdicts)], "not confirmed"
    rejected += [Rejected(n, "verify", reason) for n in passed if n not in confirmed]
    return pairs, *truncate_conversation(item.kind, confirmed, rejected)


def build_set(items, refused, args, journal):
    """-> (records, rejected rows): a function of journal, folder and options alone.

    Every item is in one, in the other, or pair by pair in both."""
    records, duplicates = [], DuplicateFilter()
    about = {"kind": None, "pair": None, "filter": "image"}
    rows = [{"image": name, **about, "reason": reason} for name, reason in refused]
    for item in items:
        pairs, passed, rejected = filter_item(item, args, journal)

        # A pair may repeat what was said before, of this image or of another.
        for n in list(passed):
            # A turn may have gone with an earlier one.
            if n not in passed:
                continue
            texts = {code: said[n] for code, said in pairs.items()}
            place = f"{item.name}, {item.kind}, pair {n}"
            if reason := duplicates.find(item.sha, place, texts):
                rest = [m for m in passed if m != n]
                rejected = [*rejected, Rejected(n, "duplicate", reason)]
                passed, rejected = truncate_conversation(item.kind, rest, rejected)

        rows += rejected_rows(item, pairs, rejected)
        records += make_records(item, pairs, passed, args)
    return records, rows


def rejected_rows(item, pairs, rejected):
    """One row for each thing that was rejected, with the texts where there are any."""
    rows = []
    for entry in sorted(set(rejected), key=lambda entry: -1 if entry.pair is None else entry.pair):
        row = {"image": item.name, "kind": item.kind, **entry._asdict()}
        if pairs and entry.pair is None:
            row["texts"] = pairs
        elif pairs:
            row["texts"] = {code: said[entry.pair] for code, said in pairs.items()}
        rows.append(row)
    return rows


def make_records(item, pairs, passed, args):
    """LLaVA records of an item: one a language, or with --one-pair-per-record one a pair."""
    image = args.folder.resolve() / item.name
    try:
        image = Path(os.path.relpath(image, args.out.parent.resolve()))
    except ValueError:  # on another drive of Windows
        pass
    image = image.as_posix()
    version = digest(generation_request(item, args).system, KINDS[item.kind])
    single = args.one_pair_per_record and item.kind != "conversation"
    groups = [passed] if passed else []
    if single:
        groups = [[n] for n in passed]

    records = []
    for code in args.languages:
        for group in groups:
            turns = []
            for n in group:
                question, answer = pairs[code][n]
                turns.append({"from": "human", "value": question})
                turns.append({"from": "gpt", "value": answer})

            # As LLaVA has it: the image stands before the first question.
            turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
            record = {
                "id": f"{item.sha[:12]}-{item.kind}-{code}",
                "image": image,
                "language": code,
                "kind": item.kind,
                "source": args.model,
                "prompt_version": version,
                "conversations": turns,
            }
            if single:
                record |= {"id": f"{record['id']}-{group[0]}", "pair": group[0]}
            read_conversation(record)  # ValueError now, rather than in training
            records.append(record)
    return records


# ------------------------------------------------------------------------------------ the run
def annotate(args):
    """Checks everything that can be checked beforehand, then runs; returns the exit status."""
    key = check_options(args)
    # Whose the files are is asked below: a dry run may look at any.
    claim_output(args.out, lambda path: True, [args.objects] if args.objects else [])
    items, refused = list_items(args)
    if args.dry_run:
        from annotation.stats import dry_run  # which imports this file

        return dry_run(items, args)

    # More images, kinds and objects go on with the journal, whose keys have them.
    journal_path, rejected_path = (
        sibling(args.out, ending) for ending in (".journal.jsonl", ".rejected.jsonl")
    )
    identity = {
        "command": "annotation",
        "model": args.model,
        "languages": args.languages,
        "max_side": args.max_side,
        "prompts": digest_text(PROMPTS),
        "files": {},
    }
    parts, known = [journal_path, rejected_path], is_journal(journal_path)
    claim_run(args.out, identity, parts, args.fresh, known)
    journal = Journal(journal_path)
    if journal.passed_over:
        count = f"{journal.passed_over} broken line(s)"
        print(f"{journal.path}: {count} passed over, as a crash leaves them", file=sys.stderr)
    # Once the journal is closed, it is free for the next process.
    with journal.file:
        endpoint = Endpoint(args, key, journal)
        why = run_jobs([partial(process_item, item, args, endpoint) for item in items], endpoint)
        records, rejected = build_set(items, refused, args, journal)
        lines = b",\n".join(json_line(record).rstrip(b"\n") for record in records)
        write_claimed(args.out, b"[\n" + lines + b"\n]\n")
        rows = b"".join(map(json_line, rejected))
        write_atomically(rejected_path, lambda file: file.write(rows))
        return report(args, items, records, rejected, endpoint, why)


def list_items(args):
    """-> (items: every image × kind, refused files). Says what was found."""
    objects = read_objects(args.objects) if args.objects else {}
    images, refused, num_others = find_images(args.folder, objects)
    if not images:
        raise ValueError(
            f"{args.folder}: no image in it ({', '.join(sorted(ENDINGS))}); {num_others} other "
            f"files, {len(refused)} refused"
        )

    # A name that was mistyped would go unnoticed.
    known = {image.name for image in images} | {name for name, _ in refused}
    if unknown := sorted(set(objects) - known):
        reason = f"{len(unknown):,} names are no image of {args.folder}: {first_few(unknown)}"
        print(f"{args.objects}: {reason}", file=sys.stderr)

    # Conversations come first: if one loses a turn as a duplicate, the later turns go with it.
    kinds = sorted(args.kinds, key=lambda kind: kind != "conversation")
    items = [replace(image, kind=kind) for image in images for kind in kinds]
    print(
        f"{args.folder}: {len(images):,} images × {len(kinds)} kinds = {len(items):,} requests, "
        f"each for {', '.join(args.languages)}; {len(refused)} files refused, {num_others} are no "
        "images"
    )
    return items, refused


def report(args, items, records, rejected, endpoint, why):
    """Prints what came of it, filter by filter; returns the exit status."""
    kept = {(record["image"], record["kind"]) for record in records}
    num_images = len({image for image, _ in kept})
    languages, kinds = (count_names(r[key] for r in records) for key in ("language", "kind"))
    print(
        f"{args.out}: {len(records):,} records ({languages}; {kinds}) about {num_images:,} images; "
        f"{len(kept):,} of {len(items):,} replies left something"
    )
    print_filters(rejected)
    print_troubles((r["filter"], r["reason"]) for r in rejected if r["filter"] in TROUBLES)

    journal = endpoint.journal
    tokens_in, tokens_out = journal.total_tokens()
    cost = f", cost {endpoint.spent:.4f}" if has_prices(args) else ""
    print(
        f"  {endpoint.sent:,} requests now; {len(journal.tokens):,} replies in "
        f"{journal.path.name}, {tokens_in:,} tokens in, {tokens_out:,} out{cost}"
    )
    # Whoever reads only the last line must know that the set is not whole.
    unanswered = sum(row["filter"] == "no reply" for row in rejected)
    if unanswered or why:
        print(
            f"{why or 'some requests were set aside'}: {unanswered:,} requests are not answered "
            "yet; run the same command to go on"
        )

    # A budget that was reached is no failure, if anything came.
    if why == "interrupted":
        return 130
    as_planned = (why or "").startswith("--max") and journal.tokens
    return int(bool(unanswered) and not as_planned)


TROUBLES = ("no reply", "malformed")  # filters that tell of the server, not of what it wrote


def count_names(names):
    """ "en 10, ko 8" of names, the most frequent first."""
    return first_few(f"{name} {n:,}" for name, n in Counter(names).most_common()) or "none"


def print_filters(rejected):
    """How many replies and pairs each filter rejected."""
    counts = Counter((row["filter"], row["pair"] is None) for row in rejected)
    for name, meaning in FILTERS.items():
        replies, pairs = counts[name, True], counts[name, False]
        if replies or pairs:
            print(f"  {name:<11}{replies:>6,} whole, {pairs:>6,} pairs   {meaning}")
