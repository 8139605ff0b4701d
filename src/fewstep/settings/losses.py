"""The terms of a distillation: each with its weight and what belongs to it."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from fewstep.errors import UserError
from fewstep.settings.earlier import Earlier, Put, entry
from fewstep.settings.tree import NonNegative, Tree

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "hellinger", "jeffreys", "softened_reverse_kl"]
LevelIndex = Annotated[int, Field(ge=0)]


def _gan_levels(value: Any) -> Any:
    """One sentence for whatever is neither."""
    if value == "shared" or (type(value) is int and value >= -1):
        return value
    raise ValueError("a grid index, -1 for none, or 'shared'")


PUBLISHED_TAPS = (0.5,)
Depth = Annotated[float, Field(gt=0, le=1)]
GanLevels = Annotated[Literal["shared"] | int, BeforeValidator(_gan_levels)]
_UNIFORM = 1.0  # shift of levels that are drawn uniformly


def _with_shift(value: Any) -> Any:
    """Lowest and highest index alone as drawn uniformly."""
    entries = tuple(value) if isinstance(value, list) else value
    return (*entries, _UNIFORM) if isinstance(entries, tuple) and len(entries) == 2 else entries


def _without_plain_shift(value: tuple[int, int, float]) -> list[Any]:
    """As recipes have it: the shift only where it is one."""
    return list(value[:2] if value[2] == _UNIFORM else value)


def _bound(place: int) -> Put:
    """An earlier key that is the lowest or highest index."""

    def put(value: Any, earlier: Any) -> Any:
        entries = entry(place, len(value) if isinstance(value, list | tuple) else 2)(value, earlier)
        return entries[:2] if entries[2:] == [_UNIFORM] else entries

    return put


LevelRange = Annotated[
    tuple[LevelIndex, LevelIndex, Annotated[float, Field(gt=0)]],
    BeforeValidator(_with_shift),
    PlainSerializer(_without_plain_shift),
]


class LossSettings(Tree):
    """Terms and their weights; a weight of 0 leaves the term out of the run."""

    distribution_matching_weight: NonNegative = Field(1.0, description="weight of distribution matching")
    level_indices: LevelRange = Field(
        (20, 980, _UNIFORM),
        description="lowest and highest grid index of distribution matching, both included, and a shift s: the share f of that range, drawn "
        "uniformly (1, or left out), becomes s f / (1 + (s - 1) f), above 1 noisier; grids of flow models have their teacher's shift already",
    )
    divergence: Divergence = Field(
        "reverse_kl",
        description="what distribution matching makes smaller: reverse_kl is DMD; the others weigh each sample by the discriminator's ratio",
    )
    gan_weights: tuple[NonNegative, NonNegative] = Field(
        (0.0, 0.0),
        description="weights of the generator's GAN loss and of the discriminator's loss (published for ImageNet-64: 3e-3 and 1e-2)",
    )
    gan_levels: GanLevels = Field(
        999,
        description="highest grid index of the GAN's noise, from 0 on; -1: no noise, the GAN sees clean images; "
        "shared: the noisy images that the scores read, in fewer operations",
    )
    gan_taps: tuple[Depth, ...] = Field(
        PUBLISHED_TAPS,
        description="relative depths of the fake score's features that the discriminator reads, rising: 0.5 is the published one, a U-Net's "
        "bottleneck or a transformer's middle block, 1 the last block; several have a light head each",
    )
    regression_weight: NonNegative = Field(0.0, description="weight of DMD's regression on noise-image pairs")
    lpips_files: tuple[str, ...] = Field(
        (),
        description="the regression's distance is LPIPS with these: VGG16 state dict (vgg16-397923af.pth), LPIPS v0.1 heads "
        "(vgg.pth) and, for latents, a VAE that decodes them (e.g. a folder of TAESD) if not the teacher's; empty: pixels",
    )

    earlier: ClassVar[dict[str, Earlier]] = {
        "min_level_index": Earlier("level_indices", _bound(0)),
        "max_level_index": Earlier("level_indices", _bound(1)),
        "gan_generator_weight": Earlier("gan_weights", entry(0, 2)),
        "gan_discriminator_weight": Earlier("gan_weights", entry(1, 2)),
        "gan_max_level_index": Earlier("gan_levels"),
    }

    @property
    def gan_generator_weight(self) -> float:
        """Of the generator's GAN loss."""
        return self.gan_weights[0]

    @property
    def gan_discriminator_weight(self) -> float:
        """Of the discriminator's loss."""
        return self.gan_weights[1]

    @property
    def min_level_index(self) -> int:
        """Lowest grid index of distribution matching."""
        return self.level_indices[0]

    @property
    def max_level_index(self) -> int:
        """Highest grid index of distribution matching, included."""
        return self.level_indices[1]

    @property
    def level_shift(self) -> float:
        """How levels of distribution matching are drawn: 1 uniformly, above 1 noisy ones more often."""
        return self.level_indices[2]

    @property
    def gan_max_level_index(self) -> int:
        """Highest grid index of the GAN's own noise; -1: none."""
        return 999 if self.gan_levels == "shared" else self.gan_levels

    @property
    def regression_distance(self) -> str:
        """pixel or lpips."""
        return "lpips" if self.lpips_files else "pixel"

    @property
    def vgg_weights(self) -> str:
        """VGG16 state dict, empty without LPIPS."""
        return self.lpips_files[0] if self.lpips_files else ""

    @property
    def lpips_weights(self) -> str:
        """LPIPS heads, empty without LPIPS."""
        return self.lpips_files[1] if self.lpips_files else ""

    @property
    def regression_autoencoder(self) -> str:
        """VAE that decodes latents for LPIPS; empty: the teacher's."""
        return self.lpips_files[2] if len(self.lpips_files) > 2 else ""

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """LPIPS had four settings."""
        return _renewed_lpips(values, under)

    def impossible(self) -> str:
        """What does not go together, or nothing."""
        if not (self.distribution_matching_weight or self.gan_generator_weight or self.regression_weight):
            return (
                "losses.distribution_matching_weight, losses.regression_weight and the first of losses.gan_weights "
                "are all 0: the generator has nothing to learn from"
            )
        if self.gan_generator_weight and not self.gan_discriminator_weight:
            return (
                f"losses.gan_weights={list(self.gan_weights)}: the generator's is set but the discriminator's is 0, and an "
                "untrained discriminator teaches nothing; set both (published: [3e-3, 1e-2])"
            )
        if self.gan_levels == "shared" and not self.gan_discriminator_weight:
            return "losses.gan_levels='shared' and there is no GAN: set losses.gan_weights (published: [3e-3, 1e-2])"
        if self.gan_levels == "shared" and self.gan_generator_weight and not self.distribution_matching_weight:
            return "losses.gan_levels='shared' shares distribution matching's noisy images, whose weight is 0"
        if reason := self._impossible_taps():
            return reason
        if self.min_level_index > self.max_level_index:
            return f"losses.level_indices={[self.min_level_index, self.max_level_index]}: the lowest comes first"
        if self.divergence != "reverse_kl":
            if not self.distribution_matching_weight:
                return f"losses.divergence={self.divergence!r} weighs distribution matching, whose weight is 0"
            if not self.gan_discriminator_weight:
                return (
                    f"losses.divergence={self.divergence!r} reads the discriminator's ratio and there is none: set "
                    "losses.gan_weights (published: [3e-3, 1e-2])"
                )
            if self.gan_max_level_index < self.max_level_index:
                return (
                    f"losses.divergence={self.divergence!r} reads the discriminator at levels up to {self.max_level_index} "
                    f"and it is trained up to losses.gan_levels={self.gan_levels}: raise that"
                )
        if self.lpips_files and len(self.lpips_files) not in (2, 3):
            return (
                f"losses.lpips_files={list(self.lpips_files)} must name two files, VGG16 and the LPIPS heads (and a VAE "
                "where one is wanted); empty compares pixels and needs no file"
            )
        return ""

    def _impossible_taps(self) -> str:
        taps = list(self.gan_taps)
        if not taps or taps != sorted(set(taps)):
            return f"losses.gan_taps={taps} must be depths above 0 and up to 1, rising, at least one, e.g. [0.5] or [0.5, 0.75, 1.0]"
        if self.gan_taps != PUBLISHED_TAPS and not self.gan_discriminator_weight:
            return f"losses.gan_taps={taps} are read by the discriminator and there is none: set losses.gan_weights (published: [3e-3, 1e-2])"
        return ""


def _renewed_lpips(values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    files = ("vgg_weights", "lpips_weights", "regression_autoencoder")
    old = ("regression_distance", *files)
    if not set(old) & values.keys():
        return values
    kept = {key: value for key, value in values.items() if key not in old}
    distance, named = values.get("regression_distance", "pixel"), [values.get(key, "") for key in files]
    if distance not in ("pixel", "lpips"):
        raise UserError(
            f"losses.regression_distance={distance!r}: set losses.lpips_files, or leave it empty for pixels"
        )
    if distance == "pixel" or not (all(named[:2]) or (under | values).get("regression_weight")):
        return kept
    if "lpips_files" in values:
        raise UserError("losses.lpips_files is all there is to set for LPIPS: leave out losses.regression_distance")
    for key, value in zip(files[:2], named, strict=False):
        if not value:
            raise UserError(
                f"losses.regression_distance='lpips' needs losses.{key}; today both are one setting, losses.lpips_files; "
                "losses.regression_distance='pixel' needs no file"
            )
    return {**kept, "lpips_files": [name for name in named if name]}
