"""Files, the chat template and its mask, batches, and what is said of bad samples."""

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from model import IGNORE_INDEX, Layout, XLlava
from training import sampler

ROOT = Path(__file__).parent.parent


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def test_a_hand_written_conversation_gives_the_hand_written_ids_and_mask(tokenizer):
    ids, mask = data.encode_chat(
        [(["", "\nWhat?"], "red"), ("Why?", "blue")], tokenizer, num_patches=3
    )
    want, learnt = [tokenizer.bos_id], [0]
    for part, learn in [
        ("USER: ", 0),
        (tokenizer.image_id, 0),
        ("\nWhat? ASSISTANT:", 0),
        ("red", 1),
        (tokenizer.eos_id, 1),
        ("USER: Why? ASSISTANT:", 0),
        ("blue", 1),
        (tokenizer.eos_id, 1),
    ]:
        new = (
            tokenizer.sp_processor.encode(part)
            if isinstance(part, str)
            else [part] * (3 if part == tokenizer.image_id else 1)
        )
        want, learnt = want + new, learnt + [learn] * len(new)
    assert ids == want and mask == learnt


def test_the_prompt_is_the_beginning_of_the_training_sample(tokenizer):
    turns = [(["", "\nWhat colour is the cat?"], "red"), ("Where?", "at the left")]
    whole, mask = data.encode_chat(turns, tokenizer, 4)
    for n in range(len(turns)):
        prompt, learnt = data.encode_chat(turns[:n] + [(turns[n][0], None)], tokenizer, 4)
        assert (
            whole[: len(prompt)] == prompt
            and mask[: len(prompt)] == learnt
            and mask[len(prompt)] == 1
        )


def test_the_marker_typed_by_a_user_is_text(tokenizer):
    ids, _ = data.encode_chat([("what is <image> </s> <s>?", None)], tokenizer, 4)
    assert (
        tokenizer.image_id not in ids
        and tokenizer.eos_id not in ids
        and ids.count(tokenizer.bos_id) == 1
    )


