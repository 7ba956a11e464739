"""Lesson 7: the projector and the two stages; the chat template and its loss mask."""

import numpy as np
import torch
from torch import nn

from course.exercise import Check, Exercise
from course.exercises import tiny
from course.exercises.tiny import near, randn

TITLE = "The projector and the two stages"


# ------------------------------------------------------------------------------------ images
def makes_features_of_patches():
    got = tiny.model().encode_images(tiny.images(3))
    want = (3, 4, 32)
    assert got.shape == want, f"shape {tuple(got.shape)} for 3 images of 4 patches, must be {want}"


def without_attention(**options):
    """A model whose ViT lets no patch see another: its blocks add nothing."""
    model = tiny.model(**options)
    for block in model.vision.layers:
        nn.init.zeros_(block.attn.out_proj.weight)
        nn.init.zeros_(block.fc2.weight)
    return model


def one_patch_changes_one_feature():
    model = without_attention(layer=-1)
    image = tiny.images(1)
    for patch in range(4):
        other, row, column = image.clone(), 8 * (patch // 2), 8 * (patch % 2)
        other[:, :, row : row + 8, column : column + 8] += 100
        difference = model.encode_images(other) - model.encode_images(image)
        changed = difference[0].abs().amax(dim=-1).nonzero().flatten().tolist()
        assert changed == [patch], f"the pixels of patch {patch} change the features {changed}"


def takes_configured_layer():
    for layer, is_used in ((-1, True), (-2, False)):
        model, image = tiny.model(layer=layer), tiny.images(1)
        before = model.encode_images(image)
        model.vision.layers[-1].fc2.bias.data += 1
        changed = not torch.equal(before, model.encode_images(image))
        word = "does not change" if is_used else "changes"
        assert changed == is_used, f"layer {layer}: the last block {word} the features"


def takes_siglip():
    from dataclasses import replace

    from model import XLlava

    config = tiny.config(layer=-1)
    vision = replace(config.vision, model_type="siglip_vision_model")
    model = XLlava(replace(config, vision=vision)).init_weights()
    shape = tuple(model.encode_images(tiny.images(2)).shape)
    assert shape == (2, 4, 32), f"shape {shape}: SigLIP has 4 patches and no class token"


def gives_encoder_gradients():
    model = tiny.model().train()
    model.encode_images(tiny.images(2)).square().sum().backward()
    parts = {"projector": model.projector.parameters(), "ViT": [model.vision.pos_embed]}
    for name, weights in parts.items():
        learns = all(weight.grad is not None and weight.grad.any() for weight in weights)
        assert learns, f"the {name} has no gradient: it would never learn"


# ------------------------------------------------------------------------------------ embeddings
def fake_encode_images(pixels):
    """encode_images without a ViT: image i is the number of its first pixel, in 4 patches."""
    steps = torch.arange(4)[:, None] / 10 + torch.zeros(4, 32)  # (N, C)
    return pixels[:, 0, 0, 0].float()[:, None, None] + steps


def model_and_images(numbers):
    """A model with fake_encode_images, and images that carry these numbers."""
    model, pixels = tiny.model(), torch.zeros(len(numbers), 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor(numbers)
    model.encode_images = fake_encode_images
    return model, pixels


def must_embed(rows, numbers):
    """rows: lists of ids; a string such as "7" is the image of number 7."""
    model, pixels = model_and_images(numbers)
    ids, want = [], []
    for row in rows:
        row_ids, row_want = [], []
        for item in row:
            if isinstance(item, str):
                row_ids += [60] * 4
                row_want += [torch.full((32,), int(item) + patch / 10) for patch in range(4)]
            else:
                row_ids.append(item)
                row_want.append(model.decoder.embed_tokens.weight[item])
        ids.append(row_ids)
        want.append(torch.stack(row_want))
    got = model.embed_inputs(torch.tensor(ids), pixels if numbers else None)
    near(got, torch.stack(want), f"rows {rows}, where a number in quotes is an image")


def embeds_text():
    must_embed([[5, 6, 7], [8, 9, 5]], [])


def embeds_one_image():
    must_embed([[5, 6, "3", 7]], [3])


def embeds_images_in_reading_order():
    text = [7] * 4
    must_embed([[5, "3", "4"], [5, *text, *text], ["9", 5, *text]], [3, 4, 9])


def refuses_wrong_number_of_images():
    for ids, numbers in (([5] + [60] * 4, [1, 2]), ([5] + [60] * 8, [1]), ([5, 6], [1])):
        model, pixels = model_and_images(numbers)
        try:
            model.embed_inputs(torch.tensor([ids]), pixels)
        except ValueError:
            continue
        raise AssertionError(f"{ids.count(60)} <image> tokens, {len(numbers)} image(s): accepted")


def gives_projector_a_gradient():
    model, ids = tiny.model().train(), torch.tensor([[5, 6]])
    model.encode_images = lambda pixels: model.projector(torch.ones(len(pixels), 4, 16))
    got = model.embed_inputs(ids)
    near(got, model.decoder.embed_tokens(ids), "text alone, while training")
    got.square().sum().backward()
    grads = [weight.grad for weight in model.projector.parameters()]
    assert all(grad is not None for grad in grads), (
        "text alone: the projector has no gradient, and DDP would wait for it for ever"
    )
    assert not any(grad.any() for grad in grads), "text alone: the projector's gradient is not 0"


def gives_images_a_gradient():
    model, pixels = model_and_images([3, 4])
    features = fake_encode_images(pixels).requires_grad_()
    model.train().encode_images = lambda pixels: features
    factors = randn(2, 6, 32)
    got = model.embed_inputs(torch.tensor([[5, *[60] * 4, 6], [7, 5, *[60] * 4]]), pixels)
    (got * factors).sum().backward()
    assert features.grad is not None, "an image: its features have no gradient, no ViT would learn"
    near(features.grad, torch.stack([factors[0, 1:5], factors[1, 2:]]), "gradients of 2 images")
    table = model.decoder.embed_tokens.weight.grad
    assert table is not None, "an image: the text beside it has no gradient"
    want = torch.stack([factors[0, 0] + factors[1, 1], factors[0, 5], factors[1, 0]])
    near(table[5:8], want, "gradients of the text beside 2 images")


# ------------------------------------------------------------------------------------ template
class Letters:
    """A tokenizer for the eye: each character is a token. 1 is <s>, 2 </s>, 3 <image>."""

    bos_id, eos_id, image_id, system_message = 1, 2, 3, ""
    eos_piece, ids, add_dummy_prefix = "</s>", {}, True

    def encode(self, text):
        return [ord(c) for c in text]


class ChatMLLetters(Letters):
    """The same with ChatML's marks around the turns: 4 is <|im_start|>, 2 <|im_end|>."""

    eos_piece, ids, bos_id = "<|im_end|>", {"<|im_start|>": 4}, None

    def id(self, piece):
        return self.ids[piece]


def must_read(turns, want, tokenizer=None):
    """The ids as text, targets in brackets, must be `want`."""
    from data import encode_chat

    ids, mask = encode_chat(turns, tokenizer or Letters(), 2)
    assert len(ids) == len(mask), f"{len(ids)} ids, {len(mask)} entries of the mask"
    marks = {1: "<s>", 2: "</s>", 3: "▪", 4: "<|im_start|>"}
    text, inside = "", 0
    for token, is_target in zip(ids, mask):
        if is_target != inside:
            text += "[" if is_target else "]"
        text, inside = text + marks.get(token, chr(token)), is_target
    text += "]" if inside else ""
    assert text == want, f"{text!r}, must be {want!r} (targets are in brackets)"


def writes_prompt():
    must_read([("What?", None)], "<s>USER: What? ASSISTANT:")


def marks_words_of_answer():
    from data import encode_chat

    ids, mask = encode_chat([("What?", "red")], Letters(), 2)
    marked = "".join(chr(token) for token, is_target in zip(ids, mask) if is_target and token > 3)
    assert marked == "red", f"the targets are {marked!r}; the answer is 'red'"


def marks_end_of_answer():
    must_read([("What?", "red")], "<s>USER: What? ASSISTANT:[red</s>]")


def places_images():
    must_read([(["", "\nWhat?"], "red")], "<s>USER: ▪▪\nWhat? ASSISTANT:[red</s>]")
    must_read([(["Is ", " as ", "?"], None)], "<s>USER: Is ▪▪ as ▪▪? ASSISTANT:")


def writes_further_turns():
    want = "<s>USER: ▪▪A? ASSISTANT:[b</s>]USER: C? ASSISTANT:[d</s>]USER: E? ASSISTANT:"
    must_read([(["", "A?"], "b"), ("C?", "d"), ("E?", None)], want)

    tokenizer = Letters()
    tokenizer.system_message = "Be brief."  # it comes once, before the first question
    want = "<s>Be brief. USER: A? ASSISTANT:[b</s>]USER: C? ASSISTANT:"
    must_read([("A?", "b"), ("C?", None)], want, tokenizer)


def writes_chatml():
    want = (
        "<|im_start|>user\nA?</s>\n<|im_start|>assistant\n[b</s>]\n"
        "<|im_start|>user\nC?</s>\n<|im_start|>assistant\n"
    )
    must_read([("A?", "b"), ("C?", None)], want, ChatMLLetters())


# ------------------------------------------------------------------------------------ batches
def collated(*samples, pixels=()):
    from data import Sample, collate

    images = list(pixels) or [[] for _ in samples]
    return collate([Sample(*s, image) for s, image in zip(samples, images)], pad_id=9)


LONG = ([1, 10, 11, 12, 2], [0, 0, 0, 1, 1])  # <s> what ? cat </s>
SHORT = ([1, 13, 2], [0, 0, 1])


def collates_inputs():
    got = collated(LONG, SHORT)["ids"].tolist()
    want = [[1, 10, 11, 12], [1, 13, 9, 9]]
    assert got == want, f"ids {got}, must be {want}: the last id of a sample is only a target"


def collates_targets():
    got = collated(LONG)["targets"].tolist()
    want = [[-100, -100, 12, 2]]
    assert got == want, f"targets {got}, must be {want}: at 11 the model learns to say 12"


def ignores_padding():
    got = collated(SHORT, LONG, SHORT)["targets"][::2].tolist()
    want = [[-100, 2, -100, -100]] * 2
    assert got == want, f"targets {got}, must be {want}"


def collates_loss_positions_and_pixels():
    images = list(tiny.images(3))
    batch = collated(LONG, SHORT, pixels=[images[:2], images[2:]])
    got, wanted = batch["layout"].loss_positions.tolist(), {2, 3, 5}
    real = [p for p in got if batch["targets"].flatten()[p] != -100]
    assert sorted(real) == sorted(wanted), f"the targets are at {sorted(wanted)}, not at {real}"
    assert torch.equal(batch["pixels"], torch.stack(images)), "the images are not in reading order"
    assert "pixels" not in collated(LONG), "a batch without images has no pixels"


def collates_several_records():
    import data
    from model import Layout

    calls, old = [], data.side_by_side

    def watch(samples, firsts, lengths, T):
        calls.append((list(firsts), list(lengths), T))
        return Layout(positions=torch.ones(1, T))

    data.side_by_side = watch
    try:
        plain = data.collate([data.Sample(*LONG, [])], 9)
        batch = data.collate([data.Sample(*LONG, [], (1, 3)), data.Sample(*SHORT, [])], 9)
    finally:
        data.side_by_side = old
    want = [([0, 4], [4, 2], 64)]
    assert calls == want, f"side_by_side was called with {calls}, must be once, with {want}"
    row = [1, 10, 11, 12, 1, 13] + 58 * [9]
    assert batch["ids"].tolist() == [row], "the samples lie end to end in one row, then padding"
    assert batch["targets"][0, 3:6].tolist() == [2, -100, 2], "the targets of the same row"
    assert plain["layout"].positions is None, "a sample of one record needs no layout"
    layout = batch["layout"]
    assert layout.positions is not None, "the layout of side_by_side is lost"
    assert layout.loss_positions is not None, "the loss positions are lost"


# ------------------------------------------------------------------------------------ side by side
def several(*lengths, prefix=5):
    """A sample of a prefix and of records with these numbers of tokens of their own."""
    from data import Sample

    n = prefix + sum(lengths)
    starts = tuple(prefix + sum(lengths[:i]) for i in range(len(lengths)))
    ids = [5 + i % 50 for i in range(n + 1)]
    return Sample(ids, [0] * prefix + [1] * (len(ids) - prefix), [], starts)


def layout_of(*samples):
    from data import side_by_side

    lengths = np.array([len(sample.ids) - 1 for sample in samples])
    T = -(-lengths.sum() // 64) * 64
    return side_by_side(list(samples), lengths.cumsum() - lengths, lengths, T)


def gathers_rows():
    prefixes, groups, _ = layout_of(several(3, 2)).split_index
    assert prefixes.tolist() == [[0, 1, 2, 3, 4]], f"the prefix lies at {prefixes.tolist()}"
    ((own, keys),) = groups  # of similar length: one group
    # Behind the tokens of each row is padding.
    got = [own[0, :3].tolist(), own[1, :2].tolist()]
    assert got == [[5, 6, 7], [8, 9]], f"the records' own tokens lie at {got}"
    got, want = [keys[0, :8].tolist(), keys[1, :7].tolist()], [[*range(8)], [*range(5), 8, 9]]
    assert got == want, f"keys {got}, must be {want}: prefix and own tokens"
    assert keys.shape[1] == 5 + own.shape[1], "a row of keys has the prefix and the own tokens"


def restarts_positions():
    got = layout_of(several(3, 3)).positions[0, :11].tolist()
    want = [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert got == want, f"positions {got}, must be {want}: both records follow the prefix"


def merges_outputs():
    samples = several(3, 2), several(4), several(1, 1, 40)
    prefixes, groups, merge = layout_of(*samples).split_index
    tokens = torch.cat([prefixes.flatten(), *(own.flatten() for own, _ in groups)])
    n = sum(len(sample.ids) - 1 for sample in samples)
    got = tokens[merge[:n]].tolist()
    assert got == [*range(n)], f"the tokens 0 to {n - 1} get the outputs of {got}"


def keeps_records_apart():
    samples, decoder = (several(3, 2, 4), several(6, 1)), tiny.model().decoder
    layout = layout_of(*samples)
    ids = torch.zeros_like(layout.positions)
    flat = torch.tensor([token for sample in samples for token in sample.ids[:-1]])
    ids[0, : len(flat)] = flat
    hidden, first = decoder(decoder.embed_tokens(ids), layout)[0], 0
    for b, sample in enumerate(samples):
        ends = [*sample.starts[1:], len(sample.ids) - 1]
        for start, end in zip(sample.starts, ends):
            alone = torch.tensor([sample.ids[:5] + sample.ids[start:end]])
            want = decoder(decoder.embed_tokens(alone))[0, 5:]
            what = f"sample {b}, record at {start}: the hidden states are not those of it alone"
            near(hidden[first + start : first + end], want, what)
        first += len(sample.ids) - 1


# ------------------------------------------------------------------------------------ exercises
EXERCISES = [
    Exercise(
        name="encode_images",
        title="From an image to features for the decoder",
        file="model.py",
        functions=["XLlava.encode_images"],
        minutes=15,
        checks=[
            Check(
                1,
                "one feature per patch",
                "The ViT gives 1 + N vectors, the decoder gets N.",
                makes_features_of_patches,
            ),
            Check(
                2,
                "feature i belongs to patch i",
                "Where does the class token stand? Read ViT.forward.",
                one_patch_changes_one_feature,
            ),
            Check(
                1,
                "the layer that the config names",
                "ViT.forward has a second argument.",
                takes_configured_layer,
            ),
            Check(
                1,
                "an encoder without class token",
                "Count patches from the end, not from the front.",
                takes_siglip,
            ),
            Check(
                1,
                "the projector and the ViT have gradients",
                "Whether the ViT learns is for the stage to say. What cuts its graph?",
                gives_encoder_gradients,
            ),
        ],
        wrong={
            "07_encode_images_a.py": 1,
            "07_encode_images_b.py": 2,
            "07_encode_images_c.py": 3,
            "07_encode_images_d.py": 4,
        },
    ),
    Exercise(
        name="embed_inputs",
        title="Text and image in one row",
        file="model.py",
        functions=["XLlava.embed_inputs"],
        minutes=30,
        checks=[
            Check(
                1,
                "text alone",
                "Each id has a row of embed_tokens.",
                embeds_text,
            ),
            Check(
                1,
                "one image",
                "The <image> tokens keep their places; their embeddings are replaced.",
                embeds_one_image,
            ),
            Check(
                2,
                "a row with two images, one with none, one with one",
                "The images of a batch are one list, in reading order: image 1 is not row 1's.",
                embeds_images_in_reading_order,
            ),
            Check(
                1,
                "too many or too few images are refused",
                "masked_scatter is silent if there are more features than places. Count first.",
                refuses_wrong_number_of_images,
            ),
            Check(
                1,
                "a batch of text gives the projector a gradient of zero",
                "Something times zero is zero, but it is part of the graph.",
                gives_projector_a_gradient,
            ),
            Check(
                1,
                "each image's features have a gradient, and the text beside them",
                "What is copied without its graph can't be trained. index_copy keeps it.",
                gives_images_a_gradient,
            ),
        ],
        wrong={
            "07_embed_inputs_a.py": 2,
            "07_embed_inputs_b.py": 3,
            "07_embed_inputs_c.py": 5,
        },
    ),
    Exercise(
        name="encode_chat",
        title="The chat template and its loss mask",
        file="data.py",
        functions=["encode_chat"],
        minutes=60,
        checks=[
            Check(
                1,
                "a prompt for inference",
                "Print chat_markers(tokenizer). Which of its parts come before the question?",
                writes_prompt,
            ),
            Check(
                2,
                "the words of the answer are targets, those of the question are not",
                "Extend the mask each time the ids grow, with the right digit.",
                marks_words_of_answer,
            ),
            Check(
                1,
                "the end of the answer is a target",
                "A model that never learns </s> never stops.",
                marks_end_of_answer,
            ),
            Check(
                2,
                "images inside the question",
                "Between each two strings of the list stands an image: num_patches ids.",
                places_images,
            ),
            Check(
                2,
                "three turns",
                "How often does a conversation begin?",
                writes_further_turns,
            ),
            Check(
                1,
                "ChatML",
                "begin, turn, reply and next_turn are ids already. Targets end with the end mark.",
                writes_chatml,
            ),
        ],
        wrong={
            "07_encode_chat_a.py": 1,
            "07_encode_chat_b.py": 2,
            "07_encode_chat_c.py": 4,
        },
    ),
    Exercise(
        name="collate",
        title="From samples to a batch",
        file="data.py",
        functions=["collate"],
        minutes=30,
        checks=[
            Check(
                1,
                "the inputs, padded on the right",
                "A dict: ids, targets, layout. A sample of n ids has n − 1 inputs and targets.",
                collates_inputs,
            ),
            Check(
                2,
                "each target is the id that follows",
                "The mask says which ids are targets. Ids and mask move together.",
                collates_targets,
            ),
            Check(
                1,
                "padding is ignored",
                "What should `targets` be filled with at first?",
                ignores_padding,
            ),
            Check(
                1,
                "loss positions and pixels",
                "select_loss_positions(targets), and one tensor of all images in order.",
                collates_loss_positions_and_pixels,
            ),
            Check(
                1,
                "samples of several records",
                "Does any sample have more than one entry in starts? Then the row is as long as "
                "the next multiple of 64. firsts: the place of each sample's first token.",
                collates_several_records,
            ),
        ],
        wrong={"07_collate_a.py": 1, "07_collate_b.py": 2},
    ),
    Exercise(
        name="side_by_side",
        title="Several records behind one image",
        file="data.py",
        functions=["side_by_side"],
        minutes=90,
        checks=[
            Check(
                1,
                "each record has a row of its own tokens, and the prefix among its keys",
                "record_spans(sample) says where the records are.",
                gathers_rows,
            ),
            Check(
                1,
                "each record counts on from the prefix",
                "The second record does not know that there is a first one.",
                restarts_positions,
            ),
            Check(
                2,
                "three samples in a batch",
                "All indices are places in the one row: token t of sample b is at firsts[b] + t.",
                merges_outputs,
            ),
            Check(
                3,
                "a tiny model gives each record what it gives it alone",
                "Draw the rows of two samples on paper, with their places below.",
                keeps_records_apart,
            ),
        ],
        wrong={"07_side_by_side_a.py": 1, "07_side_by_side_b.py": 2},
    ),
]
