"""Attention backends in compiled blocks: computed by the backend, without graph breaks, and compiled once."""

import contextlib
import shutil

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack

import hookcore
from hookcore import AttentionCall, AttentionFunction, ConflictError
from hookcore.testing import ModelSnapshot
from hookcore.testing.models import bert, flux, gpt2, unet
from hookcore_plugins import AttentionBackend, Compile, GroupOffload, LayerwiseCasting, Trace
from hookcore_plugins.attention_backend import AttentionError, AttentionReport, backends
from hookcore_plugins.attention_backend.chunked import _backward_operator, _operator, chunked_attention
from hookcore_plugins.attention_backend.function_mode import redirected, suspended
from hookcore_plugins.compile import CompileReport

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 24)

    def forward(self, x, **options):
        query, key, value = self.mix(x).unflatten(-1, (3, 2, -1)).unbind(-3)
        heads = (it.transpose(1, 2) for it in (query, key, value))
        return scaled_dot_product_attention(*heads, **options).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.second(self.first(x)))


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def brought(monkeypatch):
    """Adds attention functions to those that plugins bring."""
    known = dict(hookcore.attention_functions())
    monkeypatch.setattr(hookcore, "attention_functions", lambda: known)

    def bring(name, function, **declared):
        known[name] = AttentionFunction(name, function, **declared)

    return bring


def twice(*args, **kwargs):
    """An attention that is known by what it gives."""
    return 2 * scaled_dot_product_attention(*args, **kwargs)


def compiled(**options):
    return Compile(backend="eager", **{"fullgraph": True, **options})


def counted(model):
    """The reports of compiling and of attention."""
    reports = {type(it.counted): it.counted for it in hookcore.status(model).run_report().entries}
    return reports.get(CompileReport), reports.get(AttentionReport)


def twin(model, make=Model):
    other = make()
    other.load_state_dict(model.state_dict())
    return other


def eager_bert():
    torch.manual_seed(0)
    config = bert().build().config
    config._attn_implementation = "eager"
    return transformers.BertModel(config).eval()


# Real models


@pytest.mark.parametrize(
    ("make", "backend", "compiler"),
    [
        (unet, "flash", "eager"),
        (bert, "chunked", "aot_eager"),
        (gpt2, "flex", "aot_eager"),
        *(
            pytest.param(
                flux,
                backend,
                "inductor",
                marks=[
                    pytest.mark.slow,
                    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
                ],
            )
            for backend in ("chunked", "flex", "flash", "math")
        ),
    ],
)
def test_real_models_compute_the_same_and_nothing_is_compiled_again(make, backend, compiler):
    case = make()
    model, bare = case.build(), case.build()
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [Compile(backend=compiler, fullgraph=True), AttentionBackend(backend)])
    entry = case.entries[-1]
    with torch.no_grad():
        case.call(model, entry, 0)
        assert counted(model)[0].graph_breaks == 0
        applied.reset()
        for seed in (1, 2):
            got, expected = case.call(model, entry, seed), case.call(bare, entry, seed)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    compiling, attention = counted(model)
    assert compiling == CompileReport(compiling.blocks)
    attentions = {"flux": 5, "unet": 8, "bert": 2, "gpt2": 2}[make.__name__]
    assert attention == AttentionReport(backend, compiled=2 * attentions)
    applied.remove()
    before.assert_restored(model)


