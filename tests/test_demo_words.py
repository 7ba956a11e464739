"""The words of the demo world are data: what is missing is named, and a further kind or language
is a row or a file, which reaches every file of the world."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from demo import atlas, check, phrasing, world  # noqa: E402
from demo.phrasing import make_word, with_unknown_word  # noqa: E402
from demo.questions import Interviewer, fill_pair  # noqa: E402
from demo.records import language_rotation, split_records, train_records  # noqa: E402
from demo.words import (  # noqa: E402
    AVAILABLE,
    DEFAULT,
    LANGUAGES,
    WORDS,
    choose_languages,
    fill,
    read_languages,
    templates,
    thing_words,
    word_lists,
)
from demo.words.__main__ import check as check_file  # noqa: E402
from demo.words.__main__ import samples  # noqa: E402
from demo.world import Scene, Thing  # noqa: E402

WORDS_FOLDER = ROOT / "demo" / "words"


@pytest.fixture
def all_languages():
    """WORDS and LANGUAGES hold every file of words."""
    choose_languages(AVAILABLE)
    yield
    choose_languages(DEFAULT)


def test_words_take_the_form_their_neighbour_asks_for():
    template = "{it}은/는 {to}이/가 {a}과/와 {b}을/를"
    filled = fill("ko", template, it="고양이", to="로켓", a="집", b="사과")
    assert filled == "고양이는 로켓이 집과 사과를"
    filled = fill("ko", "{a}이에요/예요, {b}이에요/예요", a="열쇠", b="빨간색")
    assert filled == "열쇠예요, 빨간색이에요"
    filled = fill("en", "a/an {a} and a/an {b}. A/an {a}.", a="orange cat", b="key")
    assert filled == "an orange cat and a key. An orange cat."
    assert fill("zh", "{a}/{b}", a="左", b="右") == "左/右"


def test_a_turkish_particle_takes_the_last_vowel_and_i_its_own_capital(all_languages):
    words = "kırmızı mı, yeşil mi, mor mu, büyük mü, sol üstte mi, beyaz mı, gözlük mü, otobüs mü"
    plain = re.sub(" m[ıiuü]", " mı/mi", words)
    assert fill("tr", plain) == words
    assert fill("tr", "^{a} ^{b} ^{c}", a="inek", b="ısı", c="ördek") == "İnek Isı Ördek"
    assert phrasing.capital("inek", {}) == "Inek"


AGREEMENT = {  # (language, kind): a caption; is it big?, after which noun; by its colour
    ("sw", "cat"): ("paka mdogo mwekundu juu kushoto", "mdogo", "kidogo"),
    ("sw", "car"): ("gari dogo jekundu juu kushoto", "dogo", "kidogo"),
    ("sw", "tree"): ("mti mdogo mwekundu juu kushoto", "mdogo", "kidogo"),
    ("sw", "house"): ("nyumba ndogo nyekundu juu kushoto", "ndogo", "kidogo"),
    ("ar", "car"): ("سيارة صغيرة حمراء في أعلى اليسار", "صغيرة", "صغير"),
    ("ar", "house"): ("بيت صغير أحمر في أعلى اليسار", "صغير", "صغير"),
    ("tr", "tree"): ("sol üstte küçük kırmızı bir ağaç", "küçük", "küçük"),
}


@pytest.mark.parametrize(("language", "kind"), AGREEMENT)
def test_adjectives_agree_with_the_noun_that_is_named(all_languages, language, kind):
    thing = Thing(kind, "red", "small", 0)
    caption, by_kind, by_colour = AGREEMENT[language, kind]
    assert fill(language, WORDS[language]["full"], **thing_words(language, thing)) == caption
    asker = Interviewer(Scene((thing,), "day"), language, world.random_for("any"))
    assert asker.ask("size", thing, "kind")[1] == by_kind
    assert asker.ask("size", thing, "colour")[1] == by_colour


def test_the_other_thing_of_a_pair_has_forms_too(all_languages):
    fish, tree = Thing("fish", "red", "big", 0), Thing("tree", "blue", "big", 1)
    said = {code: fill_pair(code, WORDS[code]["pair_says"], fish, "left", tree) for code in WORDS}
    assert said["tr"] == "Balık, ağacın solunda."
    assert said["ar"] == "السمكة إلى يسار الشجرة."
    assert said["sw"] == "Samaki yuko kushoto kwa mti."


def test_a_pronoun_is_glued_to_the_word_before_it(all_languages):
    house, cat = Thing("house", "red", "big", 0), Thing("cat", "blue", "big", 1)
    asker = Interviewer(Scene((house, cat), "day"), "ar", world.random_for("any"))
    question = "ما لون{it_after}؟"
    asked = [asker.fill(question, thing, **asker.name(thing, "pronoun")) for thing in (house, cat)]
    assert asked == ["ما لونه؟", "ما لونها؟"]
    assert asker.fill(question, cat, **asker.name(cat, "kind")) == "ما لون القطة؟"


@pytest.mark.parametrize("language", AVAILABLE)
def test_every_language_has_samples_of_every_skill(all_languages, language):
    for skill in (
        *world.SKILLS,
        "describe",
        "absent",
        "empty",
        "greeting",
        "is_background",
        "text",
    ):
        found = list(samples(language, skill, 6))
        assert len(found) >= 3, skill
        assert not any(re.search(r"[{}@^\[\]|]|\w/\w", " ".join(turn)) for turn in found), found


def test_no_answer_is_empty_in_any_language_and_each_is_asked_relations(all_languages):
    scenes = [world.random_scene(world.random_for(n), base_only=True) for n in range(30)]
    made = [train_records(scene, 0, n) for n, scene in enumerate(scenes)]
    plain = [world.random_scene(world.random_for("plain", n), base_only=False) for n in range(4)]
    made += [train_records(scene, 0, n) for n, scene in enumerate(plain)]
    rows = [record for files in made for file in files.values() for record in file]
    asked = split_records("cross_lingual", scenes, 0)
    for record in rows + asked:
        assert all(message["value"].strip() for message in record["conversations"]), record
    relations = Counter(record["language"] for record in asked if record["skill"] == "relation")
    assert relations.keys() == set(AVAILABLE) - {LANGUAGES[0]}
    assert min(relations.values()) >= 0.9 * max(relations.values()), relations


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path, capsys):
    words = json.loads((WORDS_FOLDER / "sw.json").read_text(encoding="utf-8"))
    del (
        words["kind"]["cat"],
        words["unanswered"],
        words["class_forms"]["colour"]["colour_adj"]["li"],
    )
    words["noun_class"].pop("thing")
    words["called"].pop("ar")
    words["answer"]["where"] = "{places}"
    words["ask"]["count"][0] = "vitu/vingapi?"
    words["varied"]["greeting"][0] = "@hello"
    path = tmp_path / "sw.json"
    path.write_text(json.dumps(words), encoding="utf-8")
    number = check_file(path, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == number and all(line.startswith(f"{path}: ") for line in lines)
    said = "\n".join(lines)
    for problem in (
        "kind.cat is missing",
        "called.ar is missing",
        "unanswered.unanswerable is missing",
        "class_forms.colour.colour_adj.li.red is missing",
        "noun_class.thing is missing",
        "answer.where: {places} is not known here",
        "answer.where: {place} is missing",
        "agreement.vitu/vingapi is missing, which ask.count.0 uses",
        "varied.greeting.0: @hello is not in grammar",
    ):
        assert problem in said, problem


def test_spaces_that_would_be_lost_and_forms_of_one_name_are_named(tmp_path, capsys):
    words = json.loads((WORDS_FOLDER / "es.json").read_text(encoding="utf-8"))
    words["varied"].setdefault("it", {"kind": [" {kind}"]})["kind"][0] = " {kind}"
    # A class form "this" makes {it_this}, too.
    words["forms"]["it"]["it_this"] = words["forms"]["it"]["it_after"]
    path = tmp_path / "es.json"
    path.write_text(json.dumps(words), encoding="utf-8")
    check_file(path, 1)
    said = capsys.readouterr().out
    assert "varied.it.kind.0: ' {kind}' loses its space: write it beside {it}" in said
    assert "class_forms.class.this: {it_this} is also made by forms.it.it_this: rename one" in said


def test_punctuation_after_a_word_does_not_change_its_article(all_languages):
    for end in (".", "?", "!»", ""):
        assert fill("es", "el/la {kind}" + end, kind="manzana") == "la manzana" + end
        assert fill("es", "Un/una «{kind}»" + end, kind="pez") == "Un «pez»" + end


def test_without_its_mark_a_spanish_question_has_none_at_its_beginning_either():
    rng = random.Random(0)
    typed = {phrasing.as_typed("Y ahora, ¿qué es?", rng, {}) for _ in range(100)}
    assert typed == {
        *("Y ahora, ¿qué es?", "Y ahora, qué es", "y ahora, ¿qué es?", "y ahora, qué es"),
    }


def test_a_table_of_agreement_needs_pairs(tmp_path):
    with pytest.raises(ValueError, match="agreement.mı/mi: needs next or previous, pairs of"):
        edited_words(tmp_path / "words", "tr", '"mü",', "", AVAILABLE)


def test_what_is_left_in_english_is_noted(tmp_path, capsys):
    words = json.loads((WORDS_FOLDER / "tr.json").read_text(encoding="utf-8"))
    words["describe"][0] = WORDS[LANGUAGES[0]]["describe"][0]
    words["unseen"]["ask"]["what"][0] = words["ask"]["what"][0]
    path = tmp_path / "tr.json"
    path.write_text(json.dumps(words), encoding="utf-8")
    try:
        assert check_file(path, 0) == 0
    finally:
        choose_languages()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes[0] == "note: 1 texts as in en: describe.0"
    assert "unseen.ask.what.0" in notes[1] and len(notes) == 2


def test_languages_are_chosen_the_base_language_first():
    assert DEFAULT == ("en", "ko", "zh") and set(DEFAULT) < set(AVAILABLE)
    try:
        choose_languages(["sw", "en", "tr"])
        assert LANGUAGES == list(WORDS) == ["sw", "en", "tr"]
        choose_languages(["en", "tr", "sw", "tr"])
        assert LANGUAGES == list(WORDS) == ["en", "sw", "tr"]
        choose_languages(["tr", "sw"])
        assert LANGUAGES == list(WORDS) == ["tr", "sw"]
        choose_languages(["en"])
        assert LANGUAGES == list(WORDS) == ["en"]
    finally:
        choose_languages()
    assert LANGUAGES == list(WORDS) == ["en", "ko", "zh"]


def edited_words(folder, name, old, new, chosen=()):
    """The languages of a copy of demo/words in which one text of one file is another."""
    shutil.copytree(WORDS_FOLDER, folder, ignore=shutil.ignore_patterns("__*"))
    path = folder / f"{name}.json"
    source = path.read_text(encoding="utf-8")
    assert source.count(old) >= 1, old
    path.write_text(source.replace(old, new, 1), encoding="utf-8")
    return read_languages(folder, chosen)


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("ko", '"key": "열쇠",', "", "words/ko.json: kind.key is missing"),
        ("en", '"key": "key",', "", "words/en.json: kind.key is missing"),
        ("zh", '"key": "把",', "", "words/zh.json: forms.kind.measure.key is missing"),
        ("ko", '"그림에 무엇이 있나요?",', "", "words/ko.json: describe.3 is missing"),
        ("zh", ', "zh": "中文"', "", "words/zh.json: names.zh is missing"),
        ("zh", '"vocab_size": 700,', "", "words/zh.json: vocab_size is missing"),
        (
            "ko",
            '"stop": ".",',
            '"stop": ".", "end": "!",',
            "words/ko.json: end is in no other table",
        ),
        ("en", '"duck": "duck"', '"duck": "cat"', "words/en.json: kind: 'cat' stands for two"),
        (
            "ko",
            '"big": "커요"',
            '"big": "작아요"',
            "words/ko.json: size_end: '작아요' stands for two",
        ),
        (
            "ko",
            '"no": "아니요"',
            '"no": "네"',
            "words/ko.json: yes_no.pair: '네' stands for two things",
        ),
        ("ko", "{it}은/는 무슨", "{its}은/는 무슨", "words/ko.json: ask.colour.0: {it} is missing"),
        ("ko", "{it}은/는 무슨", "{it", "words/ko.json: ask.colour.0: {it} is missing"),
        (
            "zh",
            "“{word}”用",
            "{kind}“{word}”用",
            "words/zh.json: translate.0: {kind} is not known here",
        ),
        ("en", '"{mood}"', '"{moods}"', "words/en.json: answer.mood: {moods} is not known here"),
        ("ko", '"은/는": [', '"은는": [', "words/ko.json: agreement.은/는 is missing, which "),
        ("ko", '"커요"', '"커요', "words/ko.json: Expecting ',' delimiter: line 49 column "),
        ("ko", "{", "", "words/ko.json: Extra data: line 2 column 12 "),
        ("en", '"base": true,', "", "words: one language, and no other, needs 'base'"),
    ],
)
def test_what_is_wrong_in_a_file_of_words_is_named_in_one_line(tmp_path, name, old, new, problem):
    with pytest.raises(ValueError) as error:
        edited_words(tmp_path / "words", name, old, new)
    assert str(error.value).startswith(problem) and "\n" not in str(error.value)


def test_what_is_wrong_in_the_table_of_kinds_is_named(monkeypatch):
    monkeypatch.setitem(world.HELD_OUT, "cat", "pink")
    with pytest.raises(
        ValueError, match="things.json: cat: held_out 'pink' is none of the colours"
    ):
        check.check_tables(WORDS)
    monkeypatch.undo()
    monkeypatch.setattr(world, "BASE_ONLY", ("rocket",))
    with pytest.raises(ValueError, match="things.json: kinds needs two or more of base_only"):
        check.check_tables(WORDS)


def units(template, has_spaces):
    """The words of a template, endings included; without spaces its pairs of characters."""
    text = re.sub(r"[^\w' ]", " ", re.sub(r"{\w+}(?:\w+/\w+)?", " ", template.lower()))
    if has_spaces:
        return set(text.split())
    return {word[i : i + 2] for word in text.split() for i in range(max(1, len(word) - 1))}


def lists_of(tables, path=""):
    """{"ask.colour": its list} for all lists in nested tables."""
    if isinstance(tables, list):
        return {path[1:]: tables}
    found = {}
    for key, value in tables.items():
        found |= lists_of(value, f"{path}.{key}")
    return found


def test_a_pattern_stands_for_each_choice_of_its_alternatives():
    grammar = {"colour": ["colour", "color"], "what": ["[What|Which] @colour"]}
    assert phrasing.all_templates("@what is {it}[| now]?", grammar) == [
        *("What color is {it} now?", "What color is {it}?"),
        *("What colour is {it} now?", "What colour is {it}?"),
        *("Which color is {it} now?", "Which color is {it}?"),
        *("Which colour is {it} now?", "Which colour is {it}?"),
    ]
    assert phrasing.all_templates("[a|b [c|]]", {}) == ["a", "b", "b c"]


@pytest.mark.parametrize("language", AVAILABLE)
def test_unseen_phrasings_have_a_word_or_an_ending_that_training_never_has(all_languages, language):
    words, has_spaces = WORDS[language], WORDS[language]["gap"] == " "
    plain = lists_of({"ask": words["ask"], "describe": words["describe"]})
    plain |= {f"yes_no.{name}": table["ask"] for name, table in words["yes_no"].items()}
    training, number = lists_of(words["varied"]), Counter()
    for path, unseen in lists_of(words["unseen"]).items():
        number[path.split(".")[-1 if path.startswith("ask") else 0]] += len(unseen)
        known = set()
        for pattern in training[path] + plain.get(path, []):
            for template in templates(language, pattern):
                known |= units(template, has_spaces)
        for template in unseen:
            assert units(template, has_spaces) - known, (path, template)
    skills = {*words["ask"], "yes_no", "describe", "unanswerable", "greeting"}
    assert number.keys() == skills and min(number.values()) >= 8, number


@pytest.mark.parametrize("language", AVAILABLE)
def test_training_asks_in_several_times_as_many_ways(all_languages, language):
    words = WORDS[language]
    plain = {f"ask.{skill}": asked for skill, asked in words["ask"].items()}
    plain |= {f"yes_no.{name}": table["ask"] for name, table in words["yes_no"].items()}
    for path, asked in plain.items():
        patterns = lists_of(words["varied"])[path]
        every = {template for pattern in patterns for template in templates(language, pattern)}
        assert len(every) >= 3 * len(asked), (path, len(every))


def test_no_code_names_a_language():
    sources = [*(ROOT / "demo").glob("*.py"), *WORDS_FOLDER.glob("*.py")]
    names = "|".join(
        (*AVAILABLE, *WORDS[LANGUAGES[0]]["names"].values(), "Turkish", "Swahili", "Arabic")
    )
    for path in sources:
        source = path.read_text(encoding="utf-8")
        code = re.sub(r'"""[^"]*(?:"[^"]+)*?"""|#.*', "", source)  # docstrings give examples
        assert not re.search(rf'"(?:{names})"', code), path


@pytest.mark.parametrize("number", range(1, 9))
def test_every_language_gets_its_share_of_questions(monkeypatch, number):
    """Of six images one is asked about in the base language alone; the rotation makes up for it."""
    languages = tuple(f"l{n}" for n in range(number))
    monkeypatch.setattr("demo.records.LANGUAGES", languages)
    rotation = language_rotation()
    share = {name: 5 / 6 * rotation.count(name) / len(rotation) for name in languages}
    share[languages[0]] += 1 / 6
    if number <= 6:
        assert all(abs(value - 1 / number) < 1e-9 for value in share.values())
    assert len({share[name] for name in languages[1:]}) <= 1


def copy_of_demo(folder):
    """A copy of demo/, what it imports and its atlas, to edit as a reader would."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("demo", "vocabulary"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "atlas.png", folder / "assets" / "atlas.png")
    return folder


def replace_in(path, old, new):
    """Edits a file."""
    source = path.read_text(encoding="utf-8")
    assert old in source
    path.write_text(source.replace(old, new), encoding="utf-8")


def write(folder, *options):
    """Runs `python -m demo.write` in a copy."""
    command = [sys.executable, "-m", "demo.write", "-o", "data", "--workers", "1"]
    command += ["--images", "100", "--documents", "200", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")


def load(folder, name):
    """A file of the copy's world."""
    return json.loads((folder / "data" / f"{name}.json").read_text(encoding="utf-8"))


def add_bicycle(folder):
    """Adds a 13th kind: an entry of things.json, and its words."""
    last = '"held_out": "green", "base_only": true, "centre_only": true}'
    row = ',\n    "bicycle": {"emoji": "🚲", "held_out": "red"}'
    replace_in(folder / "demo" / "things.json", last, last + row)
    for language, rocket, bicycle in (
        ("en", "rocket", "bicycle"),
        ("ko", "로켓", "자전거"),
        ("zh", "火箭", "自行车"),
    ):
        path = folder / "demo" / "words" / f"{language}.json"
        replace_in(path, f'"rocket": "{rocket}"', f'"rocket": "{rocket}", "bicycle": "{bicycle}"')
    replace_in(path, '"rocket": "枚"', '"rocket": "枚", "bicycle": "辆"')


def test_a_thirteenth_kind_is_an_entry_and_its_words_and_reaches_every_split(tmp_path):
    folder = copy_of_demo(tmp_path)
    add_bicycle(folder)

    # Its tile is missing: refused, not drawn invisible.
    refused = write(folder)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "assets/atlas.png has no tile for the kind bicycle" in refused.stderr

    old = Image.open(folder / "assets" / "atlas.png")
    larger = Image.new("LA", (old.width, old.height + 128))
    larger.paste(old)
    ImageDraw.Draw(larger).ellipse((10, old.height + 10, 118, old.height + 118), (128, 255))
    larger.save(folder / "assets" / "atlas.png")
    done = write(folder)
    assert done.returncode == 0, done.stderr

    shown = Counter()
    for scene in load(folder, "scenes"):
        split = scene["image"].split("/")[1]
        for thing in scene["things"]:
            if thing["kind"] == "bicycle":
                shown[split] += 1
                is_held_out = split == "unseen_combinations" and thing is scene["things"][0]
                assert (thing["colour"] == "red") == is_held_out
    splits = ("validation", "unseen_images", "unseen_combinations", "cross_lingual")
    assert all(shown[split] for split in ("train", *splits)), shown
    for name in ("captions", "phrases", "instruct-1", "instruct-2", "instruct-3", "instruct"):
        words = {"en": "bicycle", "ko": "자전거", "zh": "自行车"}
        for record in load(folder, name):
            word = words.get(record["language"])
            if word and word in json.dumps(record, ensure_ascii=False):
                del words[record["language"]]
        assert not words, (name, words)
    for split in splits[:3]:
        names = ("bicycle", "자전거", "自行车")
        assert any(name in json.dumps(load(folder, split), ensure_ascii=False) for name in names)


@pytest.mark.parametrize(("number", "rows"), [(12, 3), (13, 4), (16, 4), (17, 5)])
def test_the_atlas_has_a_tile_for_every_kind(monkeypatch, tmp_path, number, rows):
    letters = "ABCDEFGHKLMNOPQRS"[:number]
    kinds = {letter: world.Kind(letter, held_out="red") for letter in letters}
    font = ImageFont.load_default(100)
    monkeypatch.setattr(atlas, "KINDS", kinds)
    monkeypatch.setattr(atlas, "ATLAS", tmp_path / "atlas.png")
    monkeypatch.setattr(atlas.ImageFont, "truetype", lambda path, size: font)
    atlas.make_atlas("any.ttf", tmp_path / "atlas.png")
    with Image.open(tmp_path / "atlas.png") as image:
        assert image.size == (4 * 128, rows * 128)
    tiles = atlas.read_atlas()
    assert list(tiles) == list(letters)
    assert len({tile.tobytes() for tile in tiles.values()}) == number

    # a kind more than the atlas has tiles
    more = kinds | {"bicycle": world.Kind("Z", held_out="red")}
    monkeypatch.setattr(atlas, "KINDS", more)
    with pytest.raises(ValueError, match="atlas.png has no tile for the kind bicycle: remake it"):
        atlas.read_atlas()


def fourth_language():
    """A language that is English with a letter of its own before every text."""
    words = dict(WORDS[LANGUAGES[0]], agreement={}, vocab_size=300)
    del words["base"], words["default"]

    def translate(table):
        """The same table with other texts."""
        if isinstance(table, str):
            return "ş" + re.sub("[Aa]/an ?", "", table)
        if isinstance(table, dict):
            return {key: translate(value) for key, value in table.items()}
        return [translate(value) for value in table]

    own = ("agreement", "script", "vocab_size", "tokenizer_flags", "names", "forms", "gap", "comma")
    words = {key: value if key in own else translate(value) for key, value in words.items()}
    words["names"] = {"en": "İngilizce", "ko": "Korece", "zh": "Çince", "tr": "Türkçe"}
    words["called"] = {"en": "Turkish", "ko": "터키어", "zh": "土耳其语"}
    return json.dumps(words)


def test_a_fourth_language_is_a_file_and_is_asked_in_every_split(tmp_path):
    folder = copy_of_demo(tmp_path)
    path = folder / "demo" / "words" / "tr.json"
    path.write_text(fourth_language(), encoding="utf-8")
    four = ("en", "ko", "zh", "tr")
    done = write(folder, "--languages", *four)
    assert done.returncode == 0, done.stderr
    assert load(folder, "world")["arguments"]["languages"] == sorted(four)

    for split in ("validation", "unseen_images", "unseen_combinations"):
        count = Counter(record["language"] for record in load(folder, split))
        assert count.keys() == {"en", "ko", "tr", "zh"}
        assert max(count.values()) - min(count.values()) <= 0.06 * sum(count.values()), count
        by_skill = {(record["language"], record["skill"]) for record in load(folder, split)}
        assert len(by_skill) == 4 * 11, "every language is asked every skill"
    count = Counter(record["language"] for record in load(folder, "cross_lingual"))
    assert count.keys() == {"ko", "tr", "zh"} and len(set(count.values())) == 1

    captions = Counter(record["language"] for record in load(folder, "captions"))
    assert captions["tr"] == captions["ko"] == captions["zh"] < captions["en"]
    texts = [record for record in load(folder, "instruct") if record["kind"] == "text"]
    read = [record for n, record in enumerate(texts) if n % 4 < 3]  # each fourth translates
    count = Counter(record["language"] for record in read)
    assert len(count) == 4 and max(count.values()) - min(count.values()) <= 1, count
    text = folder / "data" / "text"
    assert "ş" in (text / "tr.txt").read_text(encoding="utf-8")
    parallel = (text / "parallel.txt").read_text(encoding="utf-8")
    assert "ş" in parallel and "Turkish" in parallel and "터키어" in parallel
    dictionary = (text / "dictionary.txt").read_text(encoding="utf-8").splitlines()
    assert dictionary[1] == "cat = 고양이 = şcat = 猫"


def texts_of(folder, *languages):
    """A small world of these languages, the base language first: its folder."""
    done = write(folder, "--languages", *languages)
    assert done.returncode == 0, done.stderr
    return folder / "data" / "text"


def test_the_first_language_is_the_base_language(tmp_path):
    """Without the file that is marked "base": the base-only kinds are named by another."""
    folder = copy_of_demo(tmp_path)
    text = texts_of(folder, "zh", "ko")
    assert load(folder, "world")["arguments"]["languages"] == ["zh", "ko"]
    assert not (text / "en.txt").exists()
    captions = Counter(record["language"] for record in load(folder, "captions"))
    assert captions.keys() == {"zh", "ko"} and captions["ko"] < captions["zh"]
    assert {record["language"] for record in load(folder, "cross_lingual")} == {"ko"}
    said = json.dumps(load(folder, "captions"), ensure_ascii=False)
    assert re.search("雨伞|火箭", said) and not re.search("우산|로켓", said)
    assert "우산" in (text / "ko.txt").read_text(encoding="utf-8")

    # what Korean lacks a word for is asked about by its Chinese name
    records = [record for record in load(folder, "instruct") if "-borrowed-" in record["id"]]
    assert {record["language"] for record in records} == {"ko"}
    assert all(re.search("[一-鿿]", r["conversations"][0]["value"]) for r in records)


def test_a_world_of_one_language_has_no_translations(tmp_path):
    folder = copy_of_demo(tmp_path)
    text = texts_of(folder, "ko")
    assert sorted(path.name for path in text.iterdir()) == ["dictionary.txt", "ko.txt"]
    assert (text / "dictionary.txt").read_text(encoding="utf-8") == ""
    assert load(folder, "cross_lingual") == []
    records = load(folder, "instruct") + load(folder, "unseen_images")
    assert {record["language"] for record in records} == {"ko"}
    assert not re.search("[a-z]{3}", "".join(r["conversations"][1]["value"] for r in records))


def test_a_world_of_two_languages_is_one_file_less(tmp_path):
    folder = copy_of_demo(tmp_path)
    (folder / "demo" / "words" / "zh.json").unlink()
    done = write(folder)
    assert done.returncode == 0, done.stderr
    count = Counter(record["language"] for record in load(folder, "validation"))
    assert count.keys() == {"en", "ko"}
    assert max(count.values()) - min(count.values()) <= 0.06 * sum(count.values()), count


def test_a_missing_word_stops_every_command_in_one_line(tmp_path):
    folder = copy_of_demo(tmp_path)
    replace_in(folder / "demo" / "words" / "ko.json", '"key": "열쇠",', "")
    for module in ("demo", "demo.write", "demo.ablation"):
        command = [sys.executable, "-m", module, "--help"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
        assert answer.returncode == 1
        assert answer.stderr == "demo/words/ko.json: kind.key is missing\n"


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_unknown_word_leaves_placeholders_and_forms_alone(language):
    rng, (nouns, known, script) = random.Random(0), word_lists(language)
    changed = 0
    for pattern in WORDS[language]["varied"]["ask"]["colour"]:
        for template in templates(language, pattern)[::50]:
            got = with_unknown_word(template, nouns, known, script, rng)
            kept = re.findall(r"\{\w+\}|\S/\S", template)
            assert re.findall(r"\{\w+\}|\S/\S", got) == kept, (template, got)
            assert not [word for word in known if word in got and word not in template]
            changed += got != template
    assert changed > 5


def test_a_made_up_word_is_halves_of_two_nouns_and_holds_no_known_word():
    rng = random.Random(0)
    words = {make_word(["horse", "bear"], ["bear", "ar"], "", rng) for _ in range(50)}
    # hor|se + be|ar: "horse" + "bear" would be "horar", which has "ar" in it
    assert words == {"berse"}


def test_a_borrowed_noun_takes_the_place_of_each_form_of_a_kind():
    scene = world.Scene((world.Thing("rocket", "red", "big", 4),), "night")
    interviewer = Interviewer(scene, "ko", random.Random(0))
    turn = interviewer.ask("colour", scene.things[0], "kind", "rocket")
    assert "rocket" in turn[0] and "로켓" not in turn[0] and turn[1] == "빨간색이에요"
    question, answer = interviewer.word_yes_no("kind", True, scene.things[0], "rocket")
    assert "rocket" in question and "로켓" not in question and answer == "네"
