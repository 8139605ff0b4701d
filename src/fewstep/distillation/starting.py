"""Puts the authors' checkpoints, and what lies beside a converted generator, into the roles of a new run."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.backbones.fitting import fit_network
from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import Roles
from fewstep.errors import UserError
from fewstep.formats.dmd2_folder import fit_discriminator, read_dmd2
from fewstep.formats.roles_folder import read_roles


def start_from_dmd2(roles: Roles, source: Path) -> None:
    """Generator, fake score and head of a DMD2 checkpoint; what it does not hold stays as it is.

    Raises:
        UserError: unreadable, or of other networks.
    """
    checkpoint = read_dmd2(source)
    weights = fit_network(checkpoint.generator, roles.generator, "generator", str(source))
    roles.generator.load_state_dict(weights)
    others = {"fake_score": checkpoint.fake_score, "discriminator": checkpoint.discriminator}
    _start_others(roles, {name: part for name, part in others.items() if part}, source)


def start_others_beside(roles: Roles, source: Path) -> None:
    """Fake score and head from `roles/` in a generator's folder, where there is one.

    Raises:
        UserError: unreadable, or of other networks.
    """
    _start_others(roles, read_roles(source), source)


def refuse_other_scale(earlier: Denoiser, generator: Denoiser) -> None:
    """Raise UserError where both are LoRAs of another alpha: the same weights would be another update."""
    found, wanted = (getattr(getattr(network, "shared", None), "lora", None) for network in (earlier, generator))
    if found is not None and wanted is not None and found.alpha != wanted.alpha:
        raise UserError(
            f"its LoRA has alpha {found.alpha:g} and the run's {wanted.alpha:g}; set memory.lora_alpha={found.alpha:g}"
        )


def _start_others(roles: Roles, found: Mapping[str, dict[str, Tensor]], source: Path) -> None:
    if "fake_score" in found:
        weights = fit_network(found["fake_score"], roles.fake_score, "fake score", str(source))
        roles.fake_score.load_state_dict(weights)
    if "discriminator" in found and roles.discriminator is not None:
        head = fit_discriminator(found["discriminator"], roles.discriminator.state_dict(), str(source))
        roles.discriminator.load_state_dict(head)
