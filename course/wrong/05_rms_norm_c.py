import torch


class ExplicitGradient:
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        # The gradient needs the normalised rows, not x.
        x = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale * weight).to(dtype)
