"""What stands around the turns of a conversation: LLaVA-1.5's chat template, ChatML or Llama 3's.

Pipeline: below data.py, whose `encode_chat` puts a conversation together.
Sources: LLaVA-1.5's "v1" (https://github.com/haotian-liu/LLaVA, llava/conversation.py) and ChatML,
as SmolLM2 and Qwen have it in the chat_template of their tokenizer_config.json; Llama-3-Instruct's:

    LLaVA-1.5   <s>USER: <image>\\nWhat is it? ASSISTANT: a cat</s>
    ChatML      <|im_start|>user\\n<image>\\nWhat is it?<|im_end|>\\n
                <|im_start|>assistant\\na cat<|im_end|>\\n
    Llama 3     <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n
                <image>\\nWhat is it?<|eot_id|>
                <|start_header_id|>assistant<|end_header_id|>\\n\\na cat<|eot_id|>

A tokenizer whose end of sequence is <|im_end|> takes ChatML, one with <|eot_id|> Llama 3's, any
other one LLaVA-1.5's.

A ChatML base's own system message is found in its chat_template, and stands in front. LLaVA-1.5's
is left out, as in transformers' LLaVA-1.5 (LLaVA's own code has it); so are the two dates that
Llama 3.1 and later put there. `system_message` in the tokenizer_config.json of a byte-level model
folder sets another one, or "" for none.
"""

from typing import NamedTuple

# {template: (what a turn begins with, the end of sequence)}
STYLES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
}


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


def chat_style(tokenizer) -> str:
    """Which chat template: "chatml", "llama3" or "llava"."""
    for style, (start, end) in STYLES.items():
        if tokenizer.eos_piece == end and start in tokenizer.ids:
            return style
    return "llava"


def chat_markers(tokenizer) -> ChatMarkers:
    """The ChatMarkers of a tokenizer's chat template."""
    encode, system, style = tokenizer.encode, tokenizer.system_message, chat_style(tokenizer)
    if style == "chatml":
        start, end, line = [tokenizer.id("<|im_start|>")], [tokenizer.eos_id], encode("\n")
        begin = [*start, *encode(f"system\n{system}"), *end, *line] if system else []
        reply = [*end, *line, *start, *encode("assistant\n")]
        return ChatMarkers(begin, start, "user\n", "user\n", "", reply, "", line)

    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if style == "llama3":
        user, assistant, by_system = (
            [tokenizer.id("<|start_header_id|>"), *encode(role), tokenizer.id("<|end_header_id|>")]
            for role in ("user", "assistant", "system")
        )
        end, lines = tokenizer.eos_id, "\n\n"
        begin += [*by_system, *encode(lines + system), end] if system else []
        reply = [end, *assistant, *encode(lines)]
        return ChatMarkers(begin, user, lines, lines, "", reply, "", [])

    user, assistant = "USER: ", " ASSISTANT:"
    first = f"{system} {user}" if system else user
    # SentencePiece puts a space before each text by itself.
    space = "" if getattr(tokenizer, "add_dummy_prefix", False) else " "
    return ChatMarkers(begin, [], first, user, assistant, [], space, [])


def encode_answer(answer: str, tokenizer) -> list[int]:
    """The ids that follow a question: the answer and its end."""
    prefix = chat_markers(tokenizer).answer_prefix
    return [*tokenizer.encode(prefix + answer), tokenizer.eos_id]
