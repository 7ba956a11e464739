"""The start of a run: a model folder from published parts, with new rows for new pieces.

Llama's decoder and CLIP's vision encoder, or both from a LLaVA, in the layout of transformers or as
first published (github.com/haotian-liu/LLaVA). A projector that no part has gets random weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.config import (
    ALLOWED,
    ANY_VALUE,
    check_fields,
    drop_nulls,
    get_object,
    parse_text_config,
    parse_vision_config,
    require_layer,
)
from checkpoint.folder import (
    check_image_processors,
    load_config,
    load_tokenizer,
    read_aspect_ratio,
    read_object,
    set_vocabulary,
    write_model,
    write_settings,
)
from checkpoint.names import EMBEDDING, HEAD, match_tensors, tensor_shapes
from checkpoint.safetensors import load_weights
from model import ModelConfig, Projector
from tokenizer import CONTROL, ByteLevelTokenizer, Tokenizer, bpe
from vocabulary.control_pieces import add_control_pieces, require_control_pieces

WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


class BuildPlan(NamedTuple):
    """What `build` will do, from configs and tokenizers alone."""

    sources: dict  # {"decoder", "vision", maybe "projector": the folder or file of its weights}
    published: ModelConfig  # of the sources
    config: ModelConfig  # of the folder to write
    tokenizer: Tokenizer
    dtype: torch.dtype


def plan_build(
    llm, vision=None, projector=None, tokenizer=None, dtype=None, padding_rows=None, layer=None
):
    """The flags of the command line -> BuildPlan. ValueError if the parts do not fit together."""
    data, where = read_object(llm)
    published, sources = parse_llm_config(data, llm, where)
    if layer is not None:
        own = published.vision_feature_layer
        if "projector" in sources and layer != own:
            raise ValueError(f"{llm}: its projector was trained on layer {own}, not on {layer}")
        published = replace(published, vision_feature_layer=layer)

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
        encoder, ratio = load_vision_config(vision, data, published, where)
        published = replace(published, vision=encoder, image_aspect_ratio=ratio)

    # The vocabulary. Padding rows of a table stay, unless new pieces take their place.
    new = plan_tokenizer(llm, tokenizer, published.text.vocab_size, padding_rows)
    config = set_vocabulary(published, new, max(published.text.vocab_size, new.vocab_size))

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
        # LLaVA as first published: Llama's config with more fields, and LLaVA's own defaults.
        own = {"mm_projector_type": "linear", "image_aspect_ratio": "square"} | drop_nulls(data)
        names = {*ALLOWED["first_llava"], *ANY_VALUE["first_llava"], "image_aspect_ratio"}
        ratio = {"image_aspect_ratio": ["pad", "square"]}
        own = {name: value for name, value in own.items() if name in names}
        check_fields(own, "first_llava", where, **ratio)
        text = {name: value for name, value in data.items() if name not in names}
        config = ModelConfig(
            text=parse_text_config(text | {"model_type": "llama"}, where),
            vision_feature_layer=own.get("mm_vision_select_layer", -2),
            image_aspect_ratio=own["image_aspect_ratio"],
        )
        return config, sources | {"projector": llm}
    if data.get("model_type") == "llava":
        return load_config(llm), sources | {"projector": llm, "vision": llm}
    return ModelConfig(text=parse_text_config(data, where)), sources


def load_vision_config(folder, data, published, where):
    """CLIP's or SigLIP's folder -> (its VisionConfig, the image_aspect_ratio of the new model).
    ValueError if it does not fit the LLaVA, if there is one."""
    encoder = parse_vision_config(*read_object(folder))
    ratio = "square" if encoder.is_clip else read_aspect_ratio(folder, is_siglip=True)
    check_image_processors(folder, encoder, ratio)
    require_layer(published.vision_feature_layer, encoder, where)
    width = data.get("mm_hidden_size", encoder.hidden_size)
    if width != encoder.hidden_size:
        reason = f"hidden_size {encoder.hidden_size}: take {data['mm_vision_tower']}"
        raise ValueError(f"{where}: mm_hidden_size is {width}, but {folder} has {reason}")
    return encoder, published.image_aspect_ratio if encoder.is_clip else ratio


def plan_tokenizer(llm, path, num_rows, padding_rows):
    """The Tokenizer of the new model. ValueError if it or llm's own does not fit llm's rows."""
    own = None
    files = (Path(llm) / name for name in ("tokenizer.model", "tokenizer.json"))
    if not path or any(file.is_file() for file in files):
        own = load_tokenizer(llm)
        check_rows(num_rows, own.vocab_size, llm, padding_rows)
    if not path:
        names = (own.bos_piece, own.eos_piece)
        roles = [name for name in names if name in own.ids]
        new = add_control_pieces(own, [*roles, "<image>", "<pad>"])
        require_control_pieces(new, llm)
        return new

    new = load_tokenizer(path)
    require_control_pieces(new, path)
    if own is not None:
        require_extension(own, new, path, llm)
    elif new.vocab_size < num_rows:
        check_rows(num_rows, new.vocab_size, llm, padding_rows)
    return new


def check_rows(num_rows, num_pieces, where, padding_rows=None):
    """ValueError unless each piece has a row of the embeddings, and the other rows can be padding.

    Makers round the rows up to a multiple of 64 or 128 (LLaVA: 32,064 for 32,002 pieces), or keep
    a few for later, fewer than one in 200 (Qwen2.5: 271 of 151,936). More rows than that are those
    of pieces that this tokenizer lacks: it is another model's."""
    spare = num_rows - num_pieces
    counts = f"{num_rows:,} rows in the embeddings, its tokenizer has {num_pieces:,} pieces"
    if spare < 0:
        raise ValueError(
            f"{where}: {counts}: {-spare:,} without a row: take the tokenizer of these weights, or "
            "delete what it never had from added_tokens.json and tokenizer_config.json"
        )
    is_rounded = num_rows % 64 == 0 and spare < 128
    if not (is_rounded or spare * 200 < num_rows or spare == padding_rows):
        raise ValueError(
            f"{where}: {counts}: {spare:,} rows without a piece: take the tokenizer of these "
            f"weights, or if those rows are padding, --padding-rows {spare}"
        )


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


