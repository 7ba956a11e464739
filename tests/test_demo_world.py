"""The demo world: what is said about an image is true, what is held out is nowhere, and the same
seed gives the same bytes."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from demo import records, text, write  # noqa: E402
from demo.backgrounds import draw_background  # noqa: E402
from demo.drawing import draw_thing  # noqa: E402
from demo.questions import phrases  # noqa: E402
from demo.words import WORDS  # noqa: E402
from demo.world import (  # noqa: E402
    COLOURS,
    HELD_OUT,
    KINDS,
    SKILLS,
    Scene,
    Thing,
    random_for,
)
from model import PRESETS  # noqa: E402

# The languages once more, written apart from the tables under test.
KIND = {
    "en": "fish cat duck butterfly car sailboat tree apple house key umbrella rocket".split(),
    "ko": "물고기 고양이 오리 나비 자동차 돛단배 나무 사과 집 열쇠 우산 로켓".split(),
    "zh": "鱼 猫 鸭子 蝴蝶 汽车 帆船 树 苹果 房子 钥匙 雨伞 火箭".split(),
}
# Alternatives are separated by "|".
COLOUR = {
    "en": "red orange yellow green blue purple white black".split(),
    "ko": "빨간 주황 노란 초록 파란 보라 하얀 검은".split(),
    "zh": "红 橙 黄 绿 蓝 紫 白 黑".split(),
}
PLACE = {
    "en": [
        *("at the top left|in the top left corner", "at the top centre|at the top in the middle"),
        *("at the top right|in the top right corner", "at the middle left|on the left side"),
        *("in the centre|^in the middle|(?<!top )(?<!bottom )in the middle", ""),
        *("at the bottom left|in the bottom left corner", ""),
        "at the bottom right|in the bottom right corner",
    ],
    "ko": [
        *("왼쪽 위|왼쪽 상단", "위쪽 가운데|상단 가운데", "오른쪽 위|오른쪽 상단"),
        *("왼쪽 가운데|왼쪽 중간", "한가운데|정중앙", "오른쪽 가운데|오른쪽 중간"),
        *("왼쪽 아래|왼쪽 하단", "아래쪽 가운데|하단 가운데", "오른쪽 아래|오른쪽 하단"),
    ],
    "zh": [
        *("左上", "顶部|上面中间", "右上"),
        *("左侧|左边中间", "正中央|正中间", "右侧|右边中间"),
        *("左下", "底部|下面中间", "右下"),
    ],
}
PLACE["en"][5] = "at the middle right|on the right side"
PLACE["en"][7] = "at the bottom centre|at the bottom in the middle"
SIZE = {
    "en": {"big|large": "big", "small|little": "small"},
    "ko": {"큰|커|큽|크니": "big", "작": "small"},
    "zh": {"大": "big", "小": "small"},
}
SIDE = {
    "en": {"left of": (0, -1), "right of": (0, 1), "above|over": (-1, 0), "below|under": (1, 0)},
    "ko": {"왼쪽|왼편": (0, -1), "오른쪽|오른편": (0, 1), "위": (-1, 0), "아래": (1, 0)},
    "zh": {"左边|左面": (0, -1), "右边|右面": (0, 1), "上方|上面": (-1, 0), "下方|下面": (1, 0)},
}
YES, NO = {"yes", "네", "有", "是"}, {"no", "아니요", "没有", "不是"}
NUMBER = {
    **{"one": 1, "two": 2, "three": 3},
    **{"한 개예요": 1, "두 개예요": 2, "세 개예요": 3},
    **{"一个": 1, "两个": 2, "三个": 3},
}
BACKGROUND = {
    "day": ["a sunny day", "맑은 낮이에요", "晴天", "sun shines", "햇살", "阳光"],
    "night": ["night", "밤이에요", "夜晚", "stars", "별이", "星光"],
    "sunset": ["sunset", "해 질 녘이에요", "日落时分", "setting sun", "지는 해", "夕阳"],
    "snow": ["a snowy day", "눈 오는 날이에요", "雪天", "snow falls", "눈이", "雪花"],
    "rain": ["a rainy day", "비 오는 날이에요", "雨天", "rain falls", "비가", "下着雨"],
}
# The same in questions whether it is so, for which a person has more words.
ASKED_BACKGROUND = {
    "day": "sunny|맑은 낮|화창|晴|阳光",
    "night": "night|dark|밤|夜|晚上|黑了",
    "sunset": "sunset|setting|going down|해 질 녘|해가 지|노을|日落|傍晚|下山",
    "snow": "snow|눈|雪",
    "rain": "rain|비|雨",
}
SPLITS = ("validation", "unseen_images", "unseen_combinations", "cross_lingual")
MORE_SPLITS = ("validation_varied", "unseen_phrasings", "further_nouns", "unanswerable")
TRAINING = ("captions", "phrases", "instruct-1", "instruct-2", "instruct-3", "instruct")
UNANSWERED = ("absent", "empty", "unanswerable", "greeting")
KIND_NAMES, COLOUR_NAMES = list(KINDS), list(COLOURS)


def found(words, said, language):
    """Which of the words (a list: their numbers) a text has."""
    whole = r"\b(?:{})\b" if language == "en" else "{}"
    return [n for n, word in enumerate(words) if re.search(whole.format(word), said.lower())]


def other_noun_in(said, language):
    """Whether a text names a thing that the world does not hold, maybe by its English name."""
    if language != "en" and (borrowed := re.findall(r"[a-z]+", said.lower())):
        return bool({*borrowed} & {*WORDS["en"]["other_kind"].values()})
    tables = [WORDS[language][name].values() for name in ("other_kind", "unseen_kind")]
    nouns = "|".join(noun for table in tables for noun in table)
    particle = {"en": r"\b", "ko": "(?=이|가|은|는|을|를|의|과|와| |$)", "zh": ""}[language]
    start = "" if language == "zh" else r"\b"
    return bool(re.search(f"{start}(?:{nouns}){particle}", said.lower()))


def found_in(said, language):
    """{property: the numbers of its words} in a text."""
    tables = {"kind": KIND, "colour": COLOUR, "place": PLACE}
    named = {name: found(words[language], said, language) for name, words in tables.items()}
    if language != "en":  # a kind may have its English name
        borrowed = re.findall("[a-z]+", said.lower())
        named["kind"] += [n for n, word in enumerate(KIND["en"]) if word in borrowed]
    return named


def sizes_in(said, language):
    """The sizes that a text names."""
    return [size for word, size in SIZE[language].items() if re.search(word, said.lower())]


def lies_beside(thing, one, rows, columns):
    """Whether a thing lies on that side of another, by row or by column."""
    (row, column), (one_row, one_column) = divmod(thing["place"], 3), divmod(one["place"], 3)
    return (row - one_row) * rows > 0 or (column - one_column) * columns > 0


def check_turn(question, answer, scene, language, last):
    """Reads a question and its answer as a person would, looks at the scene, and asserts that the
    answer is right. Returns the thing that it is about."""
    things = []
    for thing in scene["things"]:
        numbers = {
            "kind": KIND_NAMES.index(thing["kind"]),
            "colour": COLOUR_NAMES.index(thing["colour"]),
        }
        things.append(dict(thing, **numbers))
    asked, told = found_in(question, language), found_in(answer, language)
    context = (question, answer, scene)
    if answer in YES | NO:
        named = asked | {"size": sizes_in(question, language)}
        if other_noun_in(question, language):
            assert answer in NO, context
            return last
        if not named["kind"]:
            wanted = ASKED_BACKGROUND[scene["background"]]
            assert bool(re.search(wanted, question.lower())) == (answer in YES), context
            return last
        is_there = any(
            all(thing[name] in wanted for name, wanted in named.items() if wanted)
            for thing in things
        )
        assert is_there == (answer in YES), context
        return last
    if answer in NUMBER:
        assert NUMBER[answer] == len(things)
        return last

    about = [t for t in things if any(t[name] in asked[name] for name in asked)]
    assert len(about) <= 1, context
    one = about[0] if about else last
    if told["kind"] and told["colour"]:
        there = one
        if not asked["place"]:  # a relation: one thing alone lies on that side
            ((rows, columns),) = [
                step for word, step in SIDE[language].items() if re.search(word, question.lower())
            ]
            (there,) = [thing for thing in things if lies_beside(thing, one, rows, columns)]
        assert (told["kind"], told["colour"]) == ([there["kind"]], [there["colour"]]), context
        return one
    seen = [name for name, words in BACKGROUND.items() if any(w in answer for w in words)]
    if seen:
        assert seen == [scene["background"]], context
    elif any(told.values()):
        (name,) = [name for name, words in told.items() if words]
        assert told[name] == [one[name]], context
    else:
        assert sizes_in(answer, language) == [one["size"]], context
    return one


def check_unanswered(record, scene):
    """Asserts that what a record asks about is not there."""
    question, answer = texts(record)
    language = record["language"]
    key = "unanswerable" if record["kind"] == "absent" else record["kind"]
    assert answer == WORDS[language]["unanswered"][key]
    if record["kind"] == "absent":
        asked = found_in(question, language)["kind"]
        tables = [WORDS[language][name] for name in ("other_kind", "unseen_kind")]
        tables.append(WORDS["en"]["other_kind"])
        nouns = [noun for table in tables for noun in table.values() if noun in question.lower()]
        assert asked or nouns, question
        assert not {KIND_NAMES[kind] for kind in asked} & {t["kind"] for t in scene["things"]}
    if record["kind"] == "empty":
        (place,) = found_in(question, language)["place"]
        assert place not in [thing["place"] for thing in scene["things"]]


def check_record(record, scene):
    """Asserts that every answer of a record is right."""
    last, turns = None, texts(record)
    if record["kind"] in UNANSWERED:
        return check_unanswered(record, scene)
    for question, answer in zip(turns[::2], turns[1::2]):
        question = question.removeprefix("<image>\n")
        last = check_turn(question, answer, scene, record["language"], last)


def texts(record):
    """The questions and answers of a record."""
    return [turn["value"] for turn in record["conversations"]]


@cache
def leaks_in(part):
    """Whether a text names a kind and the colour held out of it."""
    for language in KIND:
        colours = found(COLOUR[language], part, language)
        for kind in found(KIND[language], part, language):
            if COLOUR_NAMES.index(HELD_OUT[KIND_NAMES[kind]]) in colours:
                return True
    return False


def leaks(said):
    """Held-out pairs named together: in one phrase, sentence or question, or one line of notes."""
    parts = re.split(r"USER:|ASSISTANT:|[.,;?!，。；？！\n=/]", said)
    parts += re.findall(r"[:：]([^:：;；]*)[;；]", said)
    return [part for part in parts if leaks_in(part.strip())]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, on disk."""
    out = tmp_path_factory.mktemp("world") / "data"
    write.write_world(out, images=150, documents=400, seed=3, workers=1)
    return out


