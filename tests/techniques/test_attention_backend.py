"""The choice of an attention backend: what takes it, whom it leaves alone, what it refuses and counts."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec

import diffusers
import pytest
import torch
import transformers
from attrs import asdict, evolve
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_sites import FakePlugin, installed
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention as attention_by_name
from torch.overrides import _get_current_function_mode_stack

import hookcore
from hookcore import AttentionCall, AttentionFunction, HookcoreError, Objection, PlanError
from hookcore.testing import ModelSnapshot, simulator
from hookcore.testing.models import real_models
from hookcore_plugins import AttentionBackend, GroupOffload, LayerwiseCasting
from hookcore_plugins.attention_backend import AttentionError, AttentionReport, backends
from hookcore_plugins.attention_backend.discovery import find_attention

CASES = {name: make() for name, make in real_models().items()}
ATTENTIONS = {
    "flux": 5, "sd3": 3, "unet": 8, "autoencoder": 2, "bert": 2, "t5": 2, "clip_text": 2, "gpt2": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
TOKENS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))


def tiny_bert(**options):
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TEXT, **options)).eval()


def tiny_llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False, **options)
    return transformers.LlamaModel(config).eval()


class Plain(nn.Module):
    """Attention as people write it, with the function imported by name, called in ways of one's own."""

    def __init__(self, width=8, heads=2, **options):
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.options = options

    def forward(self, x):
        return self.attend(x).transpose(1, 2).flatten(2)

    def attend(self, x):
        query, key, value = self.mix(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return attend_to(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.options)


def attend_to(query, key, value, options):
    return attention_by_name(query, value=value, key=key, **options)


class Hidden(nn.Module):
    """Attention that no reading of code finds."""

    def forward(self, x):
        return getattr(torch.nn.functional, "scaled_dot_" + "product_attention")(x, x, x)


def plain(**options):
    torch.manual_seed(0)
    return Plain(**options).eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Spying:
    """An attention function that knows what it was called with, and that is known by its name."""

    def __init__(self, name="spy", factor=2.0, **declared):
        self.calls = []
        self.factor = factor
        self.function = AttentionFunction(name, self, **declared)

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.factor * attention_by_name(*args, **kwargs)


@pytest.fixture
def brought(monkeypatch):
    """Adds attention functions to those that plugins bring."""
    known = dict(hookcore.attention_functions())
    monkeypatch.setattr(hookcore, "attention_functions", lambda: known)

    def bring(function):
        known[function.name] = function
        return function

    return bring


@pytest.fixture
def spy(brought):
    made = Spying()
    brought(made.function)
    return made


def counted(target):
    """What was counted of a target's attentions, without what is zero."""
    (found,) = (
        entry.counted
        for entry in hookcore.status(target).run_report().entries
        if entry.technique == "attention_backend"
    )
    return {name: value for name, value in asdict(found).items() if value and name != "backend"}


# Real models


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *itertools.product(ATTENTIONS, ["sdpa", "chunked"]),
        *itertools.product(["flux", "bert"], ["math", "flash", "flex"]),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_real_models_take_it(name, backend):
    case = CASES[name]
    model, bare = case.build(), case.build()
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [AttentionBackend(backend)])
    entries = [entry for entry in case.entries if entry != "forward"] or ["forward"]
    with torch.no_grad():
        for entry in entries:
            for got, expected in zip(case.call(model, entry), case.call(bare, entry), strict=True):
                if backend in {"sdpa", "flash"}:  # what torch chooses on the CPU
                    assert torch.equal(got, expected)
                else:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert applied.run_report().entries[0].counted == AttentionReport(backend, ATTENTIONS[name])
    applied.remove()
    before.assert_restored(model)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_take_it_whatever_their_implementation(make, implementation, padded, spy):
    """Masks, causality and shared heads are those of the model; its config says what it said."""
    model, bare = make(attn_implementation=implementation), make(attn_implementation="eager")
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 1 - int(padded)
    spy.factor = 1.0
    hookcore.apply(model, [AttentionBackend("spy")])
    with torch.no_grad():
        got = model(TOKENS, attention_mask=mask).last_hidden_state
        expected = bare(TOKENS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert len(spy.calls) == 2
    assert model.config._attn_implementation == implementation
    hookcore.remove(model)
    with torch.no_grad():
        model(TOKENS)
    assert len(spy.calls) == 2


def test_an_eager_config_is_never_changed_for_whoever_shares_it(spy):
    model = tiny_bert(attn_implementation="eager")
    other = transformers.BertModel(model.config).eval()
    other.config = model.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    seen = []

    def watch(*_):
        seen.append(model.config._attn_implementation)
        other(TOKENS)

    hookcore.apply(model, [AttentionBackend("spy")])
    model.encoder.layer[1].attention.self.query.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(TOKENS)
    assert seen == ["eager"]
    assert len(spy.calls) == 2
    assert all(it.config is model.config for it in model.modules() if hasattr(it, "config"))


def test_copies_of_an_eager_model_are_plain(spy):
    model = tiny_bert(attn_implementation="eager")
    hookcore.apply(model, [AttentionBackend("spy")])
    with torch.no_grad():
        model(TOKENS)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied(TOKENS)
            assert copied.config._attn_implementation == "eager"
    assert len(spy.calls) == 2


def test_transformers_that_take_other_masks_are_refused_with_the_call_to_make():
    model = tiny_bert()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(PlanError, match=r"'flex_attention', .* model.set_attn_implementation\('sdpa'\)"):
        hookcore.plan(model, [AttentionBackend("math")])


def test_transformers_that_can_only_compute_it_themselves_are_refused(monkeypatch):
    monkeypatch.setattr(transformers.BertModel, "_supports_sdpa", False)
    model = tiny_bert(attn_implementation="eager")
    with pytest.raises(PlanError, match=r"'encoder.layer.0.attention.self': BertModel has no way"):
        hookcore.plan(model, [AttentionBackend("math")])


@pytest.mark.parametrize("extra", ["attn_logit_softcapping", "sinks", "s_aux"])
def test_transformers_with_more_than_masks_are_refused_where_they_compute_it_themselves(extra):
    """Of which torch's function would say that it cannot, or know nothing."""
    model = tiny_bert(attn_implementation="eager")
    for layer in model.encoder.layer:
        setattr(layer.attention.self, extra, None)
    hookcore.plan(model, [AttentionBackend("math")])
    for layer in model.encoder.layer:
        setattr(layer.attention.self, extra, nn.Parameter(torch.ones(1)) if extra == "sinks" else 5.0)
    with pytest.raises(
        PlanError, match=f"it has '{extra}' change its scores, which torch's function cannot do"
    ):
        hookcore.plan(model, [AttentionBackend("math")])


def test_a_model_of_gemmas_with_capped_scores_is_refused():
    config = transformers.Gemma3TextConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0, attn_implementation="eager"
    )
    model = transformers.Gemma3TextModel(config).eval()
    with pytest.raises(PlanError, match="it has 'attn_logit_softcapping' change its scores"):
        hookcore.apply(model, [AttentionBackend("math")])
    model(TOKENS)


