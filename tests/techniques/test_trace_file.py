"""Trace files: data and a TorchScript program, never a way to make or look up anything else."""

import io
import json
import os
import stat
import zipfile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import HookcoreError, PlanError
from hookcore_plugins import Trace
from hookcore_plugins.trace import trace_file

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
FACTS = "extra/hookcore.json"


class Model(nn.Module):
    """A model with an output of several containers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(self.layer(x))
        return {"sum": [y, (y + 1,)], "scale": 1.5, "none": None}


class Witness:
    """A class that no output has: it counts how often anybody makes one."""

    made = 0

    def __new__(cls, *args, **kwargs):
        Witness.made += 1
        return object.__new__(cls)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The members of a trace file, by their names."""
    path = tmp_path_factory.mktemp("trace") / "trace.pt"
    with hookcore.apply(Model().eval(), [Trace(X, path=path)]):
        pass
    with zipfile.ZipFile(path) as archive:
        return {item.filename: archive.read(item) for item in archive.infolist()}


def written(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def with_facts(members, change):
    """The members with other facts."""
    changed = dict(members)
    for name, data in members.items():
        if name.endswith(FACTS):
            changed[name] = change(json.loads(data))
            if not isinstance(changed[name], str):
                changed[name] = json.dumps(changed[name])
    return changed


def serves_or_is_refused(path):
    """Whether a trace in a file was taken; then it computes what the model does."""
    model = Model().eval()
    try:
        handle = hookcore.apply(model, [Trace(X, path=path)])
    except HookcoreError:
        assert not hookcore.status(model).attachments
        return False
    with torch.no_grad():
        got, expected = model(X), Model.forward(model, X)
    assert list(got) == list(expected)
    assert type(got["sum"]) is list
    torch.testing.assert_close(got, expected)
    handle.remove()
    return True


NAMES = st.sampled_from(
    [f"{__name__}:Witness", "subprocess:Popen", "os:system", "builtins:exec", "builtins:dict", "", "a:b.c"]
)
STRUCTURES = st.recursive(
    st.one_of(
        st.just(["tensor", None, []]),
        st.builds(lambda value: ["value", value, []], st.none() | st.text(max_size=5) | st.integers()),
    ),
    lambda inner: st.builds(
        lambda how, name, children: [how, name, children],
        st.sampled_from(["mapping", "named", "sequence", "object", "other"]),
        NAMES,
        st.lists(st.tuples(st.text(max_size=5), inner).map(list), max_size=3),
    ),
    max_leaves=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(output=STRUCTURES | JSON)
@example(output=["mapping", f"{__name__}:Witness", []])
@example(output=["object", f"{__name__}:Witness", []])
@example(output=["sequence", f"{__name__}:Witness", [[None, ["tensor", None, []]]]])
def test_nothing_that_a_file_names_is_made(output, members, tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "trace.pt"
    written(path, with_facts(members, lambda facts: facts | {"output": output}))
    before = Witness.made
    assert not serves_or_is_refused(path)
    assert Witness.made == before


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_other_facts_are_refused(data, members, tmp_path_factory):
    """Facts of any kind; one of them changed; one left out; text that is no JSON."""
    path = tmp_path_factory.mktemp("facts") / "trace.pt"

    def change(facts):
        name = data.draw(st.sampled_from(sorted(facts)))
        value = data.draw(JSON.filter(lambda it: it != facts[name]))
        return data.draw(
            st.one_of(
                JSON,
                st.just({key: it for key, it in facts.items() if key != name}),
                st.just(facts | {name: value}),
                st.text(max_size=20).filter(lambda text: not text.strip().startswith("{")),
            )
        )

    written(path, with_facts(members, change))
    assert not serves_or_is_refused(path)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "9" * 10**5, "", "{", '"\\ud800"', "NaN"])
def test_facts_that_are_hard_to_read_are_refused(text, members, tmp_path):
    written(tmp_path / "trace.pt", with_facts(members, lambda _: text))
    assert not serves_or_is_refused(tmp_path / "trace.pt")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_computes_the_same(data, members, tmp_path_factory):
    """Members that are cut, changed, left out or swapped in a whole archive; bytes of the archive itself."""
    path = tmp_path_factory.mktemp("damaged") / "trace.pt"
    changed = dict(members)
    name = data.draw(st.sampled_from(sorted(members)))
    content = bytearray(members[name])
    match data.draw(st.sampled_from(["bytes", "cut", "leave out", "swap", "grow", "archive"])):
        case "bytes" if content:
            for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
                content[at] = data.draw(st.integers(0, 255))
            changed[name] = bytes(content)
        case "cut":
            changed[name] = bytes(content[: data.draw(st.integers(0, len(content)))])
        case "leave out":
            del changed[name]
        case "swap":
            changed[name] = members[data.draw(st.sampled_from(sorted(members)))]
        case "grow":
            changed[name] = bytes(content) + data.draw(st.binary(max_size=30))
    written(path, changed)
    if changed == members:
        archive = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(archive) - 1), max_size=4)):
            archive[at] = data.draw(st.integers(0, 255))
        path.write_bytes(archive[: data.draw(st.just(len(archive)) | st.integers(0, len(archive)))])
    serves_or_is_refused(path)