@pytest.mark.parametrize(
    "conversation, image, reason",
    [
        ([], None, "no conversations"),
        ([human("hi")], None, "the last question has no answer"),
        ([gpt("hi"), human("hi")], None, "from 'gpt', but 'human' is due"),
        ([human("hi"), gpt("  ")], None, "the answer is empty"),
        ([human("hi"), {"from": "system", "value": "x"}], None, "from 'system', but 'gpt' is due"),
        ([human("hi"), gpt(["x"])], None, "the value is not a text"),
        ([human("<image>\nhi"), gpt("x")], None, "1 <image> marker(s) for 0 picture(s)"),
        ([human("hi"), gpt("x")], "0.png", "0 <image> marker(s) for 1 picture(s)"),
        (
            [human("<image>\n<image>\nhi"), gpt("x")],
            "0.png",
            "2 <image> marker(s) for 1 picture(s)",
        ),
        ([human("<image>\nhi"), gpt("x <image>")], "0.png", "<image> in an answer"),
        ([human("<image>\nhi"), gpt("x " * 400)], "0.png", "the limit is 256"),
        ([human("<image>\nhi"), gpt("x")], "nowhere.png", "no such image"),
        ([human("<image>\nhi"), gpt("x")], "text.png", "not an image that Pillow can read"),
        ([human("<image>\nhi"), gpt("x")], "empty.png", "the file is empty (0 bytes)"),
    ],
)
def test_a_bad_sample_is_named_with_file_record_id_and_reason(
    tokenizer, config, world, tmp_path, conversation, image, reason
):
    for name, content in (
        ("0.png", (world / "0.png").read_bytes()),
        ("text.png", b"just text"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
    good = {"id": "good", "image": "0.png", "conversations": [human("<image>\nhi"), gpt("x")]}
    bad = {"id": "bad one", "image": image, "conversations": conversation}
    file = tmp_path / "set.json"
    file.write_text(json.dumps([good, bad]))
    samples = data.ConversationDataset([file], tokenizer, config, max_length=256)
    assert len(samples.sample(0)[2]) == 1
    with pytest.raises(data.BadSample) as error:
        samples.sample(1)
    for part in (str(file), "record 1", "'bad one'", reason):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    for budget in (0, 256):  # left out, and said
        (batch,) = sampler.MicroBatchDataset(samples, 2, 0, budget=budget)[0]
        assert len(batch["sample_indices"]) == len(batch["ids"]) == 1 and batch["bad_samples"] == [
            str(error.value)
        ]


def test_json_and_json_lines_are_read_alike_and_broken_ones_are_named(tokenizer, tmp_path):
    records = [{"id": 1, "conversations": []}, {"id": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    assert (
        data.read_records(tmp_path / "a.json") == data.read_records(tmp_path / "a.jsonl") == records
    )
    (tmp_path / "broken.json").write_text('[{"id": 1}, ')
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        data.read_records(tmp_path / "broken.json")
    (tmp_path / "broken.txt").write_bytes("가\n".encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="broken.txt: line 2 is not UTF-8"):
        data.TextDataset([tmp_path / "broken.txt"], tokenizer, 10, tmp_path / "cache")


def test_lines_end_where_json_lines_end_and_a_torn_one_is_taken_out(tmp_path):
    file, rows = tmp_path / "rows.jsonl", [{"answer": "한\u2028\x85줄"}, {"answer": "나"}]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(whole + '{"answer": "다'.encode()[:-1])  # in the middle of a letter
    assert (
        list(map(json.loads, data.read_complete_lines(file))) == rows and file.read_bytes() == whole
    )
    assert data.read_complete_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "value",
    ["<image>\nWhat is it?", "What is it?\n<image>", "<image>What is it?", " What <image>is it?"],
)
def test_a_picture_stands_first_wherever_the_file_has_it(value):
    assert data.read_turns({"conversations": [human(value), gpt("x")]}) == [
        [["", "\nWhat is it?"], "x"]
    ]


def test_a_long_document_goes_on_in_the_next_sample_and_every_token_is_learnt_once(
    tokenizer, tmp_path
):
    line = "What colour is the cat? " * 30
    (tmp_path / "t.txt").write_text(line + "\n\nred\n")
    texts = data.TextDataset([tmp_path / "t.txt"], tokenizer, 16, tmp_path / "cache")
    learnt = [id for i in range(len(texts)) for id, on in zip(*texts.sample(i)[:2]) if on]
    whole = (
        tokenizer.sp_processor.encode(line.strip())
        + [tokenizer.eos_id]
        + tokenizer.sp_processor.encode("red")
        + [tokenizer.eos_id]
    )
    assert learnt == whole and texts.lengths.max() <= 16


def write_set(folder, world, records):
    (folder / "set.json").write_text(json.dumps(records, ensure_ascii=False))
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((world / name).read_bytes())
    return folder / "set.json"


def about(image, n, turns=1, question="<image>\nquestion {}?"):
    return {
        "id": n,
        "image": image,
        "conversations": [human(question.format(n)), gpt(f"answer {n}")]
        + [human("What colour?"), gpt("red" * (1 + n))] * (turns - 1),
    }


def test_merged_records_hold_the_picture_once_and_every_turn_once(
    tokenizer, config, world, tmp_path
):
    records = [about("0.png", n) for n in range(5)] + [
        about("1.png", 5),
        about("0.png", 6, turns=2),
        {"id": 7, "conversations": [human("question 7?"), gpt("answer 7")]},
    ]
    records += [
        about("0.png", 8, question="Look: <image>"),
        about("0.png", 9, question="Look:<image>"),
    ]
    samples = data.ConversationDataset(
        [write_set(tmp_path, world, records)], tokenizer, config, 256, merge=3
    )
    assert (
        len(samples) == 6
    )  # 3 + 3 + 1 about picture 0, wherever their question has it; then alone: another picture, longer, without one
    seen = []
    for i in range(len(samples)):
        sample = samples.sample(i)
        assert (
            len(sample.pixels)
            == sample.ids.count(tokenizer.image_id) / config.vision.num_patches
            == (0 if samples.record(i)["id"] == 7 else 1)
        )
        text = tokenizer.sp_processor.decode(
            [id for id, on in zip(sample.ids, sample.loss_mask) if on]
        )
        numbers = [int(c) for c in text if c.isdigit()]
        assert len({records[n].get("image") for n in numbers}) == 1 and len(sample.starts) == len(
            numbers
        )
        seen += numbers
    assert sorted(seen) == list(range(10))


def test_records_side_by_side_cost_what_they_cost_alone_and_do_not_see_each_other(
    tokenizer, config, world, tmp_path
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    file = write_set(
        tmp_path, world, [about(("0.png", "1.png")[n % 2], n, 1 + n // 6) for n in range(8)]
    )
    alone, merged = (
        data.ConversationDataset([file], tokenizer, config, 256, merge) for merge in (1, 3)
    )

    def loss(batch):
        return model.loss(batch["ids"], batch["targets"], batch.get("pixels"), batch["layout"])

    gradients = []
    for samples in (alone, merged):
        batch = data.collate([samples.sample(i) for i in range(len(samples))], tokenizer.pad_id)
        model.zero_grad()
        loss(batch).backward()
        gradients.append(
            [
                loss(batch).item(),
                *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            ]
        )
    tokens = [
        sum(len(samples.sample(i).ids) for i in range(len(samples))) for samples in (alone, merged)
    ]
    assert len(merged) == 4 and tokens[0] - tokens[1] == 4 * merged.sample(0).starts[0], (
        "what they begin with stands four times less"
    )
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12)
    assert all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(gradients[0][1:], gradients[1][1:])
    )
    sample = next(merged.sample(i) for i in range(len(merged)) if len(merged.sample(i).starts) == 3)
    one = data.collate([sample], tokenizer.pad_id)
    hidden = lambda ids: model(ids, one["pixels"], one["layout"]._replace(loss_positions=None))
    before, changed = hidden(one["ids"]), one["ids"].clone()
    changed[0, sample.starts[1]] += 1  # the second record's first token
    differs = (hidden(changed) != before).any(dim=-1)[0]
    assert (
        differs[sample.starts[1] : sample.starts[2]].any()
        and not differs[: sample.starts[1]].any()
        and not differs[sample.starts[2] :].any()
    )


def test_a_bad_record_among_others_is_named_by_itself(tokenizer, config, world, tmp_path):
    records = [about("0.png", n) for n in range(3)]
    records[1]["conversations"][1] = gpt(" ")
    samples = data.ConversationDataset(
        [write_set(tmp_path, world, records)], tokenizer, config, 256, merge=3
    )
    with pytest.raises(
        data.BadSample,
        match="id 1: turn 1: the answer is empty; the 2 that share its sample go with it",
    ):
        samples.sample(0)


def test_a_phrase_is_true_in_whatever_kind_of_record_it_stands_and_unknown_where_its_kind_was_not_told(
    tokenizer, config, world, tmp_path
):
    def told(image, kind, answer):
        return {
            "image": image,
            "language": "en",
            "kind": kind,
            "conversations": [human("<image>\nDescribe."), gpt(answer)],
        }

    file = write_set(
        tmp_path,
        world,
        [
            told("0.png", "object", "a cat, big"),
            told("1.png", "place", "a cat, left"),
            told("1.png", "object", "small"),
        ],
    )
    batch = data.PhraseDataset([file], tokenizer, config).batch([0, 1])
    rows, starts = (
        {},
        [*batch["offsets"].tolist(), len(batch["ids"])],
    )  # the first two are of picture 0
    for n, (start, stop) in enumerate(zip(starts, starts[1:])):
        rows[tokenizer.decode(batch["ids"][start:stop].tolist()).strip(), n < 2] = (
            batch["is_true"][n].tolist(),
            batch["is_known"][n].tolist(),
        )
    assert rows["a cat", True] == rows["a cat", False] == ([True, True], [True, True])
    assert rows["big", True] == ([True, False], [True, True]) and rows["small", False] == (
        [False, True],
        [True, True],
    )
    assert rows["left", False] == ([False, True], [False, True]), (
        "nobody told where things are in picture 0"
    )


def test_a_dictionarys_words_mean_the_same_in_a_line_and_each_pair_is_asked_about_once(
    tokenizer, config, world, tmp_path
):
    (tmp_path / "words.txt").write_text("cat = 고양이 = 猫\nbig = 큰\nbig = 大\n")
    phrases = data.PhraseDataset(
        [world / "captions.json"], tokenizer, config, tmp_path / "words.txt"
    )
    batch = phrases.batch([0, 1])
    starts = [*batch["word_offsets"].tolist(), len(batch["word_ids"])]
    words = [
        tokenizer.decode(batch["word_ids"][start:stop].tolist()).strip()
        for start, stop in zip(starts, starts[1:])
    ]
    assert sorted(words) == sorted(["cat", "고양이", "猫", "big", "큰", "big", "大"])
    same = {
        (a, b)
        for i, a in enumerate(words)
        for j, b in enumerate(words)
        if batch["word_true"][i, j] and a != b
    }
    assert same == {
        ("cat", "고양이"),
        ("cat", "猫"),
        ("고양이", "猫"),
        ("고양이", "cat"),
        ("猫", "cat"),
        ("猫", "고양이"),
        ("big", "큰"),
        ("큰", "big"),
        ("big", "大"),
        ("大", "big"),
    }
    asked = [
        [a != b for b in words] for a in words
    ]  # "big" stands in two lines: it is neither said to mean the same as itself nor something else
    assert batch["word_known"].tolist() == asked
    halves = [phrases.batch([0, 1], rank, 2)["word_known"] for rank in range(2)]
    assert (halves[0].int() + halves[1].int()).tolist() == [
        [int(known) for known in row] for row in asked
    ]
    (tmp_path / "words.txt").write_text("cat = 고양이\nbig\n")
    with pytest.raises(
        ValueError,
        match=r"words.txt: line 2: words that mean the same are wanted, with = between them: 'big'",
    ):
        data.PhraseDataset([world / "captions.json"], tokenizer, config, tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes("cat = 고양이\n".encode() + b"dog = \xff\n")
    with pytest.raises(ValueError, match="words.txt: line 2 is not UTF-8"):
        data.PhraseDataset([world / "captions.json"], tokenizer, config, tmp_path / "words.txt")


def test_what_records_share_is_counted_once_in_what_attention_costs():
    assert data.attention_pairs(data.Sample(list(range(11)), [0] * 11, [])) == 10 * 10
    two = data.Sample(
        list(range(11)), [0] * 11, [], (4, 7)
    )  # 4 common ids, then 3, then 3 and the last target
    assert data.record_lengths(two) == [7, 7] and data.attention_pairs(two) == 7 * 7 + 7 * 7 - 4 * 4


def test_targets_are_the_next_ids_where_they_are_learnt():
    batch = data.collate(
        [data.Sample([1, 5, 6, 7], [0, 0, 1, 1], []), data.Sample([1, 8], [0, 1], [])], pad_id=0
    )
    assert batch["ids"].tolist() == [[1, 5, 6], [1, 0, 0]]
    assert batch["targets"].tolist() == [
        [IGNORE_INDEX, 6, 7],
        [8, IGNORE_INDEX, IGNORE_INDEX],
    ] and sorted(set(batch["layout"].loss_positions.tolist())) == [0, 1, 2, 3]
    assert (
        data.collate([data.Sample([1, 5], [0, 0], [])], pad_id=0)["layout"].loss_positions.tolist()
        == [0] * 64
    ), "nothing to learn: one place all the same"


def test_the_last_block_computes_only_what_is_wanted_and_the_loss_and_gradients_are_the_same(
    tokenizer, config, world
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    samples = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    batch, found = data.collate([samples.sample(i) for i in range(5)], tokenizer.pad_id), []
    for wanted in (None, batch["layout"].loss_positions):
        model.zero_grad()
        rows = []
        hook = model.decoder.layers[-1].mlp.register_forward_hook(
            lambda mlp, args, out: rows.append(out.shape[:-1].numel())
        )
        loss = model.loss(
            batch["ids"], batch["targets"], batch["pixels"], Layout(loss_positions=wanted)
        )
        loss.backward()
        hook.remove()
        found.append(
            (
                loss.item(),
                rows,
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    (loss, every, grads), (same, few, others) = found
    assert (
        every == [batch["ids"].numel()]
        and few == [64]
        and int((batch["targets"] != IGNORE_INDEX).sum()) == 29
        and same == pytest.approx(loss, rel=1e-12)
    )
    assert grads.keys() == others.keys() and all(
        torch.allclose(others[n], g, rtol=1e-9, atol=1e-12) for n, g in grads.items()
    )


def test_every_sample_comes_once_an_epoch_on_any_number_of_ranks():
    lengths = [i % 7 for i in range(53)]
    for world, accumulate in ((1, 1), (2, 2), (4, 1)):
        plan = sampler.LengthGroupedSampler(lengths, 8, seed=3)
        seen = []
        for step in range(plan.per_epoch):
            for rank in range(world):
                for micro in range(accumulate):
                    seen += plan[step][rank::world][micro::accumulate]
        assert sorted(seen) == list(range(53))
    assert plan[0] != plan[plan.per_epoch], "the next epoch has another order"
    assert sampler.LengthGroupedSampler(lengths, 8, seed=3)[9] == plan[9], (
        "a step's samples don't depend on what was asked before"
    )


def test_phrases_shared_by_two_pictures_are_true_of_both(tokenizer, config, world):
    phrases = data.PhraseDataset([world / "captions.json"], tokenizer, config)
    batch = phrases.batch([0, 1, 2])  # red, blue, red
    ends = batch["offsets"].tolist()[1:] + [len(batch["ids"])]
    texts = [
        tokenizer.sp_processor.decode(batch["ids"][a:b].tolist())
        for a, b in zip(batch["offsets"].tolist(), ends)
    ]
    truth = dict(zip(texts, batch["is_true"].tolist()))
    halves = [
        phrases.batch([0, 1, 2], rank, 2) for rank in range(2)
    ]  # pictures 0 and 2, and 1: the same phrases, the columns by rank
    assert halves[0]["images_per_rank"] == [2, 1] and sorted(
        map(tuple, batch["is_true"][:, [0, 2, 1]].tolist())
    ) == sorted(map(tuple, torch.cat([h["is_true"] for h in halves]).tolist()))
    assert truth["red"] == truth["a red cat"] == [True, False, True]
    assert truth["blue"] == [False, True, False] and truth["number 2"] == [False, False, True]


def test_records_that_cannot_be_contrasted_are_counted_or_named(tokenizer, config, world, tmp_path):
    (tmp_path / "set.json").write_text(
        json.dumps([{"id": 1, "conversations": [human("hi"), gpt("x")]}])
    )
    phrases = data.PhraseDataset(
        [world / "captions.json", tmp_path / "set.json"], tokenizer, config
    )
    assert len(phrases) == 12 and phrases.without_picture == 1
    (tmp_path / "two.json").write_text(
        json.dumps(
            [{"id": 2, "image": ["0.png", "1.png"], "conversations": [human("hi"), gpt("x")]}]
        )
    )
    assert data.PhraseDataset([tmp_path / "two.json"], tokenizer, config).bad == [
        f"{tmp_path / 'two.json'}: record 0 (id 2): 2 pictures: the contrast takes one"
    ]


def test_workers_change_nothing(tokenizer, config, world):
    samples = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    batches = sampler.MicroBatchDataset(samples, 4, seed=1, steps=6)
    for a, b in zip(sampler.make_loader(batches), sampler.make_loader(batches, workers=2)):
        assert torch.equal(a[0]["ids"], b[0]["ids"]) and torch.equal(
            a[0]["targets"], b[0]["targets"]
        )


def test_check_and_show_as_commands(tokenizer_file, config, world, tmp_path):
    import checkpoint

    checkpoint.save_model(XLlava(config).init_weights(), tokenizer_file, tmp_path / "model")
    run = lambda *args: subprocess.run(
        [sys.executable, ROOT / "data.py", *args, "--model", tmp_path / "model"],
        capture_output=True,
        text=True,
    )
    good = run("check", world / "chats.json")
    assert (
        good.returncode == 0
        and "16 records, 0 bad" in good.stdout
        and "languages en 12, ko 4" in good.stdout
    )
    (tmp_path / "bad.json").write_text(json.dumps([{"id": 7, "conversations": [human("hi")]}]))
    bad = run("check", tmp_path / "bad.json")
    assert bad.returncode == 1 and "record 0 (id 7): the last question has no answer" in bad.stdout
    (tmp_path / "mixed.json").write_bytes(
        b'[{"id": 1, "conversations": "\xff"},\n{"id": 2, "conversations": []}]'
    )
    mixed = run("check", tmp_path / "mixed.json")
    assert (
        mixed.returncode == 1
        and "mixed.json: byte 29 is not UTF-8" in mixed.stdout
        and "record 1 (id 2): no conversations" in mixed.stdout
    ), mixed
    shown = run("show", world / "chats.json")
    assert (
        shown.returncode == 0
        and "\033[32m" in shown.stdout
        and shown.stdout.splitlines()[0].count("<image>") == 1
    )
    lost = run("check", "nowhere.json")
    assert lost.returncode == 1 and lost.stderr.strip() == "data.py: nowhere.json: no such file"


def test_records_are_found_by_place_whatever_the_layout_and_read_right(tmp_path):
    records = [
        {"id": '한 { " [ \\', "text": "猫\\\\" * n, "nested": [{"a": [1, 2]}]} for n in range(50)
    ]
    texts = {
        "list.json": json.dumps(records, ensure_ascii=False),
        "indented.json": "\n" + json.dumps(records, indent=3),
        "lines.jsonl": "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records),
        "bom.json": "\ufeff" + json.dumps(records),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        raw = (tmp_path / name).read_bytes()
        found = list(data.scan_records(tmp_path / name))
        assert (
            [json.loads(raw[start:end]) for start, end, _ in found]
            == records
            == data.read_records(tmp_path / name)
        )
    for text, where in (
        ("[{}, {} {}]", "line 1 column 9"),
        ("[{}]\n x", "line 1 column 5"),
        ("{}\n{\n", "line 2"),
        ("[{}, 3]", "record 1 is int, must be an object"),
    ):
        (tmp_path / "broken").write_text(text)
        with pytest.raises(ValueError, match=where):
            list(data.scan_records(tmp_path / "broken"))


def test_samples_do_not_grow_with_what_the_records_say(tokenizer, config, tmp_path):
    """Only places are held: the same number of records of twenty times the text takes the same memory."""
    held = []
    for size in (1, 20):
        with open(tmp_path / "set.jsonl", "w") as file:
            for n in range(2000):
                file.write(
                    json.dumps(
                        {"id": n, "conversations": [human("what? " * 10 * size), gpt("this")]}
                    )
                    + "\n"
                )
        tracemalloc.start()
        samples = data.ConversationDataset([tmp_path / "set.jsonl"], tokenizer, config, 10_000)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(samples) == 2000 and samples.record(1999)["id"] == 1999
    assert held[1] < 1.1 * held[0] and held[0] / 2000 < 60, held


def test_texts_are_tokenized_once_and_half_a_cache_is_none(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("What colour is the cat?\n\n고양이\n")
    first = data.TextDataset([tmp_path / "t.txt"], tokenizer, 64, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert [first.sample(i)[0] for i in range(2)] == [
        [tokenizer.bos_id, *tokenizer.sp_processor.encode(line), tokenizer.eos_id]
        for line in ("What colour is the cat?", "고양이")
    ]
    ids = np.fromfile(file, np.uint16)
    ids[1] = 77  # seen if, and only if, the file is read again
    ids.tofile(file)
    (tmp_path / "cache" / (file.name + ".1.tmp")).write_bytes(b"half")
    assert (
        data.TextDataset([tmp_path / "t.txt"], tokenizer, 64, tmp_path / "cache").sample(0)[0][1]
        == 77
    )
    (tmp_path / "t.txt").write_text("What colour is the dog?\n")  # another text: another file
    assert data.TextDataset([tmp_path / "t.txt"], tokenizer, 64, tmp_path / "cache").sample(0)[0][
        1:-1
    ] == tokenizer.sp_processor.encode("What colour is the dog?")


def test_weights_give_each_file_its_share_and_every_sample_its_turn():
    plan = sampler.LengthGroupedSampler(
        [0] * 100, 10, seed=1, sizes=[80, 20], weights=[1, 3]
    )  # 25 and 75 a epoch
    seen = [i for step in range(4 * plan.per_epoch) for i in plan[step]]
    assert plan.per_epoch == 10 and sum(i < 80 for i in seen) == 100 and len(seen) == 400
    counts = [seen.count(i) for i in range(100)]
    assert set(counts[:80]) == {1, 2} and set(counts[80:]) == {15}, (
        "nobody comes again before all others did"
    )
    assert (
        sampler.LengthGroupedSampler([0] * 100, 10, seed=1, sizes=[80, 20], weights=[1, 3])[17]
        == plan[17]
    ), "a step's samples don't depend on what was asked before"


def test_packed_documents_do_not_see_each_other_and_cost_what_they_cost_alone(
    tokenizer, config, world
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    samples = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    few = [samples.sample(i) for i in range(5)]
    row = data.pack(few)
    assert row["layout"].positions[0].tolist() == [
        n for ids, *_ in few for n in range(len(ids) - 1)
    ], "rope is relative: the loss would not tell"
    loss = lambda batch: model.loss(
        batch["ids"], batch["targets"], batch.get("pixels"), batch["layout"]
    ).item()
    assert loss(row) == pytest.approx(loss(data.collate(few, tokenizer.pad_id)), rel=1e-9)
    ends = [0]
    for ids, *_ in few:
        ends.append(ends[-1] + len(ids) - 1)
    changed = row["ids"].clone()
    changed[0, ends[1] + 8] += 1  # a token of the second document
    hidden = lambda ids: model(ids, row["pixels"], row["layout"]._replace(loss_positions=None))[0]
    moved = (hidden(changed) != hidden(row["ids"])).any(dim=1).nonzero()[:, 0]
    assert ends[1] + 8 == moved.min() and moved.max() < ends[2], (
        "its own later tokens feel it, no other document does"
    )


def test_bins_hold_everything_once_within_the_budget_and_evenly():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        groups = sampler.pack_into_bins(lengths, 150)
        loads = [sum(lengths[i] for i in group) for group in groups]
        assert (
            sorted(i for group in groups for i in group) == list(range(len(lengths)))
            and max(loads) <= 150
        )
        assert len(groups) <= 2 * sum(lengths) / 150 + 1


def test_a_rank_without_pictures_or_with_a_bad_one_says_nothing_in_the_contrast(
    tokenizer, config, world, tmp_path
):
    phrases = data.PhraseDataset([world / "captions.json"], tokenizer, config)
    parts = [phrases.batch([4], rank, 2) for rank in range(2)]
    assert (
        [p["images_per_rank"] for p in parts] == [[1, 1]] * 2
        and parts[1]["usable"].tolist() == [False]
        and parts[1]["is_known"].shape == (0, 2)
    )
    assert parts[0]["is_known"][:, 0].all() and not parts[0]["is_known"][:, 1].any()
    phrases.pictures[7] = (phrases.pictures[7][0], "lost.png")
    batch = phrases.batch([4, 7, 5])
    assert (
        batch["usable"].tolist() == [True, False, True]
        and "lost.png: no such image" in batch["bad_samples"][0]
        and len(batch["offsets"]) == len(phrases.phrases[4]) + len(phrases.phrases[5])
    )