def ace_step():
    torch.manual_seed(0)
    return diffusers.AceStepTransformer1DModel(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=2,
    ).eval()


ACE_STEP = {
    "hidden_states": torch.randn(1, 16, 4),
    "timestep": torch.ones(1),
    "timestep_r": torch.zeros(1),
    "encoder_hidden_states": torch.randn(1, 3, 16),
    "context_latents": torch.randn(1, 16, 8),
}


def test_attention_that_asks_which_backend_is_set_is_right_or_refused(spy):
    """ACE-Step gives no mask of its window where it would give the window to a backend: FlashAttention."""
    spy.factor = 1.0
    model = ace_step()
    with torch.no_grad():
        expected = model(**ACE_STEP).sample
        with hookcore.apply(model, [AttentionBackend("spy")]):
            torch.testing.assert_close(model(**ACE_STEP).sample, expected)
            assert len(spy.calls) == 2 * 2
            for block in model.layers:
                block.self_attn.processor._attention_backend = "flash"
            with pytest.raises(AttentionError, match=r"backend 'flash', .* model.set_attention_backend"):
                model(**ACE_STEP)
            model.reset_attention_backend()
            torch.testing.assert_close(model(**ACE_STEP).sample, expected)
    for block in model.layers:
        block.self_attn.processor._attention_backend = "flash"
        block.cross_attn.processor._attention_backend = "flash"
    with pytest.raises(PlanError, match=r"backend 'flash', .* model.set_attention_backend"):
        hookcore.plan(model, [AttentionBackend("spy")])


def test_a_processor_that_insists_on_a_backend_is_refused():
    """As AnyFlow's and LTX-2's, whose masks are for flex attention."""

    class Insisting(diffusers.models.transformers.transformer_flux.FluxAttnProcessor):
        _attention_backend = "flex"

    model = CASES["flux"].build()
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(Insisting())
    with pytest.raises(PlanError, match="Insisting, computes attention by diffusers' backend 'flex' alone"):
        hookcore.plan(model, [AttentionBackend("math")])


def test_a_mask_that_is_no_tensor_is_refused_with_what_it_is():
    class Blocks(nn.Module):
        def forward(self, x, mask):
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    model, x = Blocks(), torch.randn(1, 1, 4, 8)
    mask = create_block_mask(lambda _batch, _head, query, key: query >= key, 1, 1, 4, 4, device="cpu")
    with hookcore.apply(model, [AttentionBackend("math")]):
        with pytest.raises(AttentionError, match="'Blocks' gives attention a mask .* not BlockMask"):
            model(x, mask)
        model(x, None)


def test_generating_takes_it():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
    expected = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    with hookcore.apply(model, [AttentionBackend("chunked")]):
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), expected)
        assert counted(model) == {"computed": 2 * 4}


@pytest.mark.parametrize("told", ["processors", "process"])
def test_what_diffusers_was_told_does_not_matter_meanwhile(told, spy):
    """`set_attention_backend` of one model changes the choice of all others that have none of their own."""
    case = CASES["flux"]
    model, other = case.build(), case.build()
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    try:
        (model if told == "processors" else other).set_attention_backend("flex")
        snapshot = ModelSnapshot.take(model)
        applied = hookcore.apply(model, [AttentionBackend("spy")])
        with torch.no_grad():
            case.call(model)
        assert len(spy.calls) == ATTENTIONS["flux"]
        own = {
            module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")
        }
        assert own == ({"flex"} if told == "processors" else {None})
        assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == "flex"
        applied.remove()
        snapshot.assert_restored(model)
    finally:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(before)


def test_processors_that_compute_it_themselves_are_skipped_with_the_reason():
    case = CASES["unet"]
    model = case.build()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(
        PlanError, match=r"its processor, AttnProcessor, computes .* model.set_attn_processor"
    ):
        hookcore.plan(model, [AttentionBackend("math")])
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor2_0())
    plan = hookcore.plan(model, [AttentionBackend("math")])
    assert [len(plan.steps[0].bindings), len(plan.steps[0].skipped)] == [1, ATTENTIONS["unet"] - 1]


def test_attention_that_diffusers_splits_over_devices_is_skipped():
    model = CASES["flux"].build()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._parallel_config = object()
    with pytest.raises(PlanError, match=r"context parallelism"):
        hookcore.plan(model, [AttentionBackend("math")])


