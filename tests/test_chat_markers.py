"""The chat templates: LLaVA-1.5's, ChatML and Llama 3's, by hand and against a base's own."""

import re

import pytest
from bpe_models import ENGLISH, KOREAN, byte_level_model
from test_processor import CHAT, TURNS

import data
import tokenizer as tokenizer_module
from checkpoint.processor import chat_template, tokenizer_json
from vocabulary.byte_level import ByteLevelTokenizer
from vocabulary.chat_markers import chat_style
from vocabulary.extend import learn_pieces

# The chat_template of SmolLM2-135M-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Those of Llama-3-8B-Instruct, and of Llama-3.1 and 3.2 without their tools.
HEADER = ("<|start_header_id|>", "<|end_header_id|>")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA32 = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: 26 Jul 2024\n\n' }}"
    "{{- '<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
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


def llama3(**config):
    names = ["<|begin_of_text|>", *HEADER, "<|eot_id|>", "<image>", "<pad>"]
    base = byte_level(names[0], "<|eot_id|>", "Llama-3", **config)
    return base.with_control(names)


def render(template, messages, prompt):
    jinja2 = pytest.importorskip("jinja2")  # PyTorch brings it
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    values = {"messages": messages, "bos_token": "<|begin_of_text|>"}
    return environment.from_string(template).render(values, add_generation_prompt=prompt)


def ids_of(text, tokenizer, begin=()):
    """As transformers does: control pieces are cut out, the text between is encoded."""
    names = [tokenizer.image_id, tokenizer.bos_id, tokenizer.eos_id]
    names = [*map(tokenizer.piece, names), *(n for n in HEADER if n in tokenizer.ids)]
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
    assert chat_style(tokenizer) == "chatml"
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
    assert chat_style(tokenizer) == "llava" and shown(tokenizer, turns) == "<|begin|>" + text
    systematic = byte_level("<|begin|>", "<|end|>", system_message=LLAVA_SYSTEM)
    assert shown(systematic, turns) == f"<|begin|>{LLAVA_SYSTEM} {text}"


def test_llama_3_by_hand_with_its_targets():
    tokenizer = llama3()
    turns = [(["", "\nWhat is it?"], "a cat"), ("Where?", "left")]
    assert shown(tokenizer, turns) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[a cat<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[left<|eot_id|>]"
    )
    # Of the base, not the Instruct model, the end is another one: LLaVA's template.
    assert chat_style(llama3(eos_token="<|begin_of_text|>")) == "llava"


OWN = [(kind, SMOLLM2, {}) for kind in ("SmolLM2", "Llama-3", "Qwen2")]
OWN += [("llama3", LLAMA3, {}), ("llama3", LLAMA32, {"system_message": DATES})]


@pytest.mark.parametrize(("kind", "template", "config"), OWN)
def test_the_ids_are_those_of_the_bases_own_template(kind, template, config):
    config = config | {"chat_template": template}
    tokenizer = llama3(**config) if kind == "llama3" else byte_level(kind=kind, **config)
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
    theirs = render(template, messages, True)
    assert ids == ids_of(theirs, tokenizer)
    assert render(chat_template(tokenizer), messages, True) == theirs
    assert data.encode_chat(turns[:2], tokenizer, 1)[0] == ids_of(
        render(template, messages[:4], False), tokenizer
    )


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("style", ["chatml", "llama3", "llava"])
def test_the_jinja_template_gives_the_ids_that_we_train_on(style, system):
    tokenizer = llama3(system_message=system)
    if style != "llama3":
        roles = ("<|im_start|>", "<|im_end|>") if style == "chatml" else ("<|begin|>", "<|end|>")
        tokenizer = byte_level(*roles, system_message=system)
    assert chat_style(tokenizer) == style
    begin = [tokenizer.bos_id] if style == "llava" else []
    text = render(chat_template(tokenizer), CHAT, True)
    assert ids_of(text, tokenizer, begin) == data.encode_chat(TURNS, tokenizer, 1)[0]
    # transformers puts the begin in front by the post_processor.
    after = tokenizer_json(tokenizer)["post_processor"]
    assert list(after["special_tokens"]) == ["<|begin|>"] if style == "llava" else after is None


def test_a_sentencepiece_model_keeps_llavas_template(tokenizer):
    ids, mask = data.encode_chat([("a cat?", "red")], tokenizer, 1)
    parts = ["USER: a cat? ASSISTANT:", "red"]
    expected = [tokenizer.bos_id, *(i for part in parts for i in tokenizer.encode(part))]
    assert ids == [*expected, tokenizer.eos_id]
    assert mask[-1 - len(tokenizer.encode("red")) :] == [1] * (1 + len(tokenizer.encode("red")))
    assert chat_style(tokenizer) == "llava" and isinstance(tokenizer, tokenizer_module.Tokenizer)