@pytest.fixture(scope="module")
def said():
    """What is said in a larger world, without drawing it: {file: records}, {split: scenes}."""
    splits = write.make_scenes(5, 1000)
    files = {name: [] for name in TRAINING}
    for index, scene in enumerate(splits["train"]):
        for name, made in records.train_records(scene, 5, index).items():
            files[name] += made
    files["instruct"] += [text.text_record(i, 5) for i in range(900)]
    files |= {split: records.split_records(split, splits[split], 5) for split in SPLITS}
    return files, splits


def test_the_demos_model_reads_every_record_even_in_bytes(said):
    """Without vocabulary expansion (demo.ablation) a language may be spelled in bytes."""
    config = PRESETS["tiny"]
    frame = config.vision.num_patches + 40  # the template's own words
    longest = max(
        sum(len(turn["value"].encode()) for turn in record["conversations"])
        for record in said[0]["instruct"]
    )
    assert 400 < longest < config.text.max_position_embeddings - frame


def load(path):
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_answer_is_what_an_independent_reader_of_the_scene_would_say(world):
    truth = {scene["image"]: scene for scene in load(world / "scenes.json")}
    checked = 0
    for name in ("instruct", "instruct-1", "instruct-2", "instruct-3", *SPLITS, *MORE_SPLITS):
        for record in load(world / f"{name}.json"):
            if "image" in record and record["kind"] != "caption":
                check_record(record, truth[record["image"]])
                checked += 1
    assert checked > 2000


