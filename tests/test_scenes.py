"""The demo world: what is said of a picture is true, what is held back is nowhere, and the same seed gives the same bytes."""

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
import scenes

# The languages once more, written apart from the tables under test.
KIND = {
    "en": "fish cat duck butterfly car sailboat tree apple house key umbrella rocket".split(),
    "ko": "물고기 고양이 오리 나비 자동차 돛단배 나무 사과 집 열쇠 우산 로켓".split(),
    "zh": "鱼 猫 鸭子 蝴蝶 汽车 帆船 树 苹果 房子 钥匙 雨伞 火箭".split(),
}
COLOUR = {
    "en": "red orange yellow green blue purple white black".split(),
    "ko": "빨간색 주황색 노란색 초록색 파란색 보라색 하얀색 검은색".split(),
    "zh": "红色 橙色 黄色 绿色 蓝色 紫色 白色 黑色".split(),
}
PLACE = {
    "en": ["at the top left", "at the top centre", "at the top right", "at the middle left", "in the centre", "at the middle right", "at the bottom left", "at the bottom centre", "at the bottom right"],
    "ko": ["왼쪽 위", "위쪽 가운데", "오른쪽 위", "왼쪽 가운데", "한가운데", "오른쪽 가운데", "왼쪽 아래", "아래쪽 가운데", "오른쪽 아래"],
    "zh": ["左上角", "顶部", "右上角", "左侧", "正中央", "右侧", "左下角", "底部", "右下角"],
}
SIZE = {"en": {"big": "big", "small": "small"}, "ko": {"큰": "big", "커요": "big", "작은": "small", "작아요": "small"}, "zh": {"大": "big", "小": "small"}}
SIDE = {
    "en": {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)},
    "ko": {"왼쪽": (0, -1), "오른쪽": (0, 1), "위쪽": (-1, 0), "아래쪽": (1, 0)},
    "zh": {"左边": (0, -1), "右边": (0, 1), "上方": (-1, 0), "下方": (1, 0)},
}
YES, NO = {"yes", "네", "有", "是"}, {"no", "아니요", "没有", "不是"}
NUMBER = {"one": 1, "two": 2, "three": 3, "한 개예요": 1, "두 개예요": 2, "세 개예요": 3, "一个": 1, "两个": 2, "三个": 3}
BACKGROUND = {
    "day": ["a sunny day", "맑은 낮이에요", "晴天", "sun shines", "햇살", "阳光"],
    "night": ["night", "밤이에요", "夜晚", "stars", "별이", "星光"],
    "sunset": ["sunset", "해 질 녘이에요", "日落时分", "setting sun", "지는 해", "夕阳"],
    "snow": ["a snowy day", "눈 오는 날이에요", "雪天", "snow falls", "눈이", "雪花"],
    "rain": ["a rainy day", "비 오는 날이에요", "雨天", "rain falls", "비가", "下着雨"],
}


def found(words, text, language):
    """Which of the words (a list: their numbers) a text has."""
    return [n for n, word in enumerate(words) if re.search(rf"\b{word}\b" if language == "en" else re.escape(word), text)]


