"""LoRA layers start as peft's, do no more than they must, and are compiled once for each role."""

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.networks.frozen_layers import BaseStorage
from tests.conftest import relative_error
from tests.networks.test_adapters import SHAPE, noisy_input, randomise, two_roles
from tests.tiny_networks import FAMILIES, some_levels, tiny_condition, tiny_text_denoiser

# torch's compiler warns about torch's own use of torch.jit, and of gradients
torch_warns = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_role_starts_as_peft_starts_it(family: str) -> None:
    """A seed's run begins with the same numbers as with earlier versions, which used peft's layers."""
    base = tiny_text_denoiser(family)
    theirs = copy.deepcopy(base)
    torch.manual_seed(5)
    shared = SharedBase(base, SHAPE)
    roles = {name: shared.add_role(name) for name in ("generator", "fake_score")}
    torch.manual_seed(5)
    config = LoraConfig(r=SHAPE.rank, lora_alpha=SHAPE.alpha, target_modules=list(shared.targets))  # type: ignore[arg-type]
    inject_adapter_in_model(config, theirs, "generator")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(config, theirs, "fake_score")
    expected = theirs.state_dict()
    for role, view in roles.items():
        for name, value in view.adapter_state().items():
            assert torch.equal(value, expected[name.replace(".weight", f".{role}.weight")]), name
    assert base.state_dict().keys() == expected.keys()


# --- What a forward does


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> Counter[str]:
    with Operations() as found:
        work()
    return found.counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_layer_costs_two_operations(family: str) -> None:
    """x A, and what adds (x A) B to the base's output; no cast, no product with the scale."""
    shared, generator, _ = two_roles(tiny_text_denoiser(family), torch.float32)
    noisy, level, condition = (
        noisy_input(dtype=torch.float32),
        some_levels(shared.base, 700, 30),
        tiny_condition(family),
    )  # type: ignore[arg-type]
    with torch.no_grad():
        bare = operations(lambda: shared.base.denoise(noisy, level, condition))
        own = operations(lambda: generator.denoise(noisy, level, condition))
    linear = [layer for layer in shared.layers.values() if isinstance(layer.base_layer, torch.nn.Linear)]
    convolutions = len(shared.layers) - len(linear)
    products = sum(own[name] - bare[name] for name in ("mm", "addmm", "bmm"))
    assert products == 2 * len(linear)
    assert own["convolution"] - bare["convolution"] == 2 * convolutions
    assert own["add"] - bare["add"] <= convolutions
    for name in ("mul", "_to_copy", "copy_"):
        assert own[name] == bare[name], name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_roles_factors_are_cast_together(family: str) -> None:
    """Casts do not grow with the number of layers, forward and backward."""

    def count(targets: tuple[str, ...]) -> Counter[str]:
        shared = SharedBase(tiny_text_denoiser(family).to(torch.bfloat16), LoraShape(2, 2.0, targets))
        shared.base.compute_dtype = torch.bfloat16
        role = shared.add_role("generator")
        level = some_levels(shared.base, 300, 20)  # type: ignore[arg-type]
        condition, noisy = tiny_condition(family), noisy_input(dtype=torch.float32)
        return operations(lambda: role.denoise(noisy, level, condition).square().mean().backward())

    one, three = count(("to_q",)), count(("to_q", "to_k", "to_v"))
    assert one["_foreach_copy_"] == three["_foreach_copy_"] == 2
    assert three["_to_copy"] <= one["_to_copy"]


# --- Compiled


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as far as capturing and guards, then the captured operations as they are."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, *_, **options: original(model, backend="eager", fullgraph=True))


def a_step(
    shared: SharedBase, generator: AdapterRole, fake_score: AdapterRole, family: str, dtype: torch.dtype
) -> list[Tensor]:
    """Every role with and without gradients, interleaved; outputs and gradients."""
    condition, base = tiny_condition(family, dtype=dtype), shared.base
    level, noisy = some_levels(base, 700, 30), [noisy_input(seed=seed, dtype=dtype) for seed in range(3)]  # type: ignore[arg-type]
    x0 = generator.denoise(noisy[0], level, condition)
    with torch.no_grad():
        found = [role.denoise(noisy[1], level, condition) for role in (base, fake_score, generator)]
    score = fake_score(noisy[2], level, condition, "both")
    feature = fake_score.features(noisy[1], level, condition)[0]
    (x0 * (found[1] - found[0])).sum().backward()
    (score.x0.square().mean() + score.features[0].sin().mean() + feature.cos().mean()).backward()
    for role in (generator, fake_score):
        found += [torch.zeros_like(part) if part.grad is None else part.grad for part in role.parameters()]
        role.zero_grad(set_to_none=True)
    return [x0.detach(), score.x0.detach(), feature.detach(), *found]


@torch_warns
@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.long
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_compiled_block_serves_every_role(recomputed: bool) -> None:
    """One block of the network, which says as much as all of them and takes seconds."""
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sd"))
    if recomputed:
        shared.checkpoint_activations()
    plain = a_step(shared, generator, fake_score, "sd", torch.float64)
    shared.is_compiled = True
    shared.base.network.mid_block.compile()
    for _ in range(2):
        for ours, expected in zip(a_step(shared, generator, fake_score, "sd", torch.float64), plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.long
@torch_warns
@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_roles_are_what_they_were(family: str, recomputed: bool) -> None:
    """Twice, because the second step finds the compiled forms of all roles and must choose the right ones."""
    shared, generator, fake_score = two_roles(tiny_text_denoiser(family))
    if recomputed:
        shared.checkpoint_activations()
    plain = a_step(shared, generator, fake_score, family, torch.float64)
    for role in (shared, generator, fake_score):
        role.compile_network()
    for _ in range(2):
        compiled = a_step(shared, generator, fake_score, family, torch.float64)
        for ours, expected in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.long
@torch_warns
@pytest.mark.usefixtures("eager_compiler")
def test_compiled_roles_on_a_small_base() -> None:
    """Codes go through the compiler as weights do."""
    shared, generator, fake_score = two_roles(BaseStorage("nf4").store(tiny_text_denoiser("sd3")))  # type: ignore[arg-type]
    shared.checkpoint_activations()
    plain = a_step(shared, generator, fake_score, "sd3", torch.float64)
    shared.compile_network()
    compiled = a_step(shared, generator, fake_score, "sd3", torch.float64)
    for ours, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.long
@torch_warns
@pytest.mark.usefixtures("eager_compiler")
def test_compiled_bf16_roles() -> None:
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sdxl"), torch.float32)
    shared.base.compute_dtype = torch.bfloat16
    plain = a_step(shared, generator, fake_score, "sdxl", torch.float32)
    generator.compile_network()
    compiled = a_step(shared, generator, fake_score, "sdxl", torch.float32)
    ours, expected = (torch.cat([part.flatten() for part in found]) for found in (compiled, plain))
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.999
    torch._dynamo.reset()


@pytest.mark.long
@torch_warns
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_for_real() -> None:
    """The same through torch's own CPU backend, in float32."""
    shared, generator, fake_score = two_roles(tiny_text_denoiser("sd"), torch.float32)
    for number, role in enumerate((generator, fake_score)):
        randomise(role, number)
    plain = a_step(shared, generator, fake_score, "sd", torch.float32)
    generator.compile_network()
    compiled = a_step(shared, generator, fake_score, "sd", torch.float32)
    for ours, expected in zip(compiled, plain, strict=True):
        assert expected.abs().max() < 1e-6 or relative_error(ours, expected) < 1e-3
    torch._dynamo.reset()
