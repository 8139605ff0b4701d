from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.networks.perceptual import LPIPS, as_rgb, load_lpips, pixel_distance

Weights = dict[str, Tensor]

# VGG16 (Simonyan and Zisserman 2014, D): index in torchvision's `features`, channels in and out.
CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
CONVOLUTIONS |= {14: (256, 256), 17: (256, 512)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))
STAGES = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
HEADS = [64, 128, 256, 512, 512]


@pytest.fixture(scope="module")
def vgg() -> Weights:
    generator = torch.Generator().manual_seed(0)
    found: Weights = {}
    for index, (into, out) in CONVOLUTIONS.items():
        scale = (2 / (9 * into)) ** 0.5
        found[f"features.{index}.weight"] = scale * torch.randn(out, into, 3, 3, generator=generator)
        found[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return found | {"classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def heads() -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for i, n in enumerate(HEADS)}


@pytest.fixture(scope="module")
def files(vgg: Weights, heads: Weights, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    # As published: torch's container from before the zip, and parameters, not tensors, in the VGG16 file.
    parameters = {key: nn.Parameter(value) for key, value in vgg.items()}
    torch.save(parameters, folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    return folder / "vgg16-397923af.pth", folder / "vgg.pth"


@pytest.fixture(scope="module")
def lpips(files: tuple[Path, Path]) -> LPIPS:
    return load_lpips(*files, resize_to=None)


def pictures(seed: int, height: int = 32, width: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, height, width, generator=generator) * 2 - 1


def recomputed(vgg: Weights, heads: Weights, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS in float64, as the paper's eq. 1 reads, on the VGG16 of DMD's regression: with average pooling."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    x = (torch.cat([a, b]).double() - shift) / scale
    total = torch.zeros(len(a), dtype=torch.float64)
    for i, stage in enumerate(STAGES):
        if i:
            x = F.avg_pool2d(x, 2)  # DMD's regression and SDXL's warm-up; VGG16 itself has max pooling
        for index in stage:
            weight, bias = vgg[f"features.{index}.weight"].double(), vgg[f"features.{index}.bias"].double()
            x = F.conv2d(x, weight, bias, padding=1).clamp(min=0)
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        squared = (unit[: len(a)] - unit[len(a) :]) ** 2
        total += F.conv2d(squared, heads[f"lin{i}.model.1.weight"].double()).mean((1, 2, 3))
    return total


@pytest.mark.slow
def test_keys_and_sizes_are_the_published_ones(lpips: LPIPS, vgg: Weights, heads: Weights) -> None:
    state = lpips.state_dict()
    published = {key: value for key, value in vgg.items() if key.startswith("features.")}
    published |= {f"heads.{i}": heads[f"lin{i}.model.1.weight"] for i in range(5)}
    assert state.keys() == published.keys()
    assert all(torch.equal(state[key], value) for key, value in published.items())
    # 14,714,688 is the published size of VGG16 without its classifier.
    assert sum(parameter.numel() for parameter in lpips.parameters()) == 14_714_688 + 1472
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 17)])
def test_distance_against_a_float64_recomputation(
    lpips: LPIPS, vgg: Weights, heads: Weights, height: int, width: int
) -> None:
    a, b = pictures(2, height, width), pictures(3, height, width)
    found = lpips(a, b)
    assert (found.shape, found.dtype) == ((2,), torch.float32)
    torch.testing.assert_close(found.double(), recomputed(vgg, heads, a, b), rtol=1e-4, atol=0)
    torch.testing.assert_close(lpips(b, a), found)


@pytest.mark.slow
def test_small_images_are_enlarged_and_large_ones_left(files: tuple[Path, Path], lpips: LPIPS) -> None:
    enlarging = load_lpips(*files, resize_to=48)
    small = pictures(2, 24, 32), pictures(3, 24, 32)
    enlarged = [F.interpolate(x, (48, 64), mode="bilinear", align_corners=False) for x in small]
    torch.testing.assert_close(enlarging(*small), lpips(*enlarged))
    large = pictures(2, 52, 70), pictures(3, 52, 70)
    torch.testing.assert_close(enlarging(*large), lpips(*large))
    assert LPIPS().resize_to == 224


def test_identical_images_have_distance_and_gradient_zero(lpips: LPIPS) -> None:
    a = pictures(2).requires_grad_()
    distance = lpips(a, a.detach().clone())
    assert distance.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    assert torch.equal(gradient, torch.zeros_like(a))


@pytest.mark.parametrize("which", ["both", "first", "second"])
def test_gradient_is_finite_where_all_features_are_zero(vgg: Weights, which: str) -> None:
    model = LPIPS(resize_to=None)
    model.load_state_dict(vgg, strict=False)
    # With a bias this negative no ReLU of the first stage fires for dark images: every feature there is 0.
    model.state_dict()["features.0.bias"].fill_(-3.0)
    model.state_dict()["features.2.bias"].fill_(-1e-3)
    dark, bright = torch.zeros(1, 3, 32, 32), 40 * pictures(4, batch=1)
    a, b = {"both": (dark, dark.clone()), "first": (dark, bright), "second": (bright, dark)}[which]
    assert torch.count_nonzero(model.features[:4](dark)) == 0
    a.requires_grad_()
    # ReLU's backward would hide a NaN made above it; anomaly detection does not.
    with torch.autograd.set_detect_anomaly(True):
        distance = model(a, b)
        (gradient,) = torch.autograd.grad(distance.sum(), a)
    assert distance.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.slow
def test_gradient_and_second_derivative_are_the_finite_differences(files: tuple[Path, Path]) -> None:
    model = load_lpips(*files, resize_to=None).double()
    b, direction = pictures(6, 16, 16, batch=1).double(), pictures(7, 16, 16, batch=1).double()
    start = pictures(5, 16, 16, batch=1).double().requires_grad_()

    def slope(a: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model(a, b).sum(), a, create_graph=True)
        return (gradient * direction).sum()

    first = slope(start)
    (second,) = torch.autograd.grad(first, start)
    step = 1e-6
    ahead, behind = start + step * direction, start - step * direction
    difference = (model(ahead, b) - model(behind, b)).sum() / (2 * step)
    torch.testing.assert_close(first, difference, rtol=1e-5, atol=1e-10)
    curvature = (slope(ahead) - slope(behind)) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), curvature, rtol=1e-4, atol=1e-8)


