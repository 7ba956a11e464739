class XLlava:
    def encode_images(self, pixels):
        # Drops the first vector, also where there is no class token.
        return self.projector(self.vision(pixels, self.config.vision_feature_layer)[:, 1:])
