"""Files streamed to the simulated device: the bits of plain models, in bounded memory, whatever happens."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import struct
import tempfile
from concurrent.futures import CancelledError
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import Wide, copyings, damage, edit, every_damage, save, stored_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hookcore
from hookcore import BudgetError, CheckpointError
from hookcore.memory import find_mapping, origin_of
from hookcore.memory.device import stream_mover as stream
from hookcore.memory.files import file_reader
from hookcore.memory.files import read_engine as file_engine
from hookcore.memory.files import reader_threads as workers
from hookcore.testing import simulator
from hookcore.testing.modules import Counter
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import DiskOffload, LayerwiseCasting

FOR_EACH_EXAMPLE = settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH = 16


class Model(nn.Module):
    """Layers of different sizes that can be left out, one with a buffer only, and a weight used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=number % 3 > 0) for number in range(8))
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.stem.weight
        self.count = Counter(WIDTH)

    def forward(self, x, skip=(), backwards=False, fails_at=None):
        x = self.stem(self.count(x))
        order = range(len(self.layers))
        for number in reversed(order) if backwards else order:
            if number == fails_at:
                raise BoomError
            if number not in skip:
                x = x + torch.relu(self.layers[number](x))
        return self.head(x + self.wide(x))


class BoomError(Exception):
    pass


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def build(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().to(dtype).eval()


def call(model, device="sim", x=X, **options):
    with torch.no_grad():
        return model(x.to(device), **options)


def weights(model):
    return sum(it.nbytes for it in model.parameters())


def mover_of(model):
    (attachment, *_) = hookcore.status(model).attachments
    return next(it.hook._placement.mover for it in attachment.bindings if hasattr(it.hook, "_placement"))


def pinned_room(model, read_ahead):
    """Bytes of page-locked memory that may be taken."""
    return max(it.flat.nbytes for it in mover_of(model).own.groups.values()) + read_ahead


# Reading, at any moment


class LazyRead:
    """Something that is read when somebody asks whether it has been, or later, as chance decides."""

    def __init__(self, chance, function, args):
        self._chance, self._function, self._args = chance, function, args
        self._outcome = None

    def _run(self):
        if self._outcome is None:
            try:
                self._outcome = self._function(*self._args), None
            except (CheckpointError, RuntimeError) as error:
                self._outcome = None, error
            self._args = ()  # the memory that was read into

    def done(self):
        if self._chance():
            self._run()
        return self._outcome is not None

    def result(self):
        if (error := self.exception()) is not None:
            raise error
        return self._outcome[0]

    def exception(self):
        self._run()
        if self.cancelled():
            raise self._outcome[1]
        return self._outcome[1]

    def cancel(self):
        if self._outcome is None and self._chance():
            self._outcome, self._args = (None, CancelledError()), ()
        return self.cancelled()

    def cancelled(self):
        return self._outcome is not None and isinstance(self._outcome[1], CancelledError)


@contextlib.contextmanager
def reading(way="mixed", seed=0, likely=0.5):
    """Has reads be done without threads, at moments that a seed decides, through the cache and past it."""
    moments, ways = random.Random(seed), random.Random(seed + 1)  # noqa: S311

    class LazyWorkers:
        def __init__(self, *_, **__):
            self.reads = []

        def submit(self, function, *args):
            read = LazyRead(lambda: moments.random() < likely, function, args)
            self.reads = [*(it for it in self.reads if it._args), read]
            return read

        def shutdown(self, *, cancel_futures):
            self.finish()

        def finish(self):
            for read in self.reads:
                read.cancel()
                if not read.cancelled():
                    read.exception()

    def is_cached(_):
        return ways.random() < 0.5 if way == "mixed" else way == "cached"

    with (
        patch.object(workers, "ThreadPoolExecutor", LazyWorkers),
        patch.object(file_reader, "is_cached", is_cached),
    ):
        yield


@contextlib.contextmanager
def failing_reads(numbers):
    """Has some of the reads fail, by their numbers."""
    read_range, asked = workers.DirectReader.read_range, []

    def failing(reader, *args, **kwargs):
        asked.append(reader)
        if len(asked) in numbers:
            raise CheckpointError("the disk failed")
        return read_range(reader, *args, **kwargs)

    with patch.object(workers.DirectReader, "read_range", failing):
        yield


# Whatever is called, edited and read

ways_to_call = st.fixed_dictionaries(
    {},
    optional={
        "skip": st.sets(st.integers(0, 7), max_size=3),
        "backwards": st.just(True),
        "fails_at": st.integers(0, 7),
    },
)
ways_to_edit = st.sampled_from(["in place", "held", "held data", "through data", "new data", "loaded"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), ways_to_call),
        st.tuples(st.just("call"), st.just({})),
        st.tuples(st.just("edit"), st.tuples(ways_to_edit, st.integers(0, 7))),
        st.tuples(st.just("layer"), st.integers(0, 7)),
        st.tuples(st.just("gradients"), st.none()),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("other_stream"), st.none()),
        st.tuples(st.just("state"), st.none()),
        st.tuples(st.just("failing"), st.sets(st.integers(1, 12), min_size=1, max_size=2)),
    ),
    max_size=12,
)


