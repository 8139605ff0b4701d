"""Named network shapes: the released EDM configurations and the small ones this library trains on a CPU."""

from typing import Any

from fewstep.families.edm.unet import EDMUNetConfig

# Released: ImageNet-64 (ADM), CIFAR-10, FFHQ-64 and AFHQv2-64 (Song), Karras et al. 2022.
# Ours: `small` for 32x32 pictures on a CPU (3 M parameters), `cifar10-small` a narrow DDPM++ on folded pixels,
# `imagenet64-narrow` for benchmarks, `tiny` for tests.
_SHAPES: dict[str, dict[str, Any]] = {
    "imagenet64-adm": {
        "family": "adm", "model_channels": 192, "channel_mult": (1, 2, 3, 4), "channel_mult_emb": 4,
        "num_blocks": 3, "attn_resolutions": (32, 16, 8),
    },
    "cifar10-ddpmpp": {
        "family": "song", "model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "dropout": 0.13, "augment_dim": 9,
    },
    "cifar10-ncsnpp": {
        "family": "song", "model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "dropout": 0.13, "augment_dim": 9, "embedding_type": "fourier",
        "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1),
    },
    "ffhq64-ddpmpp": {
        "family": "song", "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "dropout": 0.05, "augment_dim": 9,
    },
    "ffhq64-ncsnpp": {
        "family": "song", "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "dropout": 0.05, "augment_dim": 9, "embedding_type": "fourier",
        "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1),
    },
    "small": {
        "family": "adm", "model_channels": 32, "channel_mult": (1, 2, 4), "channel_mult_emb": 2,
        "num_blocks": 1, "attn_resolutions": (8,), "fold": 2,
    },
    "cifar10-small": {
        "family": "song", "model_channels": 64, "channel_mult": (1, 2, 2), "num_blocks": 1,
        "attn_resolutions": (8,), "fold": 2,
    },
    "imagenet64-narrow": {
        "family": "adm", "model_channels": 32, "channel_mult": (1, 2, 3, 4), "channel_mult_emb": 4,
        "num_blocks": 1, "attn_resolutions": (32, 16, 8),
    },
    "tiny": {
        "family": "adm", "model_channels": 16, "channel_mult": (1, 2), "channel_mult_emb": 2,
        "num_blocks": 1, "attn_resolutions": (4,), "fold": 2,
    },
}  # fmt: skip

# (resolution, channels, classes) of the pictures the released networks were trained on
_RELEASED_PICTURES = {
    "imagenet64-adm": (64, 3, 1000),
    "cifar10-ddpmpp": (32, 3, 10),
    "cifar10-ncsnpp": (32, 3, 10),
    "ffhq64-ddpmpp": (64, 3, 0),
    "ffhq64-ncsnpp": (64, 3, 0),
}


def released_descriptions() -> dict[str, dict[str, Any]]:
    """The released class-conditional (FFHQ: unconditional) networks, pictures included, by name."""
    descriptions = {}
    for name, (resolution, channels, classes) in _RELEASED_PICTURES.items():
        config = build_network_config(name, img_resolution=resolution, img_channels=channels, label_dim=classes)
        descriptions[name] = {"family": "edm", "sigma_data": 0.5, "network": config.to_dict()}
    return descriptions


def network_names() -> list[str]:
    """The names `build_network_config` knows."""
    return sorted(_SHAPES)


def build_network_config(name: str, *, img_resolution: int, img_channels: int, label_dim: int) -> EDMUNetConfig:
    """Shape `name` for pictures of this size and number of classes.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _SHAPES:
        raise ValueError(f"network.name={name!r} is unknown; choose one of {', '.join(network_names())}")
    return EDMUNetConfig(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, **_SHAPES[name])