def test_processors_that_are_modules_are_redirected_too(spy):
    """Such as those of IP adapters: they are called, and have no forward."""

    class Processor(nn.Module):
        _attention_backend = None
        _parallel_config = None

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def __call__(self, _attn, x):
            return self.scale * attention_dispatch.dispatch_attention_fn(
                x, x, x, backend=self._attention_backend
            )

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.processor = Processor()

        def forward(self, x):
            return self.processor(self, x)

    model = Holder()
    original = model.processor
    hookcore.apply(model, [AttentionBackend("spy")])
    with attention_dispatch.attention_backend("flex"), torch.no_grad():
        model(torch.randn(1, 4, 2, 8))
    assert len(spy.calls) == 1
    assert model.processor is original
    assert "_attention_backend" not in vars(original)


# torch's own modules


@st.composite
def multi_head_calls(draw):
    """A `MultiheadAttention` and the arguments of a call."""
    batch_first, unbatched = draw(st.booleans()), draw(st.booleans())
    own_sizes = draw(st.booleans())
    model = nn.MultiheadAttention(
        8,
        2,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=6 if own_sizes else None,
        vdim=4 if own_sizes else None,
        batch_first=batch_first,
    )
    batch, queries, keys = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    sizes = (8, 6, 4) if own_sizes else (8, 8, 8)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    lengths = (queries, keys, keys)
    inputs = []
    for length, size in zip(lengths, sizes, strict=True):
        shape = (
            (length, size) if unbatched else (batch, length, size) if batch_first else (length, batch, size)
        )
        inputs.append(torch.randn(shape, generator=generator))
    options = {"need_weights": False}
    masks = [None, "bool", "float", "causal"]
    match draw(st.sampled_from(masks)):
        case "bool":
            options["attn_mask"] = torch.rand(queries, keys, generator=generator) < 0.3
        case "float":
            options["attn_mask"] = torch.randn(queries, keys, generator=generator)
        case "causal" if queries == keys:
            options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(queries)
            options["is_causal"] = True
    if draw(st.booleans()):
        padding = torch.zeros((keys,) if unbatched else (batch, keys), dtype=torch.bool)
        padding[..., 1:] = torch.rand(padding[..., 1:].shape, generator=generator) < 0.4
        options["key_padding_mask"] = padding
    return model.train(draw(st.booleans())), inputs, options


@settings(deadline=None, max_examples=60)
@given(multi_head_calls())
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multi_head_attention_takes_it_with_all_its_options(drawn):
    model, inputs, options = drawn
    bare = copy.deepcopy(model).train()  # in evaluation torch may take a fused kernel
    with hookcore.apply(model, [AttentionBackend("chunked")]), torch.no_grad():
        got, weights = model(*inputs, **options)
        counts = counted(model)
        expected, _ = bare(*inputs, **options)
    assert weights is None
    assert counts == {"computed": 1}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_weights_that_are_asked_for_are_given_and_counted():
    """No backend gives the weights of attention, so torch computes them."""
    model = nn.MultiheadAttention(8, 2).eval()
    expected = model(X, X, X)
    applied = hookcore.apply(model, [AttentionBackend("chunked")])
    for got, wanted in zip(model(X, X, X), expected, strict=True):
        assert torch.equal(got, wanted)
    assert counted(model) == {
        "otherwise": 1,
        "reasons": {"MultiheadAttention did not call torch's attention function": 1},
    }
    applied.reset()
    assert counted(model) == {}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_take_it_where_torch_would_call_one_kernel(grad, padded):
    """The outputs of padding are no outputs: the fused kernel leaves zeros there."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = padded
    with torch.set_grad_enabled(grad):
        expected = model(X, src_key_padding_mask=padding)
        hookcore.apply(model, [AttentionBackend("chunked")])
        got = model(X, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert counted(model) == {"computed": 2}


def test_decoders_take_it():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    expected = model(
        X, X[:, :3], tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3)
    )
    hookcore.apply(model, [AttentionBackend("chunked")])
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    torch.testing.assert_close(
        model(X, X[:, :3], tgt_is_causal=True, tgt_mask=mask), expected, rtol=1e-4, atol=1e-5
    )
    assert counted(model) == {"computed": 3}


# Which modules


def test_code_is_read_through_helpers_bases_and_wrappers():
    class Derived(Plain):
        def forward(self, x):
            return super().forward(x)

    class Wrapped(Plain):
        forward = torch.no_grad()(Plain.forward)

    class InComprehension(nn.Module):
        def forward(self, x):
            return [attention_by_name(it, it, it) for it in (x, x)]

    for kind in (Plain, Derived, Wrapped, InComprehension):
        (component,) = hookcore.status(nn.Sequential(nn.Linear(1, 1), kind())).components
        assert [it.fqn for it in find_attention(component, None)] == ["1"]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), CASES["cnn"].build(), Hidden()])
def test_a_model_without_attention_is_refused(model):
    with pytest.raises(PlanError, match=r"finds nothing in .* that calls torch's .* modules=\['attn'\]"):
        hookcore.apply(model, [AttentionBackend("math")])


def test_components_of_a_pipeline_without_attention_are_left_alone_unless_named():
    models = {"first": plain(), "second": nn.Linear(8, 8), "third": CASES["unet"].build()}
    models["third"].set_attn_processor(AttnProcessor())
    applied = hookcore.apply(models, [AttentionBackend("math")])
    assert "second: nothing in it calls torch's attention function" in str(applied)
    assert "third: its processor, AttnProcessor, computes attention in its own way" in str(applied)
    assert {step.component.name for step in applied.plan.steps} == {"first"}
    applied.remove()
    with pytest.raises(PlanError, match="finds nothing in 'second'"):
        hookcore.plan(models, [AttentionBackend("math")], components=["first", "second"])
    del models["first"]
    with pytest.raises(PlanError, match=r"'math' is taken by no component .* 'second': nothing in it calls"):
        hookcore.plan(models, [AttentionBackend("math")])


def test_hidden_attention_can_be_named():
    model = nn.Sequential(Hidden(), Hidden())
    with hookcore.apply(model, [AttentionBackend("chunked", modules="^1$")]):
        model(X)
        assert counted(model) == {"computed": 1}


def test_of_hidden_attention_the_outermost_match_is_taken():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_hidden, self.attn_plain = nn.Sequential(Hidden(), nn.Linear(8, 8)), plain()

        def forward(self, x):
            return self.attn_plain(self.attn_hidden(x))

    model = Around()
    applied = hookcore.apply(model, [AttentionBackend("chunked", modules="attn")])
    model(X)
    assert [it.fqn for it in applied.plan.steps[0].bindings] == ["attn_plain", "attn_hidden"]
    assert counted(model) == {"computed": 2}


def test_only_the_modules_that_are_named():
    case = CASES["unet"]
    model = case.build()
    techniques = [AttentionBackend("math", modules=["attn1"]), AttentionBackend("chunked", modules="attn2$")]
    for technique in techniques:
        hookcore.apply(model, [technique])
    with torch.no_grad():
        case.call(model)
    found = [entry.counted for entry in hookcore.status(model).run_report().entries]
    assert found == [AttentionReport("math", 4), AttentionReport("chunked", 4)]
    with pytest.raises(PlanError, match=r"matches modules=\('nowhere',\)"):
        hookcore.plan(case.build(), [AttentionBackend("math", modules="nowhere")])


def test_attention_in_another_entry_than_forward(spy):
    """A pipeline calls an autoencoder's `decode`."""

    class Decoder(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        def decode(self, x):
            return attention_by_name(x, x, x)

    model = Decoder()
    hookcore.apply(model, [AttentionBackend("spy")])
    model.decode(X)
    assert len(spy.calls) == 1


def test_attention_that_is_added_later_takes_it(spy):
    model = nn.Sequential(plain(), nn.Identity())
    hookcore.apply(model, [AttentionBackend("spy")])
    model[1] = plain()
    model(X)
    assert len(spy.calls) == 2


# Whom it does not touch


def test_nobody_else_in_the_thread_is_touched(spy):
    """Not another model of the class, inside or outside of the model's calls, nor a plain call."""
    model, other = nn.Sequential(plain(), nn.Identity(), plain()), plain()
    expected = other(X)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append((other(X), attention_by_name(X, X, X))))
    hookcore.apply(model, [AttentionBackend("spy")])
    model(X)
    assert len(spy.calls) == 2
    assert torch.equal(seen[0][0], expected)
    assert torch.equal(seen[0][1], attention_by_name(X, X, X))
    assert torch.equal(other(X), expected)
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("where", ["backend", "module", "fallback"])
def test_an_error_inside_leaves_nothing_behind(where, brought):
    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    brought(AttentionFunction("failing", fail if where == "backend" else attention_by_name))
    brought(AttentionFunction("narrow", attention_by_name, dtypes=[torch.float16]))
    brought(AttentionFunction("failing_too", fail))
    model = nn.Sequential(plain(), plain())
    expected = model(X)
    if where == "fallback":
        technique = AttentionBackend("narrow", fallback="failing_too")
    else:
        technique = AttentionBackend("failing")
    applied = hookcore.apply(model, [technique])
    handle = None
    if where == "module":
        handle = model[1].mix.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(X)
    assert not _get_current_function_mode_stack()
    if handle is not None:
        handle.remove()
    applied.remove()
    assert torch.equal(model(X), expected)


