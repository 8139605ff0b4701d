"""Stable Diffusion 3's transformer behind the contract is diffusers' own forward, with the middle tokens as a map."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.families.diffusers_denoiser import plain_config
from fewstep.families.registry import build_denoiser
from fewstep.families.sd3.denoiser import SD3Denoiser
from tests.conftest import relative_error
from tests.tiny_networks import tiny_condition, tiny_text_denoiser

LEVEL = torch.tensor([1.0, 0.3])


def sd3(resolution: int = 0) -> SD3Denoiser:
    denoiser = tiny_text_denoiser("sd3", resolution=resolution)
    assert isinstance(denoiser, SD3Denoiser)
    return denoiser


def sd35() -> SD3Denoiser:
    """Stable Diffusion 3.5's additions: normalised queries and keys, a second attention in some blocks; four blocks."""
    torch.manual_seed(1)
    config = plain_config(sd3().network.config)
    values = {**config, "num_layers": 4, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    return SD3Denoiser(SD3Transformer2DModel.from_config(values), {"shift": 3.0}).eval()


MAKERS = {"3.0": sd3, "3.5": sd35}


def latents(side: int = 8, size: int = 2) -> Tensor:
    return torch.randn(size, 4, side, side, generator=torch.Generator().manual_seed(3))


def their_forward(denoiser: SD3Denoiser, noisy: Tensor, condition: Condition, middle: int) -> tuple[Tensor, Tensor]:
    """diffusers' own forward at timestep 1000 t, and the image tokens after block `middle`, row by row as a map."""
    seen: list[Tensor] = []
    block = denoiser.network.transformer_blocks[middle]
    hook = block.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    with torch.no_grad():
        raw = denoiser.network(noisy, condition["text"], condition["pooled"], timestep=LEVEL * 1000).sample
    hook.remove()
    side = noisy.shape[-1] // 2
    size, _, channels = seen[0].shape
    tokens = torch.empty(size, channels, side, side)
    for row in range(side):
        for column in range(side):
            tokens[:, :, row, column] = seen[0][:, row * side + column]
    return raw, tokens


@pytest.mark.parametrize(("version", "side", "middle"), [("3.0", 8, 1), ("3.0", 12, 1), ("3.5", 8, 1)])
def test_raw_prediction_and_feature_are_those_of_diffusers(version: str, side: int, middle: int) -> None:
    denoiser = sd3(side * 2) if side != 8 else MAKERS[version]()
    condition, noisy = tiny_condition("sd3"), latents(side)
    raw, feature = their_forward(denoiser, noisy, condition, middle)
    with torch.no_grad():
        ours, both = denoiser.run_network(noisy, LEVEL, condition, "both")
        alone = denoiser.features(noisy, LEVEL, condition)[0]
        only_x0 = denoiser(noisy, LEVEL, condition, "x0")
    assert torch.equal(ours, raw)  # type: ignore[arg-type]
    assert torch.equal(both[0], feature)  # type: ignore[arg-type]
    assert torch.equal(alone, feature)
    assert alone.shape[1:] == denoiser.feature_shapes[0] == (32, side // 2, side // 2)
    assert only_x0.features is None
    torch.testing.assert_close(only_x0.x0, noisy - LEVEL[:, None, None, None] * raw, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("version", "last"), [("3.0", 1), ("3.5", 1)])
def test_the_feature_alone_stops_after_the_middle_block(version: str, last: int) -> None:
    denoiser = MAKERS[version]()
    ran: list[str] = []
    for name, module in denoiser.network.named_modules():
        if name in ("norm_out", "proj_out") or (name.startswith("transformer_blocks.") and name.count(".") == 1):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        denoiser.features(latents(), LEVEL, tiny_condition("sd3"))[0]
        assert ran == [f"transformer_blocks.{number}" for number in range(last + 1)]
        ran.clear()
        denoiser(latents(), LEVEL, tiny_condition("sd3"), "both")
    blocks = [f"transformer_blocks.{number}" for number in range(len(denoiser.network.transformer_blocks))]
    assert ran == [*blocks, "norm_out", "proj_out"]


def test_schedule_is_the_models_own() -> None:
    assert (sd3().noise_schedule.shift, sd3().noise_schedule.num_levels) == (3.0, 1000)  # type: ignore[attr-defined]
    plain = SD3Denoiser(sd3().network, {"num_train_timesteps": 500})
    assert (plain.noise_schedule.shift, plain.noise_schedule.num_levels) == (1.0, 500)  # type: ignore[attr-defined]
    torch.testing.assert_close(plain.denoising_weight(LEVEL), LEVEL**-2)


def test_description_round_trip() -> None:
    denoiser = sd3(resolution=24)
    text = json.dumps(denoiser.describe())
    again = build_denoiser(json.loads(text)).eval()
    assert json.loads(json.dumps(again.describe())) == json.loads(text)
    assert again.image_shape == (4, 12, 12)
    again.load_state_dict(denoiser.state_dict())
    condition = tiny_condition("sd3")
    with torch.no_grad():
        outputs = [model(latents(12), LEVEL, condition, "both") for model in (denoiser, again)]
    assert torch.equal(outputs[0].x0, outputs[1].x0)
    assert torch.equal(outputs[0].features[0], outputs[1].features[0])


@pytest.mark.parametrize("option", ["use_dynamic_shifting", "use_karras_sigmas", "shift_terminal", "invert_sigmas"])
def test_schedulers_with_another_grid_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"schedulers with {option} are not supported"):
        SD3Denoiser(sd3().network, {option: True})


@pytest.mark.parametrize("size", [9, 64])
def test_latent_sizes_the_transformer_cannot_take(size: int) -> None:
    with pytest.raises(ValueError, match=f"latents of side {size} do not fit this transformer"):
        SD3Denoiser(sd3().network, {"shift": 3.0}, size)


@pytest.mark.parametrize("missing", ["text", "pooled"])
def test_a_missing_part_of_the_condition_is_named(missing: str) -> None:
    whole = tiny_condition("sd3")
    values = {name: whole[name] for name in ("text", "pooled") if name != missing}
    with pytest.raises(KeyError, match=f"this model needs '{missing}'"):
        sd3().denoise(latents(), LEVEL, Condition(2, values))


def test_bf16_inside_stays_close() -> None:
    denoiser, condition = sd3(), tiny_condition("sd3")
    noisy = latents().requires_grad_(True)
    exact = denoiser(noisy, LEVEL, condition, "both")
    denoiser.compute_dtype = torch.bfloat16
    rough = denoiser(noisy, LEVEL, condition, "both")
    for ours, theirs in ((rough.x0, exact.x0), (rough.features[0], exact.features[0])):
        assert ours.dtype == torch.float32
        assert 1e-5 < relative_error(ours, theirs.detach()) < 3e-2
    rough.x0.square().mean().backward()
    assert noisy.grad.dtype == torch.float32
    assert {p.grad.dtype for p in denoiser.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("want", ["x0", "features"])
def test_recomputed_gradients_equal_kept_ones(want: Any) -> None:
    kept = sd3().double()
    recomputed = copy.deepcopy(kept)
    recomputed.checkpoint_activations()
    runs = []
    for denoiser in (kept, recomputed):
        count: list[int] = []
        denoiser.network.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        condition = tiny_condition("sd3", dtype=torch.float64)
        output = denoiser(latents().double(), LEVEL.double(), condition, want)
        (output.x0 if want == "x0" else output.features[0]).square().mean().backward()
        runs.append(len(count))
    assert runs == [1, 2]
    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)
