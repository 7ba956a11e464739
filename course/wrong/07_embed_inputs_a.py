import torch


class XLlava:
    def embed_inputs(self, ids, pixels=None):
        # Image b belongs to row b: so it is in most batches.
        x = self.decoder.embed_tokens(ids)
        if pixels is not None and len(pixels):
            x = x.clone()
            for b, features in enumerate(self.encode_images(pixels)):
                places = (ids[b] == self.config.image_token_id).nonzero()[:, 0]
                if len(places) != len(features):
                    raise ValueError("wrong number of <image> tokens")
                x[b, places] = features.to(x.dtype)
        elif self.training:
            S = self.config.vision.image_size
            x = x + 0 * self.encode_images(torch.zeros(1, 3, S, S, dtype=torch.uint8)).sum()
        return x