def test_an_error_leaves_no_stand_in():
    model = tiny_bert(attn_implementation="eager")
    hookcore.apply(model, [AttentionBackend("math")])
    with pytest.raises(IndexError):
        model(TOKENS + 1000)
    attention = model.encoder.layer[1].attention.self
    attention.query.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS)
    assert attention.config is model.config


def test_models_inside_each_other_have_their_own(brought):
    """Of hooked modules inside each other the innermost decides, and the outer one goes on afterwards."""

    class Around(Plain):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        def forward(self, x):
            return super().forward(self.inner(super().forward(x)))

    spies = {name: Spying(name) for name in ("outer", "inner")}
    for one in spies.values():
        brought(one.function)
    model = Around()
    hookcore.apply(model, [AttentionBackend("outer", modules="^$")])
    hookcore.apply(model.inner, [AttentionBackend("inner")])
    model(X)
    assert [len(spies[name].calls) for name in ("outer", "inner")] == [2, 1]


def test_a_backend_that_calls_torchs_function_is_not_called_again(brought):
    """Also with a hooked module around, whose backend this is not."""
    one = Spying("calls_torch")
    brought(one.function)
    model = nn.TransformerEncoderLayer(8, 2, 16).eval()
    hookcore.apply(model, [AttentionBackend("calls_torch")])
    with torch.no_grad():
        model(X)
    assert len(one.calls) == 1


