from torch.nn import functional as F


def swiglu_reference(gate, up):
    # GEGLU: GELU in place of SiLU.
    return F.gelu(gate) * up
