"""The README in Korean and in Chinese is in step with the English one: the same commands, and each
figure, section by section."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUM_SECTIONS = 4  # the first screen, the two lanes, the results; the rest is English alone


def read_sections(path):
    return path.read_text(encoding="utf-8").split("\n## ")[:NUM_SECTIONS]


def commands(text):
    """The lines of the blocks of code, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].rstrip() for block in blocks for line in block.splitlines()]


def figures(text):
    return Counter(re.findall(r"\d(?:[\d,.]*\d)?", text))


@pytest.mark.parametrize("language", ["ko", "zh"])
def test_translations_have_the_same_commands_and_every_figure(language):
    translation = ROOT / "docs" / f"README.{language}.md"
    pairs = list(zip(read_sections(ROOT / "README.md"), read_sections(translation)))
    assert len(pairs) == NUM_SECTIONS
    for english, other in pairs:
        assert commands(other) == commands(english)
        missing = figures(english) - figures(other)
        assert not missing, f"{translation.name}, {other.splitlines()[0]}: {dict(missing)}"

        # names in code style, such as flags and files: none is forgotten, none is invented
        names = [set(re.findall(r"`([^`\n]+)`", text)) for text in (english, other)]
        paths = [{name for name in own if not name.startswith("docs/")} for own in names]
        assert paths[0] == paths[1]