def test_gradient_reaches_only_what_asks_for_it_and_repeats(lpips: LPIPS) -> None:
    a, b = pictures(2).requires_grad_(), pictures(3)
    for _ in range(2):
        a.grad = None
        lpips(a, b).sum().backward()
        assert a.grad is not None
        assert a.grad.abs().amax((1, 2, 3)).min() > 0
    assert b.grad is None
    assert all(parameter.grad is None for parameter in lpips.parameters())


def test_grey_is_repeated_and_half_precision_images_are_read(lpips: LPIPS) -> None:
    a, b = pictures(2, channels=1), pictures(3, channels=1)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    assert lpips(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_loading_draws_no_random_numbers(files: tuple[Path, Path]) -> None:
    before = torch.get_rng_state()
    load_lpips(*files)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_safetensors_are_read(vgg: Weights, heads: Weights, tmp_path: Path, lpips: LPIPS) -> None:
    save_file(vgg, tmp_path / "vgg.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    again = load_lpips(tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors", resize_to=None)
    assert torch.equal(again(pictures(2), pictures(3)), lpips(pictures(2), pictures(3)))


def test_images_that_cannot_be_compared_are_refused(lpips: LPIPS) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3, 32, 32\) and \(2, 3, 32, 16\)"):
        lpips(pictures(2), pictures(3, 32, 16))
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 15 x 32"):
        lpips(pictures(2, 15), pictures(3, 15))
    with pytest.raises(ValueError, match=r"floating-point images.*\(2, 4, 32, 32\)"):
        lpips(pictures(2, channels=4), pictures(3, channels=4))
    with pytest.raises(ValueError, match=r"floating-point images.*uint8"):
        as_rgb(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="resize_to=8 must be at least 16"):
        LPIPS(resize_to=8)


def test_missing_files_say_what_to_download(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file; VGG16 is read from vgg16-397923af\.pth"):
        load_lpips(tmp_path / "nowhere", files[1])
    with pytest.raises(ValueError, match=r"nowhere: no such file; .*heads.*v0\.1/vgg\.pth"):
        load_lpips(files[0], tmp_path / "nowhere")


def test_other_models_are_refused_by_key(files: tuple[Path, Path], heads: Weights, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not hold VGG16 \(.*26 missing \(e\.g\. features\.0\.weight.*24 more"
    ) as caught:
        load_lpips(files[1], files[0])
    assert "5 unexpected (e.g. lin0.model.1.weight, lin1.model.1.weight, and 3 more)" in str(caught.value)
    alex = tmp_path / "alex.pth"
    torch.save(heads | {"lin1.model.1.weight": torch.zeros(1, 192, 1, 1)}, alex)
    wrong = r"alex\.pth.*of another shape \(lin1\.model\.1\.weight \(1, 192, 1, 1\) for \(1, 128, 1, 1\)\)"
    with pytest.raises(ValueError, match=wrong):
        load_lpips(files[0], alex)


def test_pixel_distance_of_a_constant_and_of_a_checkerboard() -> None:
    zero = torch.zeros(2, 3, 16, 16)
    constant = torch.stack([torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), -1.0)])
    torch.testing.assert_close(pixel_distance(constant, zero), torch.tensor([0.25, 1.0]))
    # Alternating signs average to nothing at half size; alternating 2 x 2 squares only at quarter size.
    rows = torch.arange(16)
    fine = (-1.0) ** (rows[:, None] + rows)
    coarse = (-1.0) ** (rows[:, None] // 2 + rows // 2)
    boards = torch.stack([fine, coarse])[:, None]
    torch.testing.assert_close(pixel_distance(boards, torch.zeros(2, 1, 16, 16)), torch.tensor([1 / 3, 2 / 3]))


@pytest.mark.parametrize(("side", "num_scales"), [(2, 1), (7, 1), (8, 2), (15, 2), (16, 3), (64, 3)])
def test_pixel_distance_skips_scales_below_four_pixels(side: int, num_scales: int) -> None:
    fine = (-1.0) ** torch.arange(side).expand(1, 1, side, side)
    found = pixel_distance(fine, torch.zeros_like(fine))
    torch.testing.assert_close(found, torch.tensor([1 / num_scales]))


def test_pixel_distance_gradient_dtype_and_refusals() -> None:
    a, b = pictures(2).double().requires_grad_(), pictures(3).double()
    assert torch.autograd.gradcheck(pixel_distance, (a[:1, :1, :9, :9], b[:1, :1, :9, :9]))
    assert pixel_distance(b, b).tolist() == [0, 0]
    assert pixel_distance(b.bfloat16(), b.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3, 32, 32\) and \(1, 3, 32, 32\)"):
        pixel_distance(b, b[:1])
    with pytest.raises(ValueError, match=r"compares \(B, C, H, W\)"):
        pixel_distance(b[0], b[0])
