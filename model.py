"""The whole model: image → ViT → projector → Llama-style decoder → text.

Reading order: tokenizer → vision → **model** → data → train → generate.
Sources: LLaVA-1.5 (arXiv 2310.03744), X-LLaVA (2403.11399), Llama 2 (2307.09288).

    ids       <s>  USER:  <image> <image> … <image>  What …     token ids, one <image> per patch
    embed      e    e       p₁      p₂        p_N     e         e: token embeddings,
                                                                p: projector(ViT(image))
    decoder   L × [ x + attention(rms_norm(x)) ;  x + swiglu_mlp(rms_norm(x)) ]
    head      rms_norm(x) @ lm_head.T → logits over the vocabulary → next token

    python model.py                  # the presets and their parameter counts
    python model.py x-llava-7b       # one preset with all its fields

Dimensions: B samples, T tokens, C width, H query heads, K key-value heads, D head dim,
V vocabulary, L layers, I images, N patches per image, S image size, R records, P tokens of their
prefix, U own tokens of the longest, n positions with a loss, and ignored ones as filler.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    add_rms_norm,
    attention,
    attention_with_kvcache,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)
from kernels import rope as apply_rope
from kernels.rope import RopeScaling, rope_table
from vision import VisionConfig, ViT
from vocabulary.command import Parser, run_main

IGNORE_INDEX = -100  # a target with this value adds nothing to the loss


# ---------------- configuration
@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder. The fields have the names of transformers' LlamaConfig."""

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
    rope_scaling: RopeScaling | None = None
    model_type: str = "llama"  # "qwen2": biases of q, k and v; "qwen3": norms of each head's q, k

    def __post_init__(self):
        H, K = self.num_attention_heads, self.num_key_value_heads
        if self.model_type not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"model_type {self.model_type!r}: must be llama, qwen2 or qwen3")
        if H % K:
            raise ValueError(f"num_attention_heads {H}: no multiple of num_key_value_heads {K}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of channels")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, decoder, and how an image enters the decoder. Defaults: LLaVA-1.5's choices."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: DecoderConfig = field(default_factory=DecoderConfig)
    vision_feature_layer: int = -2  # which hidden state of the ViT goes to the projector
    image_aspect_ratio: str = "pad"  # how an image becomes a square: see vision.preprocess
    image_token_id: int = -1  # id of <image>; set when the vocabulary is known
    pad_token_id: int = -1


class Layout(NamedTuple):
    """Positions, attention mask and output positions of a batch, where they are not the usual ones.

    positions       (B or 1, T) int: each token's position in its own record or sample
    key_ranges      two (B, T) int32: for each query its first key, and the one after its last,
                    for packed samples; they replace the causal mask (kernels/attention.py)
    split_index     (prefixes (B, P), groups of (own (R, U), keys (R, P + U)), merge (T,)): records
                    side by side behind one image, all in one row (1, T) (data.side_by_side)
    loss_positions  (n,) flat indices b·T + t of the targets, and an ignored one as filler
    """

    positions: torch.Tensor | None = None
    key_ranges: tuple | None = None
    split_index: tuple | None = None
    loss_positions: torch.Tensor | None = None


PLAIN = Layout()  # causal attention, positions 0 … T−1, every output


