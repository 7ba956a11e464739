"""The chat templates: LLaVA-1.5's and ChatML, by hand and against a base's own template."""

import re

import pytest
from bpe_models import ENGLISH, KOREAN, byte_level_model
from test_processor import CHAT, TURNS

import data
import tokenizer as tokenizer_module
from checkpoint.processor import chat_template, tokenizer_json
from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.chat_markers import is_chatml
from vocabulary.extend import learn_pieces

# The chat_template of SmolLM2-135M-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def byte_level(bos="<|im_start|>", eos="<|im_end|>", kind="SmolLM2", **config):
    base = byte_level_model(kind).with_roles(bos, eos).with_control(["<image>", "<pad>"])
    base = base.with_pieces(learn_pieces(base, ENGLISH + KOREAN, 60, foreign_only=False))
    return ByteLevelTokenizer(base.data, base.config | config)


def render(template, messages, prompt):
    jinja2 = pytest.importorskip("jinja2")  # PyTorch brings it
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    return environment.from_string(template).render(messages=messages, add_generation_prompt=prompt)


def ids_of(text, tokenizer, begin=()):
    """As transformers does: control pieces are cut out, the text between is encoded."""
    names = [tokenizer.image_id, tokenizer.bos_id, tokenizer.eos_id]
    names = [tokenizer.piece(i) for i in names]
    ids = list(begin)
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        ids += [tokenizer.id(part)] if part in names else tokenizer.encode(part)
    return ids


def shown(tokenizer, turns):
    """The pieces of a conversation, the targets in brackets."""
    ids, mask = data.encode_chat(turns, tokenizer, 1)
    assert len(ids) == len(mask)
    runs = []
    for token, target in zip(ids, mask):
        raw = tokenizer.raw_bytes(token)
        text = tokenizer.piece(token) if raw is None else raw.decode()
        if not runs or runs[-1][1] != target:
            runs.append(["", target])
        runs[-1][0] += text
    return "".join(f"[{text}]" if target else text for text, target in runs)


def test_chatml_by_hand_with_its_targets():
    tokenizer = byte_level()
    assert is_chatml(tokenizer)
    assert shown(tokenizer, [(["", "\nWhat is it?"], "a cat"), ("Where?", "left")]) == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n[a cat<|im_end|>]\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n"
    )
    prompt = shown(byte_level(system_message="Be kind."), [("Where?", None)])
    assert prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_bases_own_system_message_is_found_in_its_template():
    assert byte_level(chat_template=SMOLLM2).system_message == SYSTEM
    # Qwen2.5 writes the line break as an escape, and has the roles beside it.
    qwen = "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}"
    qwen += "{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}"
    assert byte_level(chat_template=qwen).system_message == "You are Qwen."
    assert byte_level(chat_template=SMOLLM2, system_message="").system_message == ""
    assert byte_level(chat_template="{{ messages }}").system_message == ""


def test_llavas_template_by_hand_with_and_without_its_system_message():
    tokenizer = byte_level("<|begin|>", "<|end|>")
    turns = [(["", "\nWhat is it?"], "a cat"), ("Where?", "left")]
    text = (
        "USER: <image>\nWhat is it? ASSISTANT:[ a cat<|end|>]USER: Where? ASSISTANT:[ left<|end|>]"
    )
    assert not is_chatml(tokenizer) and shown(tokenizer, turns) == "<|begin|>" + text
    systematic = byte_level("<|begin|>", "<|end|>", system_message=LLAVA_SYSTEM)
    assert shown(systematic, turns) == f"<|begin|>{LLAVA_SYSTEM} {text}"


@pytest.mark.parametrize("kind", ["SmolLM2", "Llama-3", "Qwen2"])
def test_chatml_gives_the_ids_of_the_bases_own_template(kind):
    tokenizer = byte_level(kind=kind, chat_template=SMOLLM2)
    messages, turns = [], []
    for question, answer in [
        ("고양이는 1 2?", "빨간색!"),
        ("And  it's\n\n12?", "(no) 3"),
        ("So?", None),
    ]:
        turns.append((question, answer))
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})

    ids, _ = data.encode_chat(turns, tokenizer, 1)
    theirs = render(SMOLLM2, messages, True)
    assert ids == ids_of(theirs, tokenizer)
    assert render(chat_template(tokenizer), messages, True) == theirs
    assert data.encode_chat(turns[:2], tokenizer, 1)[0] == ids_of(
        render(SMOLLM2, messages[:4], False), tokenizer
    )


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("roles", [("<|im_start|>", "<|im_end|>"), ("<|begin|>", "<|end|>")])
def test_the_jinja_template_gives_the_ids_that_we_train_on(roles, system):
    tokenizer = byte_level(*roles, system_message=system)
    chatml = is_chatml(tokenizer)
    begin = [] if chatml else [tokenizer.bos_id]
    text = render(chat_template(tokenizer), CHAT, True)
    assert ids_of(text, tokenizer, begin) == data.encode_chat(TURNS, tokenizer, 1)[0]
    # transformers puts the begin in front by the post_processor.
    after = tokenizer_json(tokenizer)["post_processor"]
    assert after is None if chatml else list(after["special_tokens"]) == ["<|begin|>"]


def test_a_sentencepiece_model_keeps_llavas_template(tokenizer):
    ids, mask = data.encode_chat([("a cat?", "red")], tokenizer, 1)
    parts = ["USER: a cat? ASSISTANT:", "red"]
    expected = [tokenizer.bos_id, *(i for part in parts for i in tokenizer.encode(part))]
    assert ids == [*expected, tokenizer.eos_id]
    assert mask[-1 - len(tokenizer.encode("red")) :] == [1] * (1 + len(tokenizer.encode("red")))
    assert not is_chatml(tokenizer) and isinstance(tokenizer, tokenizer_module.Tokenizer)
