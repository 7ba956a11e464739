class XLlava:
    def encode_images(self, pixels):
        # The graph ends before the ViT: nothing could train it.
        hidden = self.vision(pixels, self.config.vision_feature_layer).detach()
        return self.projector(hidden[:, -self.config.vision.num_patches :])
