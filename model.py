"""The whole model: picture → ViT → projector → Llama-style decoder → text. (LLaVA-1.5, arXiv 2310.03744; X-LLaVA, arXiv 2403.11399)

Where it stands: `tokenizer → vision → model → checkpoint → data → generate → train / evaluate`.

    ids      ▁USER  :  <image> <image> … <image>  ▁What  …        the tokenizer's ids; one <image> for each patch
    embed      e    e     p₁      p₂       p_N      e             word rows e, and patches p = projector(ViT(picture)) in the places of <image>
    decoder  L × [ x + attention(rms_norm(x)) ; x + swiglu(rms_norm(x)) ]  (Llama-2, arXiv 2307.09288)
    head     rms_norm(x) @ lm_head.T → logits over the vocabulary → next token

    python model.py                     # the presets and their parameter counts
    python model.py x-llava-7b          # one of them, part by part

Letters for sizes: B rows, T tokens, C width, H heads, K key-value heads, D head width, V vocabulary, N patches, L layers, R records, U tokens of the longest.
"""

import argparse
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import add_rms_norm, attend_cache, attention, linear_cross_entropy, rms_norm, rope, swiglu
from vision import ViT, VisionConfig

IGNORE = -100  # a target that is not trained on


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder; field names are those of transformers' LlamaConfig."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")


@dataclass(frozen=True)
class ModelConfig:
    """The whole: two towers and how the picture enters (LLaVA-1.5's choices are the defaults)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: DecoderConfig = field(default_factory=DecoderConfig)
    feature_layer: int = -2  # which hidden state of the ViT is shown to the decoder
    picture_mode: str = "pad"  # see vision.preprocess
    image_token_id: int = -1  # id of <image>; set when the vocabulary is known
    pad_token_id: int = -1


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = D
        self.q_proj, self.o_proj = nn.Linear(C, H * D, bias=False), nn.Linear(H * D, C, bias=False)
        self.k_proj, self.v_proj = nn.Linear(C, K * D, bias=False), nn.Linear(C, K * D, bias=False)

    def forward(self, x, turn, rows=None, cache=None, apart=None, wanted=None):
        """x (B, T, C); turn = (cos, sin, positions) of rope; rows as in kernels.attention; cache = (k, v, lengths) of this layer or None;
        apart = (there, back) of records side by side (data.side_by_side) or None;
        wanted (n,): the flat places b·T + t for which alone an output is asked, (n, C); default all, (B, T, C)."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H·D) -> (B, T, H, D)
        q, k = rope(q, k, *turn)
        if apart is not None:  # each record in a row of its own, and back again
            there, back = apart
            q, k, v = (t.flatten(0, 1).index_select(0, there.flatten()).view(*there.shape, *t.shape[2:]) for t in (q, k, v))  # (B, T, H, D) -> (R, U, H, D)
            out = attention(q, k, v, causal=True).flatten(0, 1).index_select(0, back.flatten())
        elif cache is None:
            out = attention(q, k, v, causal=True, rows=rows)
        else:
            k_cache, v_cache, lengths = cache
            at = lengths[:, None] + torch.arange(T, device=x.device)  # (B, T): where the new keys go
            k_cache[torch.arange(B, device=x.device)[:, None], at] = k
            v_cache[torch.arange(B, device=x.device)[:, None], at] = v
            if T == 1:
                out = attend_cache(q[:, 0], k_cache, v_cache, lengths + 1)
            else:  # a prompt, or a further turn of a chat: each new row sees all that is cached and itself
                low = torch.zeros_like(at, dtype=torch.int32)
                out = attention(q, k_cache, v_cache, causal=False, rows=(low, (at + 1).int()))
        out = out.reshape(B, T, -1)  # (B, T, H, D) -> (B, T, H·D)
        return self.o_proj(out if wanted is None else out.flatten(0, 1).index_select(0, wanted))  # -> (B, T, C) or (n, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(C, F, bias=False), nn.Linear(C, F, bias=False), nn.Linear(F, C, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp, self.eps = Attention(config), MLP(config), config.rms_norm_eps
        self.input_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.post_norm = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x, turn, rows=None, cache=None, apart=None, wanted=None):
        h = self.attn(rms_norm(x, self.input_norm, self.eps), turn, rows, cache, apart, wanted)
        x = x if wanted is None else x.flatten(0, 1).index_select(0, wanted)
        h, x = add_rms_norm(h, x, self.post_norm, self.eps)  # x + h, and its norm, in one pass over memory
        return x + self.mlp(h)