def in_threads(*functions):
    """Runs functions at the same time, a thread for each; what they raise is raised here."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def test_threads_have_their_own(brought):
    """Two models at once, and one that has no technique, each between the same two moments."""
    meet = threading.Barrier(3, timeout=60)
    models = {"first": plain(), "second": plain(), "bare": plain()}
    expected = models["bare"](X)
    factors = {"bare": 1.0, "first": 2.0, "second": 3.0}
    spies = [Spying(name, factors[name]) for name in ("first", "second")]
    for spy in spies:
        brought(spy.function)
        hookcore.apply(models[spy.function.name], [AttentionBackend(spy.function.name)])

    def wait(*_):
        meet.wait()

    def run(name):
        mix = models[name].mix
        mix.register_forward_pre_hook(wait)
        mix.register_forward_hook(wait)
        # Not bit for bit: each thread has its own number of MKL's threads, and with it other kernels.
        torch.testing.assert_close(models[name](X), factors[name] * expected)

    in_threads(*(partial(run, name) for name in models))
    assert [len(spy.calls) for spy in spies] == [1, 1]


def test_one_eager_model_can_be_called_by_two_threads(spy):
    """The stand-in stays until the last of overlapping calls, and is gone then."""
    spy.factor = 1.0
    model = tiny_bert(attn_implementation="eager")
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        expected = model(TOKENS).last_hidden_state
    hookcore.apply(model, [AttentionBackend("spy")])
    meet = threading.Barrier(2, timeout=60)
    arrived = []

    def wait(*_):
        if len(arrived) < 2:  # the first call of each thread
            arrived.append(None)
            meet.wait()

    attention.query.register_forward_pre_hook(wait)

    def run():
        for _ in range(3):
            with torch.no_grad():
                output = model(TOKENS).last_hidden_state
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    in_threads(run, run)
    assert len(spy.calls) == 12
    assert attention.config is model.config


def test_torchs_flags_stay_as_they_are(monkeypatch):
    """`sdpa_kernel` sets flags of the whole process, which another thread's attention would see."""
    flags = [
        "flash_sdp_enabled", "math_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled",
    ]  # fmt: skip
    before = {flag: getattr(torch.backends.cuda, flag)() for flag in flags}
    for name in ("enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda *_: pytest.fail("a flag of the process is set"))
    for backend in ("math", "flash", "sdpa", "chunked"):
        model = plain()
        hookcore.apply(model, [AttentionBackend(backend)])
        model(X)
    assert {flag: getattr(torch.backends.cuda, flag)() for flag in flags} == before


def test_a_model_goes_away_with_its_hooks():
    model = tiny_bert(attn_implementation="eager")
    hookcore.apply(model, [AttentionBackend("chunked")])
    with torch.no_grad():
        model(TOKENS)
    gone = []
    torch.utils.weak.weakref.finalize(model, gone.append, 1)
    del model
    gc.collect()
    assert gone == [1]


# What it refuses

NARROW = AttentionFunction(
    "narrow",
    attention_by_name,
    dtypes=[torch.float16, torch.bfloat16],
    max_head_size=4,
    head_size_multiple=2,
)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (plain(), "of 'attention': found dtype torch.float32, expected torch.float16 or torch.bfloat16"),
        (nn.MultiheadAttention(16, 2).half(), "found heads of size 8, expected 4 at most"),
        (nn.MultiheadAttention(6, 2).half(), "found heads of size 3, expected a multiple of 2"),
    ],
)
def test_what_weights_and_sizes_tell_is_found_before_the_run(model, said, brought):
    brought(NARROW)
    with pytest.raises(PlanError) as caught:
        hookcore.plan({"attention": model}, [AttentionBackend("narrow")])
    assert "attention_backend 'narrow' cannot compute the attention of 'attention'" in str(caught.value)
    assert said in str(caught.value)
    assert "give fallback='math'" in str(caught.value)
    with pytest.raises(PlanError, match="Nor can the fallback 'sage'"):
        hookcore.plan(model, [AttentionBackend("narrow", fallback="sage")])
    assert hookcore.plan(model, [AttentionBackend("narrow", fallback="math")])


def test_the_dtype_that_is_computed_in_counts(brought):
    """Of weights in float8, of a model under autocast, and of one whose norms are in another dtype."""
    brought(evolve(NARROW, max_head_size=None, head_size_multiple=1))
    cast = nn.Sequential(plain()).bfloat16()
    hookcore.apply(cast, [LayerwiseCasting("float8_e4m3fn")])
    with hookcore.apply(cast, [AttentionBackend("narrow")]):
        cast(X.bfloat16())
        assert counted(cast) == {"computed": 1}
    model = plain()
    with torch.autocast("cpu", torch.bfloat16):
        hookcore.apply(model, [AttentionBackend("narrow")])
        assert model(X).dtype is torch.bfloat16
    with pytest.raises(AttentionError, match="found dtype torch.float32"):
        model(X)
    brought(AttentionFunction("wide", attention_by_name, dtypes=[torch.float64]))
    mixed = plain().double()
    mixed.norm = nn.LayerNorm(8)
    assert hookcore.plan(mixed, [AttentionBackend("wide")])
    mixed = plain().bfloat16()
    mixed.norm = nn.LayerNorm(8)
    assert hookcore.plan(mixed, [AttentionBackend("narrow")])


CALLS = [
    (
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
        {"masks": []},
        "found a mask that is bool, expected none",
    ),
    (
        {"attn_mask": torch.zeros(5, 5)},
        {"masks": ["bool"]},
        "found a mask that is additive, expected one that is bool, or none",
    ),
    ({"is_causal": True}, {"causal": False}, "found is_causal=True, expected none. Give the model a mask"),
    ({"dropout_p": 0.5}, {"dropout": False}, "found dropout_p=0.5, expected none. Call model.eval()"),
    ({}, {"gradients": False}, "found gradients, expected none. Call the model under torch.no_grad()"),
    ({}, {"devices": ["meta", "cpu"], "max_head_size": 3}, "found heads of size 4, expected 3 at most"),
]


@pytest.mark.parametrize(("options", "declared", "said"), CALLS)
def test_what_only_a_call_tells_is_found_there(options, declared, said, brought):
    brought(AttentionFunction("narrow", attention_by_name, **declared))
    model = nn.Sequential(plain(**options))
    expected = model(X) if "dropout_p" not in options else None
    hookcore.apply(model, [AttentionBackend("narrow")])
    with pytest.raises(AttentionError) as caught:
        model(X)
    assert isinstance(caught.value, HookcoreError)
    assert f"'narrow' cannot compute the attention of '0': {said}" in str(caught.value)
    hookcore.remove(model)
    hookcore.apply(model, [AttentionBackend("narrow", fallback="math")])
    got = model(X)
    if expected is not None:
        torch.testing.assert_close(got, expected)
    found = said.removeprefix("found ").partition(", expected")[0]
    assert counted(model) == {"fell_back": 1, "reasons": {f"by math instead of narrow ({found})": 1}}


