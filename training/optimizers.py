"""The learning rate schedule and the optimizers: AdamW, and Muon for random weights."""

import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels.device import pick_precision
from training.distributed import full_tensor


def lr_multiplier(step, total_steps, warmup_ratio, decay_ratio=1.0):
    """Share of the full rate at `step`, counted from 0: a linear rise over warmup_ratio of the
    steps, the full rate, then a cosine down to 0 over decay_ratio of the steps, or what is left."""
    warmup_steps = max(1, round(warmup_ratio * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_start = max(warmup_steps, round((1 - decay_ratio) * total_steps))
    angle = math.pi * max(0, step - decay_start) / max(1, total_steps - decay_start)
    return 0.5 * (1 + math.cos(angle))


def set_learning_rate(optimizers, multiplier):
    """Scales the full rate of each optimizer; returns AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * multiplier
    return optimizers[0].param_groups[0]["lr"]


def takes_muon(name, parameter):
    """Muon is for the matrices inside blocks."""
    return ".layers." in name and parameter.dim() == 2


def make_optimizers(objective, recipe):
    """[AdamW], or with recipe.muon_lr [AdamW, Muon]. recipe: train.Recipe, or the flags."""
    adamw_params, muon_params = [], []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            is_muons = recipe.muon_lr > 0 and takes_muon(name, parameter)
            chosen = muon_params if is_muons else adamw_params
            chosen.append(parameter)

    decay, betas = recipe.weight_decay, (0.9, recipe.beta2)
    adamw = torch.optim.AdamW(adamw_params, recipe.lr, betas, weight_decay=decay, fused=True)
    optimizers = [adamw]
    if muon_params:
        optimizers.append(Muon(muon_params, recipe.muon_lr, decay))

    # The schedule scales this one.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: all singular values of an update are close to 1 (Jordan et al.
    2024, kellerjordan.github.io/posts/muon). The numbers of torch.optim.Muon, but all matrices of a
    shape at once: one by one they cost a tenth to a quarter of the demo's step."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        # foreach: zero_grad in one launch.
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "foreach": True}
        super().__init__(params, defaults)
        self.orthogonalise = orthogonalise

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for params in by_shape.values():
                self.step_alike(params, group["lr"], group["weight_decay"], group["momentum"])

    def step_alike(self, params, lr, weight_decay, momentum):
        """One step for matrices of one shape (A, B)."""
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in params]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]

        # Nesterov's momentum: average the gradients, look one step ahead. In place: for shards
        # torch 2.11 has only _foreach_lerp_.
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_lerp_(grads, buffers, momentum)

        # Sharded matrices are gathered for this; each rank then takes its own part.
        directions = torch.stack([full_tensor(grad) for grad in grads])  # (N, A, B)
        updates = self.orthogonalise(directions).to(params[0].dtype)
        updates = [shard_like(update, parameter) for update, parameter in zip(updates, params)]

        A, B = params[0].shape
        if weight_decay:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr * max(1, A / B) ** 0.5)


def orthogonalise(x):
    """Matrices U·S·Vᵀ (N, A, B) -> about U·Vᵀ: five Newton-Schulz iterations bring all singular
    values to about 0.5 … 1.2. In bfloat16 where the hardware has it. A CPU that has not multiplies
    such matrices some fifty times slower than float32."""
    is_tall = x.shape[1] > x.shape[2]
    x = x.to(pick_precision("auto", x.device))
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # x ← 3.4445 x − 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


def shard_like(tensor, parameter):
    """A whole tensor, the same on every rank, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
