def phrase_loss(logits, is_true, is_known):
    # As the formula has it: the logarithm of 0 for a large logit.
    chance = logits.sigmoid().where(is_true, 1 - logits.sigmoid())
    return -(chance.log() * is_known).sum()
