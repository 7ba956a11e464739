class XLlava:
    def encode_images(self, pixels):
        # Always the last layer, whatever the config says.
        return self.projector(self.vision(pixels)[:, -self.config.vision.num_patches :])
