from vocabulary.chat_markers import chat_markers, encode_answer


def encode_chat(turns, tokenizer, num_patches):
    # The end of the answer is no target: the model will never stop.
    chat = chat_markers(tokenizer)
    ids = list(chat.begin)
    loss_mask = [0] * len(ids)
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
        loss_mask += [0] * (len(ids) - len(loss_mask))
        if answer is not None:
            ids += encode_answer(answer, tokenizer)
            loss_mask += [1] * (len(ids) - len(loss_mask) - 1) + [0]
            ids += chat.next_turn
            loss_mask += [0] * len(chat.next_turn)
    return ids, loss_mask