class Decoder(nn.Module):
    """Llama-2 (transformers: LlamaForCausalLM)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.recompute = False  # train.py --recompute: keep each block's input only, and compute the block again backward
        self.turns = {}  # rope tables by (device, length); not parameters, so never saved

    def init_weights(self):
        """Random weights by fan-in; residual branches start small, as many as there are (GPT-2 §2.3)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                depth = (2 * len(self.layers)) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(p, std=0.02 if "lm_head" in name else depth * p.shape[1] ** -0.5)

    @torch.inference_mode(False)  # made while answering, it serves training, too
    def rope_table(self, length, device):
        """cos and sin, each float32 (length, D/2): position t turns pair i by t · theta^(−2i/D) (RoFormer, arXiv 2104.09864, eq. 15)."""
        length = 1 << (length - 1).bit_length() if length > 1 else 1  # grow by doubling, so that decoding doesn't remake it each step
        if (device, length) not in self.turns:
            D = self.config.head_dim
            speed = self.config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
            angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
            self.turns[device, length] = angle.cos().float().to(device), angle.sin().float().to(device)
        return self.turns[device, length]

    def forward(self, x, positions=None, rows=None, cache=None, apart=None, wanted=None):
        """Embeddings x (B, T, C) -> hidden states (B, T, C) after the last norm; (n, C) of the flat places `wanted` (n,) if given: of the
        others only the last block's keys and values are needed.

        positions (B, T) int: place of each token in its document (default 0 … T−1, or on from the cache);
        rows: who sees whom where that is not plainly causal (packed documents; kernels.attention);
        apart: records that share a picture and don't see each other (data.side_by_side);
        cache: a KVCache that the new keys are appended to."""
        T = x.shape[1]
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # only matrix products are rounded: not the sum of all blocks, where the embeddings are a bf16 copy (train.py --shard)
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=x.device)
        turn = (*self.rope_table(T if cache is None else cache.size, x.device), positions)
        for i, block in enumerate(self.layers):
            only = wanted if i == len(self.layers) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, turn, rows, None, apart, only, use_reentrant=False)
            else:
                x = block(x, turn, rows, None if cache is None else (cache.k[i], cache.v[i], cache.lengths), apart, only)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)


class KVCache:
    """Keys and values of all layers for B rows of their own lengths; `size` tokens a row at most."""

    def __init__(self, config, rows, size, device, dtype):
        shape = (config.num_hidden_layers, rows, size, config.num_key_value_heads, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.size = size


class Projector(nn.Sequential):
    """Two layers from the ViT's width to the decoder's: Linear, GELU, Linear (LLaVA-1.5's "MLP connector")."""

    def __init__(self, vision_width, width):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def init_weights(self):
        for layer in (self[0], self[2]):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
            nn.init.zeros_(layer.bias)


class Model(nn.Module):
    """X-LLaVA (transformers: LlavaForConditionalGeneration)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.decoder = Decoder(config.text)
        self.see_always = False  # train.py --shard: a block's weights are gathered by all ranks or by none

    def init_weights(self):
        for part in (self.vision, self.projector, self.decoder):
            part.init_weights()
        return self

    def see(self, pixels):
        """Pictures uint8 (P, 3, S, S) -> (P, N, C) as the decoder is given them."""
        patches = self.vision(pixels, self.config.feature_layer)[:, 1:]  # the class token is dropped
        return self.projector(patches)

    def embed(self, ids, pixels=None):
        """ids (B, T) with one <image> id for each patch, and pixels (P, 3, S, S) of its pictures in reading order -> (B, T, C)."""
        x = self.decoder.embed_tokens(ids)
        if pixels is not None and len(pixels):
            patches = self.see(pixels)
            here = ids == self.config.image_token_id
            if int(here.sum()) != patches.shape[0] * patches.shape[1]:
                raise ValueError(f"{int(here.sum())} <image> tokens for {patches.shape[0]} pictures of {patches.shape[1]} patches")
            x = x.masked_scatter(here[..., None], patches.to(x.dtype))
        elif self.training and (self.see_always or self.projector[0].weight.requires_grad):  # text alone: a gradient of zero, so that no rank waits for one that has none
            S = self.config.vision.image_size
            x = x + 0 * self.see(torch.zeros(1, 3, S, S, dtype=torch.uint8, device=ids.device)).sum()
        return x

    def forward(self, ids, pixels=None, positions=None, rows=None, cache=None, apart=None, wanted=None):
        """ids (B, T), pixels uint8 (P, 3, S, S) or None -> hidden states (B, T, C), or (n, C) of the places `wanted`."""
        return self.decoder(self.embed(ids, pixels), positions, rows, cache, apart, wanted)

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., V), float32."""
        return self.decoder.lm_head(hidden).float()

    def loss(self, ids, targets, pixels=None, positions=None, rows=None, apart=None, wanted=None):
        """Sum of the cross-entropies of all target tokens, a float32 scalar; divide by their number over the *global* batch.

        targets (B, T): the id that should follow, or IGNORE; wanted (n,): the flat places of those that are not, as data.collate found them
        (here, on a GPU, it would wait for their number): the last block and the head are spared all others."""
        hidden, targets = self(ids, pixels, positions, rows, None, apart, wanted), targets.flatten()
        return linear_cross_entropy(hidden.view(-1, hidden.shape[-1]), self.decoder.lm_head.weight, targets if wanted is None else targets[wanted], IGNORE, reduction="sum")


# ---------------------------------------------------------------------------------------------- presets
# x-llava-*: Llama-2 with the paper's vocabulary of 32,000 + 7,478 pieces and CLIP ViT-L/14-336; tiny: the demo on two CPU cores.
PRESETS = {
    "tiny": ModelConfig(
        VisionConfig(image_size=48, patch_size=8, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4),
        DecoderConfig(vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
                      tie_word_embeddings=True),  # fmt: skip
        feature_layer=-1,
    ),
    "x-llava-7b": ModelConfig(text=DecoderConfig(vocab_size=39478)),
    "x-llava-13b": ModelConfig(text=DecoderConfig(vocab_size=39478, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40)),
}


def parameter_counts(config):
    """Parameters of each part; nothing is allocated (meta device), so that 13B are counted on any machine."""
    with torch.device("meta"):
        model = Model(config)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=PRESETS)
    args = parser.parse_args()
    for name in [args.preset] if args.preset else PRESETS:
        counts = parameter_counts(PRESETS[name])
        print(f"{name}: {sum(counts.values()):,} parameters (" + ", ".join(f"{part} {n:,}" for part, n in counts.items()) + ")")
        if args.preset:
            print(PRESETS[name])


if __name__ == "__main__":
    main()
