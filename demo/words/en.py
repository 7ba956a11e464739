"""English, the base language. Copy this file to add a language, then translate its values.

Templates hold placeholders such as {kind}. Each template needs the same placeholders as the one
at its place in the base language's file. Lists need as many templates.
"""

WORDS = {
    "base": True,  # in this file alone: the language that describes every training image
    # What the languages are called, in this language. A new language's file may also hold "called":
    # what it is called in each older language, so that no older file has to change.
    "names": {"en": "English", "ko": "Korean", "zh": "Chinese"},
    # Its own tokenizer: pieces, and further flags of `tokenizer.py train`.
    "vocab_size": 600,
    "tokenizer_flags": [],
    # Letters that only this language uses here, as in a regex class; "" if there are none.
    # `demo.write --share` finds the language's lines by them.
    "script": "",
    # What stands between two sentences, between two phrases, and at the end.
    "gap": " ",
    "comma": ", ",
    "stop": ".",
    # Forms that depend on the word beside them. A template writes the key; `fill` replaces it:
    # (which word decides, regex of that word, form if it matches, form if not).
    # The regex is matched against Unicode NFD: accents and Hangul letters stand by themselves.
    "agreement": {
        "a/an": ("next", "^[aeiou]", "an", "a"),
        "A/an": ("next", "^[aeiou]", "An", "A"),
    },
    # The words themselves.
    "kind": {
        "fish": "fish",
        "cat": "cat",
        "duck": "duck",
        "butterfly": "butterfly",
        "car": "car",
        "sailboat": "sailboat",
        "tree": "tree",
        "apple": "apple",
        "house": "house",
        "key": "key",
        "umbrella": "umbrella",
        "rocket": "rocket",
    },
    "colour": {
        "red": "red",
        "orange": "orange",
        "yellow": "yellow",
        "green": "green",
        "blue": "blue",
        "purple": "purple",
        "white": "white",
        "black": "black",
    },
    "size": {"big": "big", "small": "small"},
    "place": {
        "top left": "at the top left",
        "top centre": "at the top centre",
        "top right": "at the top right",
        "middle left": "at the middle left",
        "middle centre": "in the centre",
        "middle right": "at the middle right",
        "bottom left": "at the bottom left",
        "bottom centre": "at the bottom centre",
        "bottom right": "at the bottom right",
    },
    "direction": {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
    },
    "background": {
        "day": "a sunny day",
        "night": "night",
        "sunset": "sunset",
        "snow": "a snowy day",
        "rain": "a rainy day",
    },
    # The background as a phrase of a caption.
    "setting": {
        "day": "on a sunny day",
        "night": "at night",
        "sunset": "at sunset",
        "snow": "on a snowy day",
        "rain": "on a rainy day",
    },
    "mood": {
        "day": "cheerful, because the sun shines on the meadow",
        "night": "quiet, because stars shine in the dark sky",
        "sunset": "warm, because the setting sun colours the sky",
        "snow": "peaceful, because snow falls softly",
        "rain": "gloomy, because rain falls from dark clouds",
    },
    "number": ["one", "two", "three"],
    # Further forms of the words: {property: {placeholder: {value: form}}}. A language that needs
    # measure words has {"kind": {"measure": {"fish": …}}} and writes {measure} in its templates.
    "forms": {},
    # How a question names a thing: by its kind, by its colour, or as the one spoken of before.
    "it": {"kind": "the {kind}", "colour": "the {colour} thing", "pronoun": "it"},
    # All that is true of a scene, in phrases: one attribute each, the whole thing, two things.
    "phrases": [
        "a/an {colour} {kind}",
        "a/an {kind} {place}",
        "a/an {size} {kind}",
        "something {colour} {place}",
        "something {size} {place}",
    ],
    "full": "a/an {size} {colour} {kind} {place}",
    "pair": "a/an {kind} {direction} a/an {other}",
    # Texts: sentences of a thing, of two, of the background and the mood; notes; a place alone.
    "sentences": [
        "There is a/an {size} {colour} {kind} {place}.",
        "I see a/an {size} {colour} {kind} {place}.",
        "A/an {size} {colour} {kind} is {place}.",
        "The {kind} {place} is {size} and {colour}.",
        "The {kind} is {colour}. It is {size} and {place}.",
        "The {colour} thing {place} is a/an {size} {kind}.",
    ],
    "pair_says": "The {kind} is {direction} the {other}.",
    "background_says": ["It is {background}.", "The background shows {background}."],
    "mood_says": "The mood is {mood}.",
    "note": "{place}: {notes};",
    "location": "{place}",
    # Questions that ask for a caption, and for all phrases.
    "describe": [
        "Describe the picture.",
        "What is in the picture?",
        "What does the picture show?",
        "Tell me what you see.",
    ],
    "list": [
        "Describe the picture in short phrases.",
        "List what is true of the picture.",
        "Say it in short phrases.",
    ],
    # Questions by skill, and the one wording of the answer.
    "ask": {
        "what": [
            "What is the {colour} thing?",
            "What thing is {colour}?",
            "Which object is {colour}?",
            "Name the {colour} thing.",
        ],
        "colour": [
            "What colour is {it}?",
            "Which colour is {it}?",
            "What is the colour of {it}?",
            "Tell me the colour of {it}.",
        ],
        "count": [
            "How many things are there?",
            "How many things do you see?",
            "How many objects are there?",
            "Count the things.",
        ],
        "size": [
            "Is {it} big or small?",
            "How big is {it}?",
            "What size is {it}?",
            "Is {it} small or big?",
        ],
        "where": [
            "Where is {it}?",
            "Where do you see {it}?",
            "Where can I find {it}?",
            "Tell me where {it} is.",
        ],
        "at": [
            "What is {place}?",
            "What do you see {place}?",
            "What can I find {place}?",
            "Which thing is {place}?",
        ],
        "relation": [
            "What is {direction} {it}?",
            "What do you see {direction} {it}?",
            "Which thing is {direction} {it}?",
        ],
        "background": [
            "What time or weather is it?",
            "What is the background?",
            "What does the background show?",
            "Which time of day or weather do you see?",
        ],
        "mood": [
            "What is the mood, and why?",
            "What mood is it, and why?",
            "How does it feel, and why?",
            "Describe the mood and its reason.",
        ],
    },
    "answer": {
        "what": "{kind}",
        "colour": "{colour}",
        "count": "{number}",
        "size": "{size}",
        "where": "{place}",
        "at": "a/an {colour} {kind}",
        "background": "{background}",
        "mood": "{mood}",
    },
    # Questions whose answer is yes or no, by what they ask about.
    "yes_no": {
        "pair": {
            "ask": [
                "Is there a/an {colour} {kind}?",
                "Do you see a/an {colour} {kind}?",
                "Can you see a/an {colour} {kind}?",
            ],
            "yes": "yes",
            "no": "no",
        },
        "kind": {
            "ask": ["Is there a/an {kind}?", "Do you see a/an {kind}?", "Can you see a/an {kind}?"],
            "yes": "yes",
            "no": "no",
        },
        "colour": {
            "ask": [
                "Is the {kind} {colour}?",
                "Is {colour} the colour of the {kind}?",
                "Does the {kind} look {colour}?",
            ],
            "yes": "yes",
            "no": "no",
        },
        "place": {
            "ask": [
                "Is the {kind} {place}?",
                "Is there a/an {kind} {place}?",
                "Do you see a/an {kind} {place}?",
            ],
            "yes": "yes",
            "no": "no",
        },
        "size": {
            "ask": [
                "Is the {kind} {size}?",
                "Is it a/an {size} {kind}?",
                "Does the {kind} look {size}?",
            ],
            "yes": "yes",
            "no": "no",
        },
    },
    # How something is said in another language.
    "translate": [
        "How do you say '{word}' in {name}?",
        "What is '{word}' in {name}?",
        "What does '{word}' mean in {name}?",
        "Translate '{word}' into {name}.",
    ],
    # Only the base language: what the narrow captions of the contact sheet leave out.
    "abbreviate": {" at the ": ", ", " in the ": ", "},
}
