class VisionBlock:
    def forward(self, x):
        # The norm behind the residual, as in the first Transformer.
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.fc2(self.act(self.fc1(x))))