@pytest.mark.parametrize("told", ["flux", "bert"])
def test_what_the_library_was_told_does_not_matter(told, brought):
    """Neither a processor's own backend nor an eager config."""
    brought("twice", twice)
    case = {"flux": flux, "bert": bert}[told]()
    model, reference = (case.build() for _ in range(2)) if told == "flux" else (eager_bert(), eager_bert())
    if told == "flux":
        for module in model.modules():
            if hasattr(module, "processor"):
                module.processor._attention_backend = "flex"
    processors = {name: getattr(it, "processor", None) for name, it in model.named_modules()}
    hookcore.apply(reference, [AttentionBackend("twice")])
    hookcore.apply(model, [AttentionBackend("twice"), compiled()])
    with torch.no_grad():
        for seed in range(3):
            torch.testing.assert_close(case.call(model, seed=seed)[0], case.call(reference, seed=seed)[0])
    assert counted(model)[0].graph_breaks == 0
    # The first of flux's single blocks is called with other strides.
    assert counted(model)[0].recompiles == (told == "flux")
    assert processors == {name: getattr(it, "processor", None) for name, it in model.named_modules()}


# With others, coming and going


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_it_goes_with_all_others_in_any_order(data):
    with pytest.MonkeyPatch.context() as patch:
        known = {**hookcore.attention_functions(), "twice": AttentionFunction("twice", twice)}
        patch.setattr(hookcore, "attention_functions", lambda: known)
        torch._dynamo.reset()
        model = Model()
        bare, doubled = twin(model), twin(model)
        leaves = GroupOffload("cpu", offload_type="leaf_level")
        casting = LayerwiseCasting("bfloat16", keep_originals=True)
        others = [it for it in (leaves, casting) if data.draw(st.booleans())]
        attend = AttentionBackend("twice")
        compile_it = compiled(regional=bool(others) or data.draw(st.booleans()))
        hookcore.apply(doubled, [attend, *others])
        hookcore.apply(bare, others)
        handles = {}
        for technique in data.draw(st.permutations([compile_it, attend, *others])):
            handles[technique] = hookcore.apply(model, [technique])
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(X), doubled(X))
            compiling, attention = counted(model)
            assert (compiling.graphs, compiling.recompiles, compiling.graph_breaks) == (1, 0, 0)
            assert attention == AttentionReport("twice", compiled=12)
            gone = data.draw(st.sampled_from([compile_it, attend]))
            handles[gone].remove()
            torch.testing.assert_close(model(X), bare(X) if gone is attend else doubled(X))
            hookcore.apply(model, [gone])
            torch.testing.assert_close(model(X), doubled(X))
        hookcore.remove(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_only_what_is_named_is_redirected(brought):
    brought("twice", twice)
    model = Model()
    reference = twin(model)
    hookcore.apply(model, [compiled(), AttentionBackend("twice", modules=r"\.second$")])
    hookcore.apply(reference, [AttentionBackend("twice", modules=r"\.second$")])
    torch.testing.assert_close(model(X), reference(X))
    assert counted(model)[1] == AttentionReport("twice", compiled=3)
    assert counted(model)[0].graphs == 1


def test_blocks_that_are_attention_themselves_share_code(brought):
    brought("twice", twice)
    model = Model(Attention)
    reference = twin(model, lambda: Model(Attention))
    hookcore.apply(reference, [AttentionBackend("twice")])
    for techniques in ([compiled()], [AttentionBackend("twice")]):
        hookcore.apply(model, techniques)
    for _ in range(2):
        torch.testing.assert_close(model(X), reference(X))
    assert counted(model)[0] == CompileReport(blocks=3, graphs=1)
    assert counted(model)[1] == AttentionReport("twice", compiled=6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoders_are_compiled_too(brought):
    """The encoder around the blocks is hooked so that it calls no fused kernel; blocks see nothing of it."""
    brought("twice", twice)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    reference = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    reference.load_state_dict(model.state_dict())
    hookcore.apply(reference, [AttentionBackend("twice")])
    hookcore.apply(model, [compiled(), AttentionBackend("twice")])
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(X), reference(X))
    compiling, attention = counted(model)
    assert (compiling.graphs, compiling.recompiles, compiling.graph_breaks) == (1, 0, 0)
    assert attention == AttentionReport("twice", compiled=4)


def test_what_is_suspended_around_compiled_code_is_on_again_after_it():
    """And a model that is called from there has its own."""

    def asked(name):
        return lambda *_: torch.full((), {"outer": 1.0, "inner": 2.0}[name])

    def call():
        before = scaled_dot_product_attention(X, X, X)
        with suspended():
            assert not _get_current_function_mode_stack()  # nor does it slow anything down
            bare = scaled_dot_product_attention(X, X, X)
            inner = redirected(asked("inner"), scaled_dot_product_attention, X, X, X)
        return before, bare, inner, scaled_dot_product_attention(X, X, X)

    before, bare, inner, after = redirected(asked("outer"), call)
    assert (before, inner, after) == (1, 2, 1)
    assert torch.equal(bare, scaled_dot_product_attention(X, X, X))


def test_nobody_else_sees_what_stands_in_and_an_error_leaves_nothing(brought):
    brought("twice", twice)

    class Seeing(Block):
        def forward(self, x):
            if x.shape[0] == 3:
                raise ZeroDivisionError
            return super().forward(x)

    model = Model(Seeing)
    applied = hookcore.apply(model, [compiled(fullgraph=False), AttentionBackend("twice")])
    model(X)
    attention = model.blocks[0].first
    assert "forward" not in vars(attention)
    torch.testing.assert_close(attention(X), twin(attention, Attention)(X))
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(3, 5, 8))
    assert "forward" not in vars(attention)
    attention.forward = Attention.forward.__get__(attention)  # somebody else's
    model(X)
    assert vars(attention)["forward"] == Attention.forward.__get__(attention)
    del attention.forward
    applied.remove()


