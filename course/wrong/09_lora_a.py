import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear:
    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # Both random: the layer is another one from the first step on.
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.randn(linear.out_features, rank) * rank**-0.5)

    def forward(self, x):
        frozen = F.linear(x, self.weight, self.bias)
        return frozen + self.SCALE * F.linear(F.linear(x, self.down), self.up)