def edit_layer(model, how, number, held):
    weight = model.layers[number].weight if how != "held data" else held[number]
    with torch.no_grad():
        if how == "in place":
            weight.mul_(2)
        elif how == "held":  # as optimizers hold them
            held[number].mul_(0.5)
        elif how in {"through data", "held data"}:  # which torch does not count
            weight.data.mul_(2)
        elif how == "new data":
            weight.data = weight.data.cpu() / 2
        elif how == "loaded":
            model.load_state_dict({name: it.cpu() / 2 for name, it in model.state_dict().items()})


class Twins:
    """A streamed model and a plain one, to which the same is done."""

    def __init__(self, folder, dtype, technique, *, in_memory):
        self.bare = build(dtype)
        with torch.no_grad():
            for name, parameter in self.bare.named_parameters():
                parameter.copy_(stored(folder)[name])
        self.technique = technique
        if in_memory:
            self.model = copy.deepcopy(self.bare)
            hookcore.apply(self.model, [technique])
        else:
            self.model = hookcore.load(Model, folder, [technique], torch_dtype=dtype)
        self.held = [[layer.weight for layer in it.layers] for it in (self.model, self.bare)]
        self.outputs = []
        self.dtype = dtype
        self.module = torch.get_device_module("sim")
        self.streams = [self.module.current_stream(), torch.Stream("sim")]

    def call(self, options):
        x = X.to(self.dtype)
        try:
            expected = call(self.bare, "cpu", x, **options)
        except BoomError:
            with pytest.raises(BoomError):
                call(self.model, x=x, **options)
        else:
            self.outputs.append((call(self.model, x=x, **options), expected))

    def failing(self, numbers):
        with failing_reads(numbers), contextlib.suppress(CheckpointError):
            call(self.model, x=X.to(self.dtype))
        self.bare.count.count.copy_(self.model.count.count.cpu())

    def edit(self, what):
        if what[0].startswith("held"):  # nobody is told of it, so no copy may be under way
            self.module.synchronize()
        for it, held in zip((self.model, self.bare), self.held, strict=True):
            edit_layer(it, *what, held)

    def layer(self, number):
        with torch.no_grad():
            found = self.model.layers[number](X.to("sim", self.dtype))
            self.outputs.append((found, self.bare.layers[number](X.to(self.dtype))))

    def gradients(self, _):
        for it, device in ((self.model, "sim"), (self.bare, "cpu")):
            it(X.to(device, self.dtype)).float().square().sum().backward()
        for ours, theirs in zip(self.model.parameters(), self.bare.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad.to(ours.grad.dtype))
            ours.grad = theirs.grad = None

    def reset(self, _):
        mover_of(self.model).reset()

    def state(self, _):
        for (name, ours), theirs in zip(
            self.model.state_dict().items(), self.bare.state_dict().values(), strict=True
        ):
            assert same_bits(ours.cpu().to(theirs.dtype), theirs), name

    def other_stream(self, _):
        self.module.synchronize()
        self.streams.reverse()
        self.module.set_stream(self.streams[0])

    def finish(self):
        self.module.set_stream(min(self.streams, key=lambda it: it.stream_id))
        self.module.synchronize()
        for ours, theirs in self.outputs:
            assert same_bits(ours.cpu(), theirs)
        mover = mover_of(self.model)
        here = {id(it): it.nbytes for it in self.model.parameters() if it.device.type == "sim"}
        if self.technique.memory_budget is not None:
            assert sum(here.values()) + mover._engine.allocator.size <= self.technique.memory_budget
        mover.store._reader._workers._pool.finish()
        gc.collect()  # reads that failed are in cycles with their tracebacks
        assert simulator.pinned_bytes() <= pinned_room(self.model, self.technique.read_ahead)

    def remove(self):
        hookcore.remove(self.model)
        gc.collect()
        assert simulator.pinned_bytes() == 0
        for (name, ours), theirs in zip(self.model.named_parameters(), self.bare.parameters(), strict=True):
            assert ours.device.type == "cpu", name
            assert same_bits(ours, theirs), name
        assert self.model.head.weight is self.model.stem.weight


