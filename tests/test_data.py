"""The chat template and its mask, records, samples, collation, and reports of bad samples."""

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from record_helpers import read_records

import checkpoint
import data
from model import IGNORE_INDEX, Layout, XLlava
from training import sampler
from vocabulary.records import read_complete_lines, scan_records

ROOT = Path(__file__).parent.parent


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


# ------------------------------------------------------------------------------------ chat template
def test_a_hand_written_conversation_gives_the_hand_written_ids_and_mask(tokenizer):
    turns = [(["", "\nWhat?"], "red"), ("Why?", "blue")]
    ids, mask = data.encode_chat(turns, tokenizer, num_patches=3)

    encode, image, eos = tokenizer.sp_processor.encode, tokenizer.image_id, tokenizer.eos_id
    expected = [
        ([tokenizer.bos_id], 0),
        (encode("USER: "), 0),
        ([image] * 3, 0),
        (encode("\nWhat? ASSISTANT:"), 0),
        (encode("red"), 1),
        ([eos], 1),
        (encode("USER: Why? ASSISTANT:"), 0),
        (encode("blue"), 1),
        ([eos], 1),
    ]
    assert ids == [token for part, _ in expected for token in part]
    assert mask == [is_target for part, is_target in expected for _ in part]


def test_the_prompt_is_the_beginning_of_the_training_sample(tokenizer):
    turns = [(["", "\nWhat colour is the cat?"], "red"), ("Where?", "at the left")]
    ids, mask = data.encode_chat(turns, tokenizer, 4)
    for n, (question, _) in enumerate(turns):
        prompt, prompt_mask = data.encode_chat(turns[:n] + [(question, None)], tokenizer, 4)
        assert ids[: len(prompt)] == prompt
        assert mask[: len(prompt)] == prompt_mask
        assert mask[len(prompt)] == 1


def test_the_marker_typed_by_a_user_is_text(tokenizer):
    ids, _ = data.encode_chat([("what is <image> </s> <s>?", None)], tokenizer, 4)
    assert tokenizer.image_id not in ids
    assert tokenizer.eos_id not in ids
    assert ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    "value",
    ["<image>\nWhat is it?", "What is it?\n<image>", "<image>What is it?", " What <image>is it?"],
)
def test_a_single_image_comes_first_wherever_the_file_has_it(value):
    record = {"image": "0.png", "conversations": [human(value), gpt("x")]}
    assert data.read_conversation(record).turns == [[["", "\nWhat is it?"], "x"]]


# ------------------------------------------------------------------------------------ bad samples
@pytest.mark.parametrize(
    "conversation, image, reason",
    [
        ([], None, "no conversations"),
        ([human("hi")], None, "the last question has no answer"),
        ([gpt("hi"), gpt("hi")], None, "message 1: from 'gpt', must be 'human'"),
        ([human("hi"), gpt("  ")], None, "the answer is empty"),
        ([human("hi"), {"from": "system", "value": "x"}], None, "from 'system', must be 'gpt'"),
        ([human("hi"), gpt(["x"])], None, "the value is not a text"),
        ([human("<image>\nhi"), gpt("x")], None, "1 <image> marker(s) for 0 image(s)"),
        ([human("hi"), gpt("x")], "0.png", "0 <image> marker(s) for 1 image(s)"),
        ([human("<image>\n<image>\nhi"), gpt("x")], "0.png", "2 <image> marker(s) for 1 image(s)"),
        ([human("<image>\nhi"), gpt("x <image>")], "0.png", "<image> in an answer"),
        ([human("<image>\nhi"), gpt("x " * 400)], "0.png", "the limit is 256"),
        ([human("<image>\nhi"), gpt("x")], "nowhere.png", "no such image"),
        ([human("<image>\nhi"), gpt("x")], "text.png", "not an image that Pillow can read"),
        ([human("<image>\nhi"), gpt("x")], "empty.png", "the file is empty (0 bytes)"),
        ([human("<image>\nhi"), gpt("x")], ["0.png", 1], "image is int, must be a file name"),
    ],
)
def test_a_bad_sample_is_named_with_file_record_id_and_reason(
    tokenizer, config, world, tmp_path, conversation, image, reason
):
    (tmp_path / "0.png").write_bytes((world / "0.png").read_bytes())
    (tmp_path / "text.png").write_bytes(b"just text")
    (tmp_path / "empty.png").write_bytes(b"")
    good = {"id": "good", "image": "0.png", "conversations": [human("<image>\nhi"), gpt("x")]}
    bad = {"id": "bad one", "image": image, "conversations": conversation}
    file = tmp_path / "set.json"
    file.write_text(json.dumps([good, bad]), encoding="utf-8")

    dataset = data.ConversationDataset([file], tokenizer, config, max_length=256)
    assert len(dataset.sample(0).pixels) == 1
    with pytest.raises(data.BadSample) as error:
        dataset.sample(1)
    for part in (str(file), "record 1", "'bad one'", reason):
        assert part in str(error.value)
    assert "\n" not in str(error.value)

    for token_budget in (0, 256):  # left out, and reported
        (batch,) = sampler.MicroBatchDataset(dataset, 2, 0, token_budget=token_budget)[0]
        assert len(batch["ids"]) == 1
        assert batch["sample_indices"] == [0]
        assert batch["bad_samples"] == [str(error.value)]


