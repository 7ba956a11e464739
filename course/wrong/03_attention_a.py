from kernels import attention


class VisionAttention:
    def forward(self, x):
        # A causal mask, as in the decoder.
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1)
        k = self.k_proj(x).view(B, T, self.heads, -1)
        v = self.v_proj(x).view(B, T, self.heads, -1)
        return self.out_proj(attention(q, k, v).reshape(B, T, C))
