"""What an annotation is worth: is the reply the JSON that was asked for, and which of its question-answer pairs can be taught?

Where it stands: beside annotate.py, which alone imports it. It judges texts; it never sees the picture.

    reply ─ parse_pairs ─ {language: [(question, answer), …]} ─ judge ─ pairs that pass (of the others: gate and reason) ─ Said ─ no duplicates

Pairs are parallel: one that falls in one language falls in all. To add a language, add its line to LANGUAGES; how a model says there that it can't see,
or that an object isn't there, may be added to REFUSALS and DENIALS (without it, the language is judged by what the others say).
"""

import json
import re
import unicodedata
import zlib
from collections import defaultdict

import numpy as np

LANGUAGES = {  # code: its name in the prompts, the characters of its script
    "en": ("English", "A-Za-zÀ-ɏ"),
    "ko": ("Korean", "가-힣ㄱ-ㆎ"),
    "zh": ("simplified Chinese", "㐀-䶿一-鿿"),
}
GATES = {  # in the order in which they are passed
    "picture": "not a readable picture of this folder, or a copy of another one",
    "no reply": "asked again at the next start",
    "malformed": "not the JSON that was asked for, --tries times; a larger number asks again",
    "hostile": "markup, chat roles, links, instructions, control or invisible characters: the whole reply goes",
    "turns": "the languages disagree in the number of turns, or there are none, or too many",
    "language": "less than half of a text is in the script of its language",
    "length": "too short or too long",
    "repetition": "the text goes round in circles",
    "ignores": "the answer is that the picture can't be seen",
    "objects": "the answer denies an object that was given",
    "verify": "the second look did not confirm it",
    "duplicate": "said already of this picture; or, at length, of another",
    "follows": "a later turn of a conversation that lost an earlier one",
}
MAX_TURNS, QUESTION, ANSWER, LONG = (
    12,
    (4, 500),
    (2, 2500),
    60,
)  # lengths in columns, where a Hangul syllable or a Han character has two
MARKUP = re.compile(  # not \b: to it a Hangul syllable or a Han character is a letter of the same word
    r"<\s*/?\s*(image|script|img|s|im_start|im_end)\b[^>]*>|<\||\|>|\[/?INST\]|<</?SYS>>|https?://|(?<![a-z])(user|assistant|system|human|gpt)\s*[:：]"
    r"|(?<![a-z])(ignore|disregard|forget)\b.{0,30}\b(previous|prior|above|earlier|all)\b.{0,20}\b(instruction|prompt|rule)s?"
    r"|이전.{0,10}(지시|명령).{0,10}무시|忽略.{0,10}(指令|指示|提示)",
    re.IGNORECASE,
)
REFUSALS = {
    "en": r"(can('|no|’)t|can ?not|unable to|not able to|couldn['’]t) (directly )?(see|view|access|open|process|analy[sz]e)"
    r"( (any|an|the|this|your|that))?( \w+)? ?(image|picture|photo|it\b|that\b|$|[.,])"
    r"|^(i['’]m |i am )?sorry\b|\bas an? (ai|language model)\b|no (image|picture|photo) (was|is|has been) (provided|attached|given)",
    "ko": r"(이미지|사진|그림)(을|를|은|는)? ?(직접 )?(볼|확인할|분석할|열) 수 (없|가 없)|^(볼 수 없|죄송)|AI 모델|언어 모델",
    "zh": r"(无法|不能|看不到|没法)(直接)?(看到|查看|识别|访问|分析|打开)?(这张|该|您的|此)?(图片|图像|照片|图)"
    r"|^(抱歉|对不起|我?无法看到)|作为(一个|一名)?(AI|人工智能|语言模型)",
}
DENIALS = {  # of an object NAME: looked for in question and answer, one after the other
    "en": r"(\b(no|not an?|not any|without( an?| any)?)|n['’]t( an?| any)) (?!other|more|second)(\w+ )?NAME(s|es)?\b"
    r"|\b(is|are) there (an?|any) NAME(s|es)?( in (the|this) \w+)?\? ?no\b|\bNAME(s|es)? (is|are) (absent|missing|nowhere)",
    "ko": r"NAME(은|는|이|가|도)? ?(없|보이지 않)|NAME(이|가|은|는)? ?(있|보이)[^?]{0,6}\? ?아니",
    "zh": r"(没有|沒有|看不到|不见)(任何)?NAME|有(没有)?NAME吗?[？?] ?(没有|不)",
}