# ---------------- the decoder
class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE. One method per way to attend."""

    def __init__(self, config):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias)
        normed = config.model_type == "qwen3"
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if normed else nn.Identity()

    def forward(self, x, rope, layout=PLAIN, cache=None):
        """x (B, T, C) -> (B, T, C), or (n, C) if the layout has loss_positions.
        rope: (cos, sin, positions (B or 1, T) or None for 0 … T−1). cache: this layer's keys,
        values (B, size, K, D) and lengths (B,), or None."""
        q, k, v = self.project(x, rope)
        if cache is not None:
            out = self.attend_cached(q, k, v, *cache)
        elif layout.split_index is not None:
            out = self.attend_side_by_side(q, k, v, *layout.split_index)
        else:
            out = attention(q, k, v, causal=True, key_ranges=layout.key_ranges)

        out = out.reshape(*x.shape[:2], -1)  # (B, T, H, D) or (B·T, H, D) -> (B, T, H·D)
        return self.o_proj(select_positions(out, layout.loss_positions))

    def project(self, x, rope):
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, K, D); q and k are rotated."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, C) -> (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, C) -> (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        return *apply_rope(self.q_norm(q), self.k_norm(k), *rope), v

    def attend_side_by_side(self, q, k, v, prefixes, groups, merge):
        """Training on several records of one image: each record attends to the shared prefix and
        to itself. The prefix attends to itself, once for all its records (data.side_by_side)."""

        def rows(tensor, index):  # (1, T, H, D) at (R, U) -> (R, U, H, D)
            return tensor[0].index_select(0, index.flatten()).view(*index.shape, *tensor.shape[2:])

        pairs = (prefixes, prefixes), *groups  # the last query is aligned with the last key
        outs = [attention(rows(q, own), rows(k, keys), rows(v, keys)) for own, keys in pairs]
        return torch.cat([out.flatten(0, 1) for out in outs]).index_select(0, merge)  # -> (T, H, D)

    def attend_cached(self, q, k, v, k_cache, v_cache, lengths):
        """Generation: appends k and v to the caches (B, slots, K, D), which hold `lengths` (B,)
        tokens, and attends to all that is cached. -> (B, T, H, D); of one token (B, H, D)."""
        B, T = q.shape[:2]
        # Sample b's new tokens go to slots lengths[b], lengths[b] + 1 …
        sample = torch.arange(B, device=q.device)[:, None]
        slots = lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
        k_cache[sample, slots] = k
        v_cache[sample, slots] = v

        if T == 1:  # the usual step of generation has a kernel of its own
            return attention_with_kvcache(q[:, 0], k_cache, v_cache, lengths + 1)

        # A prompt, or a further turn of a chat: a query attends to the cache up to itself.
        key_ranges = (torch.zeros_like(slots, dtype=torch.int32), (slots + 1).int())
        return attention(q, k_cache, v_cache, causal=False, key_ranges=key_ranges)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer of the decoder: attention and MLP, each behind a norm and a residual."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, layout=PLAIN, cache=None):
        """x (B, T, C) -> (B, T, C), or (n, C) at the layout's loss_positions: the MLP of the last
        block runs only where the loss needs it."""
        h = self.attn(self.attn_norm(x), rope, layout, cache)

        # The residual stream at h's positions. Then x ← x + h, h ← mlp_norm(x) in one pass.
        x = select_positions(x, layout.loss_positions)
        h, x = add_rms_norm(h, x, self.mlp_norm.weight, self.mlp_norm.eps)
        return x + self.mlp(h)


class Decoder(nn.Module):
    """Llama 2 and what followed it (transformers: Llama, Qwen2 and Qwen3ForCausalLM)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.norm = RMSNorm(C, config.rms_norm_eps)
        # Not nn.Embedding(V, C): its random numbers on "meta" import torch._dynamo, a second more.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.activation_checkpointing = False  # keep only the input of each block for backward
        self.rope_cache = {}  # (device, length) -> (cos, sin); not parameters, never saved

    def init_weights(self):
        """Random weights by fan-in. Residual branches start smaller, by depth (GPT-2, §2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue  # norms stay at one
            std = weight.shape[1] ** -0.5
            if "lm_head" in name:
                std = 0.02  # as GPT-2; a tied head is listed as embed_tokens only
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                # Two branches per layer are added up: keep the variance of their sum at one.
                std *= (2 * len(self.layers)) ** -0.5
            nn.init.normal_(weight, std=std)

    @torch.inference_mode(False)  # a table made while generating is used in training, too
    def rope_cos_sin(self, length, device):
        """cos and sin of each position's angles, each float32 (at least length, D/2)."""
        # Grow in powers of two, so that decoding does not build a new table at each step.
        length = 1 << (length - 1).bit_length()
        if (device, length) not in self.rope_cache:
            config = self.config
            table = rope_table(length, config.head_dim, config.rope_theta, config.rope_scaling)
            self.rope_cache[device, length] = [values.to(device) for values in table]
        return self.rope_cache[device, length]

    def forward(self, x, layout=PLAIN, cache=None):
        """Input embeddings x (B, T, C) -> hidden states (B, T, C) after the last norm, or (n, C)
        at the layout's loss_positions. cache: a KVCache; the new keys and values are written behind
        its lengths, and the caller then adds T to them."""
        T = x.shape[1]
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # the residual stream stays float32; only matrix products use bf16

        # With a cache, the new tokens follow those that are cached.
        positions, length = layout.positions, T
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=x.device)
            length = cache.size
        rope = (*self.rope_cos_sin(length, x.device), positions)

        # Only the last block may skip positions: before it, all keys and values are needed.
        full_layout = layout._replace(loss_positions=None)
        last = len(self.layers) - 1
        for i, block in enumerate(self.layers):
            block_layout = layout if i == last else full_layout
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, block_layout, use_reentrant=False)
            else:
                x = block(x, rope, block_layout, cache and cache.layer(i))

        return self.norm(x)


