"""What stands around the turns of a conversation: LLaVA-1.5's chat template, or ChatML.

Pipeline: below data.py, whose `encode_chat` puts a conversation together.
Sources: LLaVA-1.5's "v1" (https://github.com/haotian-liu/LLaVA, llava/conversation.py) and ChatML,
as SmolLM2 and Qwen have it in the chat_template of their tokenizer_config.json:

    LLaVA-1.5   <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>
    ChatML      <|im_start|>user\\n<image>\\nWhat is it?<|im_end|>\\n
                <|im_start|>assistant\\na cat<|im_end|>\\n

A tokenizer whose end of sequence is <|im_end|> takes ChatML, any other one LLaVA-1.5's.

A ChatML base's own system message is found in its chat_template, and stands in front. LLaVA-1.5's
is left out, as in transformers' LLaVA-1.5 (LLaVA's own code has it). `system_message` in the
tokenizer_config.json of a byte-level model folder sets another one, or "" for none.
"""

from typing import NamedTuple

START, END = "<|im_start|>", "<|im_end|>"


class ChatMarkers(NamedTuple):
    """Ids, and text that is encoded together with the question or answer beside it."""

    begin: list[int]  # of the conversation
    turn: list[int]  # before each question
    first_prefix: str  # of the first question
    question_prefix: str  # of the others
    question_suffix: str
    reply: list[int]  # between question and answer
    answer_prefix: str
    next_turn: list[int]  # behind the end of each answer


def is_chatml(tokenizer) -> bool:
    return tokenizer.eos_piece == END and START in tokenizer.ids


def chat_markers(tokenizer) -> ChatMarkers:
    """The ChatMarkers of a tokenizer's chat template."""
    encode, system = tokenizer.encode, tokenizer.system_message
    if is_chatml(tokenizer):
        start, end, line = [tokenizer.id(START)], [tokenizer.eos_id], encode("\n")
        begin = [*start, *encode(f"system\n{system}"), *end, *line] if system else []
        reply = [*end, *line, *start, *encode("assistant\n")]
        return ChatMarkers(begin, start, "user\n", "user\n", "", reply, "", line)

    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    user, assistant = "USER: ", " ASSISTANT:"
    first = f"{system} {user}" if system else user
    # SentencePiece puts a space before each text by itself.
    space = "" if getattr(tokenizer, "add_dummy_prefix", False) else " "
    return ChatMarkers(begin, [], first, user, assistant, [], space, [])


def encode_answer(answer: str, tokenizer) -> list[int]:
    """The ids that follow a question: the answer and its end."""
    prefix = chat_markers(tokenizer).answer_prefix
    return [*tokenizer.encode(prefix + answer), tokenizer.eos_id]