def stored(folder):
    """All tensors of a checkpoint."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: it for path in files for name, it in load_file(path).items()}


@FOR_EACH_EXAMPLE
@given(
    steps=steps,
    budget=st.none() | st.integers(10_000, 22_000),
    read_ahead=st.sampled_from([0, 3_000, 2**20]),
    kept=st.sampled_from([torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    in_memory=st.booleans(),
    shards=st.integers(1, 2),
    seed=st.integers(0, 999),
    likely=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_outputs_are_those_of_the_bare_model(  # noqa: PLR0917
    sim, steps, budget, read_ahead, kept, dtype, in_memory, shards, seed, likely
):
    with tempfile.TemporaryDirectory() as folder, reading("mixed", seed, likely):
        tensors = stored_tensors(build())
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(kept) if tensor.is_floating_point() else tensor
        save(tensors, folder, shards)
        technique = DiskOffload(folder, execution_device="sim", memory_budget=budget, read_ahead=read_ahead)
        twins = Twins(folder, dtype, technique, in_memory=in_memory)
        for kind, what in [*steps, ("call", {})]:
            getattr(twins, kind)(what)
        twins.finish()
        twins.remove()


class Deep(Wide):
    def __init__(self):
        super().__init__(layers=8)


def wide(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Deep().to(dtype).eval()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of `Deep` in two shards."""
    save(stored_tensors(wide()), tmp_path, shards=2)
    return tmp_path


W = torch.linspace(-1, 1, 3 * 128).reshape(3, 128)
LAYER = 66_048  # bytes of one of its layers


def streamed(folder, dtype=None, **options):
    technique = DiskOffload(folder, execution_device="sim", **({"read_ahead": "1MiB"} | options))
    return hookcore.load(Deep, folder, [technique], torch_dtype=dtype)


def call_wide(model, device="sim"):
    with torch.no_grad():
        return model(W.to(device))


def plain_output(dtype=torch.float32):
    return call_wide(wide(dtype).float(), "cpu")


# The schedule


@pytest.mark.parametrize("budget", [None, 150_000, 220_000, "1MiB"])
@pytest.mark.parametrize("read_ahead", [0, "100KB", "1MiB"])
def test_in_the_long_run_each_group_is_copied_once_a_pass_in_flat_memory(sim, budget, read_ahead, folder):
    with reading(likely=1.0):
        model = streamed(folder, memory_budget=budget, read_ahead=read_ahead)
        x = W.to("sim")
        module = torch.get_device_module("sim")
        with torch.no_grad():
            for _ in range(3):
                model(x)
            module.synchronize()
            held = module.memory_allocated()
            mover = mover_of(model)
            with sim.traced() as trace:
                for _ in range(5):
                    output = model(x)
                    del output
            module.synchronize()
            assert module.memory_allocated() == held
    copies = [it for it in trace.spans if it.engine == "copy in"]
    assert not [it for it in trace.spans if it.engine == "copy out"]
    comes_and_goes = [it for it in mover.own.groups.values() if not it.stays]
    if read_ahead == 0:  # how far a pass has come in copying for the next one depends on when copies end
        assert abs(len(copies) - 5 * len(comes_and_goes)) <= 4
    else:
        assert len(copies) == 5 * len(comes_and_goes)
    assert bool(comes_and_goes) == (budget != "1MiB")
    assert sim.max_pinned_bytes() <= LAYER + hookcore.parse_bytes(read_ahead)


