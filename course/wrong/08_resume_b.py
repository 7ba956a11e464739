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
    # The rate stays: the gradient is zero, but weight decay is not.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
