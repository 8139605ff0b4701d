"""Weights of other kinds are called by their names, as their tools write the keys."""

import pytest

from fewstep.formats.foreign_kinds import foreign_kind


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("base_model.model.conv1.lora_magnitude_vector", "DoRA"), ("lora_unet_conv1.dora_scale", "DoRA"), ("lora_unet_conv1.hada_w1_a", "LoHa"),
        ("lycoris_conv1.lokr_w1", "LoKr"), ("lora_unet_conv1.oft_blocks", "OFT or VeRA"), ("lora_unet_conv1.lora_mid.weight", "a LoCon with a core (lora_mid)"),
        ("base_model.model.conv1.lora_B.bias", "lora_bias"), ("conv1.lora_B.default.bias", "lora_bias"), ("lora_unet_conv_in.diff_b", "whole differences of weights (.diff)"),
        ("lora_te1_text_model_x.lora_down.weight", "LoRA of a text encoder"), ("text_encoder_2.layers.0.q.lora_A.weight", "LoRA of a text encoder"),
        ("emb_params", "a textual inversion"), ("clip_g", "a textual inversion"), ("<cat>", "a textual inversion"), ("image_proj.proj.weight", "an IP-Adapter"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"), ("first_stage_model.decoder.conv_in.weight", "a VAE"),
        ("input_blocks.0.0.weight", "a U-Net in the keys of guided diffusion or LDM, without their prefix"), ("transformer_blocks.0.attn.to_q.weight", "a transformer"),
        ("model_ema.diffusion_modelinput_blocks00weight", "a whole model whose network is there as an average alone (model_ema.*)"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", ""), ("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight", ""),
        ("0.weight", ""), ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", ""), ("enc.8x8_block0.conv0.weight", ""),
    ],
)  # fmt: skip
def test_every_kind(key: str, kind: str) -> None:
    assert foreign_kind([key]) == kind
