"""The demo world: draws pictures whose every object is known, and writes what to say of them in English, Korean and Chinese.

Where it stands: at the very beginning. It writes files and nothing imports it; everything after it reads the files as if they
were real data: LLaVA-format JSON with PNG pictures beside it, and plain text.

    python scenes.py -o out/demo/data                     # 8,000 training pictures, the test splits and the text, in under a minute
    python scenes.py --sheet sheet.png                    # a contact sheet: what the pictures look like and what is said of them
    python scenes.py --atlas /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf        # remake assets/atlas.png from the font

A picture shows 1 to 3 things, each of 12 kinds, 8 colours, 2 sizes and 9 places, before one of 5 backgrounds. Kinds differ within a
picture, and so do colours: "the cat" and "the red thing" are one thing. Whatever is asked has one right answer, worded one way.

Two gaps are left in the training data on purpose, to measure what a model makes of what it never met:
    unseen combinations   HELD_OUT pairs of a kind and a colour are never drawn, named or denied together in any training file
    cross-lingual         training pictures that show an ENGLISH_ONLY kind are spoken of in English alone; its Korean and Chinese
                          names occur in text without pictures only
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------- the world
KINDS = ("fish", "cat", "duck", "butterfly", "car", "sailboat", "tree", "apple", "house", "key", "umbrella", "rocket")
EMOJI = "🐟🐈🦆🦋🚗⛵🌳🍎🏠🔑☂🚀"  # the same order
COLOURS = {"red": (222, 38, 42), "orange": (250, 134, 16), "yellow": (252, 222, 40), "green": (38, 164, 62), "blue": (36, 92, 224),
           "purple": (142, 50, 184), "white": (246, 246, 246), "black": (40, 40, 46)}  # fmt: skip
SIZES = {"big": 56, "small": 40}  # pixels of the longer side, ± 5%
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))  # a 3 × 3 grid, row by row
BACKGROUNDS = ("day", "night", "sunset", "snow", "rain")
DIRECTIONS = ("left", "right", "above", "below")
HELD_OUT = {"fish": "purple", "cat": "blue", "duck": "red", "butterfly": "black", "car": "green", "sailboat": "yellow", "tree": "orange", "apple": "white",
            "house": "black", "key": "blue", "umbrella": "orange", "rocket": "green"}  # fmt: skip
ENGLISH_ONLY = ("umbrella", "rocket")
GREY = 3  # every third training picture is there in black and white, too: a ViT that meets kinds without colours tells them apart in any (docs/experiments.md)
CELL, SIDE, TILE = 64, 192, 128  # pixels: a cell, a picture, a tile of the atlas
ATLAS = Path(__file__).parent / "assets" / "atlas.png"

# ---------------------------------------------------------------------------------------------- the words
# One table a language. Templates are filled by `say`: "a/an" and Korean particles such as "은/는" take the form that the word beside them asks for.
LANGUAGES = ("en", "ko", "zh")
SKILLS = ("what", "colour", "count", "size", "where", "at", "relation", "background", "mood", "yes_no")
MEASURE = dict(zip(KINDS, "条只只只辆艘棵个座把把枚"))  # Chinese measure words
WORDS = {
    "en": {
        "kind": dict(zip(KINDS, KINDS)),
        "colour": dict(zip(COLOURS, COLOURS)),
        "size": {"big": "big", "small": "small"},
        "size_end": {"big": "big", "small": "small"},
        "place": {place: f"{'in' if place == 'middle centre' else 'at'} the {place.replace('middle centre', 'centre')}" for place in PLACES},
        "direction": {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"},
        "background": {"day": "a sunny day", "night": "night", "sunset": "sunset", "snow": "a snowy day", "rain": "a rainy day"},
        "setting": {"day": "on a sunny day", "night": "at night", "sunset": "at sunset", "snow": "on a snowy day", "rain": "on a rainy day"},
        "mood": {"day": "cheerful, because the sun shines on the meadow", "night": "quiet, because stars shine in the dark sky", "sunset": "warm, because the setting sun colours the sky",
                 "snow": "peaceful, because snow falls softly", "rain": "gloomy, because rain falls from dark clouds"},  # fmt: skip
        "mood_says": "The mood is {mood}.",
        "background_says": ["It is {background}.", "The background shows {background}."],
        "number": ["one", "two", "three"],
        "it": {"kind": "the {kind}", "colour": "the {colour} thing", "pronoun": "it"},
        "phrases": ["a/an {colour} {kind}", "a/an {kind} {place}", "a/an {size} {kind}", "something {colour} {place}", "something {size} {place}"],
        "full": "a/an {size} {colour} {kind} {place}",
        "pair": "a/an {kind} {direction} a/an {other}",
        "sentences": ["There is a/an {size} {colour} {kind} {place}.", "I see a/an {size} {colour} {kind} {place}.", "A/an {size} {colour} {kind} is {place}.",
                      "The {kind} {place} is {size} and {colour}.", "The {kind} is {colour}. It is {size} and {place}.", "The {colour} thing {place} is a/an {size} {kind}."],  # fmt: skip
        "pair_says": "The {kind} is {direction} the {other}.",
        "note": "{place}: {notes};",
        "describe": ["Describe the picture.", "What is in the picture?", "What does the picture show?", "Tell me what you see."],
        "list": ["Describe the picture in short phrases.", "List what is true of the picture.", "Say it in short phrases."],
        "ask": {
            "what": ["What is the {colour} thing?", "What thing is {colour}?", "Which object is {colour}?", "Name the {colour} thing."],
            "colour": ["What colour is {it}?", "Which colour is {it}?", "What is the colour of {it}?", "Tell me the colour of {it}."],
            "count": ["How many things are there?", "How many things do you see?", "How many objects are there?", "Count the things."],
            "size": ["Is {it} big or small?", "How big is {it}?", "What size is {it}?", "Is {it} small or big?"],
            "where": ["Where is {it}?", "Where do you see {it}?", "Where can I find {it}?", "Tell me where {it} is."],
            "at": ["What is {place}?", "What do you see {place}?", "What can I find {place}?", "Which thing is {place}?"],
            "relation": ["What is {direction} {it}?", "What do you see {direction} {it}?", "Which thing is {direction} {it}?"],
            "background": ["What time or weather is it?", "What is the background?", "What does the background show?", "Which time of day or weather do you see?"],
            "mood": ["What is the mood, and why?", "What mood is it, and why?", "How does it feel, and why?", "Describe the mood and its reason."],
        },
        "answer": {"what": "{kind}", "colour": "{colour}", "count": "{number}", "size": "{size}", "where": "{place}", "at": "a/an {colour} {kind}", "background": "{background}", "mood": "{mood}"},
        "yes_no": {  # kind of question: phrasings, yes, no
            "pair": (["Is there a/an {colour} {kind}?", "Do you see a/an {colour} {kind}?", "Can you see a/an {colour} {kind}?"], "yes", "no"),
            "kind": (["Is there a/an {kind}?", "Do you see a/an {kind}?", "Can you see a/an {kind}?"], "yes", "no"),
            "colour": (["Is the {kind} {colour}?", "Is {colour} the colour of the {kind}?", "Does the {kind} look {colour}?"], "yes", "no"),
            "place": (["Is the {kind} {place}?", "Is there a/an {kind} {place}?", "Do you see a/an {kind} {place}?"], "yes", "no"),
            "size": (["Is the {kind} {size}?", "Is it a/an {size} {kind}?", "Does the {kind} look {size}?"], "yes", "no"),
        },
        "name": {"en": "English", "ko": "Korean", "zh": "Chinese"},
        "translate": ["How do you say '{word}' in {name}?", "What is '{word}' in {name}?", "What does '{word}' mean in {name}?", "Translate '{word}' into {name}."],
    },
    "ko": {
        "kind": dict(zip(KINDS, "물고기 고양이 오리 나비 자동차 돛단배 나무 사과 집 열쇠 우산 로켓".split())),
        "colour": dict(zip(COLOURS, "빨간색 주황색 노란색 초록색 파란색 보라색 하얀색 검은색".split())),
        "size": {"big": "큰", "small": "작은"},
        "size_end": {"big": "커요", "small": "작아요"},
        "place": dict(zip(PLACES, ["왼쪽 위", "위쪽 가운데", "오른쪽 위", "왼쪽 가운데", "한가운데", "오른쪽 가운데", "왼쪽 아래", "아래쪽 가운데", "오른쪽 아래"])),
        "direction": {"left": "왼쪽", "right": "오른쪽", "above": "위쪽", "below": "아래쪽"},
        "background": {"day": "맑은 낮", "night": "밤", "sunset": "해 질 녘", "snow": "눈 오는 날", "rain": "비 오는 날"},
        "setting": {"day": "맑은 낮에", "night": "밤에", "sunset": "해 질 녘에", "snow": "눈 오는 날에", "rain": "비 오는 날에"},
        "mood": {"day": "풀밭에 햇살이 비쳐서 즐거운 분위기예요", "night": "어두운 하늘에 별이 빛나서 고요한 분위기예요", "sunset": "지는 해가 하늘을 물들여서 따뜻한 분위기예요",
                 "snow": "눈이 소복소복 내려서 평화로운 분위기예요", "rain": "먹구름에서 비가 내려서 쓸쓸한 분위기예요"},  # fmt: skip
        "mood_says": "{mood}.",
        "background_says": ["{background}이에요/예요.", "배경은 {background}이에요/예요."],
        "number": ["한 개", "두 개", "세 개"],
        "it": {"kind": "{kind}", "colour": "{colour} 물체", "pronoun": "그것"},
        "phrases": ["{colour} {kind}", "{place}에 있는 {kind}", "{size} {kind}", "{place}에 있는 {colour} 물체", "{place}에 있는 {size} 물체"],
        "full": "{place}에 있는 {size} {colour} {kind}",
        "pair": "{other} {direction}에 있는 {kind}",
        "sentences": ["{place}에 {size} {colour} {kind}이/가 있어요.", "{place}에 {size} {colour} {kind}이/가 보여요.", "{size} {colour} {kind}이/가 {place}에 있어요.",
                      "{place}에 있는 {kind}은/는 {colour}이고 {size_end}.", "{kind}은/는 {colour}이에요/예요. {place}에 있고 {size_end}.", "{place}에 있는 {colour} 물체는 {size} {kind}이에요/예요."],  # fmt: skip
        "pair_says": "{kind}은/는 {other}의 {direction}에 있어요.",
        "note": "{place}: {notes};",
        "describe": ["그림을 설명해 주세요.", "그림에 무엇이 있나요?", "그림에 무엇이 보이나요?", "무엇이 보이는지 말해 주세요."],
        "list": ["그림을 짧은 말로 설명해 주세요.", "그림에 맞는 말을 모두 적어 주세요.", "짧은 말로 나열해 주세요."],
        "ask": {
            "what": ["{colour} 물체는 무엇인가요?", "{colour} 물체는 뭐예요?", "무엇이 {colour}인가요?", "어떤 물체가 {colour}인가요?"],
            "colour": ["{it}은/는 무슨 색인가요?", "{it}은/는 어떤 색이에요?", "{it}의 색은 무엇인가요?", "{it}의 색을 말해 주세요."],
            "count": ["물체가 몇 개 있나요?", "물체가 모두 몇 개인가요?", "물체가 몇 개 보이나요?", "물체를 세어 보세요."],
            "size": ["{it}은/는 큰가요, 작은가요?", "{it}의 크기는 어떤가요?", "{it}은/는 얼마나 큰가요?", "{it}은/는 작은가요, 큰가요?"],
            "where": ["{it}은/는 어디에 있나요?", "{it}은/는 어디 있어요?", "{it}이/가 어디에 보이나요?", "{it}이/가 어디에 있는지 말해 주세요."],
            "at": ["{place}에는 무엇이 있나요?", "{place}에 뭐가 있어요?", "{place}에 무엇이 보이나요?", "{place}에 어떤 물체가 있나요?"],
            "relation": ["{it}의 {direction}에는 무엇이 있나요?", "{it}의 {direction}에 뭐가 있어요?", "{it}의 {direction}에 무엇이 보이나요?"],
            "background": ["배경은 무엇인가요?", "시간이나 날씨는 어떤가요?", "어떤 시간이나 날씨의 풍경인가요?", "배경의 시간이나 날씨는 어떤가요?"],
            "mood": ["분위기가 어떤가요? 이유는요?", "어떤 분위기인가요? 왜 그런가요?", "분위기와 그 이유를 말해 주세요.", "분위기가 어때요? 왜 그래요?"],
        },
        "answer": {"what": "{kind}이에요/예요", "colour": "{colour}이에요/예요", "count": "{number}예요", "size": "{size_end}", "where": "{place}에 있어요", "at": "{colour} {kind}이/가 있어요",
                   "background": "{background}이에요/예요", "mood": "{mood}"},  # fmt: skip
        "yes_no": {
            "pair": (["{colour} {kind}이/가 있나요?", "{colour} {kind}이/가 보이나요?", "{colour} {kind}이/가 있어요?"], "네", "아니요"),
            "kind": (["{kind}이/가 있나요?", "{kind}이/가 보이나요?", "{kind}이/가 있어요?"], "네", "아니요"),
            "colour": (["{kind}은/는 {colour}인가요?", "{kind}의 색이 {colour}인가요?", "{kind}이/가 {colour}이에요/예요?"], "네", "아니요"),
            "place": (["{kind}은/는 {place}에 있나요?", "{place}에 {kind}이/가 있나요?", "{place}에 {kind}이/가 보이나요?"], "네", "아니요"),
            "size": (["{kind}은/는 {size}가요?", "{size} {kind}인가요?", "{kind}의 크기가 {size}가요?"], "네", "아니요"),
        },
        "name": {"en": "영어", "ko": "한국어", "zh": "중국어"},
        "translate": ["{name}로 '{word}', 어떻게 말하나요?", "'{word}'의 {name} 표현은 무엇인가요?", "'{word}', {name}로 뭐라고 하나요?", "다음 말을 {name}로 옮겨 주세요: '{word}'"],
    },
    "zh": {
        "kind": dict(zip(KINDS, "鱼 猫 鸭子 蝴蝶 汽车 帆船 树 苹果 房子 钥匙 雨伞 火箭".split())),
        "colour": dict(zip(COLOURS, "红色 橙色 黄色 绿色 蓝色 紫色 白色 黑色".split())),
        "size": {"big": "大", "small": "小"},
        "size_end": {"big": "很大", "small": "很小"},
        "place": dict(zip(PLACES, "左上角 顶部 右上角 左侧 正中央 右侧 左下角 底部 右下角".split())),
        "direction": {"left": "左边", "right": "右边", "above": "上方", "below": "下方"},
        "background": {"day": "晴天", "night": "夜晚", "sunset": "日落时分", "snow": "雪天", "rain": "雨天"},
        "setting": {"day": "在晴天", "night": "在夜晚", "sunset": "在日落时分", "snow": "在雪天", "rain": "在雨天"},
        "mood": {"day": "欢快，因为阳光照在草地上", "night": "宁静，因为夜空中星光闪烁", "sunset": "温馨，因为夕阳染红了天空", "snow": "安详，因为雪花轻轻飘落", "rain": "忧郁，因为乌云下着雨"},
        "mood_says": "气氛{mood}。",
        "background_says": ["现在是{background}。", "背景是{background}。"],
        "number": ["一个", "两个", "三个"],
        "it": {"kind": "{kind}", "colour": "{colour}的东西", "pronoun": "它"},
        "phrases": ["一{measure}{colour}的{kind}", "{place}有一{measure}{kind}", "一{measure}{size}{kind}", "{place}有个{colour}的东西", "{place}有个{size}东西"],
        "full": "{place}有一{measure}{colour}的{size}{kind}",
        "pair": "{other}{direction}有一{measure}{kind}",
        "sentences": ["{place}有一{measure}{colour}的{size}{kind}。", "我看到{place}有一{measure}{colour}的{size}{kind}。", "一{measure}{colour}的{size}{kind}在{place}。",
                      "{place}的{kind}是{colour}的，{size_end}。", "{kind}是{colour}的。它在{place}，{size_end}。", "{place}那个{colour}的东西是一{measure}{size}{kind}。"],  # fmt: skip
        "pair_says": "{kind}在{other}的{direction}。",
        "note": "{place}：{notes}；",
        "describe": ["描述这张图片。", "图片里有什么？", "图片里能看到什么？", "说说你看到了什么。"],
        "list": ["用简短的话描述这张图片。", "列出符合图片的说法。", "用短语说一说这张图片。"],
        "ask": {
            "what": ["{colour}的东西是什么？", "什么东西是{colour}的？", "哪个东西是{colour}的？", "那个{colour}的东西是什么？"],
            "colour": ["{it}是什么颜色的？", "{it}是什么颜色？", "{it}的颜色是什么？", "请说出{it}的颜色。"],
            "count": ["有几个东西？", "一共有几个东西？", "能看到几个东西？", "数一数有几个东西。"],
            "size": ["{it}是大还是小？", "{it}有多大？", "{it}的大小怎么样？", "{it}是小还是大？"],
            "where": ["{it}在哪里？", "{it}在哪儿？", "{it}在什么位置？", "请说出{it}的位置。"],
            "at": ["{place}有什么？", "{place}是什么？", "{place}能看到什么？", "在{place}的是什么？"],
            "relation": ["{it}的{direction}有什么？", "{it}的{direction}是什么？", "{it}的{direction}能看到什么？"],
            "background": ["背景是什么？", "现在是什么时间或天气？", "这是什么时候或什么天气？", "背景是什么时间或天气？"],
            "mood": ["气氛怎么样？为什么？", "这是什么样的气氛？为什么？", "请说说气氛和原因。", "感觉怎么样？为什么？"],
        },
        "answer": {"what": "{kind}", "colour": "{colour}", "count": "{number}", "size": "{size_end}", "where": "在{place}", "at": "{colour}的{kind}", "background": "{background}", "mood": "{mood}"},
        "yes_no": {
            "pair": (["有{colour}的{kind}吗？", "有没有{colour}的{kind}？", "这里有{colour}的{kind}吗？"], "有", "没有"),
            "kind": (["有{kind}吗？", "有没有{kind}？", "这里有{kind}吗？"], "有", "没有"),
            "colour": (["{kind}是{colour}的吗？", "{kind}是不是{colour}的？", "{kind}的颜色是{colour}吗？"], "是", "不是"),
            "place": (["{place}有{kind}吗？", "{place}有没有{kind}？", "在{place}有{kind}吗？"], "有", "没有"),
            "size": (["{kind}是{size}的吗？", "{kind}是不是{size}的？", "这是一{measure}{size}{kind}吗？"], "是", "不是"),
        },
        "name": {"en": "英语", "ko": "韩语", "zh": "中文"},
        "translate": ["“{word}”用{name}怎么说？", "“{word}”的{name}是什么？", "用{name}怎么说“{word}”？", "请把“{word}”翻译成{name}。"],
    },
}  # fmt: skip

# Korean particles, "after a final consonant/after a vowel", as the templates write them.
PARTICLE = re.compile(r"([가-힣])(이에요/예요|은/는|이/가|을/를|과/와)")


def say(template, **words):
    """A template with its words filled in, and what depends on the neighbouring word put right: 은/는 after a final consonant, an before a vowel."""

    def particle(match):
        after_consonant, after_vowel = match[2].split("/")
        return match[1] + (after_consonant if (ord(match[1]) - 0xAC00) % 28 else after_vowel)  # syllables come 28 to a vowel, the first without a final

    text = PARTICLE.sub(particle, template.format_map(words))
    return re.sub(r"([aA])/an (\w)", lambda m: f"{m[1]}{'n' if m[2] in 'aeiou' else ''} {m[2]}", text)


# ---------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    place: int  # 0 … 8, row by row

    def words(self, language):
        w = WORDS[language]
        return {"kind": w["kind"][self.kind], "colour": w["colour"][self.colour], "size": w["size"][self.size], "size_end": w["size_end"][self.size],
                "place": w["place"][PLACES[self.place]], "measure": MEASURE[self.kind]}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    things: tuple
    background: str

    def beside(self, thing, direction):
        """The things that lie strictly in that direction of `thing`, by column or by row."""
        (row, column), sign = divmod(thing.place, 3), 1 if direction in ("right", "below") else -1
        if direction in ("left", "right"):
            return [o for o in self.things if (o.place % 3 - column) * sign > 0]
        return [o for o in self.things if (o.place // 3 - row) * sign > 0]

    def languages(self):
        """Those in which a training picture of this scene is spoken of."""
        return LANGUAGES[:1] if any(t.kind in ENGLISH_ONLY for t in self.things) else LANGUAGES


def random_scene(rng, english_only=None, held_out=False):
    """A scene of 1 to 3 things. english_only: must (True) or must not (False) show such a kind, None: a quarter of the scenes does.
    held_out: the first thing is a held-out pair; without it no thing is."""
    english_only = rng.random() < 0.25 if english_only is None else english_only
    number = rng.choices((1, 2, 3), (2, 4, 4))[0]
    ordinary = [k for k in KINDS if k not in ENGLISH_ONLY]
    while True:
        kinds = [rng.choice(ENGLISH_ONLY)] if english_only else []
        kinds += rng.sample(ordinary, number - len(kinds))
        colours = rng.sample(list(COLOURS), number)
        if held_out:
            colours = [HELD_OUT[kinds[0]]] + [c for c in colours if c != HELD_OUT[kinds[0]]][: number - 1]
        if any(HELD_OUT[k] == c for k, c in list(zip(kinds, colours))[held_out:]):
            continue
        places = rng.sample(range(9), number)
        things = [Thing(k, c, rng.choice(list(SIZES)), p) for k, c, p in zip(kinds, colours, places)]
        return Scene(tuple(things), rng.choice(BACKGROUNDS))


# ---------------------------------------------------------------------------------------------- pictures
def make_atlas(font_path, path=ATLAS):
    """Render each kind's emoji once from Noto Color Emoji: its luminance, spread so that the middle grey stands for the plain colour, and its alpha.
    One PNG, a 4 × 3 grid of tiles; every silhouette fills its tile's longer side."""
    font = ImageFont.truetype(str(font_path), 109)  # the one size the font's bitmaps have
    atlas = Image.new("LA", (4 * TILE, 3 * TILE))
    for i, emoji in enumerate(EMOJI):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), emoji, font=font, embedded_color=True)
        if KINDS[i] == "rocket":  # the font draws stars around it: keep what hangs together
            alpha = glyph.getchannel("A")
            hull = alpha.point(lambda a: 255 * (a > 100))
            ImageDraw.floodfill(hull, (80, 70), 128)
            glyph.putalpha(ImageChops.darker(alpha, hull.point(lambda v: 255 * (v == 128)).filter(ImageFilter.MaxFilter(3))))
        glyph = glyph.crop(glyph.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
        glyph = ImageOps.contain(glyph, (TILE, TILE), Image.Resampling.LANCZOS)
        shade, alpha = glyph.convert("RGB").convert("L"), glyph.getchannel("A")
        rank = [0] * 256  # a quarter equalised: details stay apart even where the emoji is of one brightness
        histogram, below = shade.histogram(alpha.point(lambda a: 255 * (a > 128))), 0
        for level, n in enumerate(histogram):
            rank[level] = round(255 * (below + n / 2) / sum(histogram) * 0.6 + level * 0.4)
            below += n
        tile = Image.merge("LA", (shade.point(rank), alpha))
        atlas.paste(tile, (i % 4 * TILE + (TILE - tile.width) // 2, i // 4 * TILE + (TILE - tile.height) // 2))
    path.parent.mkdir(exist_ok=True)
    atlas.save(path, optimize=True)


@cache
def sprites(size):
    """{kind: (shade, alpha)} at twice the size of drawing or the atlas's own, with a margin of an eighth for turning."""
    with Image.open(ATLAS) as image:
        atlas = image.convert("LA")
    tiles = [atlas.crop((i % 4 * TILE, i // 4 * TILE, i % 4 * TILE + TILE, i // 4 * TILE + TILE)) for i in range(len(KINDS))]
    side = round(1.25 * min(TILE, 2 * SIZES[size]))
    return {kind: [s.resize((side, side), Image.Resampling.LANCZOS) for s in ImageOps.expand(tile, TILE // 8, (0, 0)).split()] for kind, tile in zip(KINDS, tiles)}


def gradient(stops, side):
    """A vertical run of colours from top to bottom."""
    strip = Image.new("RGB", (1, len(stops)))
    strip.putdata(stops)
    return strip.resize((side, side), Image.Resampling.BILINEAR, box=(0, 0.5, 1, len(stops) - 0.5))


def draw_background(name, rng):
    S = 2 * SIDE  # drawn at twice the size, then halved: smooth edges
    shift = lambda colour, by=10: tuple(max(0, min(255, c + rng.randint(-by, by))) for c in colour)
    ground = rng.randint(int(0.66 * S), int(0.8 * S))
    x = rng.choice((rng.randint(30, S // 2 - 60), rng.randint(S // 2 + 60, S - 30)))

    def hill(colour, top, wide):
        middle = rng.randint(-S // 4, S + S // 4)
        draw.ellipse((middle - wide, top, middle + wide, top + 2 * S), fill=colour)

    def cloud(cx, cy, r, colour):
        for dx, dy, k in ((-1.1, 0.2, 0.7), (0, -0.2, 1), (1.1, 0.15, 0.75), (0.2, 0.35, 0.8), (-0.5, 0.3, 0.7)):
            draw.ellipse((cx + (dx - k) * r, cy + (dy - k * 0.75) * r, cx + (dx + k) * r, cy + (dy + k * 0.75) * r), fill=colour)

    if name == "day":
        image = gradient([shift((104, 178, 238)), shift((168, 214, 246)), shift((220, 240, 248))], S)
        draw = ImageDraw.Draw(image)
        y, r = rng.randint(30, 90), rng.randint(26, 34)
        for k, colour in ((1.5, (214, 232, 228)), (1, (255, 240, 150))):
            draw.ellipse((x - k * r, y - k * r, x + k * r, y + k * r), fill=colour)
        for _ in range(rng.randint(1, 3)):
            cloud(rng.randint(0, S), rng.randint(30, S // 2), rng.randint(16, 30), (240, 247, 252))
        hill(shift((168, 214, 128)), ground - 30, S), hill(shift((142, 200, 104)), ground + 10, 2 * S)
        for _ in range(rng.randint(8, 16)):
            fx, fy = rng.randint(0, S), rng.randint(ground + 50, S)
            draw.ellipse((fx - 4, fy - 4, fx + 4, fy + 4), fill=rng.choice(((255, 255, 240), (255, 226, 150), (246, 196, 214))))
    elif name == "night":
        image = gradient([shift((14, 18, 52), 6), shift((30, 38, 92), 8), shift((62, 66, 128), 8)], S)
        draw = ImageDraw.Draw(image)
        for _ in range(rng.randint(24, 40)):
            sx, sy, r = rng.randint(0, S), rng.randint(0, ground), rng.choice((2, 2, 3, 4))
            draw.polygon([(sx, sy - 2 * r), (sx + r // 2, sy), (sx, sy + 2 * r), (sx - r // 2, sy)], fill=(240, 236, 200))
            draw.ellipse((sx - r, sy - r, sx + r, sy + r), fill=(240, 236, 200))
        y, r = rng.randint(40, 100), rng.randint(26, 34)
        moon = Image.new("L", (2 * r, 2 * r))
        ImageDraw.Draw(moon).ellipse((0, 0, 2 * r, 2 * r), fill=255)
        ImageDraw.Draw(moon).ellipse((r * 0.7, -r * 0.25, r * 2.5, r * 1.6), fill=0)
        image.paste((250, 240, 190), (x - r, y - r), moon)
        hill(shift((26, 34, 66), 5), ground - 10, S), hill(shift((18, 24, 50), 4), ground + 40, 2 * S)
    elif name == "sunset":
        image = gradient([shift((92, 62, 138)), shift((206, 98, 130)), shift((252, 160, 100)), shift((255, 212, 138)), shift((255, 220, 150))], S)
        draw = ImageDraw.Draw(image)
        r = rng.randint(48, 66)
        for k, colour in ((1.45, (255, 202, 124)), (1.2, (255, 216, 130)), (1, (255, 240, 176))):
            draw.ellipse((x - k * r, ground - k * r, x + k * r, ground + k * r), fill=colour)
        for _ in range(rng.randint(2, 4)):
            cx, cy, w = rng.randint(0, S), rng.randint(30, ground - 90), rng.randint(50, 110)
            draw.ellipse((cx - w, cy - 7, cx + w, cy + 7), fill=(236, 150, 140))
        image.paste(gradient([shift((196, 104, 128)), shift((104, 66, 128))], S).crop((0, 0, S, S - ground)), (0, ground))
        for i in range(7):
            w = r * (1 - i / 9) * rng.uniform(0.5, 1)
            draw.rounded_rectangle((x - w, ground + 8 + 14 * i, x + w, ground + 13 + 14 * i), 3, fill=(250, 196, 140))
    elif name == "snow":
        image = gradient([shift((166, 188, 214)), shift((204, 219, 234)), shift((226, 235, 243))], S)
        draw = ImageDraw.Draw(image)
        hill(shift((222, 231, 241), 4), ground - 40, S), hill(shift((236, 242, 248), 4), ground, 2 * S)
        for _ in range(rng.randint(36, 56)):
            sx, sy, r = rng.randint(0, S), rng.randint(0, S), rng.choice((3, 4, 4, 6))
            draw.ellipse((sx - r, sy - r, sx + r, sy + r), fill=(253, 254, 255))
    else:
        image = gradient([shift((98, 108, 124)), shift((132, 142, 156)), shift((160, 168, 178))], S)
        draw = ImageDraw.Draw(image)
        hill(shift((108, 124, 120), 6), ground + 10, 2 * S)
        for _ in range(3):
            px, py, w = rng.randint(0, S), rng.randint(ground + 60, S), rng.randint(24, 50)
            draw.ellipse((px - w, py - 7, px + w, py + 7), fill=(142, 156, 168))
        for _ in range(rng.randint(50, 70)):
            sx, sy, length = rng.randint(0, S + 40), rng.randint(30, S), rng.randint(16, 28)
            draw.line((sx, sy, sx - length * 0.35, sy + length), fill=(190, 204, 220), width=2)
        for i in range(5):
            cloud(S * i // 4 + rng.randint(-20, 20), rng.randint(4, 24), rng.randint(34, 48), shift((82, 90, 106), 5))
    return image.reduce(2)


def draw_thing(image, thing, rng):
    """Paste one thing: sprite turned, scaled, recoloured (dark shades darken the colour, light ones lighten it), with a thin halo that sets it off."""
    size = round(SIZES[thing.size] * rng.uniform(0.95, 1.05))
    full = round(size * 1.25)  # the sprite's margin of an eighth on either side
    room = 3 if thing.size == "big" else 9
    row, column = divmod(thing.place, 3)
    centre = [(n + 0.5) * CELL + rng.uniform(-room, room) for n in (column, row)]
    edge = 3 - full // 10  # the halo stays inside the picture
    corner = [max(edge, min(SIDE - full - edge, round(c - full / 2))) for c in centre]
    angle = rng.uniform(-10, 10)
    shade, alpha = (s.rotate(angle, Image.Resampling.BILINEAR).resize((full, full), Image.Resampling.LANCZOS) for s in sprites(thing.size)[thing.kind])
    light = rng.uniform(0.94, 1.06)
    base = [max(0, min(255, c * light + rng.uniform(-7, 7))) for c in COLOURS[thing.colour]]
    if thing.colour in ("white", "black"):
        base = [sum(base) / 3] * 3
    depth = 0.38 if thing.colour == "white" else 0.6  # how much the darkest shade takes away
    shine = 0.3 if thing.colour in ("black", "white", "yellow") else 0.4

    def level(base, v):
        return base * (1 - depth * (1 - v / 128) ** 1.4) if v < 128 else base + (255 - base) * shine * ((v - 128) / 127) ** 2

    colour = Image.merge("RGB", [shade.point([round(level(b, v)) for v in range(256)]) for b in base])
    halo = alpha.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.BoxBlur(0.6)).point([min(255, 2 * a) for a in range(256)])
    image.paste((70, 74, 92) if thing.colour in ("white", "yellow") else (255, 255, 255), tuple(corner), halo)
    image.paste(colour, tuple(corner), alpha)


def draw_scene(scene, rng):
    """The picture of a scene, SIDE × SIDE RGB. `rng` decides everything that the scene leaves open."""
    image = draw_background(scene.background, rng)
    for thing in scene.things:
        draw_thing(image, thing, rng)
    return image


# ---------------------------------------------------------------------------------------------- what is said
def phrases(scene, language, rng, colours):
    """Every true phrase of a scene that names a colour, or every one that doesn't, in random order, each worded in the one way it has in that language."""
    w = WORDS[language]
    said = [] if colours else [w["setting"][scene.background]]
    for thing in scene.things:
        said += [say(p, **thing.words(language)) for p in w["phrases"] if ("{colour}" in p) == colours]
        for direction in () if colours else DIRECTIONS:  # what lies to the left of a cat is a thing "to the left of a cat"
            said += [say(w["pair"], **(other.words(language) | {"other": w["kind"][thing.kind], "direction": w["direction"][direction]})) for other in scene.beside(thing, direction)]
    rng.shuffle(said)
    return said


def full_caption(scene, language, rng):
    """One phrase a thing, with all its attributes, and one for the background."""
    said = [say(WORDS[language]["full"], **thing.words(language)) for thing in rng.sample(scene.things, len(scene.things))]
    return said + [WORDS[language]["setting"][scene.background]]


def comma(language):
    return "，" if language == "zh" else ", "


def ask(scene, skill, language, rng, thing=None, by=None, text_only=False):
    """One question about `thing` (any thing, if None) and its answer, or None where the scene has no such question.
    by: how the question names the thing: "kind", "colour" or "pronoun"."""
    w = WORDS[language]
    thing = thing or rng.choice(scene.things)
    words = thing.words(language) | {"number": w["number"][len(scene.things) - 1], "background": w["background"][scene.background], "mood": w["mood"][scene.background]}
    if skill == "yes_no":
        return ask_yes_no(scene, rng.choice(list(w["yes_no"])), rng.random() < 0.5, language, rng, thing, text_only)
    if skill == "relation":  # asked only where one thing lies alone on a side of `thing`
        found = [(d, o) for d in DIRECTIONS for o in scene.beside(thing, d) if len(scene.beside(thing, d)) == 1]
        if not found:
            return None
        direction, other = rng.choice(found)
        it = say(w["it"][by or rng.choice(("kind", "kind", "kind", "colour"))], **words)
        return say(rng.choice(w["ask"]["relation"]), it=it, direction=w["direction"][direction]), say(w["answer"]["at"], **other.words(language))
    by = by or ("kind" if skill == "colour" else rng.choice(("kind", "kind", "kind", "colour")))
    words["it"] = say(w["it"][by], **words)
    return say(rng.choice(w["ask"][skill]), **words), say(w["answer"][skill], **words)


def ask_yes_no(scene, type, yes, language, rng, thing=None, text_only=False, pairs=None):
    """A question of one of the types in the table whose answer is `yes`. A "no" is a near miss: one attribute of a thing that is there is changed.
    Names no held-out pair that is not there, except out of `pairs` (the held-out ones, to be denied in a test); in a language that must not
    name an English-only kind, none."""
    w = WORDS[language]
    thing = thing or rng.choice(scene.things)
    kind, colour, size, place = thing.kind, thing.colour, thing.size, thing.place
    if not yes:
        shown = {t.kind for t in scene.things}
        pool = [k for k in KINDS if language == "en" or text_only or k not in ENGLISH_ONLY]
        if type == "kind":
            kind = rng.choice([k for k in pool if k not in shown])
        elif type == "size":
            size = "small" if size == "big" else "big"
        elif type == "place":  # where another thing is, or anywhere
            others = [t.place for t in scene.things if t != thing]
            place = rng.choice(others) if others and rng.random() < 0.5 else rng.choice([p for p in range(9) if p != place])
        elif type == "pair" and pairs:
            kind, colour = rng.choice(pairs)
        else:
            true = {(t.kind, t.colour) for t in scene.things}
            colours = [c for c in COLOURS if (kind, c) not in true and HELD_OUT[kind] != c]
            kinds = [k for k in pool if (k, colour) not in true and HELD_OUT[k] != colour]
            if type == "colour" or rng.random() < 0.5:
                near = [c for c in colours if c in {t.colour for t in scene.things}]
                colour = rng.choice(near if near and rng.random() < 0.5 else colours)
            else:
                near = [k for k in kinds if k in shown]
                kind = rng.choice(near if near and rng.random() < 0.5 else kinds)
    templates, positive, negative = w["yes_no"][type]
    return say(rng.choice(templates), **Thing(kind, colour, size, place).words(language)), positive if yes else negative


def chat(scene, language, rng, turns, thing=None, by="pronoun"):
    """A conversation: one thing is brought up, follow-ups call it "it"; then another thing, or the scene as a whole."""
    talk, rest = [], [thing] if thing else rng.sample(scene.things, len(scene.things))
    whole = ["count", "background", "mood", "yes_no"]
    told = {"what": {"colour"}, "at": {"where", "colour"}}  # what the opening question gives away
    while len(talk) < turns and (rest or whole):
        if rest:
            one = rest.pop()
            first = rng.choice(("what", "where", "colour") if thing else ("what", "where", "colour", "at"))
            talk.append(ask(scene, first, language, rng, one, "kind" if first in ("where", "colour") else None))
            follow = [s for s in ("where", "colour", "size", "relation") if s != first and s not in told.get(first, ())]
            follow = [ask(scene, s, language, rng, one, by) for s in rng.sample(follow, len(follow))]
            talk += [t for t in follow if t][: turns - 1 if thing else rng.randint(1, 2)]
        else:
            talk.append(ask(scene, whole.pop(rng.randrange(len(whole))), language, rng))
    return talk[:turns]


def lookup(scene, language, rng):
    """The plainest questions that can't be answered without looking one thing up by another: what is the red thing, which colour is the cat, where is it or how big.

    Of one thing alone anything may be said that is seen; so only pictures of several are asked about. A decoder learns looking up all at once and late, and the
    sooner the more of its loss hangs on nothing else (docs/experiments.md)."""
    if len(scene.things) < 2:
        return []
    pick = lambda: rng.choice(scene.things)
    return [ask(scene, skill, language, rng, pick(), "kind" if skill in ("where", "size") else None) for skill in ("what", "colour") * 3 + ("where", "where", "size")]


def drill(scene, language, rng):
    """More of the same, also by place and by direction, and the first questions of yes or no."""
    if len(scene.things) < 2:
        return []
    turns = [ask(scene, skill, language, rng, rng.choice(scene.things)) for skill in ("what", "colour", "where", "size", "at", "relation")]
    return [turn for turn in turns if turn] + [ask_yes_no(scene, "colour", yes, language, rng, rng.choice(scene.things)) for yes in (True, False)]


def conversations(scene, language, rng, index):
    """{kind: turns} of one picture in one language: the four kinds of X-LLaVA, and yes/no."""
    things = rng.sample(scene.things, len(scene.things))
    pick = lambda n: things[n % len(things)]
    talk = {
        "object": [ask(scene, s, language, rng, pick(n)) for n, s in enumerate(("what", "colour", "count", "size"))],
        "location": [ask(scene, "where", language, rng, pick(0), "kind"), ask(scene, "at", language, rng, pick(1)), ask(scene, "where", language, rng, pick(1)),
                     ask(scene, "relation", language, rng, pick(0)), ask(scene, "relation", language, rng, pick(1))],  # fmt: skip
        "atmosphere": [ask(scene, s, language, rng) for s in ("background", "mood")],
        "conversation": chat(scene, language, rng, rng.randint(4, 6)),
    }
    for kind in ("object", "location", "atmosphere"):
        talk[kind] = list(dict.fromkeys(filter(None, talk[kind])))[:4]
        rng.shuffle(talk[kind])
    # Which questions have the answer yes is counted through, not thrown: as many yes as no for every type, and no turn tells of another.
    types = list(WORDS[language]["yes_no"])
    bits = index + 11 * LANGUAGES.index(language)
    asked = [(t, bool(bits >> n & 1)) for n, t in enumerate(types) if n != bits // 32 % 5]
    rng.shuffle(asked)
    talk["yes_no"] = [ask_yes_no(scene, t, yes, language, rng, pick(n)) for n, (t, yes) in enumerate(asked)]
    return talk


# ---------------------------------------------------------------------------------------------- records
def record(id, language, kind, turns, image=None, **extra):
    """One LLaVA record; the picture stands in the first question."""
    said = []
    for n, (question, answer) in enumerate(turns):
        said += [{"from": "human", "value": "<image>\n" * bool(image and n == 0) + question}, {"from": "gpt", "value": answer}]
    return {"id": id} | ({"image": image} if image else {}) | {"language": language, "kind": kind} | extra | {"conversations": said}


def random_for(*names):
    """A generator that depends on its names alone: neither on how many processes there are nor on what was made before."""
    return random.Random("/".join(map(str, names)))


def train_records(scene, seed, index):
    """Captions, phrases and conversations of one training picture, in each of its languages."""
    made = {"captions": [], "phrases": [], "lookup": [], "drill": [], "instruct": []}
    image, languages = f"pictures/train/{index:05}.png", scene.languages()
    for language in languages:
        w, rng = WORDS[language], random_for(seed, "said", index, language)
        id = f"train-{index:05}-{language}"
        made["captions"].append(record(id + "-caption", language, "caption", [(rng.choice(w["describe"]), comma(language).join(full_caption(scene, language, rng)))], image))
        shapes, colours = (comma(language).join(phrases(scene, language, rng, named)) for named in (False, True))
        made["phrases"].append(record(id + "-phrases", language, "phrases", [(rng.choice(w["list"]), shapes)], image))
        made["phrases"].append(record(id + "-colours", language, "colours", [(rng.choice(w["list"]), colours)], image))
        if index % GREY == 0:  # a picture without colours can tell of everything else
            made["phrases"].append(record(id + "-grey", language, "phrases", [(rng.choice(w["list"]), shapes)], image.replace("train", "grey")))
        for name, turns in (("lookup", lookup(scene, language, rng)), ("drill", drill(scene, language, rng))):
            made[name] += [record(f"{id}-{name}-{n}", language, name, [turn], image) for n, turn in enumerate(dict.fromkeys(turns))]
        for kind, turns in conversations(scene, language, rng, index).items():  # each question by itself, but for the conversation: an answer must not give away the next
            several = [turns] if kind == "conversation" else [[turn] for turn in turns]
            made["instruct"] += [record(f"{id}-{kind}-{n}", language, kind, own, image) for n, own in enumerate(several)]
    caption = made["captions"][index % len(languages)]  # what was learnt in `align` is not to be forgotten
    made["instruct"].append(caption | {"id": caption["id"] + "-again"})
    return made


KIND_OF = {"what": "object", "colour": "object", "count": "object", "size": "object", "where": "location", "at": "location", "relation": "location", "background": "atmosphere",
           "mood": "atmosphere", "yes_no": "yes_no"}  # fmt: skip


def split_records(split, scenes, seed):
    """A question of each skill for each scene, languages taking turns; in `cross_lingual`, Korean and Chinese questions that need the kind's name."""
    made, yes_next = [], Counter()
    for index, scene in enumerate(scenes):
        rng = random_for(seed, "asked", split, index)
        cross, held = split == "cross_lingual", split == "unseen_combinations"
        thing = scene.things[0] if cross or held else None
        for number, skill in enumerate(SKILLS + ("conversation",)):
            if cross:
                languages = LANGUAGES[1:] if skill not in ("count", "background", "mood") else ()
            else:  # pictures of English-only kinds (every sixth) speak English; the others make up the balance
                languages = scene.languages() if len(scene.languages()) == 1 else (("ko", "zh", "en", "ko", "zh")[(index - index // 6 + number) % 5],)
            for language in languages:
                extra = {"skill": skill}
                id, image = f"{split}-{index:05}-{skill}-{language}", f"pictures/{split}/{index:05}.png"
                if skill == "conversation":
                    made.append(record(id, language, skill, chat(scene, language, rng, 3, thing, by="kind" if cross else "pronoun"), image, **extra))
                    continue
                if skill == "yes_no":
                    types = ("pair", "pair", "place", "size") if held else ("pair", "kind", "place", "size") if cross else tuple(WORDS[language]["yes_no"])
                    type = types[(index // 6 + index) % len(types)]
                    yes = yes_next[language, type] % 2 == 0
                    yes_next[language, type] += 1
                    turn = split_yes_no(scene, type, yes, language, rng, thing, cross, held)
                elif skill == "relation":
                    turns = [ask(scene, skill, language, rng, t, "kind" if thing else None) for t in rng.sample(scene.things, len(scene.things))]
                    name = WORDS[language]["kind"][thing.kind] if thing else ""
                    turn = next((t for t in turns if t and name in " ".join(t)), None)
                else:
                    turn = ask(scene, skill, language, rng, thing, "kind" if cross else None)
                if turn:
                    made.append(record(id, language, KIND_OF[skill], [turn], image, **extra))
    return made


def split_yes_no(scene, type, yes, language, rng, thing, cross, held):
    """As `ask_yes_no`; where held-out pairs or English-only kinds are the subject, they are also what is denied."""
    shown = {(t.kind, t.colour) for t in scene.things}
    if held and type == "pair" and not yes:
        kinds, colours = {t.kind for t in scene.things}, {t.colour for t in scene.things}
        pairs = [p for p in HELD_OUT.items() if p not in shown and (language == "en" or p[0] not in ENGLISH_ONLY)]
        near = [p for p in pairs if p[0] in kinds or p[1] in colours]
        return ask_yes_no(scene, type, yes, language, rng, thing, pairs=near or pairs)
    if cross and type == "kind" and not yes:
        (other,) = [k for k in ENGLISH_ONLY if k != thing.kind]
        templates, _, no = WORDS[language]["yes_no"]["kind"]
        return say(rng.choice(templates), kind=WORDS[language]["kind"][other]), no
    if cross and type == "pair" and not yes:
        pairs = [(thing.kind, c) for c in COLOURS if c not in (thing.colour, HELD_OUT[thing.kind])]
        return ask_yes_no(scene, type, yes, language, rng, thing, pairs=pairs)
    return ask_yes_no(scene, type, yes, language, rng, thing)


# ---------------------------------------------------------------------------------------------- text without pictures
def description(scene, language, rng, plain=False):
    """A scene in words: as sentences, as a caption's phrases, or as notes whose order is shuffled."""
    w, style = WORDS[language], 0 if plain else rng.random()
    things = rng.sample(scene.things, len(scene.things))
    if style < 0.5:
        gap = "" if language == "zh" else " "
        said = [say(rng.choice(w["sentences"]), **t.words(language)) for t in things]
        said.insert(rng.choice((0, len(said))), say(rng.choice(w["background_says"]), background=w["background"][scene.background]))
        return gap.join(said)
    if style < 0.75:
        said = full_caption(scene, language, rng)
        rng.shuffle(said)
        return comma(language).join(said) + ("。" if language == "zh" else ".")
    notes = []
    for t in things:
        words = t.words(language)
        notes.append(w["note"].format(place=words["place"], notes=comma(language).join(rng.sample((words["kind"], words["colour"], words["size"]), 3))))
    notes.append(w["background"][scene.background] + ("。" if language == "zh" else "."))
    return ("" if language == "zh" else " ").join(notes)


def reading(scene, language, rng, turns):
    """Questions on a described scene."""
    talk = [ask(scene, skill, language, rng, text_only=True) for skill in rng.sample(SKILLS, turns + 1)]
    return [t for t in talk if t][:turns]


def glossary(rng):
    """{language: the same word or phrase}"""
    table = rng.choice(("kind", "kind", "kind", "colour", "size", "background", "direction", "place", "phrase", "phrase"))
    if table == "phrase":
        thing, n = rng.choice(random_scene(rng).things), rng.randrange(len(WORDS["en"]["phrases"]) + 1)
        return {l: say((WORDS[l]["phrases"] + [WORDS[l]["full"]])[n], **thing.words(l)) for l in LANGUAGES}
    if table == "place":
        thing = random_scene(rng).things[0]
        return {l: say(WORDS[l]["answer"]["where"].replace(" 있어요", "").replace("에있어요", "에"), **thing.words(l)) for l in LANGUAGES}
    key = rng.choice(list(WORDS["en"][table]))
    return {l: WORDS[l][table][key] for l in LANGUAGES}


def dictionary(shares):
    """Lines of words that mean the same, "cat = 고양이 = 猫". A language with a share of the training data has as much of them."""
    there = lambda language, key: random_for("share", language, key).random() < shares.get(language, 1)
    lines = [[WORDS[l][table][key] for l in LANGUAGES if there(l, key)] for table in ("kind", "colour", "size", "background", "direction") for key in WORDS["en"][table]]
    return [" = ".join(line) for line in lines if len(line) > 1]


def translation(rng):
    """A question in one language: how a word of a second is said in a third (the question's own language may be either)."""
    words = glossary(rng)
    asks, source, target = rng.choice(LANGUAGES), *rng.sample(LANGUAGES, 2)
    if asks not in (source, target):
        asks = source
    return asks, (say(rng.choice(WORDS[asks]["translate"]), word=words[source], name=WORDS[asks]["name"][target]), words[target])


def dialogue(turns):
    return " ".join(f"USER: {question} ASSISTANT: {answer}" for question, answer in turns)


def document(kind, rng):
    """One line of text: of a language, or ("parallel") the same thing in several."""
    scene = random_scene(rng, english_only=rng.random() < 0.33)
    if kind != "parallel":
        gap, said = "" if kind == "zh" else " ", description(scene, kind, rng, plain=True)
        if rng.random() < 0.3:
            extra = [WORDS[kind]["mood_says"].format(mood=WORDS[kind]["mood"][scene.background])]
            pairs = [(a, d, b) for b in scene.things for d in DIRECTIONS for a in scene.beside(b, d)]
            extra += [say(WORDS[kind]["pair_says"], **(a.words(kind) | {"direction": WORDS[kind]["direction"][d], "other": WORDS[kind]["kind"][b.kind]})) for a, d, b in rng.sample(pairs, min(2, len(pairs)))]
            return gap.join([said] + rng.sample(extra, len(extra)))
        said = description(scene, kind, rng)
        (question, answer), *more = reading(scene, kind, rng, rng.randint(2, 5))
        return dialogue([(said + gap + question, answer)] + more)
    style, languages = rng.random(), rng.sample(LANGUAGES, rng.choice((2, 3)))
    if style < 0.35:  # the same sentences
        order, which = rng.sample(scene.things, len(scene.things)), [rng.randrange(6) for _ in scene.things]
        lines = [("" if l == "zh" else " ").join(say(WORDS[l]["sentences"][n], **t.words(l)) for n, t in zip(which, order)) for l in languages]
        return rng.choice((" = ", " / ", " ")).join(lines)
    if style < 0.55:  # a line of a dictionary
        words = glossary(rng)
        return rng.choice((" = ", " / ", ": ")).join(words[l] for l in languages)
    if style < 0.75:
        return dialogue(translation(rng)[1] for _ in range(rng.randint(1, 3)))
    said, language = description(scene, languages[0], rng), languages[1]  # read in one language, answer in another
    (question, answer), *more = reading(scene, language, rng, rng.randint(2, 4))
    return dialogue([(f"{said} {question}", answer)] + more)


def text_record(index, seed):
    """A record of kind "text": questions on a described scene, told in the language of the questions or in another one, or on how to say something."""
    rng = random_for(seed, "text record", index)
    if index % 4 == 3:
        language, turn = translation(rng)
        return record(f"text-{index:05}", language, "text", [turn])
    language, scene = LANGUAGES[index % 3], random_scene(rng, english_only=rng.random() < 0.5)
    told = rng.choice((language, *LANGUAGES))
    (question, answer), *more = reading(scene, language, rng, rng.randint(4, 6))
    return record(f"text-{index:05}", language, "text", [(description(scene, told, rng) + ("" if told == language == "zh" else " ") + question, answer)] + more)


# ---------------------------------------------------------------------------------------------- writing it all
def make_scenes(seed, pictures):
    """{split: scenes}; no scene of a test split (things, sizes, places and background) occurs in another split."""
    splits, taken = {"train": [random_scene(random_for(seed, "train", i)) for i in range(pictures)]}, set()
    look = lambda scene: (frozenset(scene.things), scene.background)
    taken.update(map(look, splits["train"]))
    for split in ("validation", "unseen_pictures", "unseen_combinations", "cross_lingual"):
        splits[split] = []
        for i in range(200 if pictures >= 1000 else max(6, pictures // 5)):
            rng = random_for(seed, split, i)
            scene = None
            while scene is None or look(scene) in taken:
                scene = random_scene(rng, english_only=True if split == "cross_lingual" else i % 6 == 0, held_out=split == "unseen_combinations")
            taken.add(look(scene))
            splits[split].append(scene)
    return splits


def draw_job(job):
    folder, seed, split, index, scene = job
    picture = draw_scene(scene, random_for(seed, "drawn", split, index))
    picture.save(folder / "pictures" / split / f"{index:05}.png", compress_level=1)
    if split == "train" and index % GREY == 0:
        picture.convert("L").save(folder / "pictures" / "grey" / f"{index:05}.png", compress_level=1)
    return {name: [json.dumps(r, ensure_ascii=False) for r in records] for name, records in train_records(scene, seed, index).items()} if split == "train" else {}


def text_job(job):
    kind, seed, start, stop = job
    return "".join(document(kind, random_for(seed, "document", kind, i)) + "\n" for i in range(start, stop))


def write_json(path, lines):
    """A JSON list with one record a line, so that it can be read with `head`, too."""
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


SCRIPT = {"ko": re.compile("[가-힣]"), "zh": re.compile("[一-鿿]")}


def thin(lines, shares):
    """The lines that are left where languages have only a share of the training data, {"ko": 0.1}: a tenth of the pictures is spoken of in Korean,
    and a tenth of the text that holds any is there. The same every time, and a smaller share keeps a part of what a larger one does."""
    for language, share in (shares or {}).items():
        about = lambda line: (re.search('[^/"]+[.]png"', line) or [line])[0]  # all that is said of a picture, in black and white too, stays, or nothing
        lines = [line for line in lines if not SCRIPT[language].search(line) or random_for("share", language, about(line)).random() < share]
    return lines


def write_world(out, pictures=8000, documents=20000, seed=0, workers=2, log=print, shares=None):
    """All files of the demo world under `out`, made beside it and renamed when complete. With shares (see `thin`) only the training files are others."""
    arguments = {"pictures": pictures, "documents": documents, "seed": seed} | ({"shares": shares} if shares else {})
    if (out / "world.json").exists():
        if json.loads((out / "world.json").read_text())["arguments"] != arguments:
            raise ValueError(f"{out} holds a world made with other arguments: remove it, or choose another folder with -o")
        return log(f"{out} is complete: nothing to do")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and not a demo world: choose another folder with -o")
    began, folder = time.time(), out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    splits = make_scenes(seed, pictures)
    for name in ("text", "pictures/grey", *(f"pictures/{split}" for split in splits)):
        (folder / name).mkdir(parents=True)
    lines, counts = {"captions": [], "phrases": [], "lookup": [], "drill": [], "instruct": []}, {}
    jobs = [(folder, seed, split, i, scene) for split, scenes in splits.items() for i, scene in enumerate(scenes)]
    texts = [(kind, seed, start, min(start + 1000, documents)) for kind in LANGUAGES + ("parallel",) for start in range(0, documents, 1000)]
    with multiprocessing.Pool(workers) as pool:
        for made in pool.imap(draw_job, jobs, chunksize=50):
            for name, said in made.items():
                lines[name] += said
        for (kind, *_), text in zip(texts, pool.imap(text_job, texts)):
            left = thin(text.splitlines(keepends=True), shares)
            with open(folder / "text" / f"{kind}.txt", "a", encoding="utf-8") as file:
                file.writelines(left)
            counts[f"text/{kind}.txt"] = counts.get(f"text/{kind}.txt", 0) + len(left)
    (folder / "text" / "dictionary.txt").write_text("".join(f"{line}\n" for line in dictionary(shares or {})), encoding="utf-8")
    lines["instruct"] += [json.dumps(text_record(i, seed), ensure_ascii=False) for i in range(pictures)]
    lines = {name: thin(said, shares) for name, said in lines.items()}
    for split in list(splits)[1:]:
        lines[split] = [json.dumps(r, ensure_ascii=False) for r in split_records(split, splits[split], seed)]
    lines["unseen_captions"] = []
    for i, scene in enumerate(splits["unseen_pictures"]):
        for r in train_records(scene, f"{seed} unseen", i)["captions"]:
            lines["unseen_captions"].append(json.dumps(r | {"id": f"unseen_pictures-{i:05}-{r['language']}-caption", "image": f"pictures/unseen_pictures/{i:05}.png"}, ensure_ascii=False))
    lines["scenes"] = [json.dumps({"image": f"pictures/{split}/{i:05}.png"} | asdict(scene)) for split, scenes in splits.items() for i, scene in enumerate(scenes)]
    counts |= {f"{name}.json": write_json(folder / f"{name}.json", said) for name, said in lines.items()} | {f"pictures/{split}": len(scenes) for split, scenes in splits.items()}
    world = {"arguments": arguments, "held_out": HELD_OUT, "english_only": ENGLISH_ONLY, "counts": counts}
    (folder / "world.json").write_text(json.dumps(world, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if out.exists():
        out.rmdir()
    os.replace(folder, out)
    log(f"{out}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if name.endswith(".json")) + f" in {time.time() - began:.0f} s")


def contact_sheet(path, seed=0, columns=6, rows=4):
    """Pictures with their English captions, to look at."""
    font, line = ImageFont.load_default(11), 15
    sheet = Image.new("RGB", (columns * (SIDE + 16) + 16, rows * (SIDE + 16 + 4 * line + 6) + 16), "white")
    for i in range(columns * rows):
        scene = random_scene(random_for(seed, "sheet", i), held_out=False)
        x, y = 16 + i % columns * (SIDE + 16), 16 + i // columns * (SIDE + 16 + 4 * line + 6)
        sheet.paste(draw_scene(scene, random_for(seed, "sheet drawn", i)), (x, y))
        ImageDraw.Draw(sheet).multiline_text((x, y + SIDE + 4), "\n".join(full_caption(scene, "en", random.Random(i))).replace(" at the ", ", ").replace(" in the ", ", "), "black", font, spacing=3)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/demo/data"), help="folder to write")
    parser.add_argument("--pictures", type=int, default=8000, help="training pictures")
    parser.add_argument("--documents", type=int, default=20000, help="documents of text a language")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world")
    parser.add_argument("--share", nargs="+", default=[], metavar="LANGUAGE=SHARE", help="how much of the training data speaks a language: ko=0.1 for a tenth, zh=0 for a world without")
    parser.add_argument("--workers", type=int, default=2, help="processes; the files do not depend on it")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="only draw a contact sheet")
    parser.add_argument("--atlas", type=Path, metavar="FONT", help="only remake assets/atlas.png from this font file")
    args = parser.parse_args()
    try:
        if args.atlas:
            make_atlas(args.atlas)
        elif args.sheet:
            contact_sheet(args.sheet, args.seed)
        else:
            for name in ("pictures", "documents", "workers"):
                if getattr(args, name) < 1:
                    raise ValueError(f"--{name} is {getattr(args, name)}: at least 1 is needed")
            for given in args.share:
                if not re.fullmatch(r"(ko|zh)=(0|1|0?\.\d+)", given):
                    raise ValueError(f"--share {given}: give ko=SHARE or zh=SHARE, from 0 to 1")
            write_world(args.out, args.pictures, args.documents, args.seed, args.workers, shares={given[:2]: float(given[3:]) for given in args.share})
    except (ValueError, OSError) as error:
        sys.exit(f"scenes.py: {error}")


if __name__ == "__main__":
    main()
