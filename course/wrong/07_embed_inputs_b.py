import torch


class XLlava:
    def embed_inputs(self, ids, pixels=None):
        # Nobody counts: images that are too many are lost without a word.
        x = self.decoder.embed_tokens(ids)
        if pixels is not None and len(pixels):
            image_mask = ids == self.config.image_token_id
            return x.masked_scatter(image_mask[..., None], self.encode_images(pixels).to(x.dtype))
        if self.training:
            S = self.config.vision.image_size
            x = x + 0 * self.encode_images(torch.zeros(1, 3, S, S, dtype=torch.uint8)).sum()
        return x
