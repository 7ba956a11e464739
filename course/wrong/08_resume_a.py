import torch


def training_state(wrapped, optimizers):
    names = {
        parameter: name.removeprefix("module.")
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    state = {f"weight.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            state |= {f"{key}.{names[parameter]}": tensor for key, tensor in kept.items()}
    return state


def create_optimizer_state(optimizers):
    # Only the first optimizer.
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    optimizers[0].zero_grad(set_to_none=True)
