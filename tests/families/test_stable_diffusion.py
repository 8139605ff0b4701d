"""Stable Diffusion and SDXL U-Nets behind the contract are diffusers' own forward, cut in two at the mid block."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.estimate.many import parts_gathered
from fewstep.families.diffusers_denoiser import plain_config
from fewstep.families.registry import build_denoiser
from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser, discrete_alphas_cumprod
from tests.conftest import relative_error
from tests.tiny_networks import tiny_condition, tiny_text_denoiser

LEVEL = torch.tensor([999, 30])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet_denoiser(family: str, prediction_type: str = "epsilon", resolution: int = 0) -> DiffusersUNetDenoiser:
    denoiser = tiny_text_denoiser(family, prediction_type, resolution=resolution)
    assert isinstance(denoiser, DiffusersUNetDenoiser)
    return denoiser


def three_levels() -> DiffusersUNetDenoiser:
    """Two upsamplings, so that a side of 6 or 10 is uneven at the second."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    return DiffusersUNetDenoiser(unet, BETAS).eval()


def latents(height: int = 8, width: int = 8, size: int = 2) -> Tensor:
    return torch.randn(size, 4, height, width, generator=torch.Generator().manual_seed(3))


def their_forward(denoiser: DiffusersUNetDenoiser, noisy: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """diffusers' own forward and the output of its mid block."""
    seen: list[Tensor] = []
    hook = denoiser.network.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    added = None
    if denoiser.has_time_ids:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    with torch.no_grad():
        raw = denoiser.network(noisy, LEVEL, condition["text"], added_cond_kwargs=added).sample
    hook.remove()
    return raw, seen[0]


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (9, 8)])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_raw_prediction_and_feature_are_those_of_diffusers(family: str, size: tuple[int, int]) -> None:
    denoiser, condition, noisy = unet_denoiser(family), tiny_condition(family), latents(*size)
    raw, feature = their_forward(denoiser, noisy, condition)
    with torch.no_grad():
        ours, both = denoiser.run_network(noisy, LEVEL, condition, "both")
        alone = denoiser.features(noisy, LEVEL, condition)[0]
        unasked = denoiser(noisy, LEVEL, condition, "x0")
    assert torch.equal(ours, raw)  # type: ignore[arg-type]
    assert torch.equal(both[0], feature)  # type: ignore[arg-type]
    assert torch.equal(alone, feature)
    assert unasked.features is None
    assert unasked.x0.shape == noisy.shape


@pytest.mark.parametrize("size", [(8, 8), (10, 12), (9, 6), (7, 11)])
def test_uneven_upsampling_is_that_of_diffusers(size: tuple[int, int]) -> None:
    denoiser, condition, noisy = three_levels(), tiny_condition("sd"), latents(*size)
    raw, feature = their_forward(denoiser, noisy, condition)
    with torch.no_grad():
        ours, both = denoiser.run_network(noisy, LEVEL, condition, "both")
    assert torch.equal(ours, raw)  # type: ignore[arg-type]
    assert torch.equal(both[0], feature)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_follows_from_the_raw_prediction_as_the_scheduler_says(prediction_type: str) -> None:
    """DDPMScheduler's own conversion, in float64."""
    denoiser, condition, noisy = unet_denoiser("sd", prediction_type), tiny_condition("sd"), latents()
    raw, _ = their_forward(denoiser, noisy, condition)
    scheduler: Any = DDPMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    with torch.no_grad():
        x0 = denoiser.denoise(noisy, LEVEL, condition)
    for number, timestep in enumerate(LEVEL.tolist()):
        one = slice(number, number + 1)
        expected = scheduler.step(raw[one].double(), timestep, noisy[one].double()).pred_original_sample
        assert relative_error(x0[one], expected) < 1e-6


def count_calls(network: nn.Module) -> dict[str, int]:
    """How often each direct part of the network, and each of its blocks, ran."""
    counts: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> None:
        counts[name] = 0

        def count(*_: Any) -> None:
            counts[name] += 1

        module.register_forward_hook(count)

    for name, module in network.named_modules():
        if name in ("conv_in", "mid_block", "conv_out") or (name.count(".") == 1 and "blocks." in name):
            watch(name, module)
    return counts


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_feature_alone_runs_no_decoder(family: str) -> None:
    denoiser = unet_denoiser(family)
    counts = count_calls(denoiser.network)
    decoder = {"up_blocks.0", "up_blocks.1", "conv_out"}
    encoder = {"conv_in", "down_blocks.0", "down_blocks.1", "mid_block"}
    assert counts.keys() == decoder | encoder
    with torch.no_grad():
        denoiser.features(latents(), LEVEL, tiny_condition(family))[0]
        assert {name for name, count in counts.items() if count} == encoder
        denoiser(latents(), LEVEL, tiny_condition(family), "both")
    assert all(count == (1 if name in decoder else 2) for name, count in counts.items())


