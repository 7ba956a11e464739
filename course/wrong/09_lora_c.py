import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear:
    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.rank = rank
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        frozen = F.linear(x, self.weight, self.bias)
        # As if SCALE were alpha: right for rank 1 only.
        return frozen + self.SCALE / self.rank * F.linear(F.linear(x, self.down), self.up)
