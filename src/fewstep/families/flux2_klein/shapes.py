"""LoRA targets, released networks and VAE of FLUX.2 klein, and names of its releases."""

from typing import Any

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")  # and attn.to_out of every single block
_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}


def _klein(double_blocks: int, single_blocks: int, heads: int, text_width: int) -> dict[str, Any]:
    """A release: what it does not name here is as in diffusers' class."""
    network = {
        "patch_size": 1, "in_channels": 128, "out_channels": None, "num_layers": double_blocks,
        "num_single_layers": single_blocks, "attention_head_dim": 128, "num_attention_heads": heads,
        "joint_attention_dim": 3 * text_width, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False,
    }  # fmt: skip
    return {"family": "flux2-klein", "latent_size": 128, "scheduler": dict(_SCHEDULER), "network": network}


# 3.9 and 9.1 thousand million parameters; the text encoders are Qwen3 of 4 B (width 2560) and 8 B (width 4096)
SHAPES = {"flux2-klein-4b": _klein(5, 20, 24, 2560), "flux2-klein-9b": _klein(8, 24, 32, 4096)}
# 8 pixels a latent side; the encoder and decoder of AutoencoderKL, whose batch norm has 128 means and variances beside them
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 32, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
# beginnings of keys of single files
UNREAD_FILES = {
    f"{prefix}{part}.": "FLUX.2"
    for prefix in ("model.diffusion_model.", "")
    for part in ("double_stream_modulation_img", "single_stream_modulation")
}
GENERATOR_INDEX = {"is_distilled": True}  # its pipeline then makes no second branch, whatever guidance_scale says
IS_DISTILLED = "flux.2-klein without base"  # what a folder is called whose index says is_distilled
# name of a release with guidance built in: the model it was made from
DISTILLED_RELEASES = {
    "flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    IS_DISTILLED: "black-forest-labs/FLUX.2-klein-base-4B or -9B",
}


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """mu of the scheduler's shift as Flux2KleinPipeline has it (`compute_empirical_mu`): a line over image tokens for 10
    steps and one for 200, between them by the number of steps; above 4300 tokens the second for all."""
    many = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return many
    few = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (many - few) / 190.0
    return slope * num_steps + many - 200.0 * slope
