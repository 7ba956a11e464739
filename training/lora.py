"""Which parameters train, LoRA's adapters among them, and the model that comes out."""

import torch
from torch import nn
from torch.nn import functional as F

from checkpoint import write_atomically, write_model
from training.distributed import full_tensor, is_rank0
from vocabulary.command import first_few


def set_trainable(model, trainable, lora_rank=0):
    """Only the submodules named in `trainable` train. With lora_rank, "decoder" means adapters of
    its blocks; what else of the decoder is named, such as decoder.embed_tokens, trains whole."""
    model.exact_weights = {}  # see copy_weights
    model.requires_grad_(False)
    for name in trainable:
        try:
            model.get_submodule(name).requires_grad_(True)
        except AttributeError:
            raise ValueError(f"--trainable {name}: {no_such_module(model, name)}") from None

    # The loss does not depend on what comes after the feature layer.
    for unused in (model.vision.final_norm, *model.vision.layers[used_layers(model) :]):
        unused.requires_grad_(False)
    for name in trainable:
        if not any(weight.requires_grad for weight in model.get_submodule(name).parameters()):
            raise ValueError(f"--trainable {name}: nothing in it trains")

    # LoRA: the decoder itself is frozen, and the matrices of its blocks get adapters.
    if not lora_rank:
        return
    given = f"--trainable {' '.join(trainable)}"
    if "decoder" not in trainable:
        raise ValueError(f"--lora-rank: needs decoder in {given}")
    if any(name.startswith("decoder.layers") for name in trainable):
        raise ValueError(f"--lora-rank: adapts the blocks, so no decoder.layers in {given}")
    model.decoder.requires_grad_(False)
    for name in trainable:
        if name.startswith("decoder."):
            model.get_submodule(name).requires_grad_(True)
    for name, layer in list(model.decoder.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            model.decoder.layers.set_submodule(name, LoRALinear(layer, lora_rank))


def no_such_module(model, name):
    """The message for a module that is not there: "decoder has no layer, but embed_tokens, …"."""
    known, parent = [], model
    for last in name.split("."):
        children = dict(parent.named_children())
        if last not in children:
            break
        known, parent = [*known, last], children[last]
    return f"{'.'.join(known) or 'the model'} has no module {last}, but {first_few(children)}"


def used_layers(model):
    """Layers of the ViT up to the one whose output the projector takes."""
    return model.config.vision_feature_layer % (len(model.vision.layers) + 1)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained matrix of low rank: W·x + 2·up·(down·x), which starts as
    W·x because up is zero (LoRA, arXiv 2106.09685; alpha = 2·rank as in LLaVA)."""

    SCALE = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        frozen = F.linear(x, self.weight, self.bias)
        return frozen + self.SCALE * F.linear(F.linear(x, self.down), self.up)


def frozen_linear_weights(model):
    """Yields (name, parameter) of the linear layers that do not train."""
    for layer, module in model.named_modules():
        if isinstance(module, (nn.Linear, LoRALinear)):
            for name, parameter in module.named_parameters(layer, recurse=False):
                is_embedding = parameter is model.decoder.embed_tokens.weight  # a tied head
                if not parameter.requires_grad and not is_embedding:
                    yield name, parameter


def copy_weights(model, process):
    """Copies each weight from the mapped model folder to the device, one at a time, in float32.
    Frozen linear layers in process.dtype, to which autocast rounds them at each use: the same
    results in half the memory. Their exact weights stay mapped, or, with --preset, on the CPU."""
    rounds = process.dtype != torch.float32
    rounded = dict(frozen_linear_weights(model)) if rounds else {}
    for name, parameter in model.named_parameters():
        if name in rounded:
            model.exact_weights[name] = parameter.data
        dtype = process.dtype if name in rounded else torch.float32
        parameter.data = parameter.data.to(process.device, dtype, copy=True)


def merged_weights(model, adapters):
    """Yields (name, tensor) of the trained model, gathered, frozen weights as they were read.
    Adapters are merged into their weights, and also put into the dict `adapters`."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith((".down", ".up")):
            continue  # an adapter: comes with its weight

        layer, tensor = name.removesuffix(".weight"), model.exact_weights.get(name, tensor)
        tensor = full_tensor(tensor)

        # W + 2·up·down.
        if f"{layer}.down" in state:
            for part in ("down", "up"):
                adapters[f"{layer}.{part}"] = full_tensor(state[f"{layer}.{part}"]).cpu()
            up, down = adapters[f"{layer}.up"], adapters[f"{layer}.down"]
            tensor = tensor.cpu() + LoRALinear.SCALE * up @ down
        yield name, tensor


def export_model(model, tokenizer, out):
    """Rank 0 writes the model folder and adapters.pt. All ranks must call it."""
    adapters = {}
    tensors = merged_weights(model, adapters)
    try:
        if is_rank0():
            write_model(model.config, tensors, tokenizer, out)
        if is_rank0() and adapters:
            content = {"scale": LoRALinear.SCALE, "adapters": adapters}
            write_atomically(out / "adapters.pt", lambda file: torch.save(content, file))
    finally:
        for _ in tensors:
            pass  # all ranks take part in gathering, to the end
