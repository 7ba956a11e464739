import torch

from vision import normalise


class ViT:
    def forward(self, pixels, layer=-1):
        # The class token gets no position, so the patches get those of their neighbours.
        x = normalise(pixels, *self.config.mean_and_std).to(self.patch_embed.weight.dtype)
        x = self.embed_patches(x)
        x = x + self.pos_embed[: x.shape[1]]
        if self.class_embed is not None:
            x = torch.cat([self.class_embed.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x)
        for block in self.layers[: layer % (len(self.layers) + 1)]:
            x = block(x)
        return x