def check_turn(question, answer, scene, language, last):
    """Reads a question and its answer as a person would, looks at the scene, and asserts that the answer is right. Returns the thing spoken of."""
    things = [dict(t, kind=scenes.KINDS.index(t["kind"]), colour=list(scenes.COLOURS).index(t["colour"])) for t in scene["things"]]
    in_question = {name: found(words[language], question, language) for name, words in (("kind", KIND), ("colour", COLOUR), ("place", PLACE))}
    in_answer = {name: found(words[language], answer, language) for name, words in (("kind", KIND), ("colour", COLOUR), ("place", PLACE))}
    sizes = lambda text: [size for word, size in SIZE[language].items() if word in text]
    if answer in YES | NO:
        named = {"kind": in_question["kind"], "colour": in_question["colour"], "place": in_question["place"], "size": sizes(question)}
        is_there = any(all(t[name] in wanted for name, wanted in named.items() if wanted) for t in things)
        assert is_there == (answer in YES), (question, answer, scene)
        return last
    if answer in NUMBER:
        assert NUMBER[answer] == len(things)
        return last
    spoken_of = [t for t in things if t["kind"] in in_question["kind"] or t["colour"] in in_question["colour"] or t["place"] in in_question["place"]]
    assert len(spoken_of) <= 1, (question, scene)
    one = spoken_of[0] if spoken_of else last
    sides = [step for word, step in SIDE[language].items() if word in question]
    if in_answer["kind"] and in_answer["colour"]:
        if not in_question["place"]:  # a relation: strictly on that side, by row or by column, lies one thing alone
            ((rows, columns),) = sides
            (there,) = [t for t in things if (t["place"] // 3 - one["place"] // 3) * rows > 0 or (t["place"] % 3 - one["place"] % 3) * columns > 0]
        else:
            there = one
        assert (in_answer["kind"], in_answer["colour"]) == ([there["kind"]], [there["colour"]]), (question, answer, scene)
        return one
    if in_answer["kind"] or in_answer["colour"] or in_answer["place"]:
        (name,) = [name for name, words in in_answer.items() if words]
        assert in_answer[name] == [one[name]], (question, answer, scene)
    elif sizes(answer):
        assert sizes(answer) == [one["size"]], (question, answer, scene)
    else:
        assert [name for name, words in BACKGROUND.items() if any(word in answer for word in words)] == [scene["background"]], (question, answer, scene)
    return one


def check_record(record, scene):
    last, turns = None, record["conversations"]
    for human, gpt in zip(turns[::2], turns[1::2]):
        last = check_turn(human["value"].removeprefix("<image>\n"), gpt["value"], scene, record["language"], last)


def texts(record):
    return [turn["value"] for turn in record["conversations"]]


@cache
def leaks_in(part):
    """Whether a text names a kind and the colour held out of it."""
    for language in KIND:
        colours = found(COLOUR[language], part, language)
        if colours and any(list(scenes.COLOURS).index(scenes.HELD_OUT[scenes.KINDS[kind]]) in colours for kind in found(KIND[language], part, language)):
            return True
    return False


def leaks(text):
    """Held-out pairs said together: within one phrase, sentence or question, or in one line of notes."""
    parts = re.split(r"USER:|ASSISTANT:|[.,;?!，。；？！\n=/]", text) + re.findall(r"[:：]([^:：;；]*)[;；]", text)
    return [part for part in parts if leaks_in(part.strip())]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, on disk."""
    out = tmp_path_factory.mktemp("world") / "data"
    scenes.write_world(out, pictures=150, documents=400, seed=3, workers=1, log=lambda line: None)
    return out


@pytest.fixture(scope="module")
def said():
    """What is said of a larger world, without drawing it: {file: records}, {split: scenes}."""
    splits = scenes.make_scenes(5, 1000)
    files = {"captions": [], "phrases": [], "lookup": [], "drill": [], "instruct": []}
    for index, scene in enumerate(splits["train"]):
        for name, records in scenes.train_records(scene, 5, index).items():
            files[name] += records
    files["instruct"] += [scenes.text_record(i, 5) for i in range(900)]
    return files | {split: scenes.split_records(split, splits[split], 5) for split in list(splits)[1:]}, splits


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


SPLITS = ("validation", "unseen_pictures", "unseen_combinations", "cross_lingual")


def test_every_answer_is_what_an_independent_reader_of_the_scene_would_say(world):
    truth = {scene["image"]: scene for scene in load(world / "scenes.json")}
    records = [r for name in ("instruct", "lookup", "drill", *SPLITS) for r in load(world / f"{name}.json") if "image" in r and r["kind"] != "caption"]
    assert len(records) > 2000
    for record in records:
        check_record(record, truth[record["image"]])


def test_the_reader_notices_a_wrong_answer():
    scene = {"background": "day", "things": [{"kind": "cat", "colour": "red", "size": "big", "place": 0}, {"kind": "duck", "colour": "blue", "size": "small", "place": 5}]}
    check_turn("What is to the left of the duck?", "a red cat", scene, "en", None)
    check_turn("고양이는 빨간색인가요?", "네", scene, "ko", None)
    for language, question, answer in (("en", "What is to the left of the duck?", "a blue duck"), ("ko", "고양이는 빨간색인가요?", "아니요"), ("zh", "猫在哪里？", "在右上角"), ("en", "Is the cat small?", "yes"),
                                       ("en", "What is the mood, and why?", "quiet, because stars shine in the dark sky")):  # fmt: skip
        with pytest.raises(AssertionError):
            check_turn(question, answer, scene, language, None)


def test_phrases_are_all_that_is_true_and_captions_say_every_thing(said):
    files, splits = said
    cat, duck = scenes.Thing("cat", "red", "big", 0), scenes.Thing("duck", "blue", "small", 8)
    scene = scenes.Scene((cat, duck), "night")

    def said_of(language):
        without, naming = (set(scenes.phrases(scene, language, scenes.random_for(0), colours)) for colours in (False, True))
        assert not without & naming and all(found(COLOUR[language], phrase, language) for phrase in naming) and not any(found(COLOUR[language], phrase, language) for phrase in without)
        return without | naming

    assert said_of("en") == {
        "at night", "a red cat", "a cat at the top left", "a big cat", "something red at the top left", "something big at the top left", "a cat to the left of a duck", "a cat above a duck",
        "a blue duck", "a duck at the bottom right", "a small duck", "something blue at the bottom right", "something small at the bottom right", "a duck to the right of a cat", "a duck below a cat"}  # fmt: skip
    assert said_of("ko") >= {"밤에", "빨간색 고양이", "왼쪽 위에 있는 고양이", "큰 고양이", "왼쪽 위에 있는 빨간색 물체", "오리 왼쪽에 있는 고양이", "고양이 아래쪽에 있는 오리"}
    assert said_of("zh") >= {"在夜晚", "一只红色的猫", "左上角有一只猫", "一只大猫", "左上角有个红色的东西", "鸭子左边有一只猫", "猫下方有一只鸭子"}
    for record in files["captions"]:
        things = splits["train"][int(record["id"].split("-")[1])].things
        parts = re.split(", |，", record["conversations"][1]["value"])
        assert len(parts) == len(things) + 1
        for thing in things:
            wanted = [KIND[record["language"]][scenes.KINDS.index(thing.kind)], COLOUR[record["language"]][list(scenes.COLOURS).index(thing.colour)], PLACE[record["language"]][thing.place]]
            assert any(all(found([word], part, record["language"]) for word in wanted) for part in parts)


def test_pictures_in_black_and_white_are_told_of_without_colours(world):
    told = [r for r in load(world / "phrases.json") if "/grey/" in r["image"]]
    assert {r["image"] for r in told} == {f"pictures/grey/{p.name}" for p in (world / "pictures" / "grey").iterdir()} and 0.3 < len({r["image"] for r in told}) / len(list((world / "pictures" / "train").iterdir())) < 0.4
    for r in told:
        assert r["kind"] == "phrases" and not found(COLOUR[r["language"]], r["conversations"][1]["value"], r["language"])
        with Image.open(world / r["image"]) as grey, Image.open(world / r["image"].replace("grey", "train")) as coloured:
            assert grey.mode == "L" and coloured.mode == "RGB" and np.abs(np.asarray(grey, float) - np.asarray(coloured, float) @ (0.299, 0.587, 0.114)).max() < 1


def test_the_dictionary_has_all_words_in_all_languages_and_of_a_language_no_more_than_its_share(world):
    lines = [line.split(" = ") for line in (world / "text" / "dictionary.txt").read_text().splitlines()]
    assert len(lines) == 12 + 8 + 2 + 5 + 4 and all(len(line) == 3 for line in lines)
    assert ["cat", "고양이", "猫"] in lines and ["red", "빨간색", "红色"] in lines and ["rocket", "로켓", "火箭"] in lines
    count = lambda letters, shares: sum(bool(re.search(letters, line)) for line in scenes.dictionary(shares))
    assert count("[가-힣]", {"ko": 0.2}) in range(1, 13) and count("[一-鿿]", {"ko": 0.2}) == 31 and count("[一-鿿]", {"zh": 0}) == 0 and scenes.dictionary({"ko": 0, "zh": 0}) == []


def test_held_out_pairs_are_in_no_training_file(world, said):
    files, splits = said
    assert sorted(Counter(scenes.HELD_OUT.values()).values()) == [1, 1, 1, 1, 2, 2, 2, 2] and len(scenes.HELD_OUT) == 12
    for scene in splits["train"] + splits["validation"] + splits["unseen_pictures"]:
        assert all(scenes.HELD_OUT[t.kind] != t.colour for t in scene.things)
    assert all(scenes.HELD_OUT[scene.things[0].kind] == scene.things[0].colour for scene in splits["unseen_combinations"])
    spoken = [text for name in ("captions", "phrases", "lookup", "drill", "instruct", "validation", "unseen_pictures") for r in files[name] for text in texts(r)]
    spoken += [line for path in sorted((world / "text").iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [leak for text in spoken for leak in leaks(text)] == []
    # the search does find what it is to find
    for text in ("Is the cat blue?", "a big blue cat at the top left", "큰 파란색 고양이가 있어요", "左上角有一只蓝色的大猫", "at the top left: blue, big, cat; night."):
        assert leaks(text), text
    assert any(leaks(text) for r in files["unseen_combinations"] for text in texts(r))


def test_english_only_kinds_are_named_in_korean_and_chinese_in_text_alone(world, said):
    files, _ = said
    names = {"ko": ("우산", "로켓"), "zh": ("雨伞", "火箭"), "en": ("umbrella", "rocket")}
    for name in ("captions", "phrases", "lookup", "drill", "instruct", "validation", "unseen_pictures"):
        for record in files[name]:
            if "image" in record:
                assert record["language"] == "en" or not any(n in text for text in texts(record) for n in names["ko"] + names["zh"]), record
    for language, words in names.items():
        in_text = (world / "text" / f"{language}.txt").read_text(encoding="utf-8") + " ".join(text for r in files["instruct"] if "image" not in r for text in texts(r))
        in_pictures = " ".join(text for r in files["captions"] for text in texts(r))
        assert all(in_text.count(w) > 20 for w in words) and (language != "en" or all(w in in_pictures for w in words))
    for record in files["cross_lingual"]:  # every question or answer (of a conversation: every turn) needs the name
        turns = texts(record)
        assert record["language"] in ("ko", "zh")
        assert all(any(n in q + a for n in names[record["language"]]) for q, a in zip(turns[::2], turns[1::2])), record


def test_yes_and_no_are_balanced_for_every_language_and_type(said):
    files, splits = said
    types = {"pair": lambda k, c, p, s: k and c, "kind": lambda k, c, p, s: k and not (c or p or s), "place": lambda k, c, p, s: p, "size": lambda k, c, p, s: s}
    for name, slack in [("instruct", 0.06), *((split, 0.02) for split in SPLITS)]:
        for language in ("ko", "zh") if name == "cross_lingual" else ("en", "ko", "zh"):
            count = Counter()
            for record in files[name]:
                if record["kind"] != "yes_no" or record["language"] != language:
                    continue
                for question, answer in zip(texts(record)[::2], texts(record)[1::2]):
                    said_of = [bool(found(words[language], question, language)) for words in (KIND, COLOUR, PLACE)] + [any(w in question for w in SIZE[language])]
                    (type,) = [t for t, test in types.items() if test(*said_of)]
                    count[type, answer in YES] += 1
                    count["all", answer in YES] += 1
            assert count["all", True] > 20
            for type in {t for t, _ in count}:
                n = count[type, True] + count[type, False]
                assert abs(count[type, True] - n / 2) <= max(1.5 if type != "all" else 4, slack * n), (name, language, type, count)
    denied = Counter(answer in YES for r in files["unseen_combinations"] if r["kind"] == "yes_no" for question, answer in [texts(r)] if leaks(question) and not found(PLACE["en"], question, "en"))
    assert denied[True] and abs(denied[True] - denied[False]) <= 3


def test_languages_and_skills_are_balanced_in_the_test_splits(said):
    files, _ = said
    for split in SPLITS:
        count = Counter(record["language"] for record in files[split])
        assert max(count.values()) - min(count.values()) <= 0.04 * sum(count.values()), (split, count)
        assert set(r["skill"] for r in files[split]) == ({*scenes.SKILLS, "conversation"} if split != "cross_lingual" else {*scenes.SKILLS, "conversation"} - {"count", "background", "mood"})
        assert sum(len(texts(r)) // 2 for r in files[split]) >= 1500
        assert all(len(r["conversations"]) == (6 if r["kind"] == "conversation" else 2) for r in files[split])


def test_training_conversations_have_the_asked_shape(said):
    files, _ = said
    questions, asked = {"object": {3, 4}, "location": {2, 3, 4}, "atmosphere": {2}, "conversation": {1}, "yes_no": {4}, "caption": {1}}, Counter()
    for record in files["instruct"]:
        if "image" in record:
            asked[record["image"], record["language"], record["kind"]] += 1
            assert len(record["conversations"]) // 2 in ({4, 5, 6} if record["kind"] == "conversation" else {1}), "an answer must not give away the next"
    assert all(n in questions[kind] for (_, _, kind), n in asked.items())
    for records in files.values():
        for record in records:
            marks = [text.count("<image>") for text in texts(record)]
            assert marks == [int("image" in record)] + [0] * (len(marks) - 1)
            assert "image" not in record or texts(record)[0].startswith("<image>\n")
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * (len(marks) // 2)
    ids = [record["id"] for records in files.values() for record in records]
    assert len(ids) == len(set(ids))


def test_words_take_the_form_their_neighbour_asks_for():
    assert scenes.say("{it}은/는 {to}이/가 {a}과/와 {b}을/를", it="고양이", to="로켓", a="집", b="사과") == "고양이는 로켓이 집과 사과를"
    assert scenes.say("{a}이에요/예요, {b}이에요/예요", a="열쇠", b="빨간색") == "열쇠예요, 빨간색이에요"
    assert scenes.say("a/an {a} and a/an {b}. A/an {a}.", a="orange cat", b="key") == "an orange cat and a key. An orange cat."


def test_no_template_is_left_unfilled(world, said):
    files, _ = said
    every = [text for records in files.values() for r in records for text in texts(r)] + [p.read_text(encoding="utf-8") for p in (world / "text").iterdir()]
    for text in every:
        assert not re.search(r"[{}]|은/는|이/가|을/를|과/와|이에요/예요|a/an| {2}", text), text[:200]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 2)):
        scenes.write_world(tmp_path / name, pictures=12, documents=30, seed=seed, workers=workers, log=lambda line: None)
    read = lambda name: {p.relative_to(tmp_path / name): p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}
    a, b, c = read("a"), read("b"), read("c")
    assert a == b
    assert a.keys() == c.keys() and [path for path in a if a[path] == c[path]] == [Path("text/dictionary.txt")]


def test_a_share_thins_a_language_in_the_training_files_alone(tmp_path):
    shares = {"whole": None, "some": {"ko": 0.5, "zh": 0.0}, "fewer": {"ko": 0.2, "zh": 0.0}}
    for name, given in shares.items():
        scenes.write_world(tmp_path / name, pictures=30, documents=40, workers=1, log=lambda line: None, shares=given)
    files = {name: {f.relative_to(tmp_path / name).as_posix(): f.read_text(encoding="utf-8") for f in (tmp_path / name).rglob("*") if f.suffix in (".json", ".txt")} for name in shares}
    train = {f"{name}.json" for name in ("captions", "phrases", "lookup", "drill", "instruct")} | {f"text/{kind}.txt" for kind in ("en", "ko", "zh", "parallel")}
    assert all(files["whole"][f] == files["some"][f] for f in files["whole"].keys() - train - {"world.json", "text/dictionary.txt"}), "the same test splits"
    lines = lambda name: {f: {line.rstrip(",") for line in files[name][f].splitlines()} for f in train}
    korean = lambda line: bool(re.search("[가-힣]", line))
    for f in train:
        whole, some, fewer = (lines(name)[f] for name in shares)
        assert fewer <= some <= {line for line in whole if not re.search("[一-鿿]", line)}
        assert {line for line in some if not korean(line)} == {line for line in whole if not re.search("[一-鿿가-힣]", line)}, "what is neither Korean nor Chinese stays"
    grey = [{r["image"].rpartition("/")[2] for r in json.loads(files["some"]["phrases.json"]) if r["language"] == "ko" and f"/{folder}/" in r["image"]} for folder in ("grey", "train")]
    assert grey[0] and grey[0] < grey[1], "a picture speaks as it does in colour"
    of = lambda name: {r["image"] for r in json.loads(files[name]["instruct.json"]) if "image" in r and r["language"] == "ko"}
    told = lambda name: sorted((r["image"], r["id"]) for r in json.loads(files[name]["instruct.json"]) if r.get("image") in of(name) and r["language"] == "ko")
    assert 0 < len(of("fewer")) < len(of("some")) < len(of("whole")) and told("some") == [t for t in told("whole") if t[0] in of("some")], "a picture is spoken of in all kinds or in none"


def test_pictures_are_all_different_and_as_they_should_be(world, said):
    paths = sorted((world / "pictures").rglob("*.png"))
    assert len({p.read_bytes() for p in paths}) == len(paths)
    assert sum(p.stat().st_size for p in paths) / len(paths) <= 35_000
    with Image.open(paths[0]) as image:
        assert image.size == (192, 192) and image.mode == "RGB"
    records = [r for name in ("captions", "phrases", "instruct", *SPLITS) for r in load(world / f"{name}.json") if "image" in r]
    assert {r["image"] for r in records} == {str(p.relative_to(world)) for p in paths}
    look = lambda scene: (frozenset(scene.things), scene.background)
    seen = [{look(scene) for scene in split} for split in said[1].values()]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    for scene in said[1]["train"]:
        assert all(len({getattr(t, name) for t in scene.things}) == len(scene.things) for name in ("kind", "colour", "place"))


def test_big_and_small_stay_apart_and_things_stay_in_their_cell():
    for kind in scenes.KINDS:
        extent = {"big": [], "small": []}
        for size in extent:
            for n in range(6):
                plain = Image.new("RGB", (192, 192), (0, 255, 255))
                drawn = plain.copy()
                scenes.draw_thing(drawn, scenes.Thing(kind, "red", size, 4), scenes.random_for(kind, size, n))
                left, top, right, bottom = ImageChops.difference(plain, drawn).getbbox()
                extent[size].append(max(right - left, bottom - top))
                assert abs((left + right) / 2 - 96) < 14 and abs((top + bottom) / 2 - 96) < 14
        assert max(extent["small"]) + 6 < min(extent["big"]), (kind, extent)


def test_a_finished_world_is_left_alone_and_errors_are_one_line(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, ROOT / "scenes.py", *args], capture_output=True, text=True)
    out = str(tmp_path / "data")
    small = ["-o", out, "--pictures", "2", "--documents", "3"]
    (tmp_path / "data.partial").mkdir()  # what an interrupted run leaves
    (tmp_path / "data.partial" / "junk").write_text("x")
    assert run(*small).returncode == 0 and not (tmp_path / "data.partial").exists() and not (tmp_path / "data" / "junk").exists()
    stamp = (tmp_path / "data" / "world.json").stat().st_mtime_ns
    assert "nothing to do" in run(*small).stdout and (tmp_path / "data" / "world.json").stat().st_mtime_ns == stamp
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for args in ([*small, "--seed", "1"], ["-o", str(tmp_path / "mine")], ["--pictures", "0"], ["--atlas", str(tmp_path / "no.ttf")]):
        answer = run(*args)
        assert answer.returncode == 1 and answer.stderr.startswith("scenes.py: ") and answer.stderr.count("\n") == 1, answer
    assert (tmp_path / "mine" / "file").read_text() == "x"
