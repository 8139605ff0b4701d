"""The EDM U-Nets (ADM and Song families) under their own parameter names, so that released weights load unchanged.

Both families are one residual block and one encoder-decoder walk; `EDMUNetConfig` holds what differs. Shapes and
key names follow Karras et al. 2022 (arXiv:2206.00364), section 7 of the method notes lists them.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Family = Literal["adm", "song"]


@dataclass(frozen=True)
class EDMUNetConfig:
    """Shape of one EDM network; field names are those of the EDM checkpoints where they have one.

    `fold` is ours: the network works on fold x fold pixels folded into channels, at resolution
    `img_resolution // fold`, which makes small-image networks several times cheaper. Released networks have 1.
    """

    family: Family
    img_resolution: int
    img_channels: int
    label_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    augment_dim: int = 0
    embedding_type: Literal["positional", "fourier"] = "positional"
    encoder_type: Literal["standard", "residual"] = "standard"
    channel_mult_noise: int = 1
    resample_filter: tuple[int, ...] = (1, 1)
    fold: int = 1

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            values = tuple(getattr(self, name))
            if not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"network.{name}={str(list(values))[:60]} must be numbers")
            object.__setattr__(self, name, values)
        smallest = 2 ** (len(self.channel_mult) - 1) * self.fold
        if self.img_resolution % smallest:
            raise ValueError(
                f"network.img_resolution={self.img_resolution} must be a multiple of {smallest}: "
                f"{len(self.channel_mult)} levels and fold={self.fold} halve it that often"
            )
        if self.family == "adm" and self.encoder_type == "residual":
            raise ValueError("network.encoder_type='residual' exists only in the 'song' family")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EDMUNetConfig":
        """Build from a plain dict as written by `to_dict`; unknown names raise ValueError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown network settings {unknown}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict, the inverse of `from_dict`."""
        return asdict(self)


class Resample(nn.Module):
    """A convolution (kernel 0: none) with an optional exact 2x resampling before it."""

    resample_filter: Tensor

    def __init__(
        self, cin: int, cout: int, kernel: int, *, up: bool = False, down: bool = False,
        taps: tuple[int, ...] = (1, 1), fused: bool = False, init_scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.up, self.down, self.fused, self.box = up, down, fused, taps == (1, 1)
        self.cin, self.padding, self.filter_padding = cin, kernel // 2, (len(taps) - 1) // 2
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            limit = math.sqrt(3 / (cin * kernel**2)) * init_scale  # unit gain for unit input
            self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel).uniform_(-limit, limit))
            self.bias = nn.Parameter(torch.zeros(cout))
        if up or down:
            line = torch.tensor(taps, dtype=torch.float32)
            outer = torch.outer(line, line)
            self.register_buffer("resample_filter", (outer / outer.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        # the auxiliary path of NCSN++ convolves first, then filters with stride 2 and no further padding
        if self.fused and self.weight is not None:
            x = F.conv2d(x, self.weight, padding=self.padding + self.filter_padding)
            x = F.conv2d(x, self._filter(x, x.shape[1]), stride=2, groups=x.shape[1])
            return x if self.bias is None else x + self.bias.to(x.dtype)[None, :, None, None]
        if self.up:
            x = self._upsample(x)
        if self.down:
            x = self._downsample(x)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.box:  # the [1, 1] filter is nearest doubling, which needs no arithmetic
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv_transpose2d(
            x, self._filter(x, self.cin) * 4, stride=2, padding=self.filter_padding, groups=self.cin
        )

    def _downsample(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._filter(x, self.cin), stride=2, padding=self.filter_padding, groups=self.cin)

    def _filter(self, x: Tensor, channels: int) -> Tensor:
        return self.resample_filter.to(x.dtype).repeat(channels, 1, 1, 1)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with EDM's group count, min(32, C // 4), or the next smaller divisor for widths EDM never had."""
    groups = next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


