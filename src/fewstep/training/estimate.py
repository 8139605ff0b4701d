"""What a run would need, found without teacher, data or memory: networks are built on the meta device."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.catalog import build_denoiser, build_network_config, released_network_config
from fewstep.backbones.discriminator import Discriminator
from fewstep.backbones.edm_denoiser import EDMDenoiser
from fewstep.backbones.edm_unet import EDMUNetConfig
from fewstep.config import PretrainSettings, TrainSettings
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, Want
from fewstep.errors import UserError
from fewstep.formats.model_folder import read_model_folder
from fewstep.generator import BUNDLED, bundled_path

_GIB = 2**30


@dataclass(frozen=True)
class NetworkSize:
    """Counts of one network.

    Attributes:
        parameters: of the network.
        activation_bytes: kept for one sample's backward pass in float32.
        encoder_activation_bytes: the same when only the bottleneck is computed.
        head_parameters: of a discriminator on its bottleneck.
    """

    parameters: int
    activation_bytes: int
    encoder_activation_bytes: int
    head_parameters: int


def network_size(config: EDMUNetConfig) -> NetworkSize:
    """Count parameters and the tensors autograd keeps, on the meta device."""
    with torch.device("meta"):
        denoiser = EDMDenoiser(config).train()
        head = Discriminator(denoiser.bottleneck_shape)
    return NetworkSize(
        sum(p.numel() for p in denoiser.parameters()),
        _saved_bytes(denoiser, "x0"),
        _saved_bytes(denoiser, "bottleneck"),
        sum(p.numel() for p in head.parameters()),
    )


def _saved_bytes(denoiser: Denoiser, want: Want) -> int:
    """Bytes autograd keeps for one sample; each storage once, parameters not."""
    parameters = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters:
            saved[key] = tensor  # held, so that no storage address is used twice
        return tensor

    size = 2  # two samples, so that nothing of batch size 1 is special
    labels = torch.zeros(size, denoiser.num_classes, device="meta") if denoiser.num_classes else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.zeros(size, *denoiser.image_shape, device="meta")
        denoiser(noisy, torch.ones(size, device="meta"), Condition(size, labels), want)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) // size


def describe_distillation(settings: TrainSettings) -> list[str]:
    """Lines for `fewstep train --dry-run`."""
    config = _teacher_config(settings)
    if config is None:
        return ["memory: unknown; set teacher.path to a model folder, or teacher.network, to estimate it"]
    size, gan = network_size(config), settings.losses.gan_discriminator_weight > 0
    batch, half = settings.training.batch_size, 0.5 if settings.compute.precision == "bf16" else 1.0
    weights = size.parameters * 4
    head = size.head_parameters * 4 if gan else 0
    trained = weights * 2 + head
    states = weights * (3 + bool(settings.generator.ema_half_life_images)) + head + trained * 2
    graph, encoder = size.activation_bytes * batch * half, size.encoder_activation_bytes * batch * half
    generator_turn = graph + (encoder if gan else 0) + weights
    fake_score_turn = graph + (2 * encoder if gan else 0) + weights + head
    lines = [
        f"network: {size.parameters / 1e6:.1f} M parameters, {config.img_resolution}x{config.img_resolution}x"
        f"{config.img_channels}, {config.label_dim} classes"
        + (f"; discriminator: {size.head_parameters / 1e6:.1f} M" if gan else ""),
        f"memory for weights, averages and optimiser states: {states / _GIB:.1f} GiB",
        f"memory for gradients and activations at batch {batch} ({settings.compute.precision}, one process): "
        f"{max(generator_turn, fake_score_turn) / _GIB:.1f} GiB",
        f"estimated peak: {(states + max(generator_turn, fake_score_turn)) / _GIB:.1f} GiB "
        "(counted on the meta device; workspace of the kernels comes on top)",
    ]
    return lines + ([f"published: {settings.expected}"] if settings.expected else [])


def describe_pretraining(settings: PretrainSettings) -> list[str]:
    """Lines for `fewstep pretrain --dry-run`."""
    net = settings.network
    try:
        config = build_network_config(
            net.name, img_resolution=net.img_resolution, img_channels=net.img_channels, label_dim=net.label_dim
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    size = network_size(config)
    half = 0.5 if settings.compute.precision == "bf16" else 1.0
    states = size.parameters * 4 * 4
    graph = size.activation_bytes * settings.training.batch_size * half + size.parameters * 4
    return [
        f"network: {size.parameters / 1e6:.1f} M parameters",
        f"estimated peak: {(states + graph) / _GIB:.1f} GiB at batch {settings.training.batch_size} "
        f"({settings.compute.precision}; counted on the meta device; workspace of the kernels comes on top)",
    ]


def _teacher_config(settings: TrainSettings) -> EDMUNetConfig | None:
    """Shape of the teacher: named in the recipe, or read from its folder."""
    if settings.teacher.network:
        try:
            return released_network_config(settings.teacher.network)
        except ValueError as error:
            raise UserError(str(error)) from None
    path = settings.teacher.path
    if not path:
        return None
    folder = bundled_path(path.removeprefix(BUNDLED)) if path.startswith(BUNDLED) else Path(path).expanduser()
    if (folder / "teacher").is_dir():
        folder = folder / "teacher"
    if not folder.is_dir():
        return None
    description, _, _ = read_model_folder(folder)
    with torch.device("meta"):
        denoiser = build_denoiser(description)
    return denoiser.config if isinstance(denoiser, EDMDenoiser) else None