def test_max_length_is_the_last_length_that_is_taken(tokenizer, config, world):
    first = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256).sample(0)
    for limit, is_taken in ((len(first.ids), True), (len(first.ids) - 1, False)):
        dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, limit)
        if is_taken:
            assert dataset.sample(0).ids == first.ids
        else:
            with pytest.raises(data.BadSample, match=f"the limit is {limit}"):
                dataset.sample(0)


def test_as_many_tokens_as_the_model_reads_are_taken_and_not_one_more(config):
    limit = config.text.max_position_embeddings
    data.check_length([0] * limit, config)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens, longer than the model reads"):
        data.check_length([0] * (limit + 1), config)


def test_a_bad_record_among_others_is_named_by_itself(tokenizer, config, world, tmp_path):
    records = [record_about("0.png", n) for n in range(3)]
    records[1]["conversations"][1] = gpt(" ")
    file = write_set(tmp_path, world, records)
    dataset = data.ConversationDataset([file], tokenizer, config, 256, records_per_sample=3)
    reason = "id 1: message 1: the answer is empty; the 2 that share its sample go with it"
    with pytest.raises(data.BadSample, match=reason):
        dataset.sample(0)


# ------------------------------------------------------------------------------------ files
def test_json_and_json_lines_are_read_alike_and_broken_ones_are_named(tmp_path):
    records = [{"id": 1, "conversations": []}, {"id": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    lines = "\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert read_records(tmp_path / "a.json") == records
    assert read_records(tmp_path / "a.jsonl") == records

    (tmp_path / "broken.json").write_text('[{"id": 1}, ', encoding="utf-8")
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        read_records(tmp_path / "broken.json")


def test_lines_end_where_json_lines_end_and_a_torn_one_is_taken_out(tmp_path):
    file, rows = tmp_path / "rows.jsonl", [{"answer": "한\u2028\x85줄"}, {"answer": "나"}]
    complete = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(complete + '{"answer": "다'.encode()[:-1])  # torn within a character
    assert [json.loads(line) for line in read_complete_lines(file)] == rows
    assert file.read_bytes() == complete
    assert read_complete_lines(tmp_path / "none.jsonl") == []


RECORDS = [
    {"id": '한 { " [ \\', "text": "猫\\\\" * n, "nested": [{"a": [1, 2]}]} for n in range(50)
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS, ensure_ascii=False),
        "\n" + json.dumps(RECORDS, indent=3),
        "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
        "\ufeff" + json.dumps(RECORDS),
    ],
    ids=["list", "indented list", "lines", "byte order mark"],
)
def test_records_are_found_by_place_whatever_the_layout_and_read_right(tmp_path, text):
    (tmp_path / "file").write_text(text, encoding="utf-8")
    raw = (tmp_path / "file").read_bytes()
    places = [(start, end) for start, end, _ in scan_records(tmp_path / "file")]
    assert [json.loads(raw[start:end]) for start, end in places] == RECORDS
    assert read_records(tmp_path / "file") == RECORDS


