"""`hookcore demo`: the model that it builds, what it measures and compares, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from attrs import asdict, evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hookcore.cli import main

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

from hookcore_plugins.demo import draw, model, run
from hookcore_plugins.demo.child import Measurement, Request
from hookcore_plugins.demo.errors import DemoError
from hookcore_plugins.demo.model import DemoCheckpoints, DemoModel, build
from hookcore_plugins.demo.run import Difference, run_way, wrong
from hookcore_plugins.demo.ways import DEMO_WAYS, WAYS, Setting

MIB = 1024**2
CPU = torch.device("cpu")
SMALL = DemoModel("flux", 20 * MIB, "float32")

demo_models = st.builds(
    DemoModel,
    family=st.sampled_from(["flux", "sd3"]),
    nbytes=st.integers(8 * MIB, 64 * 1024 * MIB),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkpoints(cache):
    return build(SMALL, cache, lambda _: None)


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that are started


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def measurement(**values):
    made = Measurement(
        setup=1.0,
        steps=(2.0, 3.0),
        rss_before=400 * MIB,
        peak=500 * MIB,
        peak_steps=None,
        device_peak=None,
        written=0,
        left=0,
        digest="",
    )
    return evolve(made, **values)


# The model


@settings(max_examples=20)
@given(demo_models)
def test_the_model_has_about_the_size_asked_for_and_no_layer_is_a_large_part_of_it(demo):
    from accelerate import init_empty_weights

    with init_empty_weights():
        sizes = [tensor.numel() for tensor in demo.model_class(**demo.config).parameters()]
    nbytes = sum(sizes) * getattr(torch, demo.dtype).itemsize
    assert nbytes == pytest.approx(demo.nbytes, rel=0.25)
    assert max(sizes) < sum(sizes) / 5


@given(demo_models, demo_models, st.integers(-2, 2))
def test_models_share_a_folder_exactly_if_their_weights_are_the_same(one, other, apart):
    for second in (other, evolve(one, nbytes=one.nbytes + apart * MIB // 2)):
        if second.nbytes >= 8 * MIB:
            same = (one.family, one.dtype, one.config) == (second.family, second.dtype, second.config)
            assert (one.key == second.key) == same


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_building_again_gives_the_same_bytes(family, tmp_path):
    demo = DemoModel(family, 9 * MIB, "bfloat16")
    one, other = (build(demo, tmp_path / name, lambda _: None) for name in "ab")
    files = [path.relative_to(one.full.parent) for path in one.full.parent.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 2 * 3
    for path in files:
        assert (one.full.parent / path).read_bytes() == (other.full.parent / path).read_bytes()


def test_the_second_checkpoint_holds_the_same_weights_rounded(checkpoints):
    full, small = tensors(checkpoints.full), tensors(checkpoints.small)
    assert full.keys() == small.keys()
    for name, tensor in full.items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor.to(torch.bfloat16), small[name])


def test_a_model_in_the_cache_is_used_as_it_is(cache, checkpoints):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert build(SMALL, cache, lambda _: pytest.fail("wrote something")) == checkpoints
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_building_that_fails_leaves_nothing_and_can_be_tried_again(error, tmp_path, monkeypatch):
    written = []

    def fails_late(nbytes):
        written.append(nbytes)
        if len(written) == 3:
            raise error

    demo = DemoModel("flux", 9 * MIB, "float32")
    with pytest.raises(type(error)):
        build(demo, tmp_path, fails_late)
    assert not list(tmp_path.iterdir())
    left = tmp_path / f"{demo.key}.part" / "full"  # as a killed process leaves it
    left.mkdir(parents=True)
    (left / "diffusion_pytorch_model-00001-of-00001.safetensors").write_bytes(b"half")
    made = build(demo, tmp_path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [demo.key]
    assert tensors(made.full)


def test_too_little_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = model.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model.shutil, "disk_usage", lambda _: usage._replace(free=10 * MIB))
    with pytest.raises(DemoError, match=r"takes 30\.0 MiB in .* where 10\.0 MiB are free\. .* --cache"):
        build(SMALL, tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())


# Comparing

floats = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


@given(floats, st.data())
def test_outputs_are_equal_exactly_if_all_bits_are(values, data):
    reference = torch.tensor([*values, 1.0])
    assert Difference.of(reference.clone(), reference) == Difference(equal=True, largest=0.0, mean=0.0)
    changed = reference.clone()
    changed.view(torch.int32)[data.draw(st.integers(0, len(values)))] ^= 1 << data.draw(st.integers(0, 22))
    difference = Difference.of(changed, reference)
    assert not difference.equal
    assert 0 <= difference.largest <= 1


@given(floats, st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_what_is_no_number_is_found_in_every_way(values, bad):
    difference = Difference.of(torch.tensor([*values, bad]), torch.tensor([*values, 1.0]))
    for way in WAYS:
        assert len(wrong({way: difference}, "float32")) == 1


@given(st.floats(1e-9, 1.0), st.sampled_from(["float32", "bfloat16"]))
def test_what_counts_as_wrong(largest, dtype):
    difference = Difference(equal=False, largest=largest, mean=largest)
    found = {way: bool(wrong({way: difference}, dtype)) for way in WAYS}
    assert found["hookcore"]
    assert not found["hookcore-cast"]
    assert found["accelerate"] == (largest > {"float32": 1e-4, "bfloat16": 5e-2}[dtype])
    assert not wrong(dict.fromkeys(WAYS, Difference(equal=True, largest=0.0, mean=0.0)), dtype)


# Processes


@given(
    st.sampled_from(list(WAYS)),
    demo_models,
    st.integers(0, 10**12),
    st.none() | st.integers(1, 64),
    st.booleans(),
)
def test_a_request_reaches_its_process_unchanged(way, demo, budget, threads, cold):
    places = DemoCheckpoints(Path("a/full"), Path("a b/small"))
    setting = Setting(demo, places, torch.device("cuda:1"), budget, Path("/scratch"))
    request = Request(way, setting, 3, threads, cold)
    assert Request.from_json(request.to_json()) == request


def test_a_process_that_fails_is_quoted(tmp_path, one_thread):
    nowhere = DemoCheckpoints(tmp_path, tmp_path / "not-there")
    request = Request("hookcore-cast", Setting(SMALL, nowhere, CPU, MIB, tmp_path / "scratch"), 1)
    with pytest.raises(DemoError, match=r"(?s)'hookcore-cast' ended with status 1:.*not-there"):
        run_way(request, lambda _event, _seconds: None)
    assert not (tmp_path / "scratch").exists()


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The simulated accelerator, if an earlier test has added it, exists in this process only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "choose_device", lambda: (CPU, "float32"))
        yield


@pytest.fixture(scope="module")
def shown(cache, checkpoints, tmp_path_factory):
    """One whole run of the command, in processes: its exit status and results."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        arguments = ["--size", "20MiB", "--budget", "8MiB", "--steps", "2"]
        status = main(["demo", *arguments, "--cache", str(cache), "--out", str(out)])
    return status, json.loads((out / "results.json").read_text()), out, cache