def width(text):
    """Length in columns: a character of an East Asian script says about as much as two Latin letters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plain(text):
    """Letters and digits only, for comparing."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


# ---------------------------------------------------------------------------------------------- the form of a reply
def parse_json(text):
    """As json.loads, but a name that stands twice in an object is an error too. Raises ValueError."""

    def object_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(text):
    """The one JSON object of a reply. What models write around it is forgiven: reasoning that ends in </think>, a code fence, words without brackets."""
    found = re.fullmatch(r"[^{\[]*(\{.*\})[^}\]]*", text.rpartition("</think>")[2], re.DOTALL)
    if not found:
        raise ValueError(f"not one JSON object: {text[:80]!r}")
    return parse_json(found[1])


def parse_pairs(text, languages):
    """{language: [(question, answer), …]}, exactly the JSON that was asked for. Raises ValueError."""
    reply, pairs = parse_object(text), {}
    if set(reply) != set(languages):
        raise ValueError(
            f"must be an object with {', '.join(languages)}, has {str(list(reply))[:80]}"
        )
    for code, said in reply.items():
        is_pair = lambda p: (
            isinstance(p, dict)
            and set(p) == {"question", "answer"}
            and all(isinstance(v, str) for v in p.values())
        )
        if not isinstance(said, list) or not all(map(is_pair, said)):
            raise ValueError(
                f"{code}: must be a list of objects with question and answer, both texts, and nothing more"
            )
        pairs[code] = [
            tuple(
                unicodedata.normalize("NFC", p[part].replace("\r\n", "\n").strip())
                for part in ("question", "answer")
            )
            for p in said
        ]
    return pairs


def parse_verdicts(text, count):
    """The numbers of the confirmed pairs. Raises ValueError unless each of `count` pairs got one verdict."""
    try:
        verdicts = {v["pair"]: v["confirmed"] for v in parse_object(text)["pairs"]}
    except (KeyError, TypeError):
        verdicts = {}
    if set(verdicts) != set(range(count)) or not all(type(v) is bool for v in verdicts.values()):
        raise ValueError(f"must hold a verdict, true or false, for each of {count} pairs")
    return {n for n, confirmed in verdicts.items() if confirmed}


# ---------------------------------------------------------------------------------------------- one pair
def hostile(text):
    """Why a text is more than plain text, or None."""
    for c in text:  # the two joiners are spelling in some scripts, and glue in emoji
        if (
            unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
            and c not in "\n\u200c\u200d"
        ):
            return f"a character that isn't text: U+{ord(c):04X}"
    found = MARKUP.search(text)
    return f"not plain text: {found[0]!r}" if found else None


def in_script(text, language):
    """Share of the letters, by width, that are of the language's script; 1 for a text without letters."""
    letters = "".join(c for c in text if c.isalpha())
    return (
        width("".join(re.findall(f"[{LANGUAGES[language][1]}]", letters))) / width(letters)
        if letters
        else 1.0
    )


def circles(text):
    """Whether a text says the same over and over: less than half of its runs of eight characters are distinct."""
    grams = [text[i : i + 8] for i in range(len(text) - 7)]
    return len(grams) > 30 and len(set(grams)) < len(grams) / 2