@pytest.mark.parametrize(
    "text, where",
    [
        ("[{}, {} {}]", "line 1 column 9"),
        ("[{}]\n x", "line 1 column 5"),
        ("{}\n{\n", "line 2"),
        ("[{}, " + "[" * 100_000, "record 1 is nested too deeply"),
        ("[{}, " + "9" * 5_000 + "]", "record 1: Exceeds the limit"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, text, where):
    (tmp_path / "broken").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=where):
        list(scan_records(tmp_path / "broken"))


def test_samples_do_not_grow_with_what_the_records_say(tokenizer, config, tmp_path):
    """Only places are held: records of twenty times the text take the same memory."""
    held = []
    for size in (1, 20):
        conversation = [human("what? " * 10 * size), gpt("this")]
        with open(tmp_path / "set.jsonl", "w", encoding="utf-8") as file:
            for n in range(2000):
                print(json.dumps({"id": n, "conversations": conversation}), file=file)
        tracemalloc.start()
        dataset = data.ConversationDataset([tmp_path / "set.jsonl"], tokenizer, config, 10_000)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(dataset) == 2000
        assert dataset.record(1999)["id"] == 1999
    assert held[1] < 1.1 * held[0], held
    assert held[0] / 2000 < 60, held


def test_each_sample_is_found_in_its_own_file_and_sorted_by_its_length(tokenizer, config, tmp_path):
    """The sort key is the number of characters, an image's 1,000 among them."""
    paths, questions = [], [["hi", "hello"], ["hello, hello", "hi"]]
    for name, own in zip("ab", questions):
        turns = [[human(question), gpt("yes")] for question in own]
        records = [{"id": f"{name}{n}", "conversations": t} for n, t in enumerate(turns)]
        records[0]["image"] = "0.png"
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(records), encoding="utf-8")
    dataset = data.ConversationDataset(paths, tokenizer, config, 256)
    assert [dataset.record(i)["id"] for i in range(4)] == ["a0", "a1", "b0", "b1"]
    assert [dataset.name(i).partition(":")[0] for i in (1, 2)] == list(map(str, paths))
    assert dataset.sort_keys.tolist() == [1005, 8, 1015, 5]


# ------------------------------------------------------------------------------------ side by side
def test_records_share_a_sample_if_each_has_one_image_the_same_and_one_marker():
    turns = [("human", "<image>\nWhat?"), ("gpt", "a cat")]
    key = data.shared_image_key
    assert key({"image": "0.png"}, turns) == key({"image": ["0.png"]}, turns) == ("0.png", "", 2)
    assert key({"image": "0.png"}, turns * 2) == ("0.png", "", 4), "as long as each other"
    for record, messages in (
        ({"image": ["0.png", "1.png"]}, turns),
        ({"image": "0.png", "images": ["1.png"]}, turns),
        ({"image": "0.png"}, [("human", "<image> and <image>?"), ("gpt", "two")]),
        ({"image": "0.png"}, [("human", "What?"), ("gpt", "a cat")]),
        ({}, turns),
    ):
        assert key(record, messages) is None


def test_the_records_of_an_image_come_in_random_order_and_short_samples_first(
    tokenizer, config, world, tmp_path
):
    long = "<image>\nquestion {}? " + "really? " * 40
    records = [record_about("0.png", n, question=long) for n in range(12)]
    records += [record_about("1.png", 12, turns=3)]
    file = write_set(tmp_path, world, records)
    dataset = data.ConversationDataset([file], tokenizer, config, 256, records_per_sample=4)
    order = [number for i in range(3) for number in dataset.locate(i)[1]]
    assert order != list(range(12)) == sorted(order)
    assert dataset.sort_keys[3] > dataset.sort_keys[:3].max(), "more turns, fewer characters"


def write_set(folder, world, records):
    file = folder / "set.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((world / name).read_bytes())
    return file


def record_about(image, n, turns=1, question="<image>\nquestion {}?"):
    first = [human(question.format(n)), gpt(f"answer {n}")]
    further = [human("What colour?"), gpt("red" * (1 + n))]
    return {"id": n, "image": image, "conversations": first + further * (turns - 1)}


def test_a_sample_of_several_records_holds_the_image_once_and_every_turn_once(
    tokenizer, config, world, tmp_path
):
    records = [record_about("0.png", n) for n in range(5)]
    records += [
        record_about("1.png", 5),
        record_about("0.png", 6, turns=2),
        {"id": 7, "conversations": [human("question 7?"), gpt("answer 7")]},
        record_about("0.png", 8, question="Look: <image>"),
        record_about("0.png", 9, question="Look:<image>"),
    ]
    file = write_set(tmp_path, world, records)
    dataset = data.ConversationDataset([file], tokenizer, config, 256, records_per_sample=3)
    # 3 + 3 + 1 about image 0, wherever their question has it. Three stay alone: another image,
    # another number of turns, no image.
    assert len(dataset) == 6

    seen = []
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        num_images = 0 if dataset.record(i)["id"] == 7 else 1
        assert len(sample.pixels) == num_images
        assert sample.ids.count(tokenizer.image_id) == num_images * config.vision.num_patches

        if len(sample.starts) > 1:
            prefix = tokenizer.encode("USER: ") + [tokenizer.image_id] * config.vision.num_patches
            assert sample.ids[: sample.starts[0]] == [tokenizer.bos_id, *prefix]

        targets = [token for token, on in zip(sample.ids, sample.loss_mask) if on]
        text = tokenizer.sp_processor.decode(targets)
        numbers = [int(char) for char in text if char.isdigit()]
        assert len({records[n].get("image") for n in numbers}) == 1
        assert len(sample.starts) == len(numbers)
        seen += numbers
    assert sorted(seen) == list(range(10))