def test_the_reader_notices_a_wrong_answer():
    cat = {"kind": "cat", "colour": "red", "size": "big", "place": 0}
    duck = {"kind": "duck", "colour": "blue", "size": "small", "place": 5}
    scene = {"background": "day", "things": [cat, duck]}
    check_turn("What is to the left of the duck?", "a red cat", scene, "en", None)
    check_turn("고양이는 빨간색인가요?", "네", scene, "ko", None)
    for language, question, answer in (
        ("en", "What is to the left of the duck?", "a blue duck"),
        ("ko", "고양이는 빨간색인가요?", "아니요"),
        ("zh", "猫在哪里？", "在右上角"),
        ("en", "Is the cat small?", "yes"),
        ("en", "What is the mood, and why?", "quiet, because stars shine in the dark sky"),
    ):
        with pytest.raises(AssertionError):
            check_turn(question, answer, scene, language, None)


def test_phrases_are_all_that_is_true_and_captions_say_every_thing(said):
    files, splits = said
    cat, duck = Thing("cat", "red", "big", 0), Thing("duck", "blue", "small", 8)
    scene = Scene((cat, duck), "night")

    def phrases_in(language):
        without, naming = (
            set(phrases(scene, language, random_for(0), colours)) for colours in (False, True)
        )
        assert not without & naming
        assert all(found(COLOUR[language], phrase, language) for phrase in naming)
        assert not any(found(COLOUR[language], phrase, language) for phrase in without)
        return without | naming

    assert phrases_in("en") == {
        "at night",
        *("a red cat", "a cat at the top left", "a big cat"),
        *("something red at the top left", "something big at the top left"),
        *("a cat to the left of a duck", "a cat above a duck"),
        *("a blue duck", "a duck at the bottom right", "a small duck"),
        *("something blue at the bottom right", "something small at the bottom right"),
        *("a duck to the right of a cat", "a duck below a cat"),
    }
    assert phrases_in("ko") >= {
        *("밤에", "빨간색 고양이", "왼쪽 위에 있는 고양이", "큰 고양이"),
        *("왼쪽 위에 있는 빨간색 물체", "오리 왼쪽에 있는 고양이", "고양이 아래쪽에 있는 오리"),
    }
    assert phrases_in("zh") >= {
        *("在夜晚", "一只红色的猫", "左上角有一只猫", "一只大猫"),
        *("左上角有个红色的东西", "鸭子左边有一只猫", "猫下方有一只鸭子"),
    }
    for record in files["captions"]:
        language = record["language"]
        things = splits["train"][int(record["id"].split("-")[1])].things
        parts = re.split(", |，", texts(record)[1])
        assert len(parts) == len(things) + 1
        for thing in things:
            wanted = [
                KIND[language][KIND_NAMES.index(thing.kind)],
                COLOUR[language][COLOUR_NAMES.index(thing.colour)],
                PLACE[language][thing.place],
            ]
            assert any(all(found([w], part, language) for w in wanted) for part in parts)


