"""Who takes part in distillation: teacher, generator, fake score, discriminator."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.devices import device_of
from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.sharding import (
    Spread,
    fill_parts,
    is_sharded,
    local,
    mesh_of,
    shard_head,
    shard_network,
    spread_teacher,
)
from fewstep.families.registry import build_on_meta
from fewstep.formats.stored_tensors import Rows
from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.networks.discriminator import Head, build_head
from fewstep.networks.frozen_layers import BaseStorage
from fewstep.networks.untrained import computed_buffers


@dataclass
class Roles:
    """The networks of one distillation run.

    Attributes:
        teacher: frozen real score.
        generator: the student; trained.
        fake_score: score of the generator's distribution; trained.
        discriminator: GAN head on the fake score's features, or None where no term needs one.
    """

    teacher: Denoiser
    generator: Denoiser
    fake_score: Denoiser
    discriminator: Head | None

    def generator_parameters(self) -> dict[str, nn.Parameter]:
        """What the first optimiser trains, by name, as they are now: sharding replaces parameter objects."""
        return dict(self.generator.named_parameters())

    def fake_score_parameters(self) -> dict[str, nn.Parameter]:
        """What the second optimiser trains: the fake score and the head."""
        modules: dict[str, nn.Module] = {"fake_score": self.fake_score}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return {
            f"{role}.{name}": parameter
            for role, module in modules.items()
            for name, parameter in module.named_parameters()
        }


def build_roles(
    teacher: Denoiser, with_discriminator: bool, storage: BaseStorage | None = None, spread: Spread | None = None
) -> Roles:
    """Three full copies of the teacher's weights; generator and fake score are trained, in float32 and without dropout.

    Args:
        storage: of the teacher itself from then on; None: float32.
        spread: over which processes; None: this one has all.
    """
    spread_teacher(teacher, spread)
    generator, fake_score = build_twin(teacher, "generator", spread), build_twin(teacher, "fake_score", spread)
    for network in (generator, fake_score):
        network.eval().requires_grad_(True)  # eval: distillation uses no dropout
    teacher.eval().requires_grad_(False)
    head = _head(teacher, with_discriminator)
    if head is not None:
        shard_head(head, fake_score)
    return Roles((storage or BaseStorage()).store(teacher), generator, fake_score, head)


def build_twin(network: Denoiser, name: str, spread: Spread | None = None) -> Denoiser:
    """Another network of the same description with the same weights: built without memory, then filled.

    Args:
        name: of the new role, where the network is an adapter on a shared base: its twin is another one there.
        spread: over which processes; None: as the network is.
    """
    if isinstance(network, AdapterRole):
        role = network.shared.add_role(name)
        role.load_state_dict(network.state_dict())
        return role
    with ThreadPoolExecutor(
        1
    ) as apart:  # where modes that watch this thread, as an estimate's, do not see numbers made
        twin = apart.submit(build_on_meta, network.describe()).result()
    twin.noise_schedule, twin.compute_dtype = network.noise_schedule, network.compute_dtype  # never changed, so shared
    twin.chosen_taps = network.chosen_taps
    weights, mesh = network.state_dict(), spread.mesh if spread is not None else mesh_of(network)
    assert not computed_buffers(twin), f"not in a state dict: {computed_buffers(twin)}"
    if mesh is None:
        twin.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    else:
        # in the types of the weights, which a test may have in float64
        like = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in weights.items()}
        twin.load_state_dict(like, assign=True)
        shard_network(twin, mesh)
        fill_parts(twin, partial(_rows, weights))
    return twin.train(network.training)


def _rows(weights: Mapping[str, Tensor], name: str, rows: Rows) -> Tensor:
    """Rows of a network's tensor, which lies in the processes as its twin's does or is whole."""
    value = weights[name].detach()
    return local(value) if rows is None or is_sharded(value) else value[rows]


def build_lora_generator_roles(
    teacher: Denoiser,
    lora: LoraShape,
    with_discriminator: bool,
    storage: BaseStorage,
    checkpoint: bool,
    spread: Spread | None = None,
) -> Roles:
    """The generator is a LoRA on the frozen teacher; the fake score is a full float32 network of its own.

    Args:
        storage: of the frozen weights.
        checkpoint: whether activations are recomputed in the backward pass.
    """
    spread_teacher(teacher, spread)
    head = _head(teacher, with_discriminator)
    fake_score = build_twin(teacher, "fake_score", spread).eval().requires_grad_(True)
    if head is not None:
        shard_head(head, fake_score)
    if checkpoint:
        fake_score.checkpoint_activations()
    shared = _shared_base(teacher, lora, storage, checkpoint)
    return Roles(teacher, shared.add_role("generator"), fake_score, head)


def build_shared_base_roles(
    teacher: Denoiser,
    lora: LoraShape,
    with_discriminator: bool,
    storage: BaseStorage,
    checkpoint: bool,
    spread: Spread | None = None,
) -> Roles:
    """One copy of the weights: teacher bare, generator and fake score each under its own LoRA."""
    spread_teacher(teacher, spread)
    head = _head(teacher, with_discriminator)
    shared = _shared_base(teacher, lora, storage, checkpoint)
    generator, fake_score = shared.add_role("generator"), shared.add_role("fake_score")
    return Roles(teacher, generator, fake_score, head)


def _shared_base(teacher: Denoiser, lora: LoraShape, storage: BaseStorage, checkpoint: bool) -> SharedBase:
    shared = SharedBase(storage.store(teacher.eval()), lora)
    if checkpoint:
        shared.checkpoint_activations()
    return shared


def _head(teacher: Denoiser, with_discriminator: bool) -> Head | None:
    """Made before the adapters, so that its random start is the same in every memory mode."""
    return build_head(teacher.feature_shapes).to(device_of(teacher)) if with_discriminator else None
