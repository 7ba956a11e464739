from vision import CLIP_MEAN, CLIP_STD


def normalise(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    # One mean and one deviation for all channels.
    return (pixels.float() / 255 - sum(mean) / 3) / (sum(std) / 3)