def write_dry_run(plan, out):
    """Writes the folder of a plan without weights, from which train.py … --estimate computes."""
    write_settings(plan.config, plan.tokenizer, out, plan.dtype, is_dry_run=True)
    print(f"→ {out}: without weights, for train.py … --estimate")


def collect_tensors(plan):
    """{our name: tensor}, mapped, of all parts that have a source."""
    sources, llm = dict(plan.sources), plan.sources["decoder"]
    weights = {source: load_weights(source) for source in dict.fromkeys(sources.values())}
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


def require_extension(old, new, path, llm):
    """ValueError unless `new`, of the file `path`, is the tokenizer of llm with pieces appended."""
    missing = ("nothing",) * max(0, old.vocab_size - new.vocab_size)
    theirs = [*(piece.text for piece in new.pieces), *missing]
    for i, piece in enumerate(old.pieces):
        if theirs[i] != piece.text:
            raise ValueError(
                f"{path}: it is not the tokenizer of {llm} with pieces appended: piece {i:,} is "
                f"{theirs[i]!r}, not {piece.text!r}: python tokenizer.py merge {llm} … makes one"
            )


@torch.no_grad()
def expand_rows(rows, old, new, init="mean", generator=None, dtype=None):
    """Rows (V, C) of an embedding or a head for the tokenizer `old` -> (V', C) for `new`, which has
    more pieces. Old rows are kept to the bit. The row of a new piece is, by init,

      mean    the average of the rows of the old pieces that spelled it until now
      random  drawn from a normal distribution around 0 with the standard deviation of all
              numbers of the old rows (X-LLaVA, §3.1)

    A control piece, which has no spelling, gets the mean of the rows of all old pieces. Rows behind
    these are padding (LLaVA has 62): new pieces take the place of the first, the others stay.
    ValueError unless `new` is `old` with pieces appended (`require_extension`)."""
    n, m = old.vocab_size, new.vocab_size
    require_extension(old, new, "the new tokenizer", "the old one")
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
    if isinstance(tokenizer, ByteLevelTokenizer):
        return [tokenizer.id(piece) for piece in tokenizer.split_word(text)]
    ids = []
    for piece in bpe(list(text), tokenizer.scores):
        if piece in tokenizer.ids:
            ids.append(tokenizer.id(piece))
        elif tokenizer.byte_fallback:
            ids += [tokenizer.id(f"<0x{byte:02X}>") for byte in piece.encode()]
        else:
            ids.append(tokenizer.unk_id)
    return ids
