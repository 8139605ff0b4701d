"""What programs that read whole models in one file take for granted, and a generator has otherwise: such files say nothing of it."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from fewstep.export.lora import base_denoiser
from fewstep.export.single_file import layout_of
from fewstep.models.model import Model

_SAME = 1e-4  # of alphas_cumprod
_MAX_SHOWN = 3


def unassumed_facts(generator: Model) -> str:
    """The facts of a generator's configs that no single file holds and that its readers take otherwise, in words; "" for none."""
    facts = list(_facts(generator))
    shown = ", ".join(facts[:_MAX_SHOWN])
    more = len(facts) - _MAX_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def _facts(generator: Model) -> Iterator[str]:
    layout = layout_of(generator)
    network: Any = base_denoiser(generator)
    encoders = [cast(Any, module).config.to_dict() for module in generator.conditioner.encoders.modules]
    configs: dict[str, Mapping[str, Any]] = {
        generator.family.component: dict(network.network.config),
        "vae": dict(cast(Any, generator.decoder.autoencoder.vae).config),
        **dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False)),
    }
    for name, config in configs.items():
        for key, assumed in layout.assumed(name, config).items():
            if _plain(config.get(key)) != _plain(assumed):
                yield f"{name} {key}={_plain(config.get(key))} ({_plain(assumed)} is taken)"
    own, taken = network.scheduler_config, layout.alphas_cumprod(layout.assumed("scheduler", {}))
    alphas = layout.alphas_cumprod({**own, "rescale_betas_zero_snr": False})
    if len(alphas) != len(taken) or not torch.allclose(alphas, taken, atol=_SAME):
        yield "the scheduler's betas"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
