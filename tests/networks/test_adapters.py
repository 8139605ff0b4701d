"""Roles on one base are what separate copies would be: outputs, gradients, recomputation, independence."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import plain_checkpoint
from fewstep.distillation.roles import Roles, build_twin
from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.registry import family_named
from fewstep.networks.adapters import (
    AdapterRole,
    LoraShape,
    SharedBase,
    choose_targets,
)
from fewstep.settings import OptimizerSettings
from fewstep.training.checkpoint import restore_module
from fewstep.training.update import build_update
from tests.conftest import relative_error, tiny_denoiser
from tests.tiny_networks import FAMILIES, some_levels, tiny_condition, tiny_text_denoiser

SHAPE = LoraShape(rank=3, alpha=6.0)
SCALE = SHAPE.alpha / SHAPE.rank


def randomise(role: AdapterRole, seed: int) -> None:
    """Weights of both factors, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in role.parameters():
            part.copy_(0.1 * torch.randn(part.shape, generator=generator))


def two_roles(
    base: DiffusersDenoiser, dtype: torch.dtype = torch.float64
) -> tuple[SharedBase, AdapterRole, AdapterRole]:
    """Generator and fake score on one base, with random adapters, all in `dtype`."""
    shared = SharedBase(base, SHAPE)
    generator, fake_score = shared.add_role("generator"), shared.add_role("fake_score")
    randomise(generator, 1)
    randomise(fake_score, 2)
    base.to(dtype)
    return shared, generator, fake_score


