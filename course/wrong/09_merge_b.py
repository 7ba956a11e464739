from training.distributed import full_tensor
from training.lora import LoRALinear


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
            # In place: the model's own weight changes, and its adapter is then added twice.
            tensor += LoRALinear.SCALE * adapters[f"{layer}.up"] @ adapters[f"{layer}.down"]
        yield name, tensor