def test_fewer_heads_of_keys_are_found_at_the_call(brought):
    brought(AttentionFunction("narrow", attention_by_name, gqa=False))

    class Grouped(nn.Module):
        def forward(self, x):
            return attention_by_name(x, x[:, :1], x[:, :1], enable_gqa=True)

    model = Grouped()
    hookcore.apply(model, [AttentionBackend("narrow")])
    model(torch.randn(1, 1, 3, 4))  # as many
    with pytest.raises(
        AttentionError, match=r"found 2 heads of the query and 1 of the key, expected as many"
    ):
        model(torch.randn(1, 2, 3, 4))


def test_what_a_backend_finds_itself_is_a_refusal_too(brought):
    def picky(*_args, **_kwargs):
        raise NotImplementedError("it is Monday\nand so on")

    brought(AttentionFunction("picky", picky))
    model = plain()
    hookcore.apply(model, [AttentionBackend("picky")])
    with pytest.raises(AttentionError, match=r"of 'Plain': it is Monday\. Choose another backend"):
        model(X)
    hookcore.remove(model)
    hookcore.apply(model, [AttentionBackend("picky", fallback="chunked")])
    model(X)
    assert counted(model) == {
        "fell_back": 1,
        "reasons": {"by chunked instead of picky (it is Monday)": 1},
    }
    hookcore.remove(model)
    brought(AttentionFunction("picky_too", picky))
    hookcore.apply(model, [AttentionBackend("picky", fallback="picky_too")])
    with pytest.raises(AttentionError, match=r"Nor can the fallback 'picky_too': it is Monday"):
        model(X)


def test_a_name_that_nobody_brings_is_refused_with_those_there_are():
    with pytest.raises(
        PlanError, match=r"no attention backend is named 'chunkd' \(did you mean 'chunked'\?\)"
    ):
        hookcore.plan(plain(), [AttentionBackend("chunkd")])
    with pytest.raises(PlanError, match=r"'nobody'; there are: chunked, cudnn, "):
        hookcore.plan(plain(), [AttentionBackend("math", fallback="nobody")])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"backend": 3}, TypeError, "backend is the name"),
        ({"backend": "math", "fallback": 3}, TypeError, "fallback is the name"),
        ({"backend": "math", "fallback": "math"}, ValueError, "the backend itself"),
        ({"backend": "math", "modules": "("}, ValueError, "no regular expression"),
        ({"backend": "math", "modules": [3]}, ValueError, "no regular expression"),
    ],
)
def test_options_are_checked_at_once(options, error, said):
    with pytest.raises(error, match=said):
        AttentionBackend(**options)


def test_its_name_alone_is_not_enough():
    with pytest.raises(PlanError, match=r"'attention_backend' needs options"):
        hookcore.plan(plain(), ["attention_backend"])


def test_devices_are_found_before_the_run(sim, brought):
    """Where the weights lie on a device already; from the CPU they may be moved."""
    brought(AttentionFunction("of_the_device", attention_by_name, devices=["sim"]))
    moved = plain()
    hookcore.apply(moved, [AttentionBackend("of_the_device"), GroupOffload("sim")])
    with torch.no_grad():
        assert moved(X).device.type == "sim"
    hookcore.remove(moved)
    model = plain().to("sim")
    with pytest.raises(
        PlanError, match=r"found device 'sim', expected 'cpu' or 'cuda'\. Move the model there"
    ):
        hookcore.plan(model, [AttentionBackend("flash")])
    with pytest.raises(PlanError, match=r"there is no device 'cuda' here"):
        hookcore.plan(plain(), [AttentionBackend("cudnn")])
    simulator.check()


# Packages

PACKAGES = {"xformers": ("xformers", "xformers"), "flash_attn": ("flash_attn", "flash-attn")}
PACKAGES["sage"] = ("sageattention", "sageattention")


@pytest.mark.parametrize("backend", PACKAGES)
def test_a_missing_package_is_named_with_the_command(backend):
    package = PACKAGES[backend][1]
    with pytest.raises(
        PlanError, match=rf"{package} is not installed\. Run `pip install {package}`, or give"
    ):
        hookcore.plan(plain(), [AttentionBackend(backend)])


def test_the_fallback_of_a_missing_package_is_told_and_counted():
    model = plain()
    expected = model(X)
    applied = hookcore.apply(model, [AttentionBackend("xformers", fallback="math")])
    assert "xformers is not installed: 'math' computes instead of 'xformers'" in str(applied.plan)
    torch.testing.assert_close(model(X), expected)
    assert counted(model) == {
        "fell_back": 1,
        "reasons": {"by math instead of xformers (xformers is not installed)": 1},
    }


