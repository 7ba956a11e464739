from vocabulary.chat_markers import chat_markers, encode_answer


def encode_chat(turns, tokenizer, num_patches):
    # Each turn begins with <s>.
    chat = chat_markers(tokenizer)
    ids, loss_mask = [], []
    for n, (question, answer) in enumerate(turns):
        parts = [question] if isinstance(question, str) else list(question)
        parts[0] = (chat.question_prefix if n else chat.first_prefix) + parts[0]
        parts[-1] += chat.question_suffix
        ids += chat.begin + chat.turn
        for i, part in enumerate(parts):
            if i > 0:
                ids += [tokenizer.image_id] * num_patches
            if part:
                ids += tokenizer.encode(part)
        ids += chat.reply
        loss_mask += [0] * (len(ids) - len(loss_mask))
        if answer is not None:
            ids += encode_answer(answer, tokenizer)
            loss_mask += [1] * (len(ids) - len(loss_mask))
            ids += chat.next_turn
            loss_mask += [0] * len(chat.next_turn)
    return ids, loss_mask