def test_the_demo_shows_all_ways_with_equal_outputs(shown):
    status, results, out, cache = shown
    assert status == 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    ways = results["ways"]
    assert tuple(ways) == DEMO_WAYS
    for one in ways.values():
        assert len(one["steps"]) == 2
        assert min(one["setup"], *one["steps"]) > 0
        assert one["peak"] > one["rss_before"] > 50 * MIB
    assert ways["hookcore"]["digest"] == ways["resident"]["digest"] != ways["hookcore-cast"]["digest"]
    assert ways["hookcore"]["difference"] == {"equal": True, "largest": 0.0, "mean": 0.0}
    assert 1e-5 < ways["hookcore-cast"]["difference"]["mean"] < 0.1
    assert ways["accelerate"]["left"] > 15 * MIB
    assert ways["hookcore"]["left"] == ways["hookcore-cast"]["left"] == 0
    assert not list(cache.glob("scratch-*"))


def test_a_wrong_output_ends_the_demo_with_status_1(shown, monkeypatch, capsys, tmp_path):
    _, results, _, cache = shown

    def altered(request, _tell):
        values = {name: results["ways"][request.way][name] for name in asdict(measurement())}
        output = torch.ones(8)
        if request.way == "hookcore":
            output[3] += 1e-7  # one bit
        return Measurement(**values), output

    monkeypatch.setattr(run, "run_way", altered)
    arguments = ["--size", "20MiB", "--budget", "8MiB", "--cache", str(cache), "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 1
    shown_text = capsys.readouterr()
    assert "error: the output of 'hookcore, from disk' must have the bits" in shown_text.err
    assert shown_text.err.count("error:") == 1


# Showing


@given(
    st.lists(st.integers(1, 10**12), min_size=4, max_size=4),
    st.lists(st.floats(1e-3, 1e4), min_size=4, max_size=4),
    st.integers(80, 200),
)
def test_bars_fit_the_terminal_and_have_the_order_of_their_values(peaks, times, width):
    values = zip(DEMO_WAYS, peaks, times, strict=True)
    measured = {name: measurement(rss_before=0, peak=peak, steps=(time,)) for name, peak, time in values}
    lines = draw.bars(measured, 400 * MIB, width).splitlines()
    assert all(len(line) <= width for line in lines)
    for drawn, numbers in ((lines[1:5], peaks), (lines[6:], times)):
        lengths = [line.count("█") for line in drawn]
        assert [length for _, length in sorted(zip(numbers, lengths, strict=True))] == sorted(lengths)
        assert lengths[numbers.index(max(numbers))] > 10


@given(st.integers(0, 10**12))
def test_memory_is_that_of_the_device_where_there_is_one(nbytes):
    assert measurement(device_peak=nbytes).memory == nbytes
    assert measurement().memory == 100 * MIB


def test_columns_of_numbers_end_together():
    found = draw.columns([("", "step", "peak"), ("a way", "1.0", "12,345"), ("b", "10.25", "7")])
    assert found == ["        step    peak", "a way    1.0  12,345", "b      10.25       7"]


# Refusing


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4MiB", "--budget", "1MiB"], "--size is 4.0 MiB; the smallest model is 8.0 MiB"),
        (["--size", "20MiB", "--budget", "20MiB"], "--budget 20.0 MiB holds the whole model of 20.0 MiB"),
        (["--size", "20MiB", "--budget", "plenty"], "'plenty' is no size"),
        (["--size", "20MiB", "--budget", "8MiB", "--steps", "0"], "--steps is 0; a run takes at least one"),
        (["--size", "20MiB", "--budget", "100KiB"], "memory_budget is 100 KiB, but the call of"),
    ],
)
def test_what_the_demo_refuses(arguments, message, cache, tmp_path, capsys):
    assert main(["demo", *arguments, "--cache", str(cache), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["accelerate", "diffusers", "matplotlib", "psutil"])
def test_missing_packages_are_named_with_what_installs_them(missing, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == missing else object())
    assert main(["demo"]) == 1
    assert f"the demo needs {missing}. Install: pip install 'hookcore[demo]'" in capsys.readouterr().err