# What it cannot


def test_a_fallback_is_chosen_as_code_is_compiled_and_told(brought):
    def picky(query, *_args, **_kwargs):
        raise NotImplementedError("it is Monday")

    brought("narrow", twice, dtypes=[torch.float64])
    brought("picky", picky)
    model = Model()
    expected = model(X)
    for name, reason in (("narrow", "dtype torch.float32"), ("picky", "it is Monday")):
        with hookcore.apply(model, [compiled(), AttentionBackend(name, fallback="math")]):
            for _ in range(2):
                torch.testing.assert_close(model(X), expected)
            compiling, attention = counted(model)
            assert (compiling.graphs, compiling.graph_breaks) == (1, 0)
            reasons = {f"compiled: by math instead of {name} ({reason})": 1}
            assert attention == AttentionReport(name, compiled=12, reasons=reasons)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_refusal_is_raised_as_ever_unless_graphs_may_not_break(fullgraph, brought):
    brought("maskless", twice, gradients=False)
    model = Model()
    hookcore.apply(model, [compiled(fullgraph=fullgraph), AttentionBackend("maskless")])
    said = "attention_backend 'maskless' cannot compute the attention of 'Attention.forward': found gradients"
    with pytest.raises(Exception if fullgraph else AttentionError, match="maskless" if fullgraph else said):
        model(X)
    with torch.no_grad():
        model(X)


@pytest.mark.parametrize("make", [Model, Attention])
@pytest.mark.parametrize("order", [1, -1])
def test_a_trace_would_freeze_it(make, order):
    model = make()
    first, second = [Trace(X), AttentionBackend("math")][::order]
    hookcore.apply(model, [first])
    with pytest.raises(ConflictError):
        hookcore.apply(model, [second])


# Operators


def shapes():
    """Tensors as the operator takes them, and how to attend."""
    sizes = st.tuples(*(st.integers(1, 3) for _ in range(3)), *(st.integers(1, 6) for _ in range(2)))
    return st.tuples(sizes, st.sampled_from([None, "bool", "learned"]), st.booleans(), st.integers(0, 99))


def inputs_of(drawn):
    (batch, heads, group, length, keys), mask, causal, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, group, length, 4, generator=generator, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, size, generator=generator, requires_grad=True) for size in (4, 3))
    made = None
    if mask is not None:
        made = torch.randn(1, heads, 1, length, keys, generator=generator)
        made = made > 0 if mask == "bool" else made.requires_grad_()
    return q, k, v, made, causal, 0.5, 64


