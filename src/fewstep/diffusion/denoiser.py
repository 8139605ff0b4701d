"""The one contract every diffusion model meets here: noisy images in, an x0 estimate out."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.per_sample import twice
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.errors import UserError

Want = Literal["x0", "features", "both"]
Checkpoint = Callable[..., Any]  # (block, *inputs) -> its output, recomputed in the backward pass


class DenoiserOutput(NamedTuple):
    """What one forward returns: either or both of the two, the other is None."""

    x0: Tensor | None
    features: tuple[Tensor, ...] | None


class Denoiser(nn.Module):
    """A network with its noise schedule and its parameterisation hidden.

    Subclasses implement `forward`, `denoising_weight` and `blocks`. Both outputs leave the one `forward`, because wrappers
    (sharding, compilation, checkpointing) only see that call. How a network is parameterised (EDM
    preconditioning, epsilon, v, flow) is known in its subclass and nowhere else.

    Attributes:
        noise_schedule: alpha(level), sigma(level) and the training grid, owned by the model.
        image_shape: of one x0 in the model's own space.
        num_classes: number of class labels the model is conditioned on, 0 for none.
        tap_shapes: (C, H, W) of one feature at each place where a discriminator can read, in the order that `forward` reaches them.
        middle: number of the published place among them: a U-Net's bottleneck, a transformer's middle block.
        chosen_taps: numbers of the places whose features `forward` returns, rising; none: the published one (`taps`).
        compute_dtype: precision inside the network (float32, bfloat16 or float16); everything outside is float32.
        lora_targets: names of the layers that get a LoRA unless told otherwise; empty: none are known.
        guidance_norm_cap: the guided prediction's norm is at most this times the conditional one's, where the network can say
            what it predicts; 0: no limit.
        has_guidance_norm: whether it can.
    """

    noise_schedule: NoiseSchedule
    image_shape: tuple[int, ...]
    num_classes: int
    tap_shapes: tuple[tuple[int, ...], ...]
    middle: int
    chosen_taps: tuple[int, ...] = ()
    compute_dtype: torch.dtype
    lora_targets: tuple[str, ...] = ()
    guidance_norm_cap: float = 0.0
    has_guidance_norm: bool = False

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        """Estimate x0 and/or return the features at `taps`.

        Args:
            noisy: alpha(level) x0 + sigma(level) noise, (B, ...), in the model's own units. float32; in float64 the x0 comes
                in float64 too: what the network sees is the same, nothing after it is rounded.
            level: the schedule's own noise coordinate, (B,).
            condition: B conditions.
            want: "features" alone stops at the deepest of them.
        """
        raise NotImplementedError("a Denoiser subclass implements forward")

    def denoising_weight(self, level: Tensor) -> Tensor:
        """Weight (B,) that turns the squared x0 error at `level` into the model's native training loss."""
        raise NotImplementedError("a Denoiser subclass implements denoising_weight")

    def denoise(self, noisy: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """The x0 estimate, (B, ...), of `noisy`'s dtype."""
        x0 = self(noisy, level, condition, "x0").x0
        assert x0 is not None
        return x0

    def features(self, noisy: Tensor, level: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """The features at `taps`, (B, C, H, W) each; what lies behind the deepest is not run."""
        features = self(noisy, level, condition, "features").features
        assert features is not None
        return features

    @property
    def taps(self) -> tuple[int, ...]:
        """Numbers of the places that features are read at."""
        return self.chosen_taps or (self.middle,)

    @property
    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one feature at each of `taps`."""
        return tuple(self.tap_shapes[place] for place in self.taps)

    def tap_at(self, depths: Sequence[float]) -> None:
        """Read features at these depths, above 0 and up to 1, rising: 0.5 is the published place, 1 the last one (`place_at`).

        Raises:
            UserError: two of them are one place.
        """
        places = self.places_at(depths)
        for number in range(1, len(places)):
            if places[number] == places[number - 1]:
                raise UserError(
                    f"losses.gan_taps={list(depths)}: {depths[number - 1]:g} and {depths[number]:g} are one place of this network, whose "
                    f"features can be read at {len(self.tap_shapes)}; leave one out"
                )
        self.chosen_taps = places

    def places_at(self, depths: Sequence[float]) -> tuple[int, ...]:
        """Numbers of the places that depths mean."""
        return tuple(place_at(depth, len(self.tap_shapes), self.middle) for depth in depths)

    def reads(self, place: int, want: Want) -> bool:
        """Whether a forward takes the feature of the place that it has reached."""
        return want != "x0" and place in self.taps

    def is_deepest(self, place: int, want: Want) -> bool:
        """Whether nothing behind this place is wanted."""
        return want == "features" and place == self.taps[-1]

    def guide(
        self, unconditional: Tensor, conditional: Tensor, noisy: Tensor, level: Tensor, guidance_scale: float
    ) -> Tensor:
        """x0 (B, ...) under guidance, from the two branches' x0 at `noisy`: uncond + w (cond - uncond).

        Families whose pipelines form it otherwise say so here.
        """
        return unconditional + guidance_scale * (conditional - unconditional)

    def blocks(self) -> list[nn.Module]:
        """The blocks of layers that `forward` calls one after the other: what is recomputed, compiled and sharded."""
        raise NotImplementedError("a Denoiser subclass implements blocks")

    def sharded_parts(self) -> list[nn.Module]:
        """What many processes gather at once, inner modules before those around them: `blocks`, and their layers where they are large."""
        return self.blocks()

    def checkpoint_activations(self, checkpoint: Checkpoint | None = None) -> None:
        """Keep the inputs of `blocks` only and recompute the rest in the backward pass.

        Args:
            checkpoint: called as (block, *inputs) in every forward with gradients; the default is `plain_checkpoint`.
        """
        raise NotImplementedError("a Denoiser subclass implements checkpoint_activations")

    def compile_network(self) -> None:
        """Compile the network inside, in place (`torch.compile`), leaving names and state dict as they are."""
        raise NotImplementedError("a Denoiser subclass implements compile_network")

    def describe(self) -> dict[str, Any]:
        """JSON-able dict from which `families.registry.build_denoiser` makes the same network."""
        raise NotImplementedError("a Denoiser subclass implements describe")

    @property
    def base_network(self) -> "Denoiser":
        """The network itself; adapters answer with the one they sit on."""
        return self

    @property
    def own_prefix(self) -> str:
        """What the state dict puts before the names of `own_weights`."""
        return ""

    def own_weights(self) -> dict[str, Tensor]:
        """What a folder of this model stores, under the names that the tools of its family use."""
        return self.state_dict()

    def load_own_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `own_weights`; the names and shapes are the network's."""
        self.load_state_dict(weights)

    def check_size(self, height: int, width: int, factor: int) -> None:
        """Refuse pictures the network cannot make.

        Args:
            height, width: of the pictures, in pixels.
            factor: pixels a side of x0 stands for.

        Raises:
            UserError: another size than the network was built for.
        """
        own = tuple(side * factor for side in self.image_shape[-2:])
        if (height, width) != own:
            raise UserError(
                f"size {height}x{width}: this network was built for {own[0]}x{own[1]} alone; other sizes are for "
                "text-to-image models"
            )

    def add_noise(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """alpha(level) x0 + sigma(level) noise, per sample. x0, noise: (B, ...); level: (B,)."""
        return self.noise_schedule.add_noise(x0, noise, level)


def place_at(depth: float, num_places: int, middle: int) -> int:
    """Number of the place that a depth means: those up to the published one share the depths up to 0.5 evenly, the others the rest."""
    before, behind = middle + 1, num_places - middle - 1
    tiny = 1e-9  # of products that are whole numbers but for rounding
    if depth <= 0.5:
        return max(0, math.ceil(2 * depth * before - tiny) - 1)
    return middle + math.ceil((2 * depth - 1) * behind - tiny)


def plain_checkpoint(block: Callable[..., Any], *inputs: Any, random: bool = False) -> Any:
    """torch's non-reentrant activation checkpoint; random state is kept only where dropout needs it: in training, or `random`."""
    random = random or (isinstance(block, nn.Module) and block.training)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=random)


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on a device, nothing for float32. Shapes alone (the meta device) follow the CPU's autocast."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu" if device.type == "meta" else device.type, dtype)


def network_input(network: nn.Module, noisy: Tensor) -> Tensor:
    """What a network reads of `noisy` (B, ...): float64 only where its weights are."""
    if noisy.dtype != torch.float64 or next(network.parameters()).dtype == torch.float64:
        return noisy
    return noisy.float()


def guided_denoise(
    denoiser: Denoiser, noisy: Tensor, level: Tensor, condition: Condition, guidance_scale: float
) -> Tensor:
    """x0 estimate under guidance: uncond + w (cond - uncond), so w = 1 is plain conditional denoising (see `Denoiser.guide`).

    Both branches go through one forward of twice the batch; w = 1 costs a single plain forward.

    Args:
        denoiser: the teacher.
        noisy, level: as `Denoiser.denoise` takes them.
        condition: the condition of the guided branch.
        guidance_scale: w. Source: Ho & Salimans 2022 (arXiv:2207.12598); some papers write w + 1 for it.

    Returns:
        (B, ...), of `noisy`'s dtype.
    """
    if guidance_scale == 1:
        return denoiser.denoise(noisy, level, condition)
    both = Condition.cat([condition.unconditional(), condition])
    x0 = denoiser.denoise(twice(noisy), twice(level), both)
    unconditional, conditional = x0.chunk(2)
    return denoiser.base_network.guide(unconditional, conditional, noisy, level, guidance_scale)