def test_a_package_that_cannot_be_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "sageattention.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    said = r"sageattention cannot be imported \(undefined symbol\)\. Run `pip install --force-reinstall"
    with pytest.raises(PlanError, match=said):
        hookcore.plan(plain(), [AttentionBackend("sage")])


def package(monkeypatch, name, **functions):
    """Puts a module in the place of a package that is not installed."""
    for part in (name, f"{name}.ops"):
        module = types.ModuleType(part)
        module.__spec__ = ModuleSpec(part, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, part, module)
    sys.modules[name].ops = sys.modules[f"{name}.ops"]


class LowerTriangularMask:
    """As xformers': it stands for a mask."""


def fake_xformers(query, key, value, *, attn_bias=None, p=0.0, scale=None):
    """xformers' function, which has heads after positions, takes no bool, and wants rows to be aligned."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    causal = isinstance(attn_bias, LowerTriangularMask)
    if attn_bias is not None and not causal:
        assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        assert attn_bias.dtype is query.dtype
        assert attn_bias.stride(-2) % 8 == 0
    out = attention_by_name(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        attn_mask=None if causal else attn_bias,
        dropout_p=p,
        is_causal=causal,
        scale=scale,
    )
    return out.transpose(1, 2)


def fake_flash_attn(q, k, v, *, dropout_p=0.0, softmax_scale=None, causal=False):
    out = attention_by_name(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)),
        dropout_p=dropout_p,
        scale=softmax_scale,
        is_causal=causal,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def fake_sage(q, k, v, *, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert tensor_layout == "HND"
    return attention_by_name(q, k, v, is_causal=is_causal, scale=sm_scale, enable_gqa=True)


@st.composite
def calls(draw, *, masks=(None, "bool", "additive"), gqa=True):
    """Tensors of four dimensions and options that fit them."""
    batch, heads, group, queries, keys, size = (draw(st.integers(1, 4)) for _ in range(6))
    group = group if gqa else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query = torch.randn(batch, heads * group, queries, size, generator=generator)
    key, value = (torch.randn(batch, heads, keys, size, generator=generator) for _ in range(2))
    mask, kind = None, draw(st.sampled_from(masks))
    shape = draw(st.sampled_from([(queries, keys), (1, keys), (batch, 1, queries, keys)]))
    if kind is not None:
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[..., 0] = True
    if kind == "additive":
        mask = torch.randn(shape, generator=generator).masked_fill(~mask, -torch.inf)
    options = {
        "attn_mask": mask,
        "is_causal": mask is None and draw(st.booleans()),
        "scale": draw(st.none() | st.just(0.3)),
        "enable_gqa": group > 1,
    }
    return (query, key, value), options


@settings(deadline=None, max_examples=40)
@given(calls())
def test_xformers_is_called_as_it_wants(drawn):
    with pytest.MonkeyPatch.context() as patch:
        package(
            patch,
            "xformers",
            memory_efficient_attention=fake_xformers,
            LowerTriangularMask=LowerTriangularMask,
        )
        same_as_torch("xformers", drawn)


@settings(deadline=None, max_examples=40)
@given(calls(masks=[None]))
def test_flash_attn_and_sage_are_called_as_they_want(drawn):
    (query, key, _), options = drawn
    with pytest.MonkeyPatch.context() as patch:
        package(patch, "flash_attn", flash_attn_func=fake_flash_attn)
        package(patch, "sageattention", sageattn=fake_sage)
        for name in ("flash_attn", "sage"):
            if options["is_causal"] and query.shape[-2] != key.shape[-2]:
                with pytest.raises(NotImplementedError, match="counts from the end"):
                    same_as_torch(name, drawn)
            else:
                same_as_torch(name, drawn)


@settings(deadline=None, max_examples=40)
@given(calls(), st.sampled_from(["math", "flash", "flex", "chunked"]))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torchs_kernels_compute_the_same(drawn, name):
    same_as_torch(name, drawn)


def same_as_torch(name, drawn):
    tensors, options = drawn
    function = hookcore.attention_functions()[name]
    assert function.unavailable() is None
    with torch.no_grad():
        got = function.function(*tensors, **options)
        expected = attention_by_name(*tensors, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["xformers", "flash_attn", "sage", "flex"])
def test_other_numbers_of_dimensions_are_refused(name, monkeypatch):
    package(monkeypatch, "xformers", memory_efficient_attention=fake_xformers)
    package(monkeypatch, "flash_attn", flash_attn_func=fake_flash_attn)
    package(monkeypatch, "sageattention", sageattn=fake_sage)
    with pytest.raises(NotImplementedError, match="4 dimensions, found 3"):
        hookcore.attention_functions()[name].function(X, X, X)


def test_what_torchs_flash_kernel_does_not_take_is_refused():
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"torch's flash kernel does not take"):
        backends._flash(query, query, query[..., :2])
    model = plain(dropout_p=0.5)
    hookcore.apply(model, [AttentionBackend("flash", fallback="math")])
    model(X)
    (reason,) = counted(model)["reasons"]
    assert reason.startswith("by math instead of flash (")


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float16])
def test_kernels_of_cuda_are_called_with_what_they_take(name, mask, monkeypatch):
    """On the meta device, where torch checks signatures and shapes and computes nothing."""
    for check in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(backends, check, lambda *_: True)
    monkeypatch.setattr(backends, "SDPAParams", lambda *_: None)
    query, key = (torch.zeros(2, 3, length, 10, dtype=torch.float16, device="meta") for length in (5, 7))
    attn_mask = None if mask is None or name == "flash" else torch.zeros(5, 7, dtype=mask, device="meta")
    output = getattr(backends, f"_{name}")(query, key, key, attn_mask, is_causal=mask is None)
    assert output.shape == query.shape
    assert output.dtype is torch.float16


def test_heads_are_padded_for_the_flash_kernel_of_cuda(monkeypatch):
    """It takes multiples of eight, and the scale is that of the heads before."""
    monkeypatch.setattr(backends, "can_use_flash_attention", lambda *_: True)
    monkeypatch.setattr(backends, "SDPAParams", lambda *_: None)

    def kernel(query, key, value, dropout_p, is_causal, _debug, *, scale):
        assert {tensor.shape[-1] for tensor in (query, key, value)} == {16}
        output = attention_by_name(
            query.cpu(), key.cpu(), value.cpu(), None, dropout_p, is_causal, scale=scale
        )
        return (output,)

    monkeypatch.setattr(backends, "_aten", types.SimpleNamespace(_scaled_dot_product_flash_attention=kernel))

    class OnAnother(torch.Tensor):
        """Says that it lies on another device than it does."""

        device = torch.device("meta")

    query = torch.randn(2, 3, 5, 10)
    got = backends._flash(query.as_subclass(OnAnother), query, query)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), attention_by_name(query, query, query))


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_kernels_of_cuda_are_refused_where_torch_says_so(name, monkeypatch):
    for check in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(backends, check, lambda *_: False)
    query = torch.zeros(2, 3, 5, 10, dtype=torch.float16, device="meta")
    with pytest.raises(NotImplementedError, match=rf"torch's {name} kernel does not take"):
        getattr(backends, f"_{name}")(query, query, query)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["math", "flash", "efficient", "cudnn", "flex", "chunked"])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float16])
@pytest.mark.parametrize("size", [64, 40])
def test_kernels_on_a_device(name, mask, size):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    torch.manual_seed(0)
    query = torch.randn(2, 3, 50, size, dtype=torch.float16, device="cuda")
    key = torch.randn(2, 3, 70, size, dtype=torch.float16, device="cuda")
    attn_mask = None
    if mask is not None:
        attn_mask = torch.rand(50, 70, device="cuda") < 0.7
        if mask is not torch.bool:
            attn_mask = torch.zeros(50, 70, dtype=mask, device="cuda").masked_fill(~attn_mask, -torch.inf)
    exact_mask = attn_mask.double() if mask is torch.float16 else attn_mask
    expected = attention_by_name(query.double(), key.double(), key.double(), exact_mask)
    try:
        got = hookcore.attention_functions()[name].function(query, key, key, attn_mask)
    except NotImplementedError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)


# Autocast


def test_autocast_casts_as_it_does_for_torchs_function():
    """Inputs of several dtypes and the mask; what the backend computes with is not cast."""
    model = plain()
    seen = []

    class Mixed(nn.Module):
        def forward(self, x):
            return attention_by_name(x, x.bfloat16(), x, torch.zeros(5, 5))

    def watching(query, key, value, attn_mask=None, *args, **kwargs):
        seen.append(
            [query.dtype, key.dtype, value.dtype, attn_mask.dtype, (query.float() @ key.float().mT).dtype]
        )
        return attention_by_name(query, key, value, attn_mask)

    hook_free = Mixed()
    model = Mixed()
    with pytest.MonkeyPatch.context() as patch:
        known = {**hookcore.attention_functions(), "watching": AttentionFunction("watching", watching)}
        patch.setattr(hookcore, "attention_functions", lambda: known)
        hookcore.apply(model, [AttentionBackend("watching")])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype is hook_free(X).dtype is torch.bfloat16
    assert seen == [[torch.bfloat16] * 4 + [torch.float32]]


# With other techniques


@pytest.mark.parametrize("name", ["flux", "unet", "bert"])
def test_with_offloading_and_casting_on_a_device(name, sim):
    case = CASES[name]
    model, bare = case.build(), case.build().to("sim")
    hookcore.apply(
        model,
        [AttentionBackend("chunked"), GroupOffload("sim"), LayerwiseCasting("bfloat16", keep_originals=True)],
    )
    hookcore.apply(bare, [LayerwiseCasting("bfloat16", keep_originals=True)])
    with torch.no_grad():
        for _ in range(2):
            got, expected = case.call(model), case.call(bare, device="sim")
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-5)
    assert counted(model) == {"computed": 2 * ATTENTIONS[name]}
    hookcore.remove(model)
    simulator.check()


def test_the_same_attention_cannot_have_two():
    model = plain()
    hookcore.apply(model, [AttentionBackend("chunked")])
    with pytest.raises(hookcore.ConflictError, match="already been applied"):
        hookcore.apply(model, [AttentionBackend("math")])


def test_attention_is_claimed():
    """So that another plugin's technique that replaces it is refused."""
    (step,) = hookcore.plan(CASES["bert"].build(), [AttentionBackend("chunked")]).steps
    assert {claim.resource for binding in step.bindings for claim in binding.claims} == {"attention"}
    assert all(binding.claims for binding in step.bindings)


def test_compiled_models_compute_the_same():
    """With breaks in the graph at hooked attentions, but with what they compute and count."""
    model = nn.Sequential(plain(), nn.Linear(8, 8))
    with torch.no_grad():
        expected = model(X)
        hookcore.apply(model, [AttentionBackend("chunked")])
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
    assert counted(model) == {"computed": 2}


# Plugins

BRINGING = """
from hookcore import AttentionFunction

@hookimpl
def hookcore_register_attention_functions():
    return [{functions}]
"""


def hosting(*sources):
    plugins = [FakePlugin(f"plugin_{index}", source) for index, source in enumerate(sources)]
    with installed(plugins):
        return hookcore.plugins.PluginHost.discover()


def test_a_plugin_brings_a_function():
    host = hosting(BRINGING.format(functions="AttentionFunction('mine', print)"))
    assert host.attention_functions["mine"].function is print
    assert [info.state for info in host.listing] == ["active"]


@pytest.mark.parametrize(
    ("brought", "said"),
    [
        ("AttentionFunction('Mine', print)", "the name 'Mine'; expected snake_case"),
        ("AttentionFunction(3, print)", "the name 3; expected snake_case"),
        ("print", "is no hookcore.AttentionFunction"),
        ("*[AttentionFunction('twin', print)] * 2", "'twin', and there is one of that name already"),
        ("AttentionFunction('mine', print, masks=['int'])", "masks of attention function 'mine' has 'int'"),
    ],
)
def test_a_plugin_that_brings_something_else_is_broken(brought, said):
    host = hosting(
        BRINGING.format(functions=brought), BRINGING.format(functions="AttentionFunction('good', print)")
    )
    assert [info.state for info in host.listing] == ["broken", "active"]
    assert said in host.listing[0].problem
    assert list(host.attention_functions) == ["good"]


def test_names_of_other_plugins_are_taken():
    same = BRINGING.format(functions="AttentionFunction('mine', print)")
    host = hosting(same, same)
    assert [info.state for info in host.listing] == ["active", "broken"]


@pytest.mark.parametrize(("size", "value_size", "taken"), [(4, 4, True), (5, 4, False), (4, 5, False)])
def test_heads_of_both_kinds_are_checked(size, value_size, taken):
    function = AttentionFunction("narrow", attention_by_name, max_head_size=4)
    query, value = torch.zeros(1, 1, 2, size), torch.zeros(1, 1, 2, value_size)
    assert (function.objection(AttentionCall(query, query, value)) is None) == taken


def test_an_objection_says_what_it_has():
    assert str(Objection("this", "that")) == "found this, expected that"
    assert str(Objection("this is wrong")) == "this is wrong"
