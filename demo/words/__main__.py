"""Checks a file of words, and prints sentences of it to be read aloud (docs/languages.md).

python -m demo.words check xx.json               # wherever the file is
python -m demo.words check xx.json --each 3      # three samples of each skill, not ten
"""

import re
import sys
from pathlib import Path

from demo.check import find_problems, flatten, shared_texts, wording_overlaps
from demo.questions import PLAIN, UNSEEN, VARIED, Interviewer
from demo.text import description
from demo.words import AVAILABLE, FOLDER, LANGUAGES, WORDS, arrange, read_file
from demo.world import SKILLS, random_for, random_scene
from vocabulary import flags
from vocabulary.command import Parser, run_main

MORE = ("describe", "is_background", "absent", "empty", "unanswerable", "greeting")


def find_notes(words, base):
    """Yields what may be right, but seldom is: texts left in the base language, and names that
    are a part of another name."""
    own, model = shared_texts(words), shared_texts(base)
    same = [path for path in own if own[path] == model.get(path)]
    same = [path for path in same if re.search(r"\w{3}", re.sub(r"{\w+}", "", own[path]))]
    if same and words != base:
        yield f"{len(same)} texts as in {LANGUAGES[0]}: {', '.join(same[:12])}"

    names = flatten({table: words[table] for table in ("kind", "colour", "place")})
    for path, name in names.items():
        for other, longer in names.items():
            if path != other and set(name.split()) <= set(longer.split()):
                yield f"{other} {longer!r} holds the words of {path} {name!r}"


def samples(language, skill, number):
    """Yields (question, answer) of a skill: plain, as people ask, and as tests ask in turn."""
    for n in range(number):
        rng = random_for("samples", skill, n)
        scene, wording = random_scene(rng), (PLAIN, VARIED, UNSEEN)[n % 3]
        if skill in MORE and wording == PLAIN:
            wording = VARIED
        asker = Interviewer(scene, language, rng, text_only=True, wording=wording)
        if skill == "text":
            yield "", description(scene, language, rng)
        elif skill == "describe":
            yield asker.describe()
        elif skill == "is_background":
            asker.wording = VARIED  # there are no others
            yield asker.ask_background(n % 2)
        elif skill == "absent":
            yield asker.ask_absent()
        elif skill == "empty":
            yield asker.ask_empty()
        elif skill in MORE:
            yield asker.ask_unanswerable(skill)
        elif turn := asker.ask(skill):
            yield turn


def check(path, each):
    """Prints all problems of a file; if it has none, notes and samples. Returns their number."""
    language = path.stem
    words = read_file(path)
    found = {name: read_file(FOLDER / f"{name}.json") for name in AVAILABLE}
    found = arrange(found | {language: words})
    problems = list(dict.fromkeys(find_problems(language, found)))
    unnamed = [name for name, other in found.items() if language not in other.get("names", {})]
    problems += [f"called.{name} is missing" for name in unnamed if name != language]
    for problem in problems:
        print(f"{path}: {problem}")
    if problems:
        return len(problems)

    for note in (*find_notes(words, found[LANGUAGES[0]]), *wording_overlaps(words)):
        print(f"note: {note}")
    WORDS.update(found)
    LANGUAGES[:] = found
    for skill in (*SKILLS, *MORE, "text"):
        print(f"\n{skill}")
        for question, answer in samples(language, skill, each):
            print("  " + " → ".join(filter(None, (question, answer))))
    print(f"\n{path}: nothing is missing. Read the sentences aloud")
    return 0


def main():
    parser = Parser(prog="python -m demo.words", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="what is missing, then samples").add_argument
    add("file", type=flags.file, metavar="FILE", help="xx.json, of the language xx")
    each = flags.at_least(0, most=1000)
    add("--each", type=each, default=10, metavar="N", help="samples of each skill")
    args = parser.parse_args()
    if number := check(Path(args.file), args.each):
        sys.exit(f"demo.words: {number} problems")


if __name__ == "__main__":
    run_main(main, "demo.words")
