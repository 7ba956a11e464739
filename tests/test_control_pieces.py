"""Control pieces of any base: <image>, <pad>, begin and end. The sentencepiece package says what
text becomes; each message's advice is followed."""

import json
import random
import sys
from pathlib import Path

import pytest
from bpe_models import ENGLISH, KOREAN, model, package_model, random_text

import tokenizer as T
from tokenizer import CONTROL, UNUSED, USER_DEFINED, Piece, Tokenizer
from vocabulary.command import first_few

# Text becomes "<", "pa", "d>": no two of these join, so no merge leads to <pad>.
DEAD_PAD = [("pa", -1.0), ("d>", -2.0), ("<pad>", 0.0)]
LIVE_PAD = [("<p", -1.0), ("<pa", -2.0), ("<pad", -3.0), ("<pad>", -4.0)]


@pytest.fixture
def merge(monkeypatch, tmp_path, capsys):
    """Runs tokenizer.py merge in tmp_path -> what it prints. ValueError where it refuses."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", "merge", *map(str, args)])
        T.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("pieces", [DEAD_PAD, [*LIVE_PAD[:-1], ("<pad>", -4.0, UNUSED)]])
def test_an_unreachable_piece_with_a_control_name_becomes_the_control_piece(merge, pieces):
    """As in Chinese-LLaMA-2, whose <pad> stands among Chinese pieces with a score of 0."""
    base = model([*pieces, ("고", 0.0)])
    assert base.id("<pad>") not in base.sp_processor.encode("<pad> x<pad>")
    base.save("base.model")
    told = merge("base.model", "-o", "both.model")
    merged = Tokenizer.load("both.model")
    assert merged.pad_id == base.id("<pad>") and merged.vocab_size == base.vocab_size + 1
    assert f"<pad>: piece {merged.pad_id} of the base becomes a control piece" in told
    assert [p.text for p in merged.pieces[:-1]] == [p.text for p in base.pieces]

    rng = random.Random(0)
    texts = [random_text(rng, ["<pad>", "<pa", "d>", "고", "pad"]) for _ in range(300)]
    assert merged.sp_processor.encode(texts) == base.sp_processor.encode(texts)


@pytest.mark.parametrize(
    "base",
    [model(LIVE_PAD), model([("<pad>", 0.0, USER_DEFINED)])],
    ids=["ordinary", "user-defined"],
)
def test_a_piece_that_text_becomes_is_taken_from_text_only_when_asked_to(merge, base):
    token_id = base.id("<pad>")
    assert token_id in base.sp_processor.encode("x<pad>")
    base.save("base.model")
    with pytest.raises(ValueError) as error:
        merge("base.model", "-o", "both.model")
    reason = f"<pad>, piece {token_id}, is one that typed text becomes"
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)
    assert "merge BASE -o NEW.model --force-control" in str(error.value)
    merge("base.model", "-o", "both.model", "--force-control")
    merged = Tokenizer.load("both.model")
    assert merged.pad_id == token_id not in merged.sp_processor.encode("x<pad>")
    assert merged.decode(merged.encode("x<pad>")).endswith("x<pad>")


def test_a_piece_for_bytes_or_unknown_text_is_no_control_piece(merge):
    model([]).save("base.model")
    for name in ("<unk>", "<0x41>"):
        with pytest.raises(ValueError, match=f"{name} stands for unknown text or a byte"):
            merge("base.model", "-o", "both.model", "--control", name, "--force-control")


# ------------------------------------------------------------------------------- begin and end
def test_begin_and_end_are_those_that_the_trainer_named():
    """Gemma's order and names."""
    options = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    options |= {"bos_piece": "<bos>", "eos_piece": "<eos>"}
    gemma = package_model(ENGLISH, vocab_size=320, **options)
    package = gemma.sp_processor
    assert (gemma.bos_id, gemma.eos_id) == (package.bos_id(), package.eos_id()) == (2, 1)
    assert (gemma.bos_piece, gemma.eos_piece) == ("<bos>", "<eos>")
    merged = T.merge_vocabularies(gemma, T.train(KOREAN, 305))
    assert (merged.bos_id, merged.eos_id, merged.pad_id) == (2, 1, 0)
    assert merged.encode("the", bos=True, eos=True) == [2, *package.encode("the"), 1]


def renamed(names, types=(CONTROL, CONTROL)):
    """A base whose pieces 1 and 2 have other names, of which its settings know nothing."""
    base = model([("th", -1.0), ("the", -2.0)])
    roles = [Piece(name, 0.0, piece_type) for name, piece_type in zip(names, types)]
    return Tokenizer([base.pieces[0], *roles, *base.pieces[3:]], base.fields)


