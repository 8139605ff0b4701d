"""How a model's x0 becomes pictures: they are pixels already, or latents that a VAE decodes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.devices import pictures_at_once
from fewstep.errors import UserError
from fewstep.families.family import Family
from fewstep.formats.pixels import to_uint8

if TYPE_CHECKING:
    from fewstep.networks.autoencoder import Autoencoder

_LATENTS_AT_ONCE = 8


class Decoder(ABC):
    """x0 to pictures.

    Attributes:
        factor: pixels a side of x0 stands for.
    """

    factor: int = 1

    @abstractmethod
    def pixels(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) to pixels (B, C, H, W), about [-1, 1]; differentiable."""

    @abstractmethod
    def images(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) to images (B, C, H, W) in [-1, 1], without gradients."""

    @abstractmethod
    def stored(self, x0: Tensor) -> Tensor:
        """x0 as it is kept on disk, on the CPU: uint8 pixels, or float16 latents."""

    @abstractmethod
    def picture_shape(self, x0_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that x0 of this shape becomes."""

    @abstractmethod
    def with_tiny(self, source: str | Path, latent_channels: int) -> "Decoder":
        """A decoder of the same latents with a TAESD (a folder or hub id) in the place of the VAE.

        Raises:
            UserError: no TAESD, one for other latents, or a model that makes pixels.
        """

    @abstractmethod
    def with_autoencoder(self, folder: str | Path) -> "Decoder":
        """A decoder of the same latents with any VAE of a folder, a TAESD's too, in the place of its own.

        Raises:
            UserError: no VAE there, or a model that makes pixels.
        """

    @abstractmethod
    def read(self) -> None:
        """Read the VAE now, where there is one."""

    @property
    def autoencoder(self) -> "Autoencoder":
        """The VAE; raises UserError where x0 are the pictures themselves."""
        raise UserError("this model has no VAE: its network makes pixels")

    def to(self, device: torch.device) -> "Decoder":
        """Decode on this device from now on."""
        return self


class PixelDecoder(Decoder):
    """x0 is the picture."""

    def pixels(self, x0: Tensor) -> Tensor:
        return x0

    def images(self, x0: Tensor) -> Tensor:
        return x0.detach().clamp(-1, 1)

    def stored(self, x0: Tensor) -> Tensor:
        return to_uint8(x0)

    def picture_shape(self, x0_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = x0_shape
        return channels, height, width

    def with_tiny(self, source: str | Path, latent_channels: int) -> Decoder:
        raise UserError(f"a TAESD ({source}) is for text-to-image models; this one makes pixels, not latents")

    def with_autoencoder(self, folder: str | Path) -> Decoder:
        raise UserError(f"{folder}: a VAE is for text-to-image models; this one makes pixels, not latents")

    def read(self) -> None:
        pass


class LatentDecoder(Decoder):
    """x0 are latents.

    The VAE stays float32 whatever the precision of the network: SDXL's overflows in half precision.

    Args:
        factor: pixels a side of a latent stands for.
        read: gives the VAE, float32, on any device; called when it is first needed.
    """

    def __init__(self, factor: int, read: "Callable[[], Autoencoder]") -> None:
        self.factor, self._read = factor, read
        self._autoencoder: Autoencoder | None = None
        self._device = torch.device("cpu")

    @classmethod
    def around(cls, autoencoder: "Autoencoder") -> "LatentDecoder":
        """A decoder with a VAE that is there already, and stays on its device."""
        decoder = cls(autoencoder.factor, lambda: autoencoder)
        decoder._autoencoder = autoencoder
        return decoder

    @property
    def autoencoder(self) -> "Autoencoder":
        """The VAE."""
        if self._autoencoder is None:
            self._autoencoder = self._read().to(self._device)
        return self._autoencoder

    def pixels(self, x0: Tensor) -> Tensor:
        return self.autoencoder.decode(x0)

    @torch.no_grad()
    def images(self, x0: Tensor) -> Tensor:
        """At most 8 at a time, and large ones one by one."""
        group = min(_LATENTS_AT_ONCE, pictures_at_once(x0.shape[-2] * self.factor, x0.shape[-1] * self.factor))
        return torch.cat([self.autoencoder.decode(part).clamp_(-1, 1) for part in x0.split(group)])

    def stored(self, x0: Tensor) -> Tensor:
        return x0.half().cpu()

    def picture_shape(self, x0_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return 3, x0_shape[-2] * self.factor, x0_shape[-1] * self.factor

    def with_tiny(self, source: str | Path, latent_channels: int) -> "LatentDecoder":
        from fewstep.networks.tiny_autoencoder import check_tiny_autoencoder, load_tiny_autoencoder

        tiny = load_tiny_autoencoder(source)
        check_tiny_autoencoder(tiny, source, latent_channels, self.factor)
        return LatentDecoder.around(tiny.to(self._device))

    def with_autoencoder(self, folder: str | Path) -> "LatentDecoder":
        from fewstep.networks.autoencoder import load_autoencoder

        return LatentDecoder.around(load_autoencoder(Path(folder).expanduser()).to(self._device))

    def read(self) -> None:
        assert self.autoencoder is not None

    def to(self, device: torch.device) -> "LatentDecoder":
        self._device = device
        if self._autoencoder is not None:
            self._autoencoder.to(device)
        return self


def read_autoencoder(family: Family, folder: Path, channels: int) -> "Autoencoder":
    """The VAE of a folder whose network makes latents of so many channels; raises UserError for one of others."""
    autoencoder = family.autoencoder(folder)
    assert autoencoder is not None
    if autoencoder.latent_channels != channels:
        raise UserError(
            f"{folder}: its vae has latents of {autoencoder.latent_channels} channels, its {family.component} of {channels}; one of the "
            "two is another model's"
        )
    return autoencoder
