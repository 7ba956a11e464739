import torch


class XLlava:
    def embed_inputs(self, ids, pixels=None):
        # The features are copied without their graph: the projector never learns.
        x = self.decoder.embed_tokens(ids)
        if pixels is not None and len(pixels):
            features = self.encode_images(pixels).flatten(0, 1)
            at = ids == self.config.image_token_id
            if int(at.sum()) != len(features):
                raise ValueError("wrong number of <image> tokens")
            x = x.clone()
            x[at] = features.detach().to(x.dtype)
        elif self.training:
            S = self.config.vision.image_size
            x = x + 0 * self.encode_images(torch.zeros(1, 3, S, S, dtype=torch.uint8)).sum()
        return x
