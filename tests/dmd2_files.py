"""DMD2 checkpoints as the published ones are: torch.save of whole modules' state dicts, made from our tiny networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.formats.dmd2_folder import DMD2Checkpoint
from fewstep.networks.discriminator import Discriminator


class Guidance(nn.Module):
    """The second file's module: fake score, head, sometimes the teacher, and a constant."""

    def __init__(self, fake: nn.Module, head: nn.Module, real: nn.Module | None) -> None:
        super().__init__()
        if real is not None:
            self.real_unet = real
        self.fake_unet = fake
        self.cls_pred_branch = head
        self.register_buffer("karras_sigmas", torch.linspace(0.002, 80, 1000))


def edm_network(seed: int, family: str = "adm", label_dim: int = 4) -> EDMDenoiser:
    """A network of a released family on unfolded 16x16 colour pictures, with an output that depends on everything."""
    song = {} if family == "adm" else {"augment_dim": 9, "attn_resolutions": (8,), "model_channels": 16}
    if family == "ncsnpp":
        song |= {
            "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
            "resample_filter": (1, 3, 3, 1),
        }  # fmt: skip
    values: dict[str, Any] = {
        "family": "adm" if family == "adm" else "song", "img_resolution": 16, "img_channels": 3,
        "label_dim": label_dim, "model_channels": 16, "channel_mult": (1, 2), "channel_mult_emb": 2, "num_blocks": 1,
        "attn_resolutions": (8,), **song,
    }  # fmt: skip
    torch.manual_seed(seed)
    denoiser = EDMDenoiser(EDMUNetConfig(**values))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "out_conv.weight", "aux_conv.weight")):
                parameter.normal_(0, 0.05)
    return denoiser.eval()


def edm_arguments(config: EDMUNetConfig) -> dict[str, Any]:
    """Constructor arguments of EDM's preconditioning for a network."""
    values = config.to_dict()
    values.pop("fold")
    return {
        "model_type": {"adm": "DhariwalUNet", "song": "SongUNet"}[values.pop("family")],
        "sigma_data": 0.5,
        **values,
    }


def head_for(network: Any, seed: int = 9) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(network.feature_shapes[0])


def save_dmd2(
    folder: Path, generator: nn.Module, fake: nn.Module, head: nn.Module, real: nn.Module | None = None
) -> Path:
    """`..._checkpoint_model_NNNNNN/` with both files."""
    folder.mkdir(parents=True)
    torch.save(generator.state_dict(), folder / "pytorch_model.bin")
    torch.save(Guidance(fake, head, real).state_dict(), folder / "pytorch_model_1.bin")
    return folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def write_dmd2_folder(folder: Path, checkpoint: DMD2Checkpoint, teacher: Mapping[str, Tensor] | None = None) -> None:
    """A checkpoint folder as `.bin` files; without fake score and head only the generator's."""
    parts = {
        "fake_unet.": checkpoint.fake_score,
        "cls_pred_branch.": checkpoint.discriminator,
        "real_unet.": teacher or {},
    }
    guidance = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    folder.mkdir(parents=True)
    write_torch_archive(folder / "pytorch_model.bin", checkpoint.generator)
    if guidance:
        write_torch_archive(folder / "pytorch_model_1.bin", guidance)


def write_torch_archive(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A state dict as torch.save writes it."""
    torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