@pytest.mark.parametrize("read_ahead", [0, 8 * LAYER])
def test_the_host_waits_for_a_copy_only_if_all_that_is_read_into_is_full(sim, read_ahead, folder):
    waited = []
    machine = simulator.state.get_machine()
    waits = machine.host_waits

    def counted(clock, time):
        if time > machine.host_time:
            waited.append(time)
        waits(clock, time)

    slow = simulator.DeviceProfile(name="slow", host_to_device=1e8)
    with reading(likely=1.0), sim.limited(profile=slow):
        model = streamed(folder, read_ahead=read_ahead)
        for _ in range(2):
            call_wide(model)
        torch.get_device_module("sim").synchronize()
        x = W.to("sim")
        with torch.no_grad(), patch.object(machine, "host_waits", counted):
            model(x)
    assert bool(waited) == (read_ahead == 0)


def test_reading_goes_on_while_others_compute(sim, folder):
    """In threads: each layer's reading has begun before the one before it computes."""
    begun, read = [], file_reader.FileReader.read

    def noting(reader, targets, *args):
        begun.append(len(targets))
        return read(reader, targets, *args)

    with patch.object(file_reader.FileReader, "read", noting):
        model = streamed(folder)
        call_wide(model)
        begun.clear()
        seen = []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda *_: seen.append(len(mover_of(model)._engine._requests)))
        call_wide(model)
    assert seen == [4] * 8  # all that there is room for


def test_the_next_group_is_copied_while_one_computes(sim, folder):
    durations = []
    profile = simulator.DeviceProfile(name="slow", host_to_device=5e9, kernel_latency=1e-5)
    for budget in (LAYER, 3 * LAYER):
        nothing_stays = patch.object(stream, "choose_layout", return_value=None)
        with reading(likely=1.0), sim.limited(profile=profile), nothing_stays:
            model = streamed(folder, memory_budget=budget)
            call_wide(model)
            torch.get_device_module("sim").synchronize()
            x = W.to("sim")
            with torch.no_grad(), sim.traced() as trace:
                model(x)
        durations.append(trace.duration)
        hookcore.remove(model)
    assert durations[1] < 0.8 * durations[0]


def test_a_layer_that_takes_long_to_read_counts_as_one_that_takes_long_to_copy(sim, folder):
    """What stays is chosen by it."""
    read = file_reader.FileReader.read

    def slow(reader, targets, *args):
        from_files, _ = read(reader, targets, *args)
        return from_files, 1.0 if "layers.2.weight" in {it.origin.entry.key for it in targets} else 0.0

    with patch.object(file_reader.FileReader, "read", slow), reading(likely=1.0):
        model = streamed(folder, memory_budget=3 * LAYER)
        for _ in range(3):
            call_wide(model)
    stays = {group.name: it.stays for group, it in mover_of(model).own.groups.items()}
    assert stays["layers.2"]


def test_a_late_read_is_copied_while_others_compute(sim, folder):
    """It waits for what was computed when it was asked for, and not for all that was until it was read."""
    durations = []
    profile = simulator.DeviceProfile(name="slow", host_to_device=5e9, kernel_latency=1e-5)
    for likely in (1.0, 0.0):  # what isn't read ahead is read when it is needed, which takes no virtual time
        nothing_stays = patch.object(stream, "choose_layout", return_value=None)
        with reading(likely=likely), sim.limited(profile=profile), nothing_stays:
            model = streamed(folder, memory_budget=3 * LAYER)
            call_wide(model)
            torch.get_device_module("sim").synchronize()
            x = W.to("sim")
            with torch.no_grad(), sim.traced() as trace:
                model(x)
        durations.append(trace.duration)
        hookcore.remove(model)
    assert durations[1] < 1.2 * durations[0]


# Bits, dtypes and other techniques


