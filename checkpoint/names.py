"""Names of tensors: ours, and those in published files.

    ours                   decoder.layers.0.attn.q_proj.weight
    Llama                  model.layers.0.self_attn.q_proj.weight
    LLaVA, transformers 4  language_model.model.layers.0.self_attn.q_proj.weight  (what we write)

names.json lists the differences: the prefix of each module in each kind of file (we write the first
kind), and the words behind the prefix, which are the same in all files.
"""

import re
from pathlib import Path

import torch

from model import XLlava
from vocabulary.command import first_few
from vocabulary.files import read_json

NAME_MAP = read_json(Path(__file__).with_name("names.json"))
PREFIXES = {module: list(kinds.values()) for module, kinds in NAME_MAP["prefixes"].items()}

EMBEDDING, HEAD = "decoder.embed_tokens.weight", "decoder.lm_head.weight"
# Tensors that we do not need: in old files what the config says, SigLIP's pooling head, and the
# text encoders.
POOLING = r"(.*\.)?head\.(probe|attention|layernorm|mlp).*"
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*embeddings\.position_ids|" + POOLING)
CLIP_TEXT = r"|text_model\..*|(visual|text)_projection\.weight|logit_scale|logit_bias"
IGNORED_OF_CLIP = re.compile(IGNORED.pattern + CLIP_TEXT)


def module_of(name):
    """The module of names.json that a name belongs to: "vision.", "projector.0." …"""
    for module in PREFIXES:
        if name.startswith(module):
            return module
    raise ValueError(f"{name}: checkpoint/names.json has no name for it in the files that we write")


def hf_name(name, prefix=None):
    """Our tensor's name in the files that we write, or in files that have this prefix."""
    module = module_of(name)
    rest = name.removeprefix(module)
    for ours, theirs in NAME_MAP["inner"].get(module, {}).items():
        rest = rest.replace(ours, theirs)
    return (PREFIXES[module][0] if prefix is None else prefix) + rest


def find_names(ours, theirs):
    """{our name: name in a file}: for each module by the prefix that fits most of `theirs`."""
    names = {}
    # Module by module: a file may mix kinds, and may have some modules only.
    for module, prefixes in PREFIXES.items():
        here = [name for name in ours if module_of(name) == module]
        candidates = [{name: hf_name(name, prefix) for name in here} for prefix in prefixes]
        names |= max(candidates, key=lambda found: sum(name in theirs for name in found.values()))
    return names


def tensor_shapes(config):
    """{our name: shape} of all tensors of a model. A tied head has no tensor of its own."""
    with torch.device("meta"):
        model = XLlava(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def tensor_specs(config, dtype):
    """{name in the files that we write: (dtype, shape)} of all tensors of a model."""
    return {hf_name(name): (dtype, shape) for name, shape in tensor_shapes(config).items()}


def match_tensors(tensors, shapes, where, is_clip=False):
    """{name in the files: tensor} -> {our name: tensor}, for all of `shapes` {our name: shape}.

    ValueError with a list of what is missing, of another shape, or left over. is_clip: the text
    encoder may be left over."""
    names, problems = find_names(shapes, tensors), []

    for name, shape in shapes.items():
        theirs, tensor = names[name], tensors.get(names[name])
        if tensor is None:
            problems.append(f"missing {theirs}")
        elif tensor.shape != shape:
            problems.append(f"{theirs} is {list(tensor.shape)}, must be {list(shape)}")

    left_over = tensors.keys() - set(names.values())
    if HEAD not in shapes and EMBEDDING in shapes:
        # A tied head. Some files hold the embedding a second time under its name.
        embedding = tensors.get(names[EMBEDDING])
        for head in [hf_name(HEAD, prefix) for prefix in PREFIXES["decoder.lm_head."]]:
            if head in tensors and embedding is not None and embedding.equal(tensors[head]):
                left_over.remove(head)
    ignored = IGNORED_OF_CLIP if is_clip else IGNORED
    problems += [f"left over {name}" for name in sorted(left_over) if not ignored.fullmatch(name)]

    if problems:
        raise ValueError(f"{where}: {first_few(problems, separator='; ')}")
    return {name: tensors[names[name]] for name in shapes}