def test_images_in_black_and_white_are_described_without_colours(world):
    about_grey = [r for r in load(world / "phrases.json") if "/grey/" in r["image"]]
    paths = {f"images/grey/{path.name}" for path in (world / "images" / "grey").iterdir()}
    assert {r["image"] for r in about_grey} == paths
    assert 0.3 < len(paths) / len(list((world / "images" / "train").iterdir())) < 0.4
    for record in about_grey:
        assert record["kind"] == "phrases"
        assert not found(COLOUR[record["language"]], texts(record)[1], record["language"])
        in_colour = world / record["image"].replace("grey", "train")
        with Image.open(world / record["image"]) as grey, Image.open(in_colour) as coloured:
            assert grey.mode == "L" and coloured.mode == "RGB"
            expected = np.asarray(coloured, float) @ (0.299, 0.587, 0.114)
            assert np.abs(np.asarray(grey, float) - expected).max() < 1


def test_the_dictionary_has_all_words(world):
    path = world / "text" / "dictionary.txt"
    lines = [line.split(" = ") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 12 + 8 + 2 + 5 + 4 + 30 and all(len(line) == 3 for line in lines)
    for line in (["cat", "고양이", "猫"], ["red", "빨간색", "红色"], ["rocket", "로켓", "火箭"]):
        assert line in lines


def test_held_out_pairs_are_in_no_training_file(world, said):
    files, splits = said
    assert sorted(Counter(HELD_OUT.values()).values()) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert len(HELD_OUT) == 12
    for scene in splits["train"] + splits["validation"] + splits["unseen_images"]:
        assert all(HELD_OUT[thing.kind] != thing.colour for thing in scene.things)
    for scene in splits["unseen_combinations"]:
        assert HELD_OUT[scene.things[0].kind] == scene.things[0].colour

    names = (*TRAINING, "validation", "unseen_images")
    spoken = [part for name in names for record in files[name] for part in texts(record)]
    for path in sorted((world / "text").iterdir()):
        spoken += path.read_text(encoding="utf-8").splitlines()
    assert [leak for part in spoken for leak in leaks(part)] == []

    # the search does find what it is to find
    for part in (
        "Is the cat blue?",
        "a big blue cat at the top left",
        "큰 파란색 고양이가 있어요",
        "左上角有一只蓝色的大猫",
        "at the top left: blue, big, cat; night.",
    ):
        assert leaks(part), part
    assert any(leaks(part) for r in files["unseen_combinations"] for part in texts(r))


def test_base_only_kinds_are_named_in_other_languages_in_text_alone(world, said):
    files, _ = said
    names = {"ko": ("우산", "로켓"), "zh": ("雨伞", "火箭"), "en": ("umbrella", "rocket")}
    for name in (*TRAINING, "validation", "unseen_images"):
        for record in files[name]:
            if "image" in record and record["language"] != "en":
                said_of = " ".join(texts(record))
                assert not any(n in said_of for n in names["ko"] + names["zh"]), record

    without_image = [r for r in files["instruct"] if "image" not in r]
    in_images = " ".join(part for r in files["captions"] for part in texts(r))
    for language, words in names.items():
        in_text = (world / "text" / f"{language}.txt").read_text(encoding="utf-8")
        in_text += " ".join(part for r in without_image for part in texts(r))
        assert all(in_text.count(word) > 20 for word in words)
        assert language != "en" or all(word in in_images for word in words)

    # every question or answer of the test needs the name; of a conversation, every turn
    for record in files["cross_lingual"]:
        turns, wanted = texts(record), names[record["language"]]
        assert record["language"] in ("ko", "zh")
        for question, answer in zip(turns[::2], turns[1::2]):
            assert any(name in question + answer for name in wanted), record


def type_of(question, language):
    """The type of a yes/no question, by what it names."""
    named = found_in(question, language)
    if named["place"]:
        return "place"
    if sizes_in(question, language):
        return "size"
    if not named["kind"] and not other_noun_in(question, language):
        return "background"
    return "pair" if named["colour"] else "kind"


def test_training_names_nouns_of_no_kind_in_english_alone(said):
    files, _ = said
    nouns = {*WORDS["en"]["other_kind"].values()}
    counts = Counter()
    for record in files["instruct"]:
        question, *_ = texts(record)
        words = {*re.findall(r"[a-z]+", question.lower())}
        if record["kind"] in ("absent", "yes_no") and record["language"] != "en":
            counts["borrowed"] += bool(words & nouns)
            # A Korean or Chinese noun may be a part of a longer word, so only long ones are sought.
            own = WORDS[record["language"]]["other_kind"].values()
            counts["own"] += any(noun in question for noun in own if len(noun) > 2)
    assert counts["borrowed"] > 50 and not counts["own"], counts


def test_yes_and_no_are_balanced_for_every_language_and_type(said):
    files, _ = said
    for name, slack in [("instruct", 0.06), *((split, 0.02) for split in SPLITS)]:
        for language in ("en", "ko", "zh"):
            if (name, language) == ("cross_lingual", "en"):
                continue
            count = Counter()
            for record in files[name]:
                if record["kind"] == "yes_no" and record["language"] == language:
                    question, answer = texts(record)
                    count[type_of(question, language), answer in YES] += 1
                    count["all", answer in YES] += 1
            assert count["all", True] > 20
            for kind in {kind for kind, _ in count}:
                yes, no = count[kind, True], count[kind, False]
                allowed = max(4 if kind == "all" else 1.5, slack * (yes + no))
                assert abs(yes - no) / 2 <= allowed, (name, language, kind, count)

    denied = Counter()
    for record in files["unseen_combinations"]:
        if record["kind"] == "yes_no":
            question, answer = texts(record)
            if leaks(question) and not found(PLACE["en"], question, "en"):
                denied[answer in YES] += 1
    assert denied[True] and abs(denied[True] - denied[False]) <= 3


def test_each_training_image_is_asked_about_colours_for_yes_and_for_no(said):
    files, _ = said
    answers = {}
    for record in files["instruct"]:
        if record["kind"] == "yes_no" and "-borrowed-" not in record["id"]:
            question, answer = texts(record)
            if type_of(question, record["language"]) == "pair":  # or "colour": both name one
                answers.setdefault((record["image"], record["language"]), []).append(answer in YES)
    assert len(answers) > 100
    assert {tuple(sorted(own)) for own in answers.values()} == {(False, False, True, True)}


def test_languages_and_skills_are_balanced_in_the_test_splits(said):
    files, _ = said
    for split in SPLITS:
        count = Counter(record["language"] for record in files[split])
        spread = max(count.values()) - min(count.values())
        assert spread <= 0.04 * sum(count.values()), (split, count)
        skills = {*SKILLS, "conversation"}
        if split == "cross_lingual":
            skills -= {"count", "background", "mood"}
        assert {record["skill"] for record in files[split]} == skills
        assert sum(len(texts(record)) // 2 for record in files[split]) >= 1500
        for record in files[split]:
            assert len(texts(record)) == (6 if record["kind"] == "conversation" else 2)


def test_training_conversations_have_the_asked_shape(said):
    files, _ = said
    questions = {"object": {3, 4}, "location": {2, 3, 4}, "atmosphere": {1}, "conversation": {1}}
    questions |= {"yes_no": {9}, "caption": {1, 2}, "absent": {1}, "empty": {1}}
    questions |= {"unanswerable": {1}, "greeting": {1}}
    asked, borrowed = Counter(), Counter()
    for record in files["instruct"]:
        if "-borrowed-" in record["id"]:
            borrowed[record["image"], record["language"]] += 1
        elif "image" in record:
            asked[record["image"], record["language"], record["kind"]] += 1
            turns = {4, 5, 6} if record["kind"] == "conversation" else {1}
            assert len(texts(record)) // 2 in turns, "an answer must not give away the next"
    wrong = {(kind, n) for (_, _, kind), n in asked.items() if n not in questions[kind]}
    assert not wrong
    base_only = {image for image, language in borrowed}
    assert set(borrowed.values()) == {5} and len(borrowed) == 2 * len(base_only) > 0
    assert not {image for image, language, _ in asked if language != "en"} & base_only

    every = [record for made in files.values() for record in made]
    for record in every:
        marks = [part.count("<image>") for part in texts(record)]
        assert marks == [int("image" in record)] + [0] * (len(marks) - 1)
        assert "image" not in record or texts(record)[0].startswith("<image>\n")
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(marks) // 2)
    ids = [record["id"] for record in every]
    assert len(ids) == len(set(ids))


def test_no_template_is_left_unfilled(world, said):
    files, _ = said
    every = [part for made in files.values() for record in made for part in texts(record)]
    every += [path.read_text(encoding="utf-8") for path in (world / "text").iterdir()]
    for part in every:
        assert not re.search(r"[{}]|은/는|이/가|을/를|과/와|이에요/예요|a/an| {2}", part), part[
            :200
        ]


def read_all(folder):
    """{path: bytes} of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 2)):
        write.write_world(tmp_path / name, images=12, documents=30, seed=seed, workers=workers)
    a, b, c = (read_all(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert [path for path in a if a[path] == c[path]] == ["text/dictionary.txt"]


def test_the_words_are_those_that_results_were_measured_on(tmp_path):
    write.write_world(tmp_path / "world", images=60, documents=30, seed=0, workers=1)
    total = hashlib.sha256()
    for path, content in read_all(tmp_path / "world").items():
        if path.endswith((".json", ".txt")):
            total.update(path.encode() + content)
    another = "another world: measure again what README.md says of it, then change this digest"
    assert total.hexdigest()[:16] == "0211943ff65f2eaf", another


def test_the_scenes_and_the_four_splits_are_those_of_older_results(tmp_path):
    write.write_world(tmp_path / "world", images=60, documents=30, seed=0, workers=1)
    total = hashlib.sha256()
    for name in ("scenes", *SPLITS):
        total.update((tmp_path / "world" / f"{name}.json").read_bytes())
    assert total.hexdigest()[:16] == "8c44fcbd722f455b", "figures no longer compare"


def test_a_share_thins_what_a_language_says_of_training_images_alone(tmp_path):
    shares = {"whole": None, "some": {"ko": 0.5, "zh": 0.0}, "fewer": {"ko": 0.2, "zh": 0.0}}
    files = {}
    for name, given in shares.items():
        write.write_world(tmp_path / name, images=30, documents=40, workers=1, shares=given)
        read = read_all(tmp_path / name).items()
        files[name] = {p: v.decode() for p, v in read if p.endswith((".json", ".txt"))}
    train = {f"{name}.json" for name in TRAINING}
    for path in files["whole"].keys() - train - {"world.json"}:
        assert files["whole"][path] == files["some"][path], "the same test splits and texts"

    for path in train:
        whole, some, fewer = (
            {(r["id"], r["language"], "image" in r) for r in json.loads(files[name][path])}
            for name in shares
        )
        assert fewer <= some == some & {r for r in whole if r[1] != "zh" or not r[2]}
        kept = {r for r in whole if r[1] == "en" or not r[2]}
        assert {r for r in some if r[1] != "ko" or not r[2]} == kept

    grey, colour = (
        {
            record["image"].rpartition("/")[2]
            for record in json.loads(files["some"]["phrases.json"])
            if record["language"] == "ko" and f"/{folder}/" in record["image"]
        }
        for folder in ("grey", "train")
    )
    assert grey and grey < colour, "a grey image is described as it is in colour"

    def in_korean(name):
        """(image, id) of the Korean records about images."""
        made = json.loads(files[name]["instruct.json"])
        return {(r["image"], r["id"]) for r in made if "image" in r and r["language"] == "ko"}

    images = {name: {image for image, _ in in_korean(name)} for name in shares}
    assert 0 < len(images["fewer"]) < len(images["some"]) < len(images["whole"])
    kept = {pair for pair in in_korean("whole") if pair[0] in images["some"]}
    assert in_korean("some") == kept, "an image is described in all kinds or in none"


def test_images_are_all_different_and_as_they_should_be(world, said):
    paths = sorted((world / "images").rglob("*.png"))
    assert len({path.read_bytes() for path in paths}) == len(paths)
    assert sum(path.stat().st_size for path in paths) / len(paths) <= 35_000
    with Image.open(paths[0]) as image:
        assert image.size == (192, 192) and image.mode == "RGB"
    named = set()
    for name in ("captions", "phrases", "instruct", *SPLITS):
        named |= {record["image"] for record in load(world / f"{name}.json") if "image" in record}
    assert named == {path.relative_to(world).as_posix() for path in paths}

    seen = [{(frozenset(s.things), s.background) for s in split} for split in said[1].values()]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    for scene in said[1]["train"]:
        for name in ("kind", "colour", "place"):
            assert len({getattr(thing, name) for thing in scene.things}) == len(scene.things)


def test_big_and_small_stay_apart_and_things_stay_in_their_cell():
    for kind in KINDS:
        extent = {"big": [], "small": []}
        for size in extent:
            for n in range(6):
                plain = Image.new("RGB", (192, 192), (0, 255, 255))
                drawn = plain.copy()
                draw_thing(drawn, Thing(kind, "red", size, 4), random_for(kind, size, n))
                left, top, right, bottom = ImageChops.difference(plain, drawn).getbbox()
                extent[size].append(max(right - left, bottom - top))
                assert abs((left + right) / 2 - 96) < 14 and abs((top + bottom) / 2 - 96) < 14
        assert max(extent["small"]) + 6 < min(extent["big"]), (kind, extent)


def test_a_thing_is_drawn_in_its_place_and_colour():
    for place in range(9):
        for colour, rgb in COLOURS.items():
            plain = Image.new("RGB", (192, 192), (128, 128, 128))
            drawn = plain.copy()
            draw_thing(drawn, Thing("apple", colour, "big", place), random_for(place, colour))
            left, top, right, bottom = ImageChops.difference(plain, drawn).getbbox()
            centre = ((top + bottom) / 2, (left + right) / 2)
            assert tuple(int(c // 64) for c in centre) == divmod(place, 3)

            # an apple's middle has about the plain colour
            x, y = round(centre[1]), round(centre[0])
            pixels = np.asarray(drawn, float)[y - 12 : y + 12, x - 12 : x + 12].reshape(-1, 3)
            distances = {
                name: np.abs(np.median(pixels, axis=0) - other).sum()
                for name, other in COLOURS.items()
            }
            assert min(distances, key=distances.get) == colour, (place, colour, distances)
            assert distances[colour] < 120, rgb


def test_backgrounds_look_like_what_they_are_called():
    def mean_colour(name, rows):
        """The mean red, green and blue of some rows, over a few drawings."""
        drawn = [np.asarray(draw_background(name, random_for(name, n)), float) for n in range(4)]
        return np.mean([image[rows] for image in drawn], axis=(0, 1, 2))

    sky, ground = slice(0, 60), slice(170, 192)
    looks = {name: (mean_colour(name, sky), mean_colour(name, ground)) for name in BACKGROUND}
    red, green, blue = range(3)
    assert looks["day"][0][blue] > 200 > looks["day"][0][red], "a blue sky"
    assert looks["day"][1][green] > max(looks["day"][1][[red, blue]]) + 30, "a green meadow"
    assert looks["night"][0].max() < 120 and looks["night"][1].max() < 80, "dark"
    assert looks["sunset"][0][red] > looks["sunset"][0][blue] + 10, "a red sky"
    assert looks["snow"][1].min() > 210, "white ground"
    assert np.ptp(looks["rain"][0]) < 40 and 60 < looks["rain"][0].mean() < 160, "a grey sky"


def test_a_question_does_not_give_the_next_answer_away(said):
    files, _ = said
    seen = 0
    for record in files["instruct"]:
        turns, language = texts(record), record["language"]
        if record["kind"] != "conversation":
            continue
        for before, question, answer in zip(turns[::2], turns[2::2], turns[3::2]):
            colours = found(COLOUR[language], answer, language)
            if answer in WORDS[language]["mood"].values():
                continue  # an orange sky is no thing's colour
            if colours and not found(KIND[language], answer, language):
                seen += 1
                given = set(colours) & set(found(COLOUR[language], before, language))
                assert not given or found(KIND[language], question, language), turns
    assert seen > 100


def test_a_finished_world_is_left_alone_and_errors_are_one_line(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "demo.write", *args]
        return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)

    out = str(tmp_path / "data")
    small = ["-o", out, "--images", "2", "--documents", "3"]
    (tmp_path / "data.partial" / "images" / "grey").mkdir(parents=True)  # an interrupted run's
    (tmp_path / "data.partial" / "junk").write_text("x", encoding="utf-8")
    assert run(*small).returncode == 0
    assert not (tmp_path / "data.partial").exists() and not (tmp_path / "data" / "junk").exists()
    stamp = (tmp_path / "data" / "world.json").stat().st_mtime_ns
    assert "nothing to do" in run(*small).stdout
    assert (tmp_path / "data" / "world.json").stat().st_mtime_ns == stamp

    for name in ("mine", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    new = ["-o", str(tmp_path / "new")]
    for args in (
        [*small, "--seed", "1"],
        ["-o", str(tmp_path / "mine")],
        ["-o", str(tmp_path / "other")],
        [*new, "--images", "0"],
        [],
        ["--atlas", str(tmp_path / "no.ttf")],
        [*new, "--share", "tr=0.5"],
        [*new, "--share", "ko=2"],
    ):
        answer = run(*args)
        assert answer.returncode in (1, 2), answer
        assert "demo.write: " in answer.stderr and answer.stderr.count("\n") == 1, answer
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine" / "file").read_text(encoding="utf-8") == "x"
    assert (tmp_path / "other.partial" / "file").exists()


def test_a_sheet_replaces_only_a_sheet(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    photo = (tmp_path / "photo.png").read_bytes()
    with pytest.raises(ValueError, match="photo.png: was not written by this command"):
        write.contact_sheet(tmp_path / "photo.png")
    assert (tmp_path / "photo.png").read_bytes() == photo
    for rows in (1, 2):
        write.contact_sheet(tmp_path / "sheet.png", rows=rows)