@pytest.mark.parametrize("budget", [None, 70_000, "1MiB"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_bytes_of_the_storage_dtype_travel_and_full_ones_when_casting_is_removed(sim, budget, kept, tmp_path):
    save(stored_tensors(wide(kept)), tmp_path)
    casting = LayerwiseCasting(torch.float8_e4m3fn, skip_modules_pattern=())
    cast = wide(kept).float()
    hookcore.apply(cast, [casting])
    model = streamed(tmp_path, torch.float32, memory_budget=budget)
    for _ in range(2):
        with hookcore.apply(model, [casting]):
            for _ in range(3):
                assert same_bits(call_wide(model).cpu(), call_wide(cast, "cpu"))
            assert sum(it.flat.nbytes for it in mover_of(model).own.groups.values()) < 8 * LAYER / 3
        for _ in range(3):
            assert same_bits(call_wide(model).cpu(), plain_output(kept))


@pytest.mark.parametrize("way", ["cached", "direct"])
def test_an_edit_that_nobody_is_told_of_is_seen(sim, way, folder):
    bare = wide()
    with reading(way, likely=1.0):
        model = streamed(folder)
        held = [[layer.weight for layer in it.layers] for it in (model, bare)]
        for _ in range(2):
            call_wide(model)
        torch.get_device_module("sim").synchronize()
        assert len(mover_of(model).prefetcher.ahead) == 4  # copied for the next call
        for weights_of in held:
            for weight in weights_of:
                weight.data.mul_(2)
        assert same_bits(call_wide(model).cpu(), call_wide(bare, "cpu"))


def test_what_is_kept_is_read_anew_when_it_is_no_longer_in_use(sim, folder):
    """After an edit that nobody is told of, while the device still computes the call before."""
    bare, model = wide(), wide()
    technique = DiskOffload(folder, execution_device="sim", memory_budget=9 * LAYER)
    hookcore.apply({"model": model, "other": wide()}, [technique])
    held = [[layer.weight for layer in it.layers] for it in (model, bare)]
    x = W.to("sim")  # a copy of an input from the host would wait for the device
    slow = simulator.DeviceProfile(name="slow kernels", kernel_latency=1e-2)
    with reading("cached", likely=1.0), sim.limited(profile=slow), torch.no_grad():
        for _ in range(4):
            model(x)
        for weights_of in held:
            for weight in weights_of:
                weight.data.mul_(2)
        found = model(x)
    assert len(mover_of(model)._engine.allocator.kept) == 8
    assert same_bits(found.cpu(), call_wide(bare, "cpu"))


@pytest.mark.parametrize("budget", [None, "1MiB"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_what_a_forward_changes_in_its_weight_is_kept(sim, budget, kept, tmp_path):
    class Growing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.add_(2**-12)
            return super().forward(x)

    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(*(Growing(128, 128) for _ in range(6)))

    bare = Model().to(kept)
    save(stored_tensors(bare), tmp_path)
    bare = bare.float()
    model = hookcore.load(
        Model,
        tmp_path,
        [DiskOffload(execution_device="sim", memory_budget=budget)],
        torch_dtype=torch.float32,
    )
    for _ in range(3):
        assert same_bits(call_wide(model).cpu(), call_wide(bare, "cpu"))
    hookcore.remove(model)
    assert all(same_bits(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))


def test_files_whose_tensors_are_not_aligned(sim, tmp_path):
    save(stored_tensors(wide()), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 4 + 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    for way in ("cached", "direct"):
        for dtype in (None, torch.float64):
            with reading(way):
                model = streamed(tmp_path, dtype)
                expected = wide().to(dtype or torch.float32)
                x = W.to(dtype or torch.float32)
                with torch.no_grad():
                    assert same_bits(model(x.to("sim")).cpu(), expected(x))


@pytest.mark.parametrize("chunk", [4096, 3 * 4096])
def test_tensors_larger_than_what_is_read_at_once(sim, chunk, tmp_path):
    save(stored_tensors(wide(torch.bfloat16)), tmp_path, shards=2)
    for way in ("cached", "direct"):
        for dtype in (torch.bfloat16, torch.float32):
            with (
                patch.object(file_reader, "_CHUNK_BYTES", chunk),
                patch.object(file_reader, "_CACHED_CHUNK_BYTES", chunk),
                reading(way),
            ):
                model = streamed(tmp_path, dtype)
                with torch.no_grad():
                    found = model(W.to("sim", dtype)).cpu()
                    assert same_bits(found, wide(torch.bfloat16).to(dtype)(W.to(dtype)))


# Copies, removal and memory


@pytest.mark.parametrize("copying", copyings.values(), ids=copyings.keys())
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_copies_are_plain_models(sim, copying, kept, tmp_path):
    save(stored_tensors(wide(kept)), tmp_path)
    model = streamed(tmp_path, torch.float32)
    for _ in range(2):
        call_wide(model)
        copied = copying(model)
        assert not hookcore.status(copied).techniques
        assert same_bits(call_wide(copied, "cpu"), plain_output(kept))


def test_memory_is_free_while_applied_and_strides_come_back(sim, tmp_path):
    model = wide()
    model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach().t().contiguous().t())
    save(stored_tensors(model), tmp_path)
    snapshot = ModelSnapshot.take(model)
    storages = [StorageWeakRef(it.untyped_storage()) for it in model.parameters()]
    options = {"memory_budget": 2 * LAYER, "read_ahead": 0}
    applied = hookcore.apply(model, [DiskOffload(tmp_path, execution_device="sim", **options)])
    assert all(it.expired() for it in storages)
    for _ in range(3):
        call_wide(model)
    assert all(find_mapping(it) or it.device.type == "sim" for it in model.parameters())
    applied.remove()
    snapshot.assert_restored(model)
    assert not any(origin_of(it) for it in model.parameters())
    assert torch.get_device_module("sim").memory_allocated() == 0
    assert sim.pinned_bytes() == 0


def test_removal_waits_for_what_is_being_read_and_closes_files(sim, folder):
    model = streamed(folder)
    call_wide(model)  # at its end the next call's weights begin to be read
    reader = mover_of(model).store._reader
    readers = list(reader._workers._readers.values())
    assert readers
    hookcore.remove(model)
    assert all(it._fd == -1 for it in readers)


def test_a_model_may_go_away_with_its_hooks_on(sim, folder):
    model = streamed(folder, memory_budget=2 * LAYER)
    for _ in range(3):
        call_wide(model)  # the next one's first groups are on their way
    pool = mover_of(model).store._reader._workers._pool
    del model
    pool.shutdown()  # what is being read at this moment is read to its end
    gc.collect()
    sim.check()
    assert torch.get_device_module("sim").memory_allocated() == 0
    assert sim.pinned_bytes() == 0


@pytest.mark.parametrize("budget", [None, 2 * LAYER, "1MiB"])
def test_a_residents_edits_survive_removal(sim, budget, folder):
    model, bare = streamed(folder, memory_budget=budget), wide()
    for _ in range(3):
        call_wide(model)
    for it in (model, bare):
        for number, how in enumerate(["add_", "data.add_", "data =", "bias"]):
            edit(it, how, number, 0.5) if it is bare else edit_there(it, how, number)
    assert same_bits(call_wide(model).cpu(), call_wide(bare, "cpu"))
    hookcore.remove(model)
    assert all(same_bits(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))


def edit_there(model, how, number):
    """The same, wherever the weight is."""
    with torch.no_grad():
        weight = model.layers[number].weight
        if how == "data =":
            weight.data = torch.full((128, 128), 0.5)
        else:
            edit(model, how, number, 0.5)


def test_the_smallest_budget_is_named_and_works(sim, folder):
    with pytest.raises(BudgetError) as raised:
        streamed(folder, memory_budget=10)
    least = int(str(raised.value).rsplit("works is ", 1)[1].split()[0])
    with pytest.raises(BudgetError):
        streamed(folder, memory_budget=least - 1)
    for _ in range(2):
        assert same_bits(call_wide(streamed(folder, memory_budget=least)).cpu(), plain_output())


# Files that change


@every_damage
@pytest.mark.parametrize("likely", [0.0, 1.0])
def test_a_file_changed_between_calls_is_an_error_until_it_is_put_back(sim, how, likely, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    with reading("direct", likely=likely):
        model = streamed(folder)
        call_wide(model)
        put_back = damage(file, how)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"{file.name}', which holds tensor 'layers\."):
                call_wide(model)
        put_back()
        assert same_bits(call_wide(model).cpu(), plain_output())


@pytest.mark.parametrize("how", ["append", "overwrite", "replace", "delete"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_file_changed_during_a_call_is_an_error_of_this_call(sim, how, layer, folder):
    file = min(folder.glob("*.safetensors"))
    with reading("mixed"):
        model = streamed(folder)
        call_wide(model)
        put_back, run = [], []
        for number, it in enumerate(model.layers):
            it.register_forward_hook(lambda *_, number=number: run.append(number))
        handle = model.layers[layer].register_forward_hook(lambda *_: put_back.append(damage(file, how)))
        with pytest.raises(CheckpointError, match=file.name):
            call_wide(model)
        assert run == list(range(layer + 1)) or run == list(range(layer + 2))  # one may be of the other file
        handle.remove()
        put_back[0]()
        assert same_bits(call_wide(model).cpu(), plain_output())


@every_damage
def test_what_was_read_ahead_of_a_changed_file_is_never_used(sim, how, folder):
    """Also when the file is put back before the call that would have used it, but after one that failed."""
    file = sorted(folder.glob("*.safetensors"))[1]
    with reading("direct", likely=1.0):
        model = streamed(folder)
        call_wide(model)
        torch.get_device_module("sim").synchronize()
        for load in mover_of(
            model
        ).prefetcher.ahead.values():  # as if it had been read while the file was damaged
            load.place.memory.fill_(7)
        put_back = damage(file, how)
        with pytest.raises(CheckpointError):
            call_wide(model)
        put_back()
        assert same_bits(call_wide(model).cpu(), plain_output())


@every_damage
@pytest.mark.parametrize("budget", [None, 2 * LAYER, "1MiB"])
def test_removal_never_gives_a_model_the_values_of_a_changed_file(sim, how, budget, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    model = wide()
    snapshot = ModelSnapshot.take(model)
    technique = DiskOffload(folder, execution_device="sim", memory_budget=budget)
    applied = hookcore.apply(model, [technique])
    for _ in range(3):
        call_wide(model)
    put_back = damage(file, how)
    with pytest.raises(CheckpointError, match=file.name):
        applied.remove()
    assert hookcore.status(model).techniques == ("disk_offload",)
    put_back()
    call_wide(model)
    applied.remove()
    snapshot.assert_restored(model)


def test_a_read_that_fails_is_an_error_of_the_call_that_needs_it(sim, folder):
    with reading("direct", likely=1.0):
        model = streamed(folder)
        with failing_reads(range(1, 99)), pytest.raises(CheckpointError, match="the disk failed"):
            call_wide(model)
        assert same_bits(call_wide(model).cpu(), plain_output())
        with failing_reads([1]):  # one ahead of use, and not when it is tried again
            for _ in range(2):
                assert same_bits(call_wide(model).cpu(), plain_output())


# Each wait is needed


def without_wait_for_copy(self, load):
    self._copy_now(request) if not (request := self._requests[load]).is_copied else None
    if self.times is not None:
        load.used = self.times.mark(self._computing)


def without_event_after_use(self, load):
    self.give_back(load)
    self._go_on()


FAULTS = {
    "use does not wait for its copy": ("wait_for", without_wait_for_copy),
    "copy does not wait for the last use": ("leave", without_event_after_use),
}


@pytest.mark.parametrize("budget", [None, 2 * LAYER])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_wait_is_missed(sim, fault, budget, folder):
    name, mutant = fault
    with (
        patch.object(file_engine.FileEngine, name, mutant),
        simulator.limited(strict=True),
        reading(likely=1.0),
    ):
        model = streamed(folder, memory_budget=budget)
        with pytest.raises(simulator.RaceError):
            for _ in range(3):
                call_wide(model)
            simulator.check()
    simulator.reset()
    hookcore.remove(model)
    simulator.reset()
