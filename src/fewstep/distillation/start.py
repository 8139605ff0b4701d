"""Puts the authors' checkpoints, and what lies beside a converted generator, into the roles of a new run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import Roles
from fewstep.distillation.sharding import put_weights
from fewstep.errors import UserError
from fewstep.formats.dmd2_folder import fit_discriminator, read_dmd2
from fewstep.formats.roles_folder import read_roles
from fewstep.networks.fitting import fit_network
from fewstep.settings import LossSettings, MemorySettings, Tree, renew_settings
from fewstep.settings.losses import PUBLISHED_TAPS


def start_from_dmd2(roles: Roles, source: Path) -> None:
    """Generator, fake score and head of a DMD2 checkpoint; what it does not hold stays as it is.

    Raises:
        UserError: unreadable, or of other networks.
    """
    checkpoint = read_dmd2(source)
    weights = fit_network(checkpoint.generator, roles.generator, "generator", str(source))
    put_weights(roles.generator, weights)
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
    found, wanted = _lora(earlier), _lora(generator)
    if found is not None and wanted is not None and found.alpha != wanted.alpha:
        raise UserError(
            f"its LoRA has alpha {found.alpha:g} and the run's {wanted.alpha:g}; set memory.lora=[{found.rank}, {found.alpha:g}]"
        )


def refuse_other_memory(run: Path, roles: Roles) -> None:
    """Raise UserError where an earlier run's roles shared memory otherwise, or its LoRA has another rank or alpha.

    A checkpoint holds weights alone; what they mean stands in the run's settings.json.
    """
    wanted = _lora(roles.generator)
    path = run / "settings.json"
    if wanted is None and not path.is_file():
        return  # full networks need no scale; another shape is found by its tensors
    before = _read_group(path, "memory", MemorySettings, "how its LoRA is scaled")
    try:
        found = {"mode": before["mode"], "lora": list(before["lora"])[:2]}  # dropout is no part of what is trained
    except (KeyError, TypeError) as error:
        raise _unread("how its LoRA is scaled", error) from None
    now: dict[str, Any] = {"mode": "full"}
    if wanted is not None:
        mode = "lora_generator" if _lora(roles.fake_score) is None else "shared_base"
        now = {"mode": mode, "lora": [wanted.rank, wanted.alpha]}
    for name, value in now.items():
        if found[name] != value:
            raise UserError(f"memory.{name} was {found[name]!r} in that run and is {value!r} here; set it back")


def refuse_other_taps(run: Path, fake_score: Denoiser) -> None:
    """Raise UserError where an earlier run's discriminator read other features than are read here: their shapes may be the same."""
    path, published = run / "settings.json", fake_score.taps == (fake_score.middle,)
    if published and not path.is_file():
        return
    what = "which features its discriminator reads"
    before = _read_group(path, "losses", LossSettings, what).get("gan_taps", PUBLISHED_TAPS)
    try:
        places = fake_score.places_at(before)
    except TypeError as error:
        raise _unread(what, error) from None
    if places != fake_score.taps:
        raise UserError(
            f"losses.gan_taps was {list(before)} in that run and is other depths here: set it back, or start from its exported "
            "generator, beside which a discriminator begins anew"
        )


def _read_group(path: Path, name: str, kind: type[Tree], what: str) -> dict[str, Any]:
    """A group of an earlier run's settings, under today's names."""
    try:
        written = dict(json.loads(path.read_text(encoding="utf-8"))[name])
        return renew_settings(kind, written, str(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unread(what, error) from None


def _unread(what: str, error: Exception) -> UserError:
    return UserError(
        f"its settings.json, which says {what}, cannot be read ({type(error).__name__}: {error}); copy it beside checkpoints/"
    )


def _lora(network: Denoiser) -> Any:
    """The shape of a role's LoRA, None for a full network."""
    return getattr(getattr(network, "shared", None), "lora", None)


def _start_others(roles: Roles, found: Mapping[str, dict[str, Tensor]], source: Path) -> None:
    if "fake_score" in found:
        weights = fit_network(found["fake_score"], roles.fake_score, "fake score", str(source))
        put_weights(roles.fake_score, weights)
    if "discriminator" in found and roles.discriminator is not None:
        if roles.fake_score.taps != (roles.fake_score.middle,):
            raise UserError(
                "its discriminator reads the published feature alone: leave losses.gan_taps out, or start from the generator alone, beside "
                "which a discriminator begins anew"
            )
        head = fit_discriminator(found["discriminator"], roles.discriminator.state_dict(), str(source))
        put_weights(roles.discriminator, head)
