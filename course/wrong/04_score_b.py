class PhraseScore:
    def forward(self, phrases, patches):
        # logit_scale is a logarithm.
        B, N, C = patches.shape
        cosines = (phrases @ patches.view(B * N, C).T).view(-1, B, N)
        return cosines.amax(dim=2) * self.logit_scale + self.bias