class UNetBlock(nn.Module):
    """EDM's residual block with an embedding, optional resampling and optional self-attention.

    Source: Karras et al. 2022, appendix F. ADM modulates with scale and shift, Song only shifts.
    """

    def __init__(
        self, config: EDMUNetConfig, cin: int, cout: int, *, up: bool = False, down: bool = False,
        attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        adm = config.family == "adm"
        eps = 1e-5 if adm else 1e-6
        emb = config.model_channels * config.channel_mult_emb
        self.out_channels, self.attention, self.scale_and_shift = cout, attention, adm
        self.heads = max(1, cout // 64) if adm else 1
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.dropout = config.dropout
        taps = config.resample_filter
        self.norm0 = group_norm(cin, eps)
        self.conv0 = Resample(cin, cout, 3, up=up, down=down, taps=taps)
        self.affine = nn.Linear(emb, cout * (2 if adm else 1))
        self.norm1 = group_norm(cout, eps)
        self.conv1 = Resample(cout, cout, 3, init_scale=1e-5)
        self.skip: Resample | None = None
        if cin != cout or up or down:
            project = cin != cout or not adm
            self.skip = Resample(cin, cout, 1 if project else 0, up=up, down=down, taps=taps)
        if attention:
            self.norm2 = group_norm(cout, eps)
            self.qkv = Resample(cout, cout * 3, 1)
            self.proj = Resample(cout, cout, 1, init_scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, cin, H, W) and the embedding (B, E) to (B, cout, H', W')."""
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.scale_and_shift:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + params))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        h = self.conv1(h)
        x = self._scaled(h + (x if self.skip is None else self.skip(x)))
        return self._attend(x) if self.attention else x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1 else x * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # qkv channels are head-major, then channel, then (q, k, v) innermost
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        # contiguous: the fused kernels want the channels of a position next to each other, and fall back silently otherwise
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        a = F.scaled_dot_product_attention(q, k, v)
        a = a.transpose(2, 3).reshape(batch, channels, height, width)
        return self._scaled(self.proj(a) + x)


class NoiseEmbedding(nn.Module):
    """Sinusoidal (positional) or random-frequency (fourier) features of c_noise, (B,) -> (B, channels)."""

    freqs: Tensor

    def __init__(self, config: EDMUNetConfig) -> None:
        super().__init__()
        self.channels = config.model_channels * config.channel_mult_noise
        self.fourier = config.embedding_type == "fourier"
        self.sin_first = config.family == "song"
        half = self.channels // 2
        if self.fourier:
            self.register_buffer("freqs", torch.randn(half) * 16)
        else:
            self.denominator = half - 1 if self.sin_first else half

    def forward(self, c_noise: Tensor) -> Tensor:
        if self.fourier:
            freqs = self.freqs.to(c_noise.dtype) * (2 * math.pi)
        else:
            steps = torch.arange(self.channels // 2, dtype=c_noise.dtype, device=c_noise.device)
            freqs = (1 / 10000) ** (steps / self.denominator)
        angle = torch.outer(c_noise, freqs)
        pair = [angle.sin(), angle.cos()] if self.sin_first else [angle.cos(), angle.sin()]
        return torch.cat(pair, dim=1)


class EDMUNet(nn.Module):
    """The raw network F(c_in x, c_noise, labels) of EDM preconditioning, ADM or Song family.

    Keys equal those of EDM checkpoints below their `model.` prefix. Output and features leave one forward, which stops at
    the deepest feature where the output is not asked for.

    Attributes:
        tap_shapes: (C, H, W) of the features: what each entry of the encoder gives on to the decoder, then each block of that.
        middle: number of the bottleneck among them, the last entry of the encoder.
    """

    def __init__(self, config: EDMUNetConfig) -> None:
        super().__init__()
        self.config = config
        song = config.family == "song"
        emb = config.model_channels * config.channel_mult_emb
        noise_channels = config.model_channels * config.channel_mult_noise
        self.map_noise = NoiseEmbedding(config)
        if config.label_dim:
            self.map_label = nn.Linear(config.label_dim, noise_channels if song else emb, bias=song)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.checkpoint: Callable[..., Tensor] | None = None
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        width, skips = self._build_encoder(config)
        self.middle = len(skips) - 1
        self._build_decoder(config, width, list(skips))
        self.tap_shapes = self._find_tap_shapes(skips)

    def _build_encoder(self, config: EDMUNetConfig) -> tuple[int, list[int]]:
        song, top = config.family == "song", config.img_resolution // config.fold
        channels = config.img_channels * config.fold**2
        width = config.model_channels * (1 if song else config.channel_mult[0])
        aux_width, skips = channels, [width]
        for level, mult in enumerate(config.channel_mult):
            res = top >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Resample(channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(config, width, width, down=True)
                skips.append(width)
                if config.encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Resample(
                        aux_width, width, 3, down=True, taps=config.resample_filter, fused=True
                    )
                    aux_width = width
            for index in range(config.num_blocks):
                cin, width = width, config.model_channels * mult
                self.enc[f"{res}x{res}_block{index}"] = UNetBlock(
                    config, cin, width, attention=res in config.attn_resolutions
                )
                skips.append(width)
        return width, skips

    def _build_decoder(self, config: EDMUNetConfig, width: int, skips: list[int]) -> None:
        song, top = config.family == "song", config.img_resolution // config.fold
        channels = config.img_channels * config.fold**2
        for level in reversed(range(len(config.channel_mult))):
            res = top >> level
            if level == len(config.channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(config, width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(config, width, width)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(config, width, width, up=True)
            for index in range(config.num_blocks + 1):
                cin, width = width + skips.pop(), config.model_channels * config.channel_mult[level]
                attention = res in config.attn_resolutions and (not song or index == config.num_blocks)
                self.dec[f"{res}x{res}_block{index}"] = UNetBlock(config, cin, width, attention=attention)
        if song:
            self.dec[f"{top}x{top}_aux_norm"] = group_norm(width, 1e-6)
            self.dec[f"{top}x{top}_aux_conv"] = Resample(width, channels, 3, init_scale=1e-5)
        else:
            self.out_norm = group_norm(width, 1e-5)
            self.out_conv = Resample(width, channels, 3, init_scale=1e-5)

    def _find_tap_shapes(self, encoder_widths: list[int]) -> tuple[tuple[int, int, int], ...]:
        kept = [name for name in self.enc if not name.endswith("_aux_residual")]
        made = list(zip(kept, encoder_widths, strict=True))
        made += [(name, block.out_channels) for name, block in self.dec.items() if isinstance(block, UNetBlock)]
        sides = [int(name.partition("x")[0]) for name, _ in made]
        return tuple((width, side, side) for (_, width), side in zip(made, sides, strict=True))

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None,
        want: Literal["output", "features", "both"] = "output", taps: tuple[int, ...] = (),
    ) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """Run the encoder and the decoder, or as far as the deepest feature where only features are wanted.

        Args:
            x: c_in-scaled noisy images, (B, C, H, W).
            c_noise: ln(sigma) / 4, (B,).
            class_labels: one-hot rows (B, label_dim), zeros for unconditional; None means zeros.
            want: which of (output (B, C, H, W), features (B, C', H', W')) to compute; the other is None, or empty.
            taps: numbers of the features, rising; none: the bottleneck.
        """
        taps = () if want == "output" else taps or (self.middle,)
        last = taps[-1] if want == "features" else len(self.tap_shapes)
        emb = self._embed(c_noise.to(x.dtype), class_labels)
        if self.config.fold > 1:
            x = F.pixel_unshuffle(x, self.config.fold)
        skips: list[Tensor] = []
        aux = x
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + module(aux)) * math.sqrt(0.5)
                continue
            if len(skips) > last:
                break
            x = self._run(module, x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        features = [skips[tap] for tap in taps if tap <= self.middle]
        if last <= self.middle:
            return None, features
        decoder = [(name, block) for name, block in self.dec.items() if isinstance(block, UNetBlock)]
        for place, (name, block) in enumerate(decoder, self.middle + 1):
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, emb)
            if place in taps:
                features.append(x)
            if place == last:
                return None, features
        return self._output(x), features

    def blocks(self) -> list[nn.Module]:
        """The residual blocks in the order they are called."""
        return [module for part in (self.enc, self.dec) for module in part.values() if isinstance(module, UNetBlock)]

    def _run(self, block: UNetBlock, x: Tensor, emb: Tensor) -> Tensor:
        """One block; with `checkpoint` set its activations are recomputed in the backward pass."""
        if self.checkpoint is None or not torch.is_grad_enabled():
            output: Tensor = block(x, emb)
            return output
        return self.checkpoint(block, x, emb)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        song = self.config.family == "song"
        emb = self.map_noise(c_noise)
        label: Tensor | float = 0.0
        if self.config.label_dim and class_labels is not None:
            label = self.map_label(class_labels * (math.sqrt(self.config.label_dim) if song else 1.0))
        elif self.config.label_dim and song:
            label = self.map_label.bias  # zeros as labels still pass the bias
        if song:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb + label))))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))) + label)

    def _output(self, x: Tensor) -> Tensor:
        if self.config.family == "song":
            top = self.config.img_resolution // self.config.fold
            norm, conv = self.dec[f"{top}x{top}_aux_norm"], self.dec[f"{top}x{top}_aux_conv"]
        else:
            norm, conv = self.out_norm, self.out_conv
        x = conv(F.silu(norm(x)))
        return F.pixel_shuffle(x, self.config.fold) if self.config.fold > 1 else x
