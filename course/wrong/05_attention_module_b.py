from kernels import attention
from kernels import rope as apply_rope
from model import PLAIN, select_positions


class Attention:
    def forward(self, x, rope, layout=PLAIN, cache=None):
        # The norms of Qwen3 come after the rotation.
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = apply_rope(q, k, *rope)
        q, k = self.q_norm(q), self.k_norm(k)

        if cache is not None:
            out = self.attend_cached(q, k, v, *cache)
        elif layout.split_index is not None:
            out = self.attend_side_by_side(q, k, v, *layout.split_index)
        else:
            out = attention(q, k, v, causal=True, key_ranges=layout.key_ranges)
        out = out.reshape(B, T, -1)
        return self.o_proj(select_positions(out, layout.loss_positions))
