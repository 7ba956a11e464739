import torch


def training_state(wrapped, optimizers):
    # The weights alone: AdamW and Muon begin anew after each stop.
    return {
        f"weight.{name.removeprefix('module.')}": parameter.detach()
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


def create_optimizer_state(optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
