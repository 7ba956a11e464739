from torch import nn

from model import IGNORE_INDEX, PLAIN


class XLlava:
    def loss(self, ids, targets, pixels=None, layout=PLAIN):
        # The mean of this batch: later, a mean of means.
        hidden = self(ids, pixels, layout).view(-1, self.config.text.hidden_size)
        targets = targets.flatten()
        if layout.loss_positions is not None:
            targets = targets[layout.loss_positions]
        logits = self.decoder.lm_head(hidden)
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