def test_begin_and_end_have_the_usual_ids_where_nobody_says_their_names():
    base = renamed(["<|start|>", "<|end|>"])
    assert (base.bos_id, base.bos_piece, base.eos_id, base.eos_piece) == (
        1,
        "<|start|>",
        2,
        "<|end|>",
    )
    no_begin = package_model(ENGLISH, vocab_size=320, bos_id=-1, eos_id=1, control_symbols=["<x>"])
    assert no_begin.bos_id is None and no_begin.piece(no_begin.eos_id) == "</s>"


def test_a_base_without_begin_or_end_is_refused_and_the_advice_helps(merge):
    base = package_model(ENGLISH, vocab_size=320, bos_id=-1, eos_id=-1, control_symbols=["<x>"])
    base.save("base.model")
    with pytest.raises(ValueError) as error:
        merge("base.model", "-o", "both.model")
    assert "base.model: no control piece begins a sequence" in str(error.value)
    assert "--bos PIECE names one (it has <x>), or adds one" in str(error.value)
    assert not Path("both.model").exists()

    with pytest.raises(ValueError, match="no control piece ends a sequence.* --eos PIECE"):
        merge("base.model", "-o", "both.model", "--bos", "<x>")
    merge("base.model", "-o", "both.model", "--bos", "<x>", "--eos", "<new>")
    merged = Tokenizer.load("both.model")
    assert merged.bos_id == base.id("<x>") and merged.eos_id == base.vocab_size
    assert merged.sp_processor.bos_id() == merged.bos_id  # the package reads the same roles
    assert merged.sp_processor.eos_id() == merged.eos_id
    merge("both.model", "-o", "again.model")  # a merged file is a base again
    assert Tokenizer.load("again.model").to_bytes() == merged.to_bytes()


def test_a_folders_tokenizer_has_the_pieces_and_roles_that_transformers_files_add(merge):
    folder = Path("base")
    folder.mkdir()
    base = T.train(ENGLISH, 300)
    base.save(folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 300}), encoding="utf-8")
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = Tokenizer.load(folder)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (301, 1, 300)

    # Merging begins behind what the folder added. The .model alone says the same as before.
    T.train(KOREAN, 305).save("ko.model")
    merge("base", "ko.model", "-o", "both.model")
    merged = Tokenizer.load("both.model")
    assert merged.eos_id == 300 and merged.piece(301) not in loaded.ids
    assert Tokenizer.load(folder / "tokenizer.model").eos_id == 300
    (folder / "other.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert Tokenizer.load(folder / "other.model").eos_id == 2
    with pytest.raises(ValueError, match="is an input of this command"):
        merge("base", "ko.model", "-o", "base/tokenizer.model")

    for broken, reason in (
        ({"eos_token": "<nowhere>"}, "'<nowhere>' is no piece of tokenizer.model"),
        ({"added_tokens_decoder": {"x": 1}}, "tokenizer_config.json is not as transformers"),
        ([1], "tokenizer_config.json is not as transformers"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ValueError, match=reason):
            Tokenizer.load(folder)


def test_a_git_lfs_pointer_is_called_what_it_is(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n"
    (tmp_path / "tokenizer.model").write_text(pointer, encoding="utf-8")
    with pytest.raises(ValueError, match="a Git LFS pointer, not the file; `git lfs pull"):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------- what is said
def test_long_lists_are_cut_to_eight_and_counted_by_reason(merge):
    model([("해", -1.0)]).save("base.model")
    words = [f"해{chr(ord('가') + i)}{chr(ord('나') + i)}" for i in range(658)]
    lines = [*words, "해", "cat", *(f"dog{i}" for i in range(1200))]
    Path("words.txt").write_text("\n".join(lines), encoding="utf-8")
    told = merge("base.model", "words.txt", "-o", "both.model", "--foreign-only").splitlines()
    assert told[0] == "words.txt: 0 new pieces" and told[1] == "  1 there already: 해"
    assert told[2].startswith("  1,201 left out that plain English could contain")
    assert told[2].endswith("cat, dog0, dog1, dog2, dog3, dog4, dog5, dog6 and 1,193 more")
    assert told[3].startswith("  658 left out that no merges lead to (--unreachable repair")
    assert told[3].endswith(f"{', '.join(words[:8])} and 650 more")
    assert max(map(len, told)) < 200

    # A .model brings pieces that are no text, and one of them is named like a base's.
    T.train(KOREAN, 305).save("ko.model")
    told = merge("base.model", "ko.model", "-o", "ko-both.model")
    assert "  259 left out that stand for control, bytes or unknown text: <unk>, <s>, </s>" in told


def test_the_first_few_of_a_list():
    assert first_few([]) == "" and first_few("ab") == "a, b"
    assert first_few(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert first_few(range(1009)) == "0, 1, 2, 3, 4, 5, 6, 7 and 1,001 more"
