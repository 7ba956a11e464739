"""The start of a run: a model folder from published parts, with new rows for new pieces.

Llama's decoder and CLIP's vision encoder, or both from a LLaVA, in the layout of transformers or as
first published (github.com/haotian-liu/LLaVA). A projector that no part has gets random weights.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from checkpoint.config import (
    get_object,
    parse_clip_config,
    parse_llama_config,
    require_layer,
    require_values,
)
from checkpoint.folder import (
    load_config,
    load_tokenizer,
    read_object,
    set_vocabulary,
    write_model,
)
from checkpoint.names import EMBEDDING, HEAD, match_tensors, tensor_shapes
from checkpoint.safetensors import load_weights
from model import ModelConfig, Projector
from tokenizer import CONTROL, Tokenizer, bpe, merge_vocabularies

WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


class BuildPlan(NamedTuple):
    """What `build` will do, from configs and tokenizers alone."""

    sources: dict  # {"decoder", "vision", maybe "projector": the folder or file of its weights}
    published: ModelConfig  # of the sources
    config: ModelConfig  # of the folder to write
    tokenizer: Tokenizer
    dtype: torch.dtype


def plan_build(llm, vision=None, projector=None, tokenizer=None, dtype=None):
    """The flags of the command line -> BuildPlan. ValueError if the parts do not fit together."""
    data, where = read_object(llm)
    published, sources = parse_llm_config(data, llm, where)

    # What comes from elsewhere.
    for part, given in (("vision", vision), ("projector", projector)):
        if given and part in sources:
            raise ValueError(f"{llm}: it brings its own {part}: leave out --{part}")
        if given:
            sources[part] = given
    if "vision" not in sources:
        named = data.get("mm_vision_tower", "none")
        raise ValueError(
            f"{llm}: no vision encoder (it names {named}): give CLIP's folder with --vision"
        )
    if vision:
        clip = parse_clip_config(*read_object(vision))
        require_layer(published.vision_feature_layer, clip, where)
        published = replace(published, vision=clip)

    # The vocabulary. Padding rows of a table stay, unless new pieces take their place.
    if tokenizer:
        new = Tokenizer.load(tokenizer)
    else:
        new = merge_vocabularies(load_tokenizer(llm), [])  # appends <image> and <pad>
    if None in (new.image_id, new.pad_id):
        reason = "it has no <image> or no <pad>: python tokenizer.py merge adds them"
        raise ValueError(f"{tokenizer}: {reason}")
    vocab_size = max(published.text.vocab_size, new.vocab_size)
    config = set_vocabulary(published, new, vocab_size)

    # The type of the weights.
    text_config = get_object(data, "text_config", where)
    stored = data.get("dtype") or data.get("torch_dtype") or text_config.get("torch_dtype")
    dtype = dtype or stored or "float32"
    if dtype not in WRITTEN_DTYPES:
        raise ValueError(f"{where}: dtype is {dtype!r}, supported: {', '.join(WRITTEN_DTYPES)}")
    return BuildPlan(sources, published, config, new, getattr(torch, dtype))


def parse_llm_config(data, llm, where):
    """The config.json of llm -> (ModelConfig, {part: llm} for the parts that it brings)."""
    sources = {"decoder": llm}
    if "mm_vision_tower" in data:
        # LLaVA as first published: Llama's config with more fields.
        required = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
        require_values(data, where, required | {"mm_use_im_start_end": False})
        padded = data.get("image_aspect_ratio", "pad") == "pad"
        config = ModelConfig(
            text=parse_llama_config(data | {"model_type": "llama"}, where),
            vision_feature_layer=data.get("mm_vision_select_layer", -2),
            image_aspect_ratio="pad" if padded else "square",
        )
        return config, sources | {"projector": llm}
    if data.get("model_type") == "llava":
        return load_config(llm), sources | {"projector": llm, "vision": llm}
    return ModelConfig(text=parse_llama_config(data, where)), sources


def build(plan, out, init="mean", seed=0):
    """Writes the model folder of a plan, tensor by tensor. init: see expand_rows."""
    tensors = collect_tensors(plan)
    if "projector" not in plan.sources:
        torch.manual_seed(seed)
        projector = Projector(plan.config.vision.hidden_size, plan.config.text.hidden_size)
        projector.init_weights()
        tensors |= {f"projector.{name}": x for name, x in projector.state_dict().items()}

    old, generator = load_tokenizer(plan.sources["decoder"]), torch.Generator().manual_seed(seed)

    # One at a time: an expanded table is in memory only while it is written.
    def expanded():
        for name, tensor in tensors.items():
            if name in (EMBEDDING, HEAD):
                tensor = expand_rows(tensor, old, plan.tokenizer, init, generator, plan.dtype)
            yield name, tensor

    write_model(plan.config, expanded(), plan.tokenizer, out, plan.dtype)
    print(f"→ {out}")


def collect_tensors(plan):
    """{our name: tensor}, mapped, of all parts that have a source."""
    sources, llm = dict(plan.sources), plan.sources["decoder"]
    weights = {source: load_weights(source) for source in set(sources.values())}
    clip = sources["vision"] if sources["vision"] != llm else None
    # LLaVA as first published names CLIP, but may hold a vision encoder of its own.
    if clip and any(name.startswith("model.vision_tower.") for name in weights[llm]):
        reason = f"which may have been tuned; {clip} gives the shapes"
        print(f"vision: the weights are those in {llm}, {reason}")
        sources["vision"] = llm

    # Several parts may come from one source, which must have nothing else.
    tensors, shapes = {}, tensor_shapes(plan.published)
    for source in dict.fromkeys(sources.values()):
        parts = [part for part in sources if sources[part] == source]
        here = {name: s for name, s in shapes.items() if name.partition(".")[0] in parts}
        tensors |= match_tensors(weights[source], here, source, is_clip=source == clip)
    return tensors


@torch.no_grad()
def expand_rows(rows, old, new, init="mean", generator=None, dtype=None):
    """Rows (V, C) of an embedding or a head for the tokenizer `old` -> (V', C) for `new`, which has
    more pieces. Old rows are kept to the bit. The row of a new piece is, by init,

      mean    the average of the rows of the old pieces that spelled it until now
      random  drawn from a normal distribution as wide as the old rows (X-LLaVA, §3.1)

    A control piece, which has no spelling, gets the mean of all rows. Rows behind the pieces of
    `old` are padding (LLaVA has 62): new pieces take their place."""
    n, m = old.vocab_size, new.vocab_size
    if m < n or any(old.piece(i) != new.piece(i) for i in range(n)):
        reason = f"is not the old one ({n:,} pieces) with pieces appended"
        raise ValueError(f"the new tokenizer ({m:,} pieces) {reason}")
    if len(rows) < n:
        raise ValueError(f"the model has {len(rows):,} rows, its tokenizer {n:,} pieces")

    out = torch.empty(max(m, len(rows)), rows.shape[1], dtype=dtype or rows.dtype)
    out[: len(rows)] = rows
    mean, std = row_statistics(rows[:n])
    for i in range(n, m):
        if new.pieces[i].type == CONTROL:
            out[i] = mean
        elif init == "mean":
            out[i] = rows[spell(new.piece(i), old)].float().mean(dim=0)
        else:
            out[i].normal_(0, std, generator=generator)
    return out


def row_statistics(rows):
    """rows (V, C) -> (their mean (C,) in float64, the standard deviation of all numbers)."""
    total = square = torch.zeros(rows.shape[1], dtype=torch.float64)
    # In blocks: the whole table is never in memory as float64.
    for part in rows.split(128):
        total = total + part.double().sum(dim=0)
        square = square + part.double().square().sum(dim=0)
    variance = square.mean() / len(rows) - (total.mean() / len(rows)) ** 2
    return total / len(rows), variance.sqrt().item()


def spell(text, tokenizer):
    """The ids of a piece's text in a tokenizer that does not have the piece."""
    ids = []
    for piece in bpe(list(text), tokenizer.scores):
        if piece in tokenizer.ids:
            ids.append(tokenizer.id(piece))
        elif tokenizer.byte_fallback:
            ids += [tokenizer.id(f"<0x{byte:02X}>") for byte in piece.encode()]
        else:
            ids.append(tokenizer.unk_id)
    return ids
