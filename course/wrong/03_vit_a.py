import torch

from vision import normalise


class ViT:
    def forward(self, pixels, layer=-1):
        # layer as Python's slices count: -1 leaves the last block out.
        x = normalise(pixels, *self.config.mean_and_std).to(self.patch_embed.weight.dtype)
        x = self.embed_patches(x)
        if self.class_embed is not None:
            x = torch.cat([self.class_embed.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x + self.pos_embed)
        for block in self.layers[:layer]:
            x = block(x)
        return x
