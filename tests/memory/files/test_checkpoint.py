"""Reading safetensors headers: right, or an error that names the fault; never wrong values."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open

from hookcore import HookcoreError
from hookcore.errors import CheckpointError
from hookcore.memory import Checkpoint
from hookcore.memory.files.mapped_file import map_checkpoint
from hookcore.memory.files.safetensors_header import FileStamp

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def read(checkpoint):
    """Read every tensor with nothing but its entry."""
    found = {}
    for key, entry in checkpoint.entries.items():
        data = entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        if data:
            found[key] = torch.frombuffer(bytearray(data), dtype=entry.dtype).view(entry.shape)
        else:
            found[key] = torch.empty(entry.shape, dtype=entry.dtype)
    return found


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def write(path, header, data=b""):
    """Write a file of safetensors' format, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def field(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@st.composite
def tensors(draw, dtypes):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(values, dtype=dtype).view(shape)
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


SAVED_DTYPES = tuple(dtype for dtype in DTYPES.values() if dtype != torch.float8_e8m0fnu)
KEYS = st.text(min_size=1, max_size=8).filter(lambda key: key != "__metadata__")
STATES = st.dictionaries(KEYS, tensors(SAVED_DTYPES), max_size=6)


@given(state=STATES, shards=st.integers(1, 3), metadata=st.booleans())
def test_any_state_reads_back_bit_equal(state, shards, metadata):
    with TemporaryDirectory() as folder:
        save(state, Path(folder), shards, {"format": "pt"} if metadata else None)
        checkpoint = Checkpoint.open(folder)
        assert {key: bits(value) for key, value in read(checkpoint).items()} == {
            key: bits(value) for key, value in state.items()
        }
        assert checkpoint.nbytes == sum(value.nbytes for value in state.values())
        assert checkpoint.root == Path(folder)
        places = [(entry.path.name, entry.offset) for entry in checkpoint.entries.values()]
        assert places == sorted(places)
        checkpoint.verify()


def save(state, folder, shards=1, metadata=None):
    """Save as `save_pretrained` does; an index only if there is more than one shard."""
    if shards == 1 or not state:
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata=metadata)
        return
    weight_map = {}
    for position, key in enumerate(state):
        weight_map[key] = f"model-{position % shards + 1:05d}-of-{shards:05d}.safetensors"
    for name in set(weight_map.values()):
        part = {key: value for key, value in state.items() if weight_map[key] == name}
        safetensors.torch.save_file(part, folder / name, metadata=metadata)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@given(name=st.sampled_from(list(DTYPES)), data=st.data())
def test_every_dtype_of_the_format(name, data):
    value = data.draw(tensors((DTYPES[name],)))
    _, shape, content = bits(value)
    with TemporaryDirectory() as folder:
        path = write(
            Path(folder) / "a.safetensors", {"w": field(name, shape, (0, len(content)))}, bytes(content)
        )
        assert bits(read(Checkpoint.open(path))["w"]) == bits(value)


STATE = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(3, dtype=torch.int16),
    "c": torch.ones(5).bfloat16(),
    "empty": torch.empty(0, 2),
}
IMAGE = safetensors.torch.save(STATE, {"format": "pt"})