def test_records_side_by_side_cost_what_they_cost_alone_and_do_not_see_each_other(
    tokenizer, config, world, tmp_path
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    records = [record_about(("0.png", "1.png")[n % 2], n, 1 + n // 6) for n in range(8)]
    file = write_set(tmp_path, world, records)
    losses, gradients, num_tokens = [], [], []
    for records_per_sample in (1, 3):
        dataset = data.ConversationDataset([file], tokenizer, config, 256, records_per_sample)
        samples = [dataset.sample(i) for i in range(len(dataset))]
        num_tokens.append(sum(len(sample.ids) for sample in samples))
        batch = data.collate(samples, tokenizer.pad_id)
        model.zero_grad()
        loss = model.loss(batch["ids"], batch["targets"], batch["pixels"], batch["layout"])
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(samples) == 4
    assert num_tokens[0] - num_tokens[1] == 4 * samples[0].starts[0], "four prefixes less"
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for alone, merged in zip(*gradients):
        assert torch.allclose(alone, merged, rtol=1e-9, atol=1e-12)

    # A change of the second record is felt by the second record alone.
    sample = next(sample for sample in samples if len(sample.starts) == 3)
    batch = data.collate([sample], tokenizer.pad_id)
    layout = batch["layout"]._replace(loss_positions=None)
    changed = batch["ids"].clone()
    changed[0, sample.starts[1]] += 1
    before, after = (model(ids, batch["pixels"], layout) for ids in (batch["ids"], changed))
    differs = (before != after).any(dim=-1)[0]
    assert differs[sample.starts[1] : sample.starts[2]].any()
    assert not differs[: sample.starts[1]].any()
    assert not differs[sample.starts[2] :].any()


def test_what_records_share_is_counted_once_in_what_attention_costs():
    assert data.attention_pairs(data.Sample(list(range(11)), [0] * 11, [])) == 10 * 10
    # 4 shared ids, then 3, then 3 and the last target.
    two = data.Sample(list(range(11)), [0] * 11, [], (4, 7))
    assert data.record_lengths(two) == [7, 7]
    assert data.attention_pairs(two) == 7 * 7 + 7 * 7 - 4 * 4


# ------------------------------------------------------------------------------------ batches
def test_targets_are_the_next_ids_where_the_mask_has_them():
    samples = [data.Sample([1, 5, 6, 7], [0, 0, 1, 1], []), data.Sample([1, 8], [0, 1], [])]
    batch = data.collate(samples, pad_id=0)
    assert batch["ids"].tolist() == [[1, 5, 6], [1, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert sorted(set(batch["layout"].loss_positions.tolist())) == [0, 1, 2, 3]
    assert len(batch["layout"].loss_positions) == 64

    nothing = data.collate([data.Sample([1, 5], [0, 0], [])], pad_id=0)
    assert nothing["layout"].loss_positions.tolist() == [0] * 64, "one position all the same"


def test_long_batches_are_padded_to_a_multiple_of_16():
    for length, padded in ((3, 3), (64, 64), (65, 80), (80, 80)):
        batch = data.collate([data.Sample([1] * (length + 1), [0] * (length + 1), [])], pad_id=0)
        assert batch["ids"].shape == batch["targets"].shape == (1, padded)


def test_the_last_block_computes_loss_positions_only_and_loss_and_gradients_are_the_same(
    tokenizer, config, world
):
    torch.manual_seed(0)
    model = XLlava(config).init_weights().double()
    dataset = data.ConversationDataset([world / "chats.json"], tokenizer, config, 256)
    batch = data.collate([dataset.sample(i) for i in range(5)], tokenizer.pad_id)
    losses, gradients, positions = [], [], []

    def note_positions(mlp, inputs, output):
        positions.append(output.shape[:-1].numel())

    model.decoder.layers[-1].mlp.register_forward_hook(note_positions)
    for loss_positions in (None, batch["layout"].loss_positions):
        model.zero_grad()
        layout = Layout(loss_positions=loss_positions)
        loss = model.loss(batch["ids"], batch["targets"], batch["pixels"], layout)
        loss.backward()
        losses.append(loss.item())
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert int((batch["targets"] != IGNORE_INDEX).sum()) == 29
    assert positions == [batch["ids"].numel(), 64]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ command line
@pytest.fixture
def run(tokenizer_file, config, tmp_path):
    weights = XLlava(config).init_weights().state_dict().items()
    checkpoint.write_model(config, weights, tokenizer_file, tmp_path / "model")

    def run_data(*args):
        command = [sys.executable, ROOT / "data.py", *args, "--model", tmp_path / "model"]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    return run_data


def test_check_as_a_command(run, world, tmp_path):
    good = run("check", world / "chats.json")
    assert good.returncode == 0, good.stderr
    assert "16 records, 0 bad; 12 images; " in good.stdout
    assert "languages en 12, ko 4; kinds object 12, text 4" in good.stdout

    records = [{"id": 7, "conversations": [human("hi")]}]
    (tmp_path / "bad.json").write_text(json.dumps(records), encoding="utf-8")
    bad = run("check", tmp_path / "bad.json", world / "chats.json")
    assert bad.returncode == 1
    assert "record 0 (id 7): the last question has no answer" in bad.stdout

    mixed = b'[{"id": 1, "conversations": "\xff"},\n{"id": 2, "conversations": []}]'
    (tmp_path / "mixed.json").write_bytes(mixed)
    mixed = run("check", tmp_path / "mixed.json")
    assert mixed.returncode == 1
    assert "mixed.json: record 0 (id None): byte 29 is not UTF-8" in mixed.stdout
    assert "record 1 (id 2): no conversations" in mixed.stdout

    lost = run("check", "nowhere.json")
    assert lost.returncode == 2
    assert lost.stderr.startswith("data.py: argument FILE: nowhere.json: no such file")

    # The images may lie elsewhere than the file.
    (tmp_path / "chats.json").write_bytes((world / "chats.json").read_bytes())
    assert run("check", tmp_path / "chats.json").returncode == 1
    assert run("check", tmp_path / "chats.json", "--images", world).returncode == 0


def test_show_as_a_command(run, world, monkeypatch, capsys, tmp_path):
    shown = run("show", world / "chats.json")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 6, "three samples: where each comes from, and its tokens"
    assert lines[0].endswith("record 0 (id 'q0'): image 0.png; language en")
    assert lines[1].count("<image>") == 1
    assert "[red" in lines[1].replace("▁", "") and "\033" not in shown.stdout

    # On a terminal targets are green.
    monkeypatch.setattr(data, "use_colour", lambda: True)
    folder = tmp_path / "model"
    parts = checkpoint.load_tokenizer(folder), checkpoint.load_config(folder)
    data.show(world / "chats.json", *parts, 2048)
    assert "\033[32mred" in capsys.readouterr().out.replace("▁", "")
    assert lines[2].endswith("record 1 (id 't0'): image none; language ko")

    # Only the tokens of an image are drawn together.
    records = [{"id": 1, "conversations": [human("hi"), gpt("red red red")]}]
    (tmp_path / "twice.json").write_text(json.dumps(records), encoding="utf-8")
    data.show(tmp_path / "twice.json", *parts, 2048)
    assert capsys.readouterr().out.count("red") == 3


def test_no_record_attends_to_one_beside_it(config):
    torch.manual_seed(0)
    model, rng, samples = XLlava(config), random.Random(0), []
    for lengths in ((3, 2, 4), (6, 1), (2, 3)):
        starts = tuple(9 + sum(lengths[:i]) for i in range(len(lengths)))
        ids = [rng.randrange(5, 50) for _ in range(9 + sum(lengths) + 1)]
        samples.append(data.Sample(ids, [1] * len(ids), [], starts))
    batch = data.collate(samples, pad_id=0)
    hidden = model.decoder(model.decoder.embed_tokens(batch["ids"]), batch["layout"])

    place = {p: n for n, p in enumerate(batch["layout"].loss_positions.tolist())}
    first = 0
    for sample in samples:
        for start, stop in data.record_spans(sample):
            ids = torch.tensor([sample.ids[: sample.starts[0]] + sample.ids[start:stop]])
            alone = model.decoder(model.decoder.embed_tokens(ids))[0, sample.starts[0] :]
            got = hidden[[place[first + t] for t in range(start, stop)]]
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        first += len(sample.ids) - 1