def test_nothing_of_a_file_is_run_before_its_facts_fit(members, tmp_path, monkeypatch):
    """Loading TorchScript runs the `__setstate__` of its modules."""
    path = written(tmp_path / "trace.pt", with_facts(members, lambda facts: facts | {"entry": "decode"}))
    monkeypatch.setattr(torch.jit, "load", lambda *_args, **_kwargs: pytest.fail("it was loaded"))
    with pytest.raises(PlanError, match="its entry is 'decode', expected 'forward'"):
        hookcore.apply(Model().eval(), [Trace(X, path=path)])


def test_messages_hold_no_control_characters_and_are_short(members, tmp_path):
    hostile = "\x1b[2J" + "x" * 10**6
    path = written(tmp_path / "trace.pt", with_facts(members, lambda facts: facts | {"entry": hostile}))
    with pytest.raises(PlanError) as caught:
        hookcore.apply(Model().eval(), [Trace(X, path=path)])
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_trace_of_code_that_has_changed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "trace.pt"
    with hookcore.apply(Model().eval(), [Trace(X, path=path)]):
        pass
    before = path.read_bytes()
    unchanged = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, x: unchanged(self, x * 2))
    with pytest.raises(PlanError, match=r"does not compute what Model\.forward\(\) does .* to trace again"):
        hookcore.apply(Model().eval(), [Trace(X, path=path)])
    assert path.read_bytes() == before


def test_a_file_of_other_parameters_is_refused(members, tmp_path):
    """A script of more parameters than the model has, though the facts say that it fits."""

    class Larger(Model):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(4, 4)

        def forward(self, x):
            return super().forward(self.more(x))

    with hookcore.apply(Larger().eval(), [Trace(X, path=tmp_path / "larger.pt")]):
        pass
    with zipfile.ZipFile(tmp_path / "larger.pt") as archive:
        larger = {item.filename: archive.read(item) for item in archive.infolist()}
    (facts,) = (data for name, data in members.items() if name.endswith(FACTS))
    written(tmp_path / "trace.pt", with_facts(larger, lambda _: facts.decode()))
    with pytest.raises(PlanError, match="is no trace that was saved here"):
        hookcore.apply(Model().eval(), [Trace(X, path=tmp_path / "trace.pt")])


def test_a_file_holds_nothing_of_the_example(members):
    assert not any("traced_inputs" in name for name in members)
    raw = X.numpy().tobytes()
    assert not any(raw in data for data in members.values())


# Writing


def save_at(path):
    with hookcore.apply(Model().eval(), [Trace(X, path=path)]):
        pass


@pytest.mark.parametrize("target", ["missing", "present"])
def test_writing_follows_no_link(target, tmp_path):
    """Neither one at the path nor one at a name that a program could guess."""
    precious = tmp_path / "precious"
    if target == "present":
        precious.write_bytes(b"precious")
    folder = tmp_path / "traces"
    folder.mkdir()
    for name in ("trace.pt.part", ".trace.pt", "trace.pt.tmp"):
        (folder / name).symlink_to(precious)
    path = folder / "trace.pt"
    if target == "missing":
        path.symlink_to(precious)
    save_at(path)
    assert not path.is_symlink()
    assert precious.exists() == (target == "present")
    assert target == "missing" or precious.read_bytes() == b"precious"
    assert serves_or_is_refused(path)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_folder_as_it_was(failing, tmp_path, monkeypatch):
    path = tmp_path / "trace.pt"

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(trace_file, "open", FailingFile.opened, raising=False)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(type(path), "replace", fail)
    model = Model().eval()
    with pytest.raises(PlanError, match=r"cannot write the trace to .*No space left.* Give another path"):
        hookcore.apply(model, [Trace(X, path=path)])
    assert not list(tmp_path.iterdir())
    assert not hookcore.status(model).attachments


class FailingFile(io.FileIO):
    """A file on a full disk."""

    @classmethod
    def opened(cls, path, mode, opener):
        return open(path, mode, opener=opener) if "x" not in mode else cls(path, mode, opener=opener)

    def write(self, _data):
        raise OSError(28, "No space left on device")


def test_a_file_has_the_permissions_that_its_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        save_at(tmp_path / "trace.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "trace.pt").stat().st_mode) == 0o640


def test_a_missing_folder_is_told_when_it_is_planned(tmp_path):
    with pytest.raises(PlanError, match=r"the folder of path='.*none/trace\.pt' does not exist"):
        hookcore.plan(Model().eval(), [Trace(X, path=tmp_path / "none" / "trace.pt")])


# Other things than files


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "trace.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = type(path)("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(PlanError, match="is not a regular file|Is a directory"):
        hookcore.apply(Model().eval(), [Trace(X, path=path)])


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PlanError, match=r"cannot read the trace in .*Permission denied"):
        hookcore.apply(Model().eval(), [Trace(X, path=tmp_path / "trace.pt")])
