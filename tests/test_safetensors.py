"""Files of weights: as the format says and the safetensors package reads; damage is refused."""

import json
import random
import re

import pytest
import torch

import checkpoint.safetensors
from checkpoint.safetensors import load_safetensors, load_weights, plan_shards, save_safetensors


def save(tensors, folder, **options):
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    save_safetensors(specs, tensors.items(), folder, **options)


def write_raw(path, header, data):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def same_bytes(a, b):
    a, b = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def test_the_safetensors_package_reads_our_file_and_we_read_its(saved_model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, path = saved_model
    theirs = safetensors.load_file(path / "model.safetensors")
    ours = load_safetensors(path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "c": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    safetensors.save_file(tensors, tmp_path / "t.safetensors")
    ours = load_safetensors(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, ours[name]) and tensor.dtype == ours[name].dtype


def test_a_hand_made_file_is_read_as_the_format_says(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    write_raw(tmp_path / "x", header, b"\x00\x00\x80\x3f\x00\x00\x00\xc0")
    assert load_safetensors(tmp_path / "x")["x"].tolist() == [1.0, -2.0]


def test_a_file_is_written_as_the_format_says(tmp_path):
    save({"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([[3]], dtype=torch.uint8)}, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0  # so that the data is aligned
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "y": {"dtype": "U8", "shape": [1, 1], "data_offsets": [8, 9]},
    }
    assert content[8 + length :] == b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x03"


def test_shards_hold_the_tensors_in_order_up_to_their_size(monkeypatch):
    sizes = [40, 60, 1, 250, 30, 70, 5]
    specs = {f"t{i}": (torch.uint8, (size,)) for i, size in enumerate(sizes)}
    assert plan_shards(specs) == {"model.safetensors": specs}
    monkeypatch.setattr(checkpoint.safetensors, "SHARD_SIZE", 100)
    shards = plan_shards(specs)
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    parts = [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"], ["t6"]]
    assert [(file, list(part)) for file, part in shards.items()] == list(zip(names, parts))


# ------------------------------------------------------------------------------------ damage
TEMPTING = ["0", "-1", "1", "2", "6", "24", "56", "1e3", "9" * 20, str(2**63), str(2**31)]
TEMPTING += ["2.0", "null"]


def mutants(good, count, seed=0):
    """Damaged copies of a safetensors file: bytes of the header changed, the file cut, or a number
    in the header replaced by a tempting one."""
    rng, length = random.Random(seed), int.from_bytes(good[:8], "little")
    for _ in range(count):
        bad = bytearray(good)
        if rng.random() < 0.4:
            head = good[8 : 8 + length].decode()
            numbers = list(re.finditer(r"\d+", head))
            for spot in sorted(rng.sample(numbers, rng.randint(1, 2)), key=lambda m: -m.start()):
                head = head[: spot.start()] + rng.choice(TEMPTING) + head[spot.end() :]
            bad = len(head.encode()).to_bytes(8, "little") + head.encode() + good[8 + length :]
        else:
            for _ in range(rng.randint(1, 3)):
                bad[rng.randrange(8 + length)] = rng.choice(b'0123456789[]{},:"FIU\x00\xff')
        yield bytes(bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))])


def check_loaded(tensors, content):
    """What loads must cover the file to the byte, and be what the safetensors package reads, where
    that is at hand."""
    data_size = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == data_size
    try:
        import safetensors.torch as package
    except ImportError:
        return
    theirs = package.load(content)
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert same_bytes(tensor, theirs[name]), name


def test_headers_that_lie_are_refused_and_never_crash(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(4),
        "e": torch.zeros(0, 5),
        "h": torch.ones(2, 2).bfloat16(),
    }
    save(tensors, tmp_path)
    file, loaded, refused = tmp_path / "model.safetensors", 0, 0
    for bad in mutants(file.read_bytes(), 10_000):
        file.unlink()  # the old one may still be mapped
        file.write_bytes(bad)
        try:
            tensors = load_safetensors(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        check_loaded(tensors, bad)
    assert refused > 9000 and loaded > 100


@pytest.mark.parametrize(
    "lie, reason",
    [
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12), "c": ("F32", [1], 12, 16)}, "overlap"),
        ({"a": ("F32", [1], 0, 4), "b": ("F32", [2], 8, 16)}, "leave a gap"),
        ({"a": ("F32", [4], 0, 16), "b": ("F32", [1], 16, 20)}, "outside the file"),
        ({"a": ("F32", [5], 0, 16)}, r"bytes 0–16 don't hold F32 \[5\]"),
        ({"a": ("F32", [2], 0, 8)}, "8 bytes that belong to no tensor"),
        ({"a": ("F8_E4M3", [16], 0, 16)}, "a is 'F8_E4M3', supported: F32"),
        ({"a": ("F32", [-4], 0, 16)}, "not a whole number"),
        ({"a": ("F32", [1] * 65 + [4], 0, 16)}, "more than 64"),
        ({"a\nb": ("F32", [5], 0, 16)}, r"damaged .*the name 'a\\nb'"),
    ],
)
def test_each_kind_of_lie_is_named(tmp_path, lie, reason):
    write_raw(tmp_path / "x.safetensors", lying_header(lie), bytes(16))
    with pytest.raises(ValueError, match=reason) as error:
        load_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_a_shape_without_elements_that_pytorch_may_not_have(tmp_path):
    lie = {"a": ("F32", [4], 0, 16), "b": ("F32", [2**47, 2**47, 0], 16, 16)}
    write_raw(tmp_path / "x.safetensors", lying_header(lie), bytes(16))
    try:
        assert load_safetensors(tmp_path / "x.safetensors")["b"].numel() == 0
    except ValueError as error:
        assert "no tensor has the shape" in str(error)


def lying_header(lie):
    keys = ("dtype", "shape", "data_offsets")
    entries = {name: (dtype, shape, offsets) for name, (dtype, shape, *offsets) in lie.items()}
    return json.dumps({name: dict(zip(keys, entry)) for name, entry in entries.items()}).encode()


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="a file beside it"):
        load_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}), encoding="utf-8")
    with pytest.raises(ValueError, match="a file beside it"):
        load_weights(tmp_path)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("run",)

    contents = {"code": {"a": Payload()}, "list": [torch.ones(1)], "text": {"a": "b"}}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.bin")
        with pytest.raises(ValueError, match=f"{name}.bin: ") as error:
            load_weights(tmp_path / f"{name}.bin")
        assert "\n" not in str(error.value)

    (tmp_path / "cut.bin").write_bytes((tmp_path / "list.bin").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut.bin: can't be read as weights"):
        load_weights(tmp_path / "cut.bin")

    old = tmp_path / "legacy.bin"
    torch.save({"a": torch.arange(3.0)}, old, _use_new_zipfile_serialization=False)
    assert load_weights(old)["a"].tolist() == [0, 1, 2]
