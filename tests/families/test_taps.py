"""Features at several depths: of every family, what its own blocks give (by hooks on them), and nothing behind the deepest is run."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, place_at
from fewstep.distillation.roles import build_twin
from fewstep.errors import UserError
from fewstep.families.registry import build_released, family_of, recognise, released_shapes
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.conftest import golden_denoiser, tiny_denoiser
from tests.tiny_flow_models import tiny_flux2_klein_folder, tiny_qwen_image_folder, tiny_z_image_folder
from tests.tiny_networks import tiny_condition, tiny_text_denoiser

FLOWS: dict[str, Callable[[Path], Path]] = {
    "z-image": tiny_z_image_folder, "klein": tiny_flux2_klein_folder, "qwen-image": tiny_qwen_image_folder,
}  # fmt: skip
FAMILIES = ("edm", "edm residual", "sd", "sdxl", "sd3", *FLOWS)


@cache
def made(name: str) -> tuple[Denoiser, Condition]:
    """A tiny network with random weights, and two conditions."""
    if name in FLOWS:
        with tempfile.TemporaryDirectory() as place:
            folder = FLOWS[name](Path(place) / "model")
            network = recognise(folder).load(folder).eval()
        parts = family_of(network.describe()).example_condition(network, 2).parts
        width = parts["text"].shape[-1]
        return network, Condition(2, {**parts, "text": torch.randn(2, 5, width), "text_length": torch.tensor([5, 3])})
    if name.startswith("edm"):
        network = golden_denoiser("ncsnpp")[0] if "residual" in name else tiny_denoiser()
        return network, Condition.from_labels(torch.arange(2) % max(network.num_classes, 1), network.num_classes)
    return tiny_text_denoiser(name), tiny_condition(name)


def tapped(name: str, taps: tuple[int, ...] = ()) -> tuple[Denoiser, Condition]:
    network, condition = made(name)
    network.chosen_taps = taps
    network.zero_grad()
    return network, condition


def places(name: str, network: Any) -> list[nn.Module]:
    """The modules whose outputs can be read, in the order they are called."""
    if name.startswith("edm"):
        enc = [module for key, module in network.model.enc.items() if "aux_residual" not in key]
        return [*enc, *(module for key, module in network.model.dec.items() if "aux" not in key)]
    return list(network.network.layers) if name == "z-image" else list(network.blocks())


def as_map(name: str, output: Any, place: int, network: Any, condition: Condition) -> Tensor:
    """What a block gave, as (B, C, H, W)."""
    if name in ("sd", "sdxl") or name.startswith("edm"):
        return output[0] if isinstance(output, tuple) else output
    side = network.image_shape[-1] // 2
    if name == "z-image":
        tokens = output[:, : side * side]
    elif name == "klein" and place >= len(network.network.transformer_blocks):
        tokens = output[:, condition["text"].shape[1] :]
    else:
        tokens = output[1]
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def inputs(network: Denoiser) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, *network.image_shape, generator=generator), network.noise_schedule.at(
        torch.tensor([300, 700])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_blocks_give(name: str) -> None:
    network, condition = tapped(name)
    modules, seen = places(name, network), dict[int, Tensor]()
    assert len(modules) == len(network.tap_shapes)
    network.chosen_taps = every = tuple(range(len(modules)))

    def keep(place: int) -> Callable[..., None]:
        return lambda module, given, output: seen.update({place: as_map(name, output, place, network, condition)})

    hooks = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    noisy, level = inputs(network)
    try:
        with torch.no_grad():
            x0, features = network(noisy, level, condition, "both")
            plain = network(noisy, level, condition)
            alone = network.features(noisy, level, condition)
    finally:
        for hook in hooks:
            hook.remove()
    assert plain.features is None
    assert torch.equal(plain.x0, x0)
    assert network.feature_shapes == network.tap_shapes
    assert len(features) == len(alone) == len(every)
    for place, (feature, again) in enumerate(zip(features, alone, strict=True)):
        assert feature.shape[1:] == network.tap_shapes[place]
        assert torch.equal(feature, again)
        if name != "edm residual":
            assert torch.equal(feature, seen[place]), place


def test_a_residual_encoders_features_are_what_the_decoder_gets() -> None:
    """Its second path is added to what the block that halves has given."""
    network, condition = tapped("edm residual")
    place = next(
        n for n, key in enumerate(key for key in network.model.enc if "aux_residual" not in key) if n and "_down" in key
    )  # type: ignore[union-attr,operator]
    network.chosen_taps = (place,)
    seen: dict[str, Tensor] = {}
    names = [key for key in network.model.enc if "_down" in key or "aux_residual" in key][:2]  # type: ignore[union-attr,operator]
    hooks = [
        network.model.enc[key].register_forward_hook(lambda _, __, output, key=key: seen.update({key: output}))  # type: ignore[union-attr,operator,index]
        for key in names
    ]
    with torch.no_grad():
        (feature,) = network.features(*inputs(network), condition)
    for hook in hooks:
        hook.remove()
    assert torch.equal(feature, (seen[names[0]] + seen[names[1]]) * 0.5**0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_behind_the_deepest_is_run(name: str) -> None:
    """Forward, and backward: a block up to the deepest tap has gradients, one behind it has none."""
    network, condition = tapped(name)
    network.requires_grad_(True)
    modules, ran = places(name, network), list[int]()
    hooks = [module.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, module in enumerate(modules)]
    try:
        for taps in ((0, last) if last else (0,) for last in range(len(modules))):
            network.chosen_taps = taps
            network.zero_grad()
            ran.clear()
            features = network.features(*inputs(network), condition)
            assert ran == list(range(taps[-1] + 1))
            torch.stack([feature.square().mean() for feature in features]).sum().backward()
            for number, module in enumerate(modules):
                found = [part.grad is not None and bool(part.grad.any()) for part in module.parameters()]
                assert any(found) == (number <= taps[-1]), (taps, number)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_tap_is_the_depth_of_a_half(name: str) -> None:
    network, _ = tapped(name)
    assert network.taps == (network.middle,)
    network.tap_at([0.5])
    assert network.taps == (network.middle,)
    network.tap_at([0.01, 0.5, 1])
    assert network.taps == (0, network.middle, len(network.tap_shapes) - 1)


def test_depths_of_many_blocks() -> None:
    def of_z_image(depth: float) -> int:
        return place_at(depth, 30, 14)

    assert [of_z_image(depth) for depth in (0.5, 0.75, 0.99, 1.0)] == [14, 22, 29, 29]
    assert [of_z_image(number / 30) for number in range(1, 31)] == list(range(30))
    assert [place_at(number / 100, 1, 0) for number in (1, 50, 51, 100)] == [0, 0, 0, 0]
    for count in range(1, 70):  # a transformer's middle block is the one that half of the depth lies in
        assert place_at(0.5, count, (count - 1) // 2) == (count - 1) // 2
        assert place_at(1, count, (count - 1) // 2) == count - 1


@pytest.mark.parametrize("depths", [[0.55, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
def test_two_depths_in_one_block_are_refused(depths: list[float]) -> None:
    network, _ = tapped("sd3")
    with pytest.raises(
        UserError, match=r"losses\.gan_taps=\[0\..*\]: 0\.\d+ and 0\.\d+ are one place of this network"
    ) as error:
        network.tap_at(depths)
    assert f"can be read at {len(network.tap_shapes)}; leave one out" in str(error.value)
    assert network.taps == (network.middle,)


def test_twins_and_adapters_read_what_their_network_does() -> None:
    network, condition = tiny_text_denoiser("sd3"), tiny_condition("sd3")
    network.tap_at([0.5, 1])
    assert build_twin(network, "fake_score").taps == network.taps
    role = SharedBase(network, LoraShape(rank=2)).add_role("fake_score")
    assert (role.taps, role.feature_shapes) == (network.taps, network.feature_shapes)
    assert [feature.shape for feature in role.features(*inputs(network), condition)] == [
        (2, *shape) for shape in network.feature_shapes
    ]


@pytest.mark.parametrize("name", released_shapes())
def test_released_networks_say_their_features(name: str) -> None:
    network = build_released(name)
    assert 0 <= network.middle < len(network.tap_shapes)
    assert all(len(shape) == 3 and min(shape) > 0 for shape in network.tap_shapes)
    network.tap_at([0.5, 0.75, 1.0])