def noisy_input(size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class SeparateCopy:
    """A whole network of its own with W + (alpha / rank) B A written into its weights: no peft, no sharing."""

    def __init__(self, base: nn.Module, role: AdapterRole) -> None:
        self.network = copy.deepcopy(base)
        self.factors = {name: part.clone().requires_grad_(True) for name, part in role.adapter_state().items()}

    def __call__(self, *inputs: Any) -> Any:
        weights, merged = dict(self.network.named_parameters()), {}
        for name in {name.rsplit(".lora_", 1)[0] for name in self.factors}:
            down, up = self.factors[f"{name}.lora_A.weight"], self.factors[f"{name}.lora_B.weight"]
            weight = weights[f"{name}.weight"]
            merged[f"{name}.weight"] = weight + SCALE * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        return functional_call(self.network, merged, inputs)


def assert_same_gradients(role: AdapterRole, separate: SeparateCopy) -> None:
    found = {name: part.grad for name, part in role.named_parameters()}
    assert found.keys() == separate.factors.keys()
    touched = 0
    for name, factor in separate.factors.items():
        if factor.grad is None or not factor.grad.any():
            assert found[name] is None or not found[name].any(), name
        else:
            touched += 1
            torch.testing.assert_close(
                found[name], factor.grad, rtol=1e-7, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert touched > 10


# --- Shared base equals three copies


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_base_equals_three_copies(family: str, recomputed: bool) -> None:
    """One training step's pattern of forwards and backwards, interleaved, in float64."""
    base = tiny_text_denoiser(family)
    teacher = copy.deepcopy(base).double()
    shared, generator, fake_score = two_roles(base)
    copies = SeparateCopy(teacher, generator), SeparateCopy(teacher, fake_score)
    if recomputed:
        shared.checkpoint_activations()

    def step(teacher: Any, generator: Any, fake_score: Any) -> tuple[Tensor, ...]:
        """Both backward calls come after forwards of the other roles."""
        condition = tiny_condition(family, dtype=torch.float64)
        first, later = some_levels(base, 999, 999), some_levels(base, 600, 30)
        x0 = generator(noisy_input(), first, condition, "x0").x0
        with torch.no_grad():
            noisy = base.add_noise(x0, noisy_input(seed=1), later)
            real = teacher(noisy, later, condition, "x0").x0
            fake = fake_score(noisy, later, condition, "x0").x0
        score = fake_score(base.add_noise(x0.detach(), noisy_input(seed=2), later), later, condition, "both")
        ((fake - real).detach() * x0).sum().backward()
        with torch.no_grad():
            generator(noisy_input(), first, condition, "x0")
            teacher(noisy, later, condition, "x0")
        (score.x0.square().mean() + score.features[0].sin().mean()).backward()
        return x0.detach(), real, fake, score.x0.detach(), score.features[0].detach()

    for ours, theirs in zip(step(base, generator, fake_score), step(teacher, *copies), strict=True):
        assert relative_error(ours, theirs) < 1e-9
    assert_same_gradients(generator, copies[0])
    assert_same_gradients(fake_score, copies[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_belong_to_the_role_of_the_forward(family: str) -> None:
    """Backward while another role is bound: neither the bound role nor none may be used for recomputing."""
    gradients = []
    for recomputed in (False, True):
        shared, generator, fake_score = two_roles(tiny_text_denoiser(family))
        if recomputed:
            shared.checkpoint_activations()
        condition = tiny_condition(family, dtype=torch.float64)
        x0 = generator.denoise(noisy_input(), some_levels(shared.base, 700, 100), condition)  # type: ignore[arg-type]
        with shared.bound("fake_score"):
            x0.square().sum().backward()
            assert shared.role == "fake_score"
        assert shared.role is None
        assert all(part.grad is None for part in fake_score.parameters())
        gradients.append([part.grad for part in generator.parameters()])
    plain, again = gradients
    assert sum(gradient is not None for gradient in plain) > 10
    for kept, recomputed_gradient in zip(plain, again, strict=True):
        assert (kept is None) == (recomputed_gradient is None)
        if kept is not None:
            torch.testing.assert_close(recomputed_gradient, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_dropout_acts_where_gradients_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs of the updates alone: scores and sampling see the whole network, recomputing leaves out the same inputs."""
    monkeypatch.setattr("tests.networks.test_adapters.SHAPE", replace(SHAPE, dropout=0.5))
    gradients, condition = [], tiny_condition("sd", dtype=torch.float64)
    for recomputed in (False, True):
        shared, generator, _ = two_roles(tiny_text_denoiser("sd"))
        if recomputed:
            shared.checkpoint_activations()
        inputs = noisy_input(), some_levels(shared.base, 700, 100), condition
        with torch.no_grad():
            whole, bare = generator.denoise(*inputs), shared.base.denoise(*inputs)  # type: ignore[arg-type]
        torch.manual_seed(4)
        x0 = generator.denoise(*inputs)  # type: ignore[arg-type]
        torch.rand(5)  # what other dropout draws meanwhile changes nothing
        x0.square().sum().backward()
        gradients.append([part.grad for part in generator.parameters()])
        assert relative_error(x0, whole) > 1e-3
        assert torch.equal(generator.denoise(*inputs).detach(), x0.detach()) is False  # type: ignore[arg-type]
    for kept, again in zip(*gradients, strict=True):
        assert kept is None or torch.allclose(kept, again, rtol=1e-9, atol=1e-12)
    plain_shared, plain, _ = two_roles(tiny_text_denoiser("sd"))
    plain_shared.binding.dropout = 0.0
    with torch.no_grad():
        assert torch.equal(whole, plain.denoise(*inputs))  # type: ignore[arg-type]
        assert not torch.equal(whole, bare)


def test_checkpoint_binds_and_restores() -> None:
    shared, _, _ = two_roles(tiny_text_denoiser("sd"))
    seen: list[str | None] = []

    def block(x: Tensor) -> Tensor:
        seen.append(shared.role)
        return x.sin().exp()

    x = torch.ones(2, requires_grad=True)
    with shared.bound("generator"):
        y = shared.checkpoint(block, x)
    with shared.bound("fake_score"):
        y.sum().backward()
        assert shared.role == "fake_score"
    assert seen == ["generator", "generator"]
    assert shared.role is None
    torch.testing.assert_close(x.grad, (x.cos() * x.sin().exp()).detach())


def test_a_checkpoint_that_forgets_the_role_is_wrong() -> None:
    """Control: with torch's plain checkpoint the test above would see other gradients or an error."""
    base = tiny_text_denoiser("sd")
    _, generator, _ = two_roles(base)
    base.checkpoint_activations(plain_checkpoint)
    x0 = generator.denoise(noisy_input(), some_levels(base, 700, 100), tiny_condition("sd", dtype=torch.float64))
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        x0.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_gradients_survive_the_other_role(recomputed: bool) -> None:
    base = tiny_text_denoiser("sdxl")
    shared, generator, fake_score = two_roles(base)
    if recomputed:
        shared.checkpoint_activations()
    condition, level = tiny_condition("sdxl", dtype=torch.float64), some_levels(base, 500, 20)
    generator.denoise(noisy_input(), level, condition).sum().backward()
    kept = [None if part.grad is None else part.grad.clone() for part in generator.parameters()]
    fake_score.denoise(noisy_input(seed=3), level, condition).sum().backward()
    base.denoise(noisy_input(seed=4), level, condition)
    for part, before in zip(generator.parameters(), kept, strict=True):
        assert part.requires_grad
        assert (part.grad is None) == (before is None)
        assert before is None or torch.equal(part.grad, before)
    assert any(part.grad is not None and part.grad.any() for part in fake_score.parameters())


# --- The base


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_the_roles_never_touches_the_base(family: str, recomputed: bool) -> None:
    base = tiny_text_denoiser(family)
    untouched = copy.deepcopy(base)
    shared, generator, fake_score = two_roles(base, torch.float32)
    if recomputed:
        shared.checkpoint_activations()
    condition = tiny_condition(family)
    noisy, level = noisy_input(dtype=torch.float32), some_levels(base, 800, 300)
    before = [role.denoise(noisy, level, condition).detach() for role in (generator, fake_score)]
    for role in (generator, fake_score):
        optimizer = torch.optim.SGD(role.parameters(), lr=1e-2)
        role.denoise(noisy, level, condition).square().mean().backward()
        optimizer.step()
    own = {name.replace(".base_layer", ""): part for name, part in base.named_parameters() if ".lora_" not in name}
    expected = dict(untouched.named_parameters())
    assert own.keys() == expected.keys()
    for name, part in own.items():
        assert part.grad is None, name
        assert not part.requires_grad, name
        assert torch.equal(part, expected[name]), name
    with torch.no_grad():
        # not bit for bit: with several threads kernels sum in an order that depends on where tensors lie in memory
        both = [network(noisy, level, condition, "both") for network in (base, untouched)]
        assert relative_error(both[0].x0, both[1].x0) < 1e-6
        assert relative_error(both[0].features[0], both[1].features[0]) < 1e-6
    for role, output in zip((generator, fake_score), before, strict=True):
        assert not torch.equal(role.denoise(noisy, level, condition).detach(), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(family: str) -> None:
    base = tiny_text_denoiser(family)
    condition, level, noisy = tiny_condition(family), some_levels(base, 900, 5), noisy_input(dtype=torch.float32)
    with torch.no_grad():
        expected = base.denoise(noisy, level, condition)
        role = SharedBase(base, SHAPE).add_role("generator")
        assert relative_error(role.denoise(noisy, level, condition), expected) < 1e-6
        assert all(not part.any() for name, part in role.adapter_state().items() if ".lora_B." in name)
        randomise(role, 0)
        assert relative_error(role.denoise(noisy, level, condition), expected) > 1e-2


def test_roles_describe_themselves_as_the_base_with_an_adapter() -> None:
    base = tiny_text_denoiser("sd")
    described = base.describe()
    role = SharedBase(base, SHAPE).add_role("generator")
    assert role.describe() == {**described, "lora": {"rank": 3, "alpha": 6.0, "targets": list(role.shared.targets)}}
    assert role.image_shape == base.image_shape
    assert role.feature_shapes == base.feature_shapes
    assert role.noise_schedule is base.noise_schedule
    level = some_levels(base, 3, 700)
    assert torch.equal(role.denoising_weight(level), base.denoising_weight(level))
    base.compute_dtype = torch.bfloat16
    assert role.compute_dtype == torch.bfloat16


def test_parameters_of_a_role_are_its_adapter_alone() -> None:
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sd3"))
    assert len(list(generator.parameters())) == 2 * len(shared.layers)
    assert not {id(p) for p in generator.parameters()} & {id(p) for p in fake_score.parameters()}
    assert sum(p.requires_grad for p in shared.base.parameters()) == 4 * len(shared.layers)


# --- Scale


def layer_of(shared: SharedBase, kind: type[nn.Module]) -> Any:
    return next(layer for layer in shared.layers.values() if isinstance(layer.base_layer, kind))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize("lora", [LoraShape(4, 8.0), LoraShape(4, 1.0), LoraShape(1, 3.0)])
def test_update_is_alpha_over_rank_times_b_a(kind: type[nn.Module], lora: LoraShape) -> None:
    shared = SharedBase(tiny_text_denoiser("sd"), lora)
    role = shared.add_role("generator")
    randomise(role, 5)
    shared.base.double()
    layer: Any = layer_of(shared, kind)
    plain: Any = layer.base_layer
    down, up = layer.lora_A["generator"].weight, layer.lora_B["generator"].weight
    assert down.shape[0] == up.shape[1] == lora.rank
    weight = plain.weight + lora.alpha / lora.rank * (up.flatten(1) @ down.flatten(1)).reshape(plain.weight.shape)
    if kind is nn.Linear:
        x = torch.randn(2, 3, plain.in_features, dtype=torch.float64)
        expected = x @ weight.T + (0 if plain.bias is None else plain.bias)
    else:
        x = torch.randn(2, plain.in_channels, 6, 6, dtype=torch.float64)
        expected = nn.functional.conv2d(x, weight, plain.bias, plain.stride, plain.padding)
    with shared.bound("generator"):
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(x), plain(x))


# --- Copies and files


def test_a_twin_is_another_adapter_on_the_same_base() -> None:
    shared, generator, _ = two_roles(tiny_text_denoiser("sd"), torch.float32)
    average = build_twin(generator, "average")
    assert isinstance(average, AdapterRole)
    assert average.shared is shared
    assert average.role == "average"
    condition, level, noisy = tiny_condition("sd"), some_levels(shared.base, 400, 10), noisy_input(dtype=torch.float32)  # type: ignore[arg-type]
    with torch.no_grad():
        kept = generator.denoise(noisy, level, condition)
        assert torch.equal(average.denoise(noisy, level, condition), kept)
        for part in average.parameters():
            part.add_(0.1)
        assert torch.equal(generator.denoise(noisy, level, condition), kept)
        changed = average.denoise(noisy, level, condition)
        assert relative_error(changed, kept) > 1e-2
        for part in generator.parameters():
            part.zero_()
        assert torch.equal(average.denoise(noisy, level, condition), changed)


def test_a_new_role_freezes_and_thaws_nobody() -> None:
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sd"), torch.float32)
    average = build_twin(generator, "average").requires_grad_(False)
    late = shared.add_role("late")
    assert all(part.requires_grad for role in (generator, fake_score, late) for part in role.parameters())
    assert not any(part.requires_grad for part in average.parameters())


def replace_parameters(network: nn.Module) -> None:
    """What sharding does: every parameter becomes another object of the same value."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone() + 1, parameter.requires_grad))


def test_a_role_keeps_no_parameter_of_its_own() -> None:
    """Roles, their states and optimisers built after sharding see the base's new parameters."""
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sd"), torch.float32)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    roles = Roles(shared.base, generator, fake_score, None)
    replace_parameters(shared.base)
    now = dict(shared.base.named_parameters())
    for name, parameter in generator.named_parameters():
        layer, factor, _ = name.rsplit(".", 2)
        assert parameter is now[f"{layer}.{factor}.generator.weight"]
        assert torch.equal(generator.state_dict()[name], before[name] + 1)
    update = build_update(roles.generator_parameters(), 1e-3, OptimizerSettings())
    held = {id(parameter) for parameter in update.optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in generator.parameters()}
    assert held <= {id(parameter) for parameter in shared.base.parameters()}
    generator.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert {value.dtype for value in generator.double().state_dict().values()} == {torch.float64}
    assert {value.dtype for value in fake_score.state_dict().values()} == {torch.float32}


def test_the_names_of_earlier_checkpoints_are_read() -> None:
    _, generator, fake_score = two_roles(tiny_text_denoiser("sd"), torch.float32)
    older = {
        "adapter." + name.removesuffix(".weight").replace(".", "/"): value.clone()
        for name, value in generator.state_dict().items()
    }
    restore_module("fake_score", fake_score, {f"fake_score.{name}": value for name, value in older.items()})
    assert all(torch.equal(value, generator.state_dict()[name]) for name, value in fake_score.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_state_round_trip(family: str) -> None:
    shared, generator, _ = two_roles(tiny_text_denoiser(family), torch.float32)
    state = generator.adapter_state()
    plain = dict(tiny_text_denoiser(family).named_modules())
    for name, value in state.items():
        path, kind = name.rsplit(".lora_", 1)
        assert path in plain, name
        assert kind in ("A.weight", "B.weight")
        assert not value.requires_grad
    other = SharedBase(tiny_text_denoiser(family), SHAPE).add_role("anything")
    other.load_adapter_state(state)
    condition, level = tiny_condition(family), some_levels(shared.base, 400, 10)  # type: ignore[arg-type]
    noisy = noisy_input(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(other.denoise(noisy, level, condition), generator.denoise(noisy, level, condition))
        state[next(iter(state))].zero_()
    assert any(part.any() for part in other.parameters())


def wrong_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    other = SharedBase(tiny_text_denoiser("sd"), LoraShape(rank=5, alpha=6.0))
    return other.add_role("generator").adapter_state()


def with_one_missing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(state.items())[1:])


def with_one_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "network.nowhere.lora_A.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize("spoil", [wrong_rank, with_one_missing, with_one_more])
def test_another_adapters_state_is_refused(spoil: Callable[..., Any]) -> None:
    role = SharedBase(tiny_text_denoiser("sd"), SHAPE).add_role("generator")
    before = {name: value.clone() for name, value in role.adapter_state().items()}
    with pytest.raises(UserError, match=r"the LoRA does not fit this base, rank and targets: of its tensors, "):
        role.load_adapter_state(spoil(before))
    assert all(torch.equal(value, before[name]) for name, value in role.adapter_state().items())


# --- Targets


@pytest.mark.parametrize("family", FAMILIES)
def test_published_targets_all_match(family: str) -> None:
    published = family_named(family).lora_targets
    shared = SharedBase(tiny_text_denoiser(family), LoraShape(2, 2.0))
    shared.add_role("generator")
    assert shared.targets == published
    for target in published:
        assert [name for name in shared.layers if f".{name}".endswith(f".{target}")], target
    assert all(any(f".{name}".endswith(f".{target}") for target in published) for name in shared.layers)


def test_sd3_adapts_the_projections_of_every_block() -> None:
    """METHOD section 8; the last block has no way back to the text."""
    shared = SharedBase(tiny_text_denoiser("sd3"), LoraShape(2, 2.0))
    shared.add_role("generator")
    published = len(family_named("sd3").lora_targets)
    for number in range(3):
        names = [name for name in shared.layers if f"transformer_blocks.{number}." in name]
        assert len(names) == (published if number < 2 else published - 3)


def test_named_targets_are_the_only_ones() -> None:
    shared = SharedBase(tiny_text_denoiser("sd"), LoraShape(2, 2.0, ("to_k", "conv_in")))
    shared.add_role("generator")
    assert {name.rsplit(".", 1)[1] for name in shared.layers} == {"to_k", "conv_in"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_target_is_refused_with_its_name(family: str) -> None:
    lora = LoraShape(2, 2.0, ("to_q", "to_quarry"))
    with pytest.raises(UserError, match=r"memory\.lora_targets \['to_quarry'\] match no layer of the teacher"):
        SharedBase(tiny_text_denoiser(family), lora)


def test_a_target_is_a_whole_name() -> None:
    """ "o_q" ends no layer's name at a dot."""
    with pytest.raises(UserError, match=r"\['o_q'\]"):
        choose_targets(tiny_text_denoiser("sd"), LoraShape(2, 2.0, ("o_q",)))


def test_a_target_that_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory\.lora_targets: network\.conv_norm_out is a GroupNorm; a LoRA goes on"):
        SharedBase(tiny_text_denoiser("sd"), LoraShape(2, 2.0, ("conv_norm_out",)))


def test_a_family_without_published_targets_needs_them_named() -> None:
    with pytest.raises(UserError, match=r"memory\.lora_targets is empty .* name the layers"):
        SharedBase(tiny_denoiser(), SHAPE)


# --- Precision


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_trains_a_float32_adapter(family: str, recomputed: bool) -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        shared = SharedBase(tiny_text_denoiser(family).to(dtype), SHAPE)
        shared.base.compute_dtype = dtype
        role = shared.add_role("generator")
        randomise(role, 1)
        assert {part.dtype for part in role.parameters()} == {torch.float32}
        own = [p for name, p in shared.base.named_parameters() if ".lora_" not in name]
        assert {part.dtype for part in own} == {dtype}
        if recomputed:
            shared.checkpoint_activations()
        level = some_levels(shared.base, 300, 20)  # type: ignore[arg-type]
        x0 = role.denoise(noisy_input(dtype=torch.float32), level, tiny_condition(family))
        assert x0.dtype == torch.float32
        x0.square().mean().backward()
        return [torch.zeros_like(part) if part.grad is None else part.grad for part in role.parameters()]

    found, exact = gradients(torch.bfloat16), gradients(torch.float32)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    ours, theirs = (torch.cat([gradient.flatten() for gradient in part]) for part in (found, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert 0.9 < ours.norm() / theirs.norm() < 1.1
    assert not torch.equal(ours, theirs)


def test_condition_of_another_size_is_not_silently_used() -> None:
    """The role passes its inputs on as they are."""
    role = SharedBase(tiny_text_denoiser("sd"), SHAPE).add_role("generator")
    with pytest.raises(KeyError, match="this model needs 'text'"):
        role.denoise(noisy_input(dtype=torch.float32), torch.tensor([1, 2]), Condition(2))
