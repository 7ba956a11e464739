from vocabulary.chat_markers import chat_markers, encode_answer


def encode_chat(turns, tokenizer, num_patches):
    # The question is a target, too.
    chat = chat_markers(tokenizer)
    ids = list(chat.begin)
    for n, (question, answer) in enumerate(turns):
        parts = [question] if isinstance(question, str) else list(question)
        parts[0] = (chat.question_prefix if n else chat.first_prefix) + parts[0]
        parts[-1] += chat.question_suffix
        ids += chat.turn
        for i, part in enumerate(parts):
            if i > 0:
                ids += [tokenizer.image_id] * num_patches
            if part:
                ids += tokenizer.encode(part)
        ids += chat.reply
        if answer is not None:
            ids += encode_answer(answer, tokenizer) + chat.next_turn
    is_prompt = turns[-1][1] is None
    return ids, [0 if is_prompt or token == tokenizer.image_id else 1 for token in ids]
