"""Refuses a checkpoint that would run code: torch reads its file .metadata by pickle."""

import pickle

import torch

# What torch.distributed.checkpoint writes, beside the classes of its own modules.
ALLOWED = {
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
TORCH_TYPES = (torch.dtype, torch.layout, torch.memory_format)


class Unpickler(pickle.Unpickler):
    """Builds what torch.distributed.checkpoint writes, and calls nothing else."""

    def find_class(self, module, name):
        is_own = module.startswith("torch.distributed.checkpoint.")
        # A name with a dot leads from a module to whatever that has imported.
        if "." not in name and (is_own or module == "torch" or (module, name) in ALLOWED):
            found = super().find_class(module, name)
            is_class = isinstance(found, type) and found.__module__ == module
            if (module, name) in ALLOWED or (is_own and is_class):
                return found
            if module == "torch" and (found is torch.Size or isinstance(found, TORCH_TYPES)):
                return found
        raise ValueError(f"{module}.{name} in it: not what train.py writes")


def require_plain_metadata(checkpoint):
    """checkpoint: the path of a folder step-…. ValueError if its .metadata would call anything but
    torch's own classes. The other files in it are read as tensors alone."""
    path = checkpoint / ".metadata"
    with open(path, "rb") as file:
        try:
            Unpickler(file).load()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
