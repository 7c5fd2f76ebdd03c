"""Who may import whom, read off the code itself."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import hookcore

ROOT = Path(hookcore.__file__).parents[1]
CORE = ROOT / "hookcore"
ROOMS = ROOT / "plugins" / "hookcore_plugins"

OPTIONAL = {"diffusers", "transformers", "accelerate", "peft", "matplotlib", "psutil", "hookcore_plugins"}
TESTING = {"pytest", "hypothesis", "_pytest"}
# What is about a library, which each imports when it is asked for that and not before.
USES_LIBRARIES = {
    CORE / "memory" / "device" / "timeline.py": {"matplotlib"},  # draws
    CORE / "testing" / "models.py": {"diffusers", "transformers"},  # small models of these libraries
    CORE / "testing" / "pipelines.py": {"diffusers", "transformers"},
    CORE / "testing" / "simulator" / "trace.py": {"matplotlib"},  # draws
}
PUBLIC = {"hookcore", "hookcore.memory", "hookcore.testing", "hookcore.testing.simulator"}
SHOWS_TECHNIQUES = {"demo", "__init__"}  # no technique: a command that runs others, and the names of all


def module_name(path, base):
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path, base, *, type_checking, functions):
    """Names of the modules that a file imports.

    Args:
        path: The file.
        base: The folder that its package lies in.
        type_checking: Also those that only a type checker sees.
        functions: Also those inside functions.
    """
    own = module_name(path, base)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child) and not type_checking:
                for part in child.orelse:
                    yield from visit(part)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
                continue
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = child.module or ""
                if child.level:
                    parents = package.split(".")
                    source = ".".join([*parents[: len(parents) - child.level + 1], *filter(None, [source])])
                for alias in child.names:
                    found = base / Path(*source.split(".")) / alias.name
                    is_module = found.with_suffix(".py").exists() or (found / "__init__.py").exists()
                    yield f"{source}.{alias.name}" if is_module else source
            else:
                yield from visit(child)

    return set(visit(ast.parse(path.read_text(encoding="utf-8"))))


def files(folder):
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(CORE), ids=name_of)
def test_the_core_knows_no_technique_and_no_optional_library(path):
    found = imports(path, ROOT, type_checking=True, functions=True)
    tops = {name.split(".")[0] for name in found}
    assert tops & OPTIONAL == USES_LIBRARIES.get(path, set())
    if CORE / "testing" not in path.parents:
        assert not tops & TESTING
        assert not any(name.startswith("hookcore.testing") for name in found)


@pytest.mark.parametrize("path", USES_LIBRARIES, ids=name_of)
def test_a_library_is_imported_only_when_it_is_asked_for(path):
    assert (
        not {name.split(".")[0] for name in imports(path, ROOT, type_checking=False, functions=False)}
        & OPTIONAL
    )


@pytest.mark.parametrize("path", files(ROOMS), ids=name_of)
def test_a_technique_uses_public_names_only_and_no_other_technique(path):
    """Its room is its own file, or its own package; what begins with an underscore is nobody's to use."""
    found = imports(path, ROOMS.parent, type_checking=True, functions=True)
    room = path.relative_to(ROOMS).with_suffix("").parts[0]
    rooms = {name.split(".")[1] for name in found if name.startswith("hookcore_plugins.")}
    assert room in SHOWS_TECHNIQUES or rooms <= {room}
    assert {name for name in found if name.split(".")[0] == "hookcore"} <= PUBLIC


@pytest.mark.parametrize("path", files(ROOMS), ids=name_of)
def test_a_technique_uses_what_the_public_modules_declare(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in PUBLIC and node.module != "hookcore.testing":
            declared = set(__import__(node.module, fromlist=["x"]).__all__)
            assert {alias.name for alias in node.names} <= declared


def test_modules_of_the_core_import_each_other_in_one_direction():
    graph = {}
    for path in files(CORE):
        own = module_name(path, ROOT)
        needed = imports(path, ROOT, type_checking=False, functions=False)
        graph[own] = {name for name in needed if name.split(".")[0] == "hookcore" and name != own}
    assert len(graph) > 10
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


NAME_EACH_OTHER = {  # in type annotations only: a pool and the movers that have it in turn
    ("hookcore.memory.device.device_pool", "hookcore.memory.device.stream_mover"),
    ("hookcore.memory.files.host_pool", "hookcore.memory.files.file_mover"),
    ("hookcore.testing.simulator.capture", "hookcore.testing.simulator.devices"),
}


def test_types_follow_the_same_direction():
    graph = {}
    for path in files(CORE):
        own = module_name(path, ROOT)
        if path.name != "__init__.py":
            needed = imports(path, ROOT, type_checking=True, functions=False)
            graph[own] = {
                it for it in needed if it.startswith("hookcore.") and (own, it) not in NAME_EACH_OTHER
            }
    graphlib.TopologicalSorter({own: needed - {own} for own, needed in graph.items()}).prepare()


def test_what_importing_hookcore_brings_along():
    program = (
        "import sys; sys.modules['hookcore_plugins.group_offload'] = None\n"  # importing it fails
        "from hookcore_plugins import DiskOffload, LayerwiseCasting"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_looking_for_plugins_brings_along_no_compiler_and_no_library():
    program = (
        "import sys, hookcore\n"
        "hookcore.plugins.plugins()\n"
        "print([it for it in ('torch._dynamo', 'sympy', 'diffusers', 'transformers', 'accelerate') "
        "if it in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
