from kernels import linear_cross_entropy
from model import IGNORE_INDEX, PLAIN


class XLlava:
    def loss(self, ids, targets, pixels=None, layout=PLAIN):
        # Shifted once more: data.collate has done that already.
        hidden = self(ids, pixels, layout._replace(loss_positions=None))[:, :-1].flatten(0, 1)
        targets = targets[:, 1:].flatten()
        return linear_cross_entropy(hidden, self.decoder.lm_head.weight, targets, IGNORE_INDEX)
