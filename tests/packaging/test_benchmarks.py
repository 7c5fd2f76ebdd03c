"""The offloading benchmarks at their smallest: they run, and what they print and write holds together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(script, *options):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offloading_on_the_simulated_device(tmp_path):
    path = tmp_path / "results.json"
    modes = ["diffusers-block-stream", "diffusers-leaf-stream-record"]
    said = run(
        *("offload.py", "--models", "flux-single", "--ratios", 2, "--budgets", 0.25, "--no-cost"),
        *("--modes", *modes, "--json", path),
    )
    found = json.loads(path.read_text())
    family = found["families"]["flux-single"]
    assert family["resident_seconds"] == pytest.approx(0.16, rel=1e-3)
    (cell,) = family["cells"]
    (ours,) = cell["ours"]
    bound = 2 * family["resident_seconds"] * 0.75
    assert bound <= ours["run"]["seconds"] <= 1.08 * bound
    assert ours["run"]["peak"] <= ours["budget"] + family["activations"]
    assert ours["run"]["waits"] == 0
    assert ours["run"]["copies"] == ours["run"]["streamed"]
    assert [rival["name"] for rival in cell["rivals"]] == modes
    for rival in cell["rivals"]:
        # A peer copies every weight of every pass, and has the host wait.
        assert rival["run"]["seconds"] >= 2 * family["resident_seconds"]
        assert rival["run"]["waits"] > 0
        assert rival["run"]["waited"] > 0
        assert rival["run"]["equal"]
    for aim in found["aims"]:
        reached = aim["found"] >= aim["limit"] if aim["at_least"] else aim["found"] <= aim["limit"]
        assert aim["met"] == reached
        line = next(line for line in said.splitlines() if line.startswith(aim["what"]))
        assert line.endswith("MISSED") != reached


def test_attention(tmp_path):
    path = tmp_path / "results.json"
    run("attention.py", "--lengths", 256, 512, "--rounds", 1, "--json", path)
    found = json.loads(path.read_text())
    assert [(it["length"], it["grad"], it["way"]) for it in found["lengths"]] == [
        (length, grad, way)
        for grad in (False, True)
        for length in (256, 512)
        for way in ("math", "sdpa", "chunked")
    ]
    assert all(it["largest_difference"] < 1e-5 for it in found["lengths"][2::3])
    assert [it["model"] for it in found["cost"]] == ["bert", "flux"]


def test_offloading_on_a_device(tmp_path):
    path = tmp_path / "results.json"
    chosen = ["resident", "hookcore-25", "diffusers-leaf-stream", "accelerate"]
    said = run(
        *("gpu/offload.py", "--size", "small", "--device", "sim", "--models", "unet", "--no-tests"),
        *("--passes", 2, "--ways", *chosen, "--json", path),
    )
    found = json.loads(path.read_text())
    resident, ours, *peers = found["outcomes"]["unet"]
    assert [it["way"] for it in (resident, ours, *peers)] == chosen
    assert found["rates"]["pinned"] > found["rates"]["pageable"] > 0
    for one in (resident, ours, *peers):
        assert not one["failed"]
        assert len(one["passes"]) == 2
        assert one["checksum"] == resident["checksum"] != 0
        assert one["way"] in said
    activations = resident["allocated"] - resident["nbytes"]
    assert ours["allocated"] <= ours["budget"] + activations
    assert 0.5 * ours["nbytes"] < ours["pinned"] < ours["nbytes"]
    assert ours["passes"][-1] < min(peer["passes"][-1] for peer in peers)


def test_a_way_that_fails_is_shown_with_its_error(tmp_path):
    path = tmp_path / "results.json"
    said = run(
        *("gpu/offload.py", "--size", "small", "--device", "sim", "--models", "unet", "--no-tests"),
        *("--passes", 1, "--memory", "8MiB", "--ways", "resident", "hookcore-6", "--json", path),
    )
    resident, ours = json.loads(path.read_text())["outcomes"]["unet"]
    assert "OutOfMemoryError" in resident["failed"]
    assert resident["failed"] in said
    assert not ours["failed"]