@pytest.mark.parametrize(("resolution", "side"), [(0, 4), (24, 6), (18, 5)])
def test_feature_shape(resolution: int, side: int) -> None:
    denoiser = unet_denoiser("sd", resolution=resolution)
    assert denoiser.feature_shapes[0] == (32, side, side)
    feature = denoiser.features(latents(*denoiser.image_shape[1:]), LEVEL, tiny_condition("sd"))[0]
    assert feature.shape[1:] == denoiser.feature_shapes[0]


def test_feature_shape_of_three_levels() -> None:
    denoiser = DiffusersUNetDenoiser(three_levels().network, BETAS, latent_size=10)
    assert denoiser.image_shape == (4, 10, 10)
    assert denoiser.feature_shapes[0] == (16, 3, 3)
    assert denoiser.features(latents(10, 10), LEVEL, tiny_condition("sd"))[0].shape[1:] == denoiser.feature_shapes[0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prediction_type"), [("sd", "v_prediction"), ("sdxl", "epsilon")])
def test_description_round_trip(family: str, prediction_type: str) -> None:
    denoiser = unet_denoiser(family, prediction_type, resolution=24)
    text = json.dumps(denoiser.describe())
    again = build_denoiser(json.loads(text)).eval()
    assert json.loads(json.dumps(again.describe())) == json.loads(text)
    assert again.image_shape == (4, 12, 12)
    again.load_state_dict(denoiser.state_dict())
    with torch.no_grad():
        outputs = [model(latents(12, 12), LEVEL, tiny_condition(family), "both") for model in (denoiser, again)]
    assert torch.equal(outputs[0].x0, outputs[1].x0)
    assert torch.equal(outputs[0].features[0], outputs[1].features[0])
    assert torch.equal(again.denoising_weight(LEVEL), denoiser.denoising_weight(LEVEL))


def changed(**values: Any) -> UNet2DConditionModel:
    """The tiny SD network with other constructor arguments, untrained."""
    config = plain_config(unet_denoiser("sd").network.config)
    return UNet2DConditionModel.from_config({**config, **values})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text", "encoder_hid_dim": 32}, "addition_embed_type='text'"),
    ],
)
def test_other_conditioning_is_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* not supported"):
        DiffusersUNetDenoiser(changed(**values), BETAS)


@pytest.mark.parametrize("kind", ["sample", "flow", "x"])
def test_other_predictions_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"prediction_type='{kind}' is not supported; epsilon and v_prediction are"):
        DiffusersUNetDenoiser(unet_denoiser("sd").network, {**BETAS, "prediction_type": kind})


def test_prediction_without_a_type_is_epsilon() -> None:
    assert DiffusersUNetDenoiser(unet_denoiser("sd").network, BETAS).prediction == "epsilon"


