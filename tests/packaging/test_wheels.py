"""What ships: wheels built from the tracked files, installed where no source is, work and are complete."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[2]
OURS = {"hookcore": ".", "hookcore-example-plugin": "examples/hookcore-example-plugin"}
"""Distribution to its folder."""
PACKAGES = {
    "hookcore": {"hookcore": "hookcore", "hookcore_plugins": "plugins/hookcore_plugins"},
    "hookcore-example-plugin": {
        "hookcore_example_plugin": "examples/hookcore-example-plugin/hookcore_example_plugin"
    },
}
"""Distribution to its packages and where they lie."""

# Runs in the new environment. `libraries` are those that hookcore has to do without.
PREAMBLE = """
import importlib.abc, sys

libraries = ("accelerate", "diffusers", "numpy", "peft", "transformers")

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in libraries:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@frozen
class Environment:
    """A fresh environment with the two wheels in it, and a folder to work in."""

    python: Path
    packages: Path
    folder: Path

    def run(self, *arguments: object) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return run(self.python, *arguments, cwd=self.folder, env=clean)

    def script(self, source: str) -> str:
        return self.run("-c", PREAMBLE + textwrap.dedent(source))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, as they are staged, and nothing else."""
    folder = tmp_path_factory.mktemp("sources")
    run("git", "checkout-index", "--all", f"--prefix={folder}/", cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheels(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution to its wheel."""
    built = {}
    for distribution, folder in OURS.items():
        out = tmp_path_factory.mktemp(distribution)
        run(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            out,
            sources / folder,
            cwd=out,
        )
        (built[distribution],) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    options = (
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-warn-script-location",
        "--disable-pip-version-check",
    )
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels.values(), cwd=folder)
    link_dependencies(packages, folder / "dependencies")
    work = folder / "work"
    work.mkdir()
    return Environment(python, packages, work)


def link_dependencies(packages: Path, links: Path) -> None:
    """Lets an environment see what is installed in this one, except our own distributions.

    Each entry of site-packages is linked into a folder that a .pth file names. The .pth files in that folder
    are not read by Python, so that an editable install of hookcore has no say, and links to what belongs to
    our distributions are left out.
    """
    links.mkdir()
    own = {path.parts[0] for name in OURS for path in installed_files(name)} | {
        "hookcore",
        "hookcore_plugins",
    }
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if entry.name not in own and entry.suffix != ".pth" and not (links / entry.name).exists():
                (links / entry.name).symlink_to(entry)
    (packages / "dependencies.pth").write_text(f"{links}\n")


def installed_files(distribution: str) -> list[Path]:
    try:
        return [Path(file) for file in importlib.metadata.files(distribution) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def test_hookcore_comes_from_the_wheel_and_needs_no_library_of_models(environment):
    printed = environment.script(
        """
        import hookcore, hookcore_plugins, hookcore_example_plugin
        from hookcore.plugins import plugins

        assert {info.state for info in plugins().listing} == {"active"}
        assert not set(libraries) & set(sys.modules)
        for module in (hookcore, hookcore_plugins, hookcore_example_plugin):
            print(module.__file__)
        """
    )
    for name in printed.split():
        assert Path(name).is_relative_to(environment.packages)


def test_the_command_line_finds_all_techniques(environment):
    command = environment.python.with_name("hookcore")
    rows = json.loads(environment.run(command, "plugins", "--json"))
    found = {name: row for row in rows for name in row["techniques"]}
    assert {row["state"] for row in rows} == {"active"}
    assert {name: found[name]["distribution"] for name in ("group_offload", "activation_statistics")} == {
        "group_offload": "hookcore",
        "activation_statistics": "hookcore-example-plugin",
    }
    assert found["activation_statistics"]["version"] == "0.1.0"


def test_techniques_work_by_name(environment):
    environment.script(
        """
        import torch
        from torch import nn
        import hookcore
        from hookcore_example_plugin import statistics

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.randn(3, 4)
        bare = model(x)
        applied = hookcore.apply(model, ["activation_statistics"])
        assert torch.equal(model(x), bare)
        assert statistics(model)["2"].maximum == bare.max().item()
        applied.remove()
        assert not statistics(model)
        hookcore.apply(model, ["layerwise_casting"]).remove(allow_lossy=True)
        assert model[0].weight.dtype is torch.float32
        """
    )


def test_weights_are_written_and_read_without_numpy(environment):
    environment.script(
        """
        import torch
        from torch import nn
        import hookcore
        from hookcore_plugins import GroupOffload

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(torch.bfloat16)
        model.nothing = nn.Parameter(torch.empty(0))
        x = torch.randn(3, 4, dtype=torch.bfloat16)
        bare = model(x)
        with hookcore.apply(model, [GroupOffload("cpu", offload_to_disk_path="weights")]):
            assert torch.equal(model(x), bare)
        assert torch.equal(model(x), bare)
        """
    )


def test_an_sdist_holds_what_the_readme_and_the_guide_name(sources, tmp_path):
    run(
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        tmp_path,
        sources,
        cwd=tmp_path,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = {file.relative_to(sources).as_posix() for file in sources.rglob("*") if file.is_file()}
    missing = {name for name in tracked if not name.startswith(".") and name not in names}
    assert not missing


@pytest.mark.parametrize("distribution", OURS)
def test_a_wheel_is_complete_and_holds_nothing_else(distribution, wheels, sources):
    with zipfile.ZipFile(wheels[distribution]) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    expected = {
        f"{package}/{file.relative_to(sources / folder).as_posix()}"
        for package, folder in PACKAGES[distribution].items()
        for file in (sources / folder).rglob("*")
        if file.is_file()
    }
    assert {f"{package}/py.typed" for package in PACKAGES[distribution]} <= expected
    assert expected <= names
    (metadata,) = {name.partition("/")[0] for name in names - expected}
    assert metadata.endswith(".dist-info")
    assert f"{metadata}/licenses/LICENSE" in names
    assert "[hookcore]" in entry_points


def test_what_is_installed_has_what_it_needs(environment):
    """As `pip check` would find, of our own distributions."""
    environment.script(
        f"""
        from importlib.metadata import distribution
        from packaging.requirements import Requirement

        for name in {list(OURS)}:
            for line in distribution(name).requires:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({{"extra": ""}}):
                    found = distribution(requirement.name).version
                    assert requirement.specifier.contains(found, prereleases=True), line
        """
    )


def test_the_examples_own_tests_pass_where_it_is_installed(environment, sources):
    tests = sources / OURS["hookcore-example-plugin"] / "tests"
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", tests, "--import-mode=importlib")
    environment.run("-m", "pytest", *options, tests)