class KVCache:
    """Keys and values of all layers, for `batch` samples with lengths of their own.

    k, v: (layers, batch, size, K, D); lengths: (batch,) tokens that are cached."""

    def __init__(self, config, batch, size, device, dtype):
        shape = (config.num_hidden_layers, batch, size, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.size = size

    def layer(self, i):
        """(keys, values, lengths) of layer i."""
        return self.k[i], self.v[i], self.lengths


def select_positions(x, positions):
    """x (B, T, C) at flat positions b·T + t -> (n, C); all of x if positions is None."""
    if positions is None:
        return x
    return x.flatten(0, 1).index_select(0, positions)


# ---------------- whole model
class Projector(nn.Sequential):
    """From the ViT's width to the decoder's: Linear, GELU, Linear (LLaVA-1.5's "MLP")."""

    def __init__(self, vision_width, width):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def init_weights(self):
        for layer in (self[0], self[2]):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
            nn.init.zeros_(layer.bias)


class XLlava(nn.Module):
    """The bilingual vision-language model (transformers: LlavaForConditionalGeneration)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.decoder = Decoder(config.text)
        self.always_encode = False  # FSDP: all ranks must run the encoder, or none

    @property
    def device(self):
        return self.decoder.norm.weight.device

    def init_weights(self):
        for module in (self.vision, self.projector, self.decoder):
            module.init_weights()
        return self

    def encode_images(self, pixels):
        """Images uint8 (I, 3, S, S) -> image features (I, N, C) for the decoder."""
        hidden = self.vision(pixels, self.config.vision_feature_layer)
        return self.projector(hidden[:, -self.config.vision.num_patches :])  # no class token

    def embed_inputs(self, ids, pixels=None):
        """Token ids (B, T) with N <image> ids per image, and the images uint8 (I, 3, S, S) in
        reading order -> input embeddings (B, T, C). ValueError if their numbers differ."""
        x = self.decoder.embed_tokens(ids)
        I, N = 0 if pixels is None else len(pixels), self.config.vision.num_patches
        image_mask = (ids == self.config.image_token_id).flatten()  # (B, T) -> (B·T,)
        # Counting makes a GPU wait, so training there does not. A generated token is no image.
        must_count = (ids.is_cpu or not self.training) and ids.shape[1] > 1
        if must_count and (count := int(image_mask.sum())) != I * N:
            raise ValueError(f"{count} <image> tokens for {I} images of {N} patches")

        if I:  # the patch features replace the embeddings of the <image> tokens
            features = self.encode_images(pixels)
            places = torch.nonzero_static(image_mask, size=I * N)[:, 0]
            features = features.flatten(0, 1).to(x.dtype)  # (I·N, C)
            return x.flatten(0, 1).index_copy(0, places, features).view(*ids.shape, -1)

        trains = any(p.requires_grad for m in (self.projector, self.vision) for p in m.parameters())
        if self.training and (self.always_encode or trains):
            # Text alone: encode a blank image, times zero. Every rank then has a gradient for
            # projector and ViT, and joins the all-reduce.
            S = self.config.vision.image_size
            blank = torch.zeros(1, 3, S, S, dtype=torch.uint8, device=ids.device)
            x = x + 0 * self.encode_images(blank).sum()
        return x

    def forward(self, ids, pixels=None, layout=PLAIN, cache=None):
        """ids (B, T), pixels uint8 (I, 3, S, S) or None -> hidden states (B, T, C), or (n, C) at
        the layout's loss_positions."""
        return self.decoder(self.embed_inputs(ids, pixels), layout, cache)

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., V), float32."""
        return self.decoder.lm_head(hidden).float()

    def loss(self, ids, targets, pixels=None, layout=PLAIN):
        """The sum of the cross-entropies of all targets, a float32 scalar. Divide it by the number
        of targets in the *global* batch. targets (B, T): the id that follows, or IGNORE_INDEX."""
        hidden = self(ids, pixels, layout).view(-1, self.config.text.hidden_size)
        targets = targets.flatten()
        if layout.loss_positions is not None:  # hidden has rows for these positions only
            targets = targets[layout.loss_positions]

        # Head and loss in one: the logits of all tokens are never in memory at once.
        return linear_cross_entropy(hidden, self.decoder.lm_head.weight, targets, IGNORE_INDEX)


# ---------------- presets
# "tiny" is the demo's, for two CPU cores. "x-llava-*": Llama 2 with the paper's vocabulary of
# 32,000 + 7,478 pieces, and CLIP ViT-L/14-336.
PRESETS = {
    "tiny": ModelConfig(
        vision=VisionConfig(
            image_size=48,
            patch_size=8,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        text=DecoderConfig(
            vocab_size=2000,  # init_model sets it to the tokenizer's
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        vision_feature_layer=-1,
    ),
    "x-llava-7b": ModelConfig(text=DecoderConfig(vocab_size=39478)),
    # vocabulary, width, inner width of the MLP, layers, query heads, key-value heads
    "x-llava-13b": ModelConfig(text=DecoderConfig(39478, 5120, 13824, 40, 40, 40)),
}


def parameter_counts(config):
    """{module: parameters}. On the meta device nothing is allocated: 13B count on any machine."""
    with torch.device("meta"):
        model = XLlava(config)
    return {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("preset", nargs="?", choices=PRESETS, help="show this one with its fields")
    args = parser.parse_args()
    for name, config in PRESETS.items():
        if args.preset in (None, name):
            counts = parameter_counts(config)
            parts = ", ".join(f"{module} {count:,}" for module, count in counts.items())
            print(f"{name}: {sum(counts.values()):,} parameters ({parts})")
            if args.preset:
                print(f"  vision  {config.vision}\n  text    {config.text}")


if __name__ == "__main__":
    run_main(main, "model.py")