@settings(max_examples=8, deadline=None)
@given(shapes())
def test_the_operators_are_what_torch_wants_of_operators(drawn):
    given_ = inputs_of(drawn)
    torch.library.opcheck(
        _operator, given_, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"]
    )
    saved = [None if it is None else it.detach() for it in given_[:4]]
    outputs = _operator(*saved, *given_[4:])
    learned = drawn[1] == "learned"
    torch.library.opcheck(
        _backward_operator,
        (torch.ones_like(outputs[0]), *saved, *outputs, *given_[4:], learned),
        test_utils=["test_schema", "test_faketensor"],
    )


@pytest.mark.parametrize(
    ("mask", "causal", "dynamic"), [(None, True, False), ("bool", False, True), ("learned", True, True)]
)
def test_chunked_attention_is_the_same_compiled_with_gradients(mask, causal, dynamic):
    q, k, v, mask, causal, scale, _ = inputs_of(((2, 3, 2, 6, 5), mask, causal, 0))
    inputs = [q.flatten(1, 2), k.repeat_interleave(q.shape[2], 1), v.repeat_interleave(q.shape[2], 1)]
    inputs = [it.detach().requires_grad_() for it in inputs]
    if mask is not None:
        mask = mask[:, :1, 0].detach()
        inputs.append(mask.requires_grad_() if mask.is_floating_point() else mask)

    def attend(*tensors):
        return chunked_attention(*tensors, is_causal=causal, scale=scale, tile_bytes=64)

    results = []
    learned = [it for it in inputs if it.requires_grad]
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(*(st.integers(1, 3) for _ in range(4)), *(st.integers(0, 2) for _ in range(2))),
    st.sampled_from(["", "heads", "batch", "size", "value", "strided", "dropout", "three"]),
    st.sampled_from([None, (), (1,), (1, 1), "learned", "strided"]),
    st.booleans(),
)
def test_what_is_compiled_takes_the_flash_kernel_only_where_torch_does(sizes, odd, masked, causal):
    batch, heads, group, size, length, keys = sizes
    query = torch.randn(batch, heads * group, length, size)
    key = torch.randn(batch + (odd == "batch"), heads + (odd == "heads"), keys, size + (odd == "size"))
    value = torch.randn(*key.shape[:3], size + (odd == "value"))
    if odd == "strided":
        key = torch.randn(*key.shape[:2], key.shape[3], keys).mT
    if odd == "three":
        query, key, value = query[0], key[0], value[0]
    mask = None
    if masked is not None:
        lead = masked if isinstance(masked, tuple) else (1, 1)
        mask = torch.zeros(*lead, length, keys)
        mask = torch.zeros(*lead, keys, length).mT if masked == "strided" else mask
        mask.requires_grad_(masked == "learned")
    dropout = 0.5 * (odd == "dropout")
    given_ = query, key, value, mask, dropout
    if backends._flash_of_cpu_can(AttentionCall(*given_)):
        with contextlib.suppress(RuntimeError):
            choice = torch._fused_sdp_choice(*given_, causal and mask is None)
            assert choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


@pytest.mark.parametrize("kind", [torch.bfloat16, None])
def test_autocast_is_traced_as_it_is_run(kind, brought):
    def wide(query, *args, **kwargs):
        return 2 * scaled_dot_product_attention(query, *args, **kwargs).to(query.dtype)

    brought("wide", wide)
    model = Model()
    reference = twin(model)
    hookcore.apply(reference, [AttentionBackend("wide")])
    hookcore.apply(model, [compiled(), AttentionBackend("wide")])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is not None), torch.no_grad():
        got, expected = model(X), reference(X)
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got, expected)
    assert counted(model)[0].graph_breaks == 0
