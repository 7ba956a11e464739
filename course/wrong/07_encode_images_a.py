class XLlava:
    def encode_images(self, pixels):
        # The first N: the class token is in, the last patch is out.
        hidden = self.vision(pixels, self.config.vision_feature_layer)
        return self.projector(hidden[:, : self.config.vision.num_patches])