@given(
    edits=st.lists(st.tuples(st.integers(0, len(IMAGE) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    length=st.integers(0, len(IMAGE) + 3),
)
@example(edits=[(0, IMAGE[0])], length=len(IMAGE))
@example(edits=[(7, 255)], length=len(IMAGE))
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(edits, length):
    image = bytearray(IMAGE)
    for position, value in edits:
        image[position] = value
    image = bytes((image + b"xyz")[:length])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(image)
        try:
            found = read(Checkpoint.open(path))
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017 - both outcomes are right
            assert image != IMAGE
        else:
            with safe_open(path, "pt") as reference:
                assert set(found) == set(reference.keys())
                for key, value in found.items():
                    assert bits(value) == bits(reference.get_tensor(key))


@given(length=st.integers(0, len(IMAGE) - 1))
def test_every_truncation_is_refused(length):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(IMAGE[:length])
        with pytest.raises(CheckpointError, match=r"truncated|not a safetensors"):
            Checkpoint.open(path)


def test_a_truncated_file_says_how_much_is_missing_and_from_where(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(IMAGE[:-7])
    with pytest.raises(CheckpointError, match=r"truncated: 7 of \d+ bytes are missing, from tensor '[bc]'"):
        Checkpoint.open(path)
    path.write_bytes(IMAGE[:50])
    with pytest.raises(CheckpointError, match=r"truncated: .* the file at 50: \d+ bytes are missing"):
        Checkpoint.open(path)


HUGE = 2**40
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DAMAGE = {
    "not json": (b"nonsense", b"", "cannot be read"),
    "not utf-8": (b'{"\xff": 1}', b"", "cannot be read"),
    "deep": (DEEP, b"", "nested too deeply"),
    "long number": (b'{"a":' + b"1" * 5000 + b"}", b"", "cannot be read"),
    "no table": ([], b"", "not a table"),
    "number": ({"w": 3}, b"", "'w': expected a table, found 3"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "'__metadata__'"),
    "metadata list": ({"__metadata__": []}, b"", "'__metadata__'"),
    "twice": (b'{"w": {}, "v": {}, "w": {}}', b"", "key 'w' stands there twice"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), "dtype None"),
    "unknown dtype": ({"w": field("F12")}, bytes(4), "'w' .* dtype 'F12'.*expected one of BOOL"),
    "list dtype": ({"w": field(["F32"])}, bytes(4), "'w' .* dtype"),
    "sub-byte": ({"w": field("F4", (8,))}, bytes(4), "'w' .* 'F4'.*whole bytes"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "'w': expected a shape"),
    "negative": ({"w": field(shape=(-1, -1))}, bytes(4), "'w': expected a shape"),
    "bool shape": ({"w": field(shape=(True,))}, bytes(4), "'w': expected a shape"),
    "float shape": ({"w": field(shape=(1.0,))}, bytes(4), "'w': expected a shape"),
    "overflow": ({"w": field(shape=(HUGE, HUGE, 0), offsets=(0, 0))}, b"", "'w': expected a shape"),
    "offsets": ({"w": field(offsets=(0, 4, 4))}, bytes(4), "'w': expected data_offsets"),
    "backwards": ({"w": field(shape=(0,), offsets=(4, 0))}, bytes(4), "'w': expected data_offsets"),
    "bool offset": ({"w": field(offsets=(False, 4))}, bytes(4), "'w': expected data_offsets"),
    "too small": ({"w": field(shape=(2,))}, bytes(4), r"'w': shape \[2\] of F32 takes 8 bytes.* give it 4"),
    "hole": ({"v": field(), "w": field(offsets=(8, 12))}, bytes(12), "'w' begins .* leaves a hole"),
    "first hole": ({"w": field(offsets=(4, 8))}, bytes(8), "'w' begins .* leaves a hole"),
    "overlap": ({"v": field(), "w": field(offsets=(2, 6))}, bytes(6), "'w' begins .* overlaps"),
    "same place": ({"v": field(), "w": field()}, bytes(4), "'w' begins .* overlaps"),
    "outside": ({"v": field(), "w": field(offsets=(4, 8))}, bytes(4), "4 of .* missing, from tensor 'w'"),
    "more": ({"w": field()}, bytes(9), "5 bytes follow the last tensor"),
    "nothing": ({}, bytes(1), "1 bytes follow"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage, tmp_path):
    header, data, message = damage
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


def test_a_header_longer_than_the_format_allows(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(path)


# Headers and files that were made to do harm


@pytest.fixture
def patience():
    """Fails a test that hangs, or that takes quadratic time for what is large."""

    def fail(*_):
        pytest.fail("it goes on and on", pytrace=False)

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ODD = [
    "-0",
    "1e0",
    "1.0",
    "NaN",
    "-Infinity",
    "null",
    "true",
    '"\\ud800"',
    '"\\udc00x"',
    "[]",
    "{}",
    '"F4"',
    '"C64"',
]
TOKEN = re.compile(r'"[^"]*"|-?\d+|[\[\]{}:,]')


@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(ODD)), max_size=3))
@example(edits=[(14, "-0")])
def test_what_safetensors_refuses_is_refused(edits):
    """Whatever stands in a header, safetensors itself decides what is valid."""
    header = {"a": field("U8", (2, 0), (0, 0)), "b": field("U8", (4,), (0, 4)) | {"more": 3}}
    tokens = TOKEN.findall(json.dumps({"__metadata__": {"format": "pt"}} | header))
    for position, token in edits:
        tokens[position % len(tokens)] = token
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.safetensors", "".join(tokens).encode(), bytes(4))
        try:
            found = Checkpoint.open(path)
        except CheckpointError:
            return
        with safe_open(path, "pt") as reference:
            assert set(found.entries) == set(reference.keys())


LONG = "x" * 1_000_000
LARGE = {
    "keys": "{" + ",".join(f'"{number}":0' for number in [*range(100_000), 99_999]) + "}",
    "sizes": json.dumps({"a": field("U8", [2**63 - 1] * 200_000, (0, 0))}),
    "shape": json.dumps({"a": field("U8", [1] * 100_000, (0, 3))}),
    "key": json.dumps({LONG: field("F99")}),
    "dtype": json.dumps({"a": field(LONG)}),
    "field": json.dumps({"a": [LONG] * 3}),
    "offsets": json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [LONG, {LONG: [LONG]}]}}),
    "metadata": json.dumps({"__metadata__": {LONG: 3}}),
    "twice": f'{{"{LONG}": 0, "{LONG}": 0}}',
    "hole": json.dumps({LONG: field(offsets=(9, 13))}),
    "parser": json.dumps({"a": field("U8", [0], (0, 0)) | {LONG: -0.0}}).replace("-0.0", "1e999"),
}


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_large_headers_are_refused_soon_and_briefly(text, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(write(tmp_path / "a.safetensors", text.encode()))
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    "places",
    [{LONG: "no.safetensors"}, {"a": LONG}, {"a": LONG + ".bin"}, {LONG: "a/b.safetensors"}],
    ids=len,
)
def test_large_indexes_are_refused_briefly(places, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(index)
    assert len(str(caught.value)) < 2_000


def put_pipe(path):
    os.mkfifo(path)


def put_device(path):
    path.symlink_to("/dev/zero")


def put_socket(path):
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's path may have 108 characters
    os.close(here)


def put_loop(path):
    path.symlink_to(path)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("put", [put_pipe, put_device, put_socket, put_loop, Path.mkdir])
@pytest.mark.parametrize("where", ["file", "index", "shard"])
def test_what_is_no_file_is_refused(where, put, tmp_path):
    save(STATE, tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    path = {"file": tmp_path / "a.safetensors", "index": index}.get(
        where, tmp_path / "model-00002-of-00002.safetensors"
    )
    path.unlink(missing_ok=True)
    put(path)
    with pytest.raises(
        CheckpointError,
        match="holds nothing" if put is Path.mkdir and where != "shard" else re.escape(path.name),
    ):
        Checkpoint.open(index if where == "shard" else path)


@given(
    st.text(st.characters(), max_size=300).map(lambda text: text * 20)
    | st.text(st.sampled_from("\0a/.\ud800"), max_size=10)
)
def test_any_path_is_opened_or_refused(name):
    with TemporaryDirectory() as folder:
        for path in (f"{folder}/{name}", name):
            try:
                Checkpoint.open(path)
            except HookcoreError as error:
                assert len(str(error)) < 10_000  # noqa: PT017 - which error is no matter


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(
        CheckpointError, match=f"'{tmp_path}' cannot be read: Permission denied. Give this user"
    ):
        Checkpoint.open(tmp_path)


def test_too_many_open_files_says_what_helps(tmp_path):
    save({f"w{number}": torch.ones(1) for number in range(50)}, tmp_path, 50)
    checkpoint = Checkpoint.open(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"Too many open files. .*ulimit -n.*max_shard_size="):
            map_checkpoint(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Folders


def names(checkpoint):
    return [path.name for path in checkpoint.stamps]


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "something_else"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_names_that_save_pretrained_writes(stem, variant, tmp_path):
    infix = f".{variant}" if variant else ""
    folder = tmp_path / "pipe" / "unet"
    folder.mkdir(parents=True)
    (folder / f"{stem}{infix}.safetensors").write_bytes(IMAGE)
    (folder / f"{stem}.other.safetensors").write_bytes(IMAGE)
    if stem == "something_else":
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path / "pipe", subfolder="unet", variant=variant)
        (folder / f"{stem}.other.safetensors").unlink()
        if variant is None:
            assert names(Checkpoint.open(folder)) == [f"{stem}.safetensors"]
        return
    found = Checkpoint.open(tmp_path / "pipe", subfolder="unet", variant=variant)
    assert names(found) == [f"{stem}{infix}.safetensors"]


@pytest.mark.parametrize("index", ["model.safetensors.index{}.json", "other.safetensors.index.json"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_index_is_found(index, variant, tmp_path):
    if variant and "{}" not in index:
        return
    save(STATE, tmp_path, 2)
    name = index.format(f".{variant}" if variant else "")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / name)
    by_folder = Checkpoint.open(tmp_path, variant=variant)
    by_path = Checkpoint.open(str(tmp_path / name))
    assert by_folder.entries == by_path.entries
    assert names(by_folder) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_what_diffusers_and_transformers_save(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    wanted = {key: bits(value) for key, value in model.state_dict().items()}
    for number, options in enumerate(({}, {"variant": "fp16"}, {"max_shard_size": "20KB"})):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, **options)
        checkpoint = Checkpoint.open(folder, variant=options.get("variant"))
        assert {key: bits(value) for key, value in read(checkpoint).items()} == wanted
        assert (len(checkpoint.stamps) > 1) == ("max_shard_size" in options)
    folder = tmp_path / "sharded variant"
    model.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    assert Checkpoint.open(folder, variant="fp16").nbytes == checkpoint.nbytes


def test_what_cannot_be_opened_says_what_to_do(tmp_path):
    def refuses(match, path=tmp_path, **options):
        with pytest.raises(CheckpointError, match=match):
            Checkpoint.open(path, **options)

    refuses("no checkpoint at .* must be downloaded", tmp_path / "nobody/model")
    refuses("holds nothing")
    refuses("no folder .*subfolder=", subfolder="unet")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refuses("pytorch_model.bin' is a pickle checkpoint.*save_pretrained")
    refuses("is a pickle checkpoint", tmp_path / "pytorch_model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" * 9)
    refuses("not a safetensors file", tmp_path / "model.gguf")
    path = tmp_path / "model.fp16.safetensors"
    path.write_bytes(IMAGE)
    refuses("no safetensors checkpoint of variant 'bf16'; it holds model.fp16.safetensors", variant="bf16")
    refuses("subfolder and variant choose", path, variant="fp16")
    (tmp_path / "model.safetensors").write_bytes(IMAGE)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(IMAGE)
    refuses("more than one checkpoint: diffusion_pytorch_model.safetensors, model.safetensors. Pass the path")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(IMAGE)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoint.open(path)


# Indexes


INDEXES = {
    "not json": ("nonsense", "cannot be read"),
    "list": ("[]", "no 'weight_map'"),
    "no map": ("{}", "no 'weight_map'"),
    "empty map": ('{"weight_map": {}}', "no 'weight_map'"),
    "number": ('{"weight_map": {"a": 3}}', "says that 3 holds tensor 'a'"),
    "outside": ('{"weight_map": {"a": "../a.safetensors"}}', "'../a.safetensors' holds tensor 'a'"),
    "null": ('{"weight_map": {"a": "a\\u0000.safetensors"}}', "missing|cannot be read"),
    "empty name": ('{"weight_map": {"a": ""}}', "'' holds tensor 'a'"),
    "twice": ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands there twice"),
    "pickle": ('{"weight_map": {"a": "pytorch_model-1.bin"}}', "pickle checkpoint"),
}


@pytest.mark.parametrize("damage", INDEXES.values(), ids=INDEXES)
def test_a_damaged_index_is_named(damage, tmp_path):
    text, message = damage
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(index)
    assert str(tmp_path) in str(caught.value)


def test_index_and_shards_must_agree(tmp_path):
    def refuses(change, match):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save(STATE, folder, 2)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(folder, content["weight_map"])
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=match) as caught:
            Checkpoint.open(folder)
        assert str(index) in str(caught.value)

    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    refuses(lambda _, places: places.pop("c"), f"{first}' holds tensor 'c'.* does not list it")
    refuses(
        lambda _, places: places.update(c=second), f"{first}' holds tensor 'c'.*says that '{second}' does"
    )
    refuses(lambda _, places: places.update(z=second), f"shard '{second}' holds tensor 'z', but it does not")
    refuses(lambda folder, _: (folder / second).unlink(), rf"'{second}' is missing \(1 of 2.*holds 'b'")

    def put_twice(folder, _):
        safetensors.torch.save_file({key: STATE[key] for key in ("a", "b", "empty")}, folder / second)

    refuses(put_twice, f"{second}' holds tensor 'a'")


# Stamps


def test_verify_names_what_happened_to_a_file(tmp_path):
    path = tmp_path / "model.safetensors"

    def refuses(change, match):
        path.write_bytes(IMAGE)
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        checkpoint.verify([path])
        change()
        with pytest.raises(CheckpointError, match=match) as caught:
            checkpoint.verify_file(path)
        with pytest.raises(CheckpointError):
            checkpoint.verify()
        assert f"'{path}', which holds tensor 'a'" in str(caught.value)

    def replace():
        before = path.stat()
        other = tmp_path / "other"
        other.write_bytes(IMAGE)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)

    refuses(path.unlink, "cannot be read any more")
    refuses(lambda: os.truncate(path, 20), rf"shrank to 20 bytes, {len(IMAGE)} were expected")
    refuses(lambda: path.write_bytes(IMAGE + b"x"), "grew to")
    refuses(lambda: os.utime(path, ns=(0, 0)), "was written to")
    refuses(replace, "was replaced by another file")


def test_a_stamp_of_a_link_is_that_of_the_file(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(IMAGE)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)  # as the Hub's cache lays files out
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.stamps == {link: FileStamp.of(blob)}
    os.utime(blob, ns=(0, 0))
    with pytest.raises(CheckpointError, match="written to"):
        checkpoint.verify()


@given(tensor=st.integers(0, 9), count=st.integers(1, 10))
def test_a_file_that_was_rewritten_with_its_old_times_is_seen(tensor, count):
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        tensors = {str(number): torch.arange(100.0) + number for number in range(count)}
        safetensors.torch.save_file(tensors, path)
        before = path.stat()
        checkpoint = Checkpoint.open(path)
        tensors[str(tensor % count)] += 1
        other = Path(folder, "other")
        safetensors.torch.save_file(tensors, other)
        with path.open("r+b") as file:
            file.write(other.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CheckpointError, match="given its old times"):
            checkpoint.verify()


@pytest.mark.parametrize("how", ["moved", "linked", "rights", "put back"])
def test_a_file_that_was_moved_linked_or_put_back_is_the_same(how, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(IMAGE)
    before = path.stat()
    checkpoint = Checkpoint.open(path)
    match how:
        case "moved":
            path.rename(tmp_path / "aside").rename(path)
        case "linked":
            (tmp_path / "other").hardlink_to(path)
        case "rights":
            path.chmod(0o600)
        case "put back":
            with path.open("r+b") as file:
                file.truncate(3)
                file.write(IMAGE)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ctime_ns != before.st_ctime_ns
    checkpoint.verify()
    assert checkpoint.stamps[path] == FileStamp.of(path)  # known by that from now on