def test_no_signal_at_the_end_goes_with_v_alone() -> None:
    network, betas = unet_denoiser("sd").network, {**BETAS, "rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match=r"zero signal .*use a v-prediction model"):
        DiffusersUNetDenoiser(network, betas)
    denoiser = DiffusersUNetDenoiser(network, {**betas, "prediction_type": "v_prediction"})
    assert denoiser.noise_schedule.alpha(torch.tensor([999])).item() == 0
    with torch.no_grad():
        x0 = denoiser.denoise(latents(), LEVEL, tiny_condition("sd"))
        raw, _ = their_forward(denoiser, latents(), tiny_condition("sd"))
    assert torch.equal(x0[0], -raw[0])  # pure noise in: x0 = -v
    assert denoiser.denoising_weight(LEVEL).isfinite().all()


@pytest.mark.parametrize("missing", ["text", "pooled", "time_ids"])
def test_a_missing_part_of_the_condition_is_named(missing: str) -> None:
    denoiser = unet_denoiser("sdxl")
    whole = tiny_condition("sdxl")
    values = {name: whole[name] for name in ("text", "pooled", "time_ids") if name != missing}
    with pytest.raises(KeyError, match=f"this model needs '{missing}'; the condition has "):
        denoiser.denoise(latents(), LEVEL, Condition(2, values))


def test_missing_text_is_named() -> None:
    with pytest.raises(KeyError, match=r"this model needs 'text'; the condition has nothing"):
        unet_denoiser("sd").features(latents(), LEVEL, Condition(2))[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_native_weight(prediction_type: str) -> None:
    denoiser = unet_denoiser("sd", prediction_type)
    cumprod = DDPMScheduler(**BETAS).alphas_cumprod.double()[LEVEL]  # type: ignore[attr-defined]
    expected = cumprod / (1 - cumprod) if prediction_type == "epsilon" else 1 / (1 - cumprod)
    weight = denoiser.denoising_weight(LEVEL)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_bf16_inside_stays_close(family: str) -> None:
    denoiser, condition = unet_denoiser(family, "v_prediction"), tiny_condition(family)
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
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_recomputed_gradients_equal_kept_ones(family: str, want: Any) -> None:
    kept = unet_denoiser(family, "v_prediction").double()
    recomputed = copy.deepcopy(kept)
    recomputed.checkpoint_activations()
    runs = []
    for denoiser in (kept, recomputed):
        count: list[int] = []  # before the forward: recomputation stops once it has what it needs
        denoiser.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        output = denoiser(latents().double(), LEVEL, tiny_condition(family, dtype=torch.float64), want)
        (output.x0 if want == "x0" else output.features[0]).square().mean().backward()
        runs.append(len(count))
    assert runs == [1, 2]
    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


def test_a_checkpoint_of_ones_own_is_used() -> None:
    calls = []

    def checkpoint(block: Any, *inputs: Any) -> Any:
        calls.append(block)
        return block(*inputs)

    denoiser = unet_denoiser("sd")
    denoiser.checkpoint_activations(checkpoint)
    denoiser.denoise(latents(), LEVEL, tiny_condition("sd"))
    assert calls
    calls.clear()
    with torch.no_grad():
        denoiser.denoise(latents(), LEVEL, tiny_condition("sd"))
    assert not calls


def test_betas_of_every_scheduler_are_read() -> None:
    linear = {"num_train_timesteps": 50, "beta_start": 0.01, "beta_end": 0.2, "beta_schedule": "linear"}
    betas = torch.linspace(0.01, 0.2, 50, dtype=torch.float64)
    found = discrete_alphas_cumprod(
        {**linear, "steps_offset": 1, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    )
    torch.testing.assert_close(found.double(), torch.cumprod(1 - betas, 0), rtol=1e-5, atol=0)
    trained = discrete_alphas_cumprod({"trained_betas": [0.1, 0.2, 0.5], "num_train_timesteps": 3})
    torch.testing.assert_close(trained, torch.tensor([0.9, 0.72, 0.36]))


def test_private_entries_stay_out_of_descriptions() -> None:
    assert plain_config({"_name_or_path": "x", "sample_size": 8}) == {"sample_size": 8}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("center_input_sample", True), ("time_embedding_act_fn", "silu"), ("encoder_hid_dim", 32), ("num_class_embeds", 10),
        ("mid_block_type", None), ("in_channels", 9), ("out_channels", 8),
    ],
)  # fmt: skip
def test_networks_of_another_kind_are_refused(name: str, value: object) -> None:
    """Each would run, but not as diffusers runs it, or fail deep inside."""
    config = {**plain_config(tiny_text_denoiser("sd").network.config), name: value}
    with pytest.raises(ValueError, match="are not supported; Stable Diffusion"):
        DiffusersUNetDenoiser(UNet2DConditionModel.from_config(config), {"beta_schedule": "scaled_linear"})


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_parts_that_are_gathered_are_small_and_inner_ones_come_first(family: str) -> None:
    """`fully_shard` takes what no earlier part has; of the released SDXL no part is above 2% of the network (tests/estimate/test_many.py)."""
    denoiser = tiny_text_denoiser(family)
    parts = denoiser.sharded_parts()
    assert parts[-len(denoiser.blocks()) :] == denoiser.blocks()
    for number, part in enumerate(parts):
        inside = {id(module) for module in part.modules()} - {id(part)}
        assert not any(id(later) in inside for later in parts[number:])
    assert sum(parts_gathered(denoiser)) == sum(weight.numel() for weight in denoiser.parameters())
    largest_block = max(sum(weight.numel() for weight in block.parameters()) for block in denoiser.blocks())
    assert max(parts_gathered(denoiser)) < largest_block / 2