def fault_of(question, answer, language, objects):
    """(gate, reason) of the first gate that a pair doesn't pass, or None."""
    for part, text, (least, most) in (("question", question, QUESTION), ("answer", answer, ANSWER)):
        if (share := in_script(text, language)) < 0.5:
            return "language", f"{part}: {share:.0%} of the letters are {LANGUAGES[language][0]}"
        if not least <= width(text) <= most or not plain(text):
            return (
                "length",
                f"{part}: {width(text)} columns, must be {least} to {most} and hold a letter or a digit",
            )
        if circles(text):
            return "repetition", part
    if language in REFUSALS and (found := re.search(REFUSALS[language], answer, re.IGNORECASE)):
        return "ignores", f"answer: {found[0]!r}"
    for name in objects if language in DENIALS else ():
        if found := re.search(
            DENIALS[language].replace("NAME", re.escape(name)),
            f"{question} {answer}",
            re.IGNORECASE,
        ):
            return "objects", f"{name} is there, but: {found[0]!r}"
    return None


# ---------------------------------------------------------------------------------------------- a reply, by itself and beside the others
def judge(pairs, kind, objects=()):
    """What a parsed reply is worth by itself: (numbers of the pairs that pass, [(number or None for the whole, gate, reason)])."""
    for code, said in pairs.items():
        for n, pair in enumerate(said):
            if reason := hostile(pair[0]) or hostile(pair[1]):
                return [], [(None, "hostile", f"{code}, pair {n}: {reason}")]
    counts = {code: len(said) for code, said in pairs.items()}
    if len(set(counts.values())) > 1 or not 1 <= max(counts.values()) <= MAX_TURNS:
        return [], [(None, "turns", ", ".join(f"{code} {n}" for code, n in counts.items()))]
    passed, fallen = [], []
    for n in range(max(counts.values())):
        faults = ((code, fault_of(*said[n], code, objects)) for code, said in pairs.items())
        code, fault = next(((code, fault) for code, fault in faults if fault), (None, None))
        passed += [n] * (fault is None)
        fallen += [(n, fault[0], f"{code}: {fault[1]}")] if fault else []
    return keep_thread(kind, passed, fallen)


def keep_thread(kind, passed, fallen):
    """Without an earlier turn a conversation's later ones hang in the air: they go with it."""
    first = min((n for n, *_ in fallen if n is not None), default=None)
    if kind != "conversation" or first is None:
        return passed, fallen
    return [n for n in passed if n < first], fallen + [
        (n, "follows", f"pair {first} is gone") for n in passed if n > first
    ]


class Said:
    """What has been said of the pictures so far, to find what is said again. Short answers ("two", "a cat") are true of many pictures; a long one that
    comes back for another picture comes out of the model's habit. Near means: 80% of all runs of five characters are shared (found by MinHash,
    Broder 1997: sets that are alike have the same smallest hashes)."""

    def __init__(self):
        self.a, self.b = np.random.default_rng(0).integers(1, 2**31 - 1, (2, 32), dtype=np.uint64)
        self.pairs, self.bands = {}, defaultdict(list)

    def again(self, picture, here, said):
        """The reason why a pair {language: (question, answer)} of a picture is a duplicate, or None: then it is remembered, as said `here`."""
        pairs, bands = [], []
        for code, (question, answer) in said.items():
            answer = plain(answer)
            pairs.append((picture, code, plain(question), answer))
            if pairs[-1] in self.pairs:
                return f"{code}: the same question and answer as in {self.pairs[pairs[-1]]}"
            if width(answer) < LONG:
                continue
            grams = np.unique(
                np.array(
                    [zlib.crc32(answer[i : i + 5].encode()) for i in range(len(answer) - 4)],
                    dtype=np.uint32,
                )
            )
            least = (
                (grams[:, None].astype(np.uint64) * self.a + self.b) % np.uint64(2**31 - 1)
            ).min(0)
            for band in [(code, n, least[n : n + 4].tobytes()) for n in range(0, 32, 4)]:
                for where, other in self.bands[band]:
                    shared = len(np.intersect1d(grams, other, assume_unique=True))
                    if shared >= 0.8 * (len(grams) + len(other) - shared):
                        return f"{code}: the answer is nearly that of {where}"
                bands.append((band, grams))
        self.pairs.update(dict.fromkeys(pairs, here))
        for band, grams in bands:
            self.bands[band].append((here, grams))
        return None
