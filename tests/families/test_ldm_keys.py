"""Single-file keys against diffusers' own conversion, for tiny networks and the real shapes of SD 1.5 and SDXL."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.errors import UserError
from fewstep.families.registry import family_named, released_shapes
from fewstep.families.stable_diffusion.ldm_keys import PREFIXES, check_unet_config, from_ldm, to_ldm

# the published text encoders of SD 1.5 and SDXL (both its own)
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
OPEN_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
TINY_UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "cross_attention_dim": 8,
    "attention_head_dim": 2,
}  # fmt: skip
TINY_UNETS: dict[str, dict[str, Any]] = {
    "two levels, one layer": {
        "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "five levels, three layers: more than ten blocks": {
        "block_out_channels": (4, 4, 8, 8, 8), "layers_per_block": 3,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 4, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 4),
    },
    "SDXL's kind": {
        "block_out_channels": (8, 16, 16), "layers_per_block": 2, "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
}  # fmt: skip


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert value.is_meta or torch.equal(actual[name], value), name


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def round_trip(family: str, component: str, module: Any) -> dict[str, Tensor]:
    """Our writing and reading; returns what was written."""
    config = module.config if component in ("unet", "vae") else {}
    written = to_ldm(family, component, module.state_dict(), config)
    prefix = PREFIXES[family][component]
    assert all(key.startswith(prefix) for key in written)
    bare = {key.removeprefix(prefix): value for key, value in written.items()}
    same(from_ldm(component, bare, config, shapes(module)), module.state_dict())
    return written


def text_names(module: nn.Module) -> dict[str, Tensor]:
    """A text encoder's tensors as diffusers' conversion names them (every version of transformers)."""
    return {
        name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in module.state_dict().items()
    }


def tiny_text(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        CLIPTextConfig(
            vocab_size=11, hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=7, projection_dim=10,
        )
    )  # fmt: skip


def released_unet(name: str) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(released_shapes()[name]["network"])


def released_text(kind: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return kind(CLIPTextConfig(**config))


@pytest.mark.parametrize("name", TINY_UNETS)
@pytest.mark.slow
def test_tiny_unets_return_through_diffusers(name: str) -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**TINY_UNET, **TINY_UNETS[name])
    written = round_trip("sdxl", "unet", unet)
    same(convert_ldm_unet_checkpoint(dict(written), unet.config), unet.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_keys"), [("sd15", 686), ("sdxl", 1680)])
def test_released_unets_match_key_for_key(name: str, num_keys: int) -> None:
    unet = released_unet(name)
    written = round_trip(name, "unet", unet) if name == "sdxl" else round_trip("sd", "unet", unet)
    assert len(written) == num_keys
    same(convert_ldm_unet_checkpoint(dict(written), unet.config), unet.state_dict())


@pytest.mark.slow
def test_known_keys_and_shapes_of_released_unets() -> None:
    """A few facts about the published files, so that two mistakes cannot cancel out."""
    sd = to_ldm("sd", "unet", released_unet("sd15").state_dict(), released_unet("sd15").config)
    sdxl = to_ldm("sdxl", "unet", released_unet("sdxl").state_dict(), released_unet("sdxl").config)
    known = {
        "input_blocks.0.0.weight": (320, 4, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1), "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3), "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768), "time_embed.2.weight": (1280, 1280),
        "out.2.weight": (4, 320, 3, 3),
    }  # fmt: skip
    for key, shape in known.items():
        assert tuple(sd[f"model.diffusion_model.{key}"].shape) == shape, key
    known = {
        "label_emb.0.0.weight": (1280, 2816), "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1), "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
    }  # fmt: skip
    for key, shape in known.items():
        assert tuple(sdxl[f"model.diffusion_model.{key}"].shape) == shape, key


def test_vaes_return_through_diffusers() -> None:
    torch.manual_seed(0)
    tiny: Any = AutoencoderKL(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    with torch.device("meta"):
        released: Any = AutoencoderKL(**family_named("sd").autoencoder_config)
    for vae in (tiny, released):
        written = round_trip("sd", "vae", vae)
        same(convert_ldm_vae_checkpoint(dict(written), vae.config), vae.state_dict())
    assert len(written) == 248
    known = {
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "encoder.down.2.downsample.conv.bias": (512,),
        "encoder.norm_out.weight": (512,), "quant_conv.weight": (8, 8, 1, 1),
    }  # fmt: skip
    for key, shape in known.items():
        assert tuple(written[f"first_stage_model.{key}"].shape) == shape, key


def test_text_encoders_return_through_diffusers() -> None:
    for model in (tiny_text(CLIPTextModel), released_text(CLIPTextModel, CLIP_L)):
        for family in ("sd", "sdxl"):
            written = round_trip(family, "text_encoder", model)
            same(convert_ldm_clip_checkpoint(dict(written)), text_names(model))
    assert len(written) == 196


def test_open_clip_encoders_return_through_diffusers() -> None:
    prefix = PREFIXES["sdxl"]["text_encoder_2"]
    for model in (
        tiny_text(CLIPTextModelWithProjection), released_text(CLIPTextModelWithProjection, OPEN_CLIP_G),
    ):  # fmt: skip
        written = round_trip("sdxl", "text_encoder_2", model)
        holder = SimpleNamespace(config=model.config)
        same(convert_open_clip_checkpoint(holder, dict(written), prefix=prefix), text_names(model))
    assert len(written) == 5 + 32 * 12
    known = {
        "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280), "text_projection": (1280, 1280),
        "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280), "positional_embedding": (77, 1280),
        "ln_final.bias": (1280,), "transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    }  # fmt: skip
    for key, shape in known.items():
        assert tuple(written[prefix + key].shape) == shape, key


def test_extra_tensors_of_published_files_are_ignored_and_others_are_named() -> None:
    model = tiny_text(CLIPTextModel)
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    extra = {**state, "embeddings.position_ids": torch.arange(7)[None]}
    same(from_ldm("text_encoder", extra, {}, shapes(model)), model.state_dict())
    with pytest.raises(UserError, match=r"1 unexpected \(encoder\.layers\.9\.bias\)"):
        from_ldm("text_encoder", {**state, "encoder.layers.9.bias": torch.zeros(1)}, {}, shapes(model))
    state.pop("final_layer_norm.bias")
    with pytest.raises(UserError, match=r"1 missing \(final_layer_norm\.bias\)"):
        from_ldm("text_encoder", state, {}, shapes(model))
    state["final_layer_norm.bias"] = torch.zeros(5)
    with pytest.raises(UserError, match=r"final_layer_norm.bias \(5,\) for \(12,\)"):
        from_ldm("text_encoder", state, {}, shapes(model))


def test_old_linear_vae_attention_and_odd_fused_matrices() -> None:
    """Some files keep matrices where others keep 1x1 convolutions; a fused matrix that is no multiple of 3 is named."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(norm_num_groups=2, block_out_channels=(4,))
    bare = {
        key.removeprefix("first_stage_model."): value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value
        for key, value in to_ldm("sd", "vae", vae.state_dict(), vae.config).items()
    }
    same(from_ldm("vae", bare, vae.config, shapes(vae)), vae.state_dict())
    text = tiny_text(CLIPTextModelWithProjection)
    prefix = PREFIXES["sdxl"]["text_encoder_2"]
    bare = {key.removeprefix(prefix): v for key, v in to_ldm("sdxl", "text_encoder_2", text.state_dict(), {}).items()}
    bare["transformer.resblocks.0.attn.in_proj_bias"] = torch.zeros(35)
    with pytest.raises(UserError, match="in_proj_bias"):
        from_ldm("text_encoder_2", bare, {}, shapes(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D",)}, "AttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid block UNetMidBlock2D"),
        ({"layers_per_block": (1, 2)}, "layers_per_block"),
    ],
)
def test_unets_without_a_single_file_layout_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**TINY_UNETS["two levels, one layer"], **change}
    with pytest.raises(UserError, match=message):
        check_unet_config(config)


def test_the_keys_are_found_where_they_were() -> None:
    """Scripts of others import them from there."""
    from fewstep.formats.ldm_keys import to_ldm as to_there

    state = {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}
    found = to_there("sdxl", "vae", state, {})
    assert found.keys() == to_ldm("sdxl", "vae", state, {}).keys()
    with pytest.raises(UserError, match="single files have no vae of wan"):
        to_there("wan", "vae", state, {})
