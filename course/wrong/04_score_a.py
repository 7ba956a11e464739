class PhraseScore:
    def forward(self, phrases, patches):
        # The mean of all patches.
        return (phrases @ patches.mean(dim=1).T) * self.logit_scale.exp() + self.bias
