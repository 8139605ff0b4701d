import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.networks.inception import (
    InceptionV3Features,
    inception_state_dict_shapes,
    load_inception,
    resize_bilinear_tf1,
)

Weights = dict[str, Tensor]

# The paper's table, written out by hand, a convolution each: channels in, out, kernel height, width.
STEM = "3 32 3 3, 32 32 3 3, 32 64 3 3, 64 80 1 1, 80 192 3 3"
A = "{n} 64 1 1, {n} 48 1 1, 48 64 5 5, {n} 64 1 1, 64 96 3 3, 96 96 3 3, {n} {pool} 1 1"
B = "288 384 3 3, 288 64 1 1, 64 96 3 3, 96 96 3 3"
C = (
    "768 192 1 1, 768 {c} 1 1, {c} {c} 1 7, {c} 192 7 1, "
    "768 {c} 1 1, {c} {c} 7 1, {c} {c} 1 7, {c} {c} 7 1, {c} 192 1 7, 768 192 1 1"
)
D = "768 192 1 1, 192 320 3 3, 768 192 1 1, 192 192 1 7, 192 192 7 1, 192 192 3 3"
E = (
    "{n} 320 1 1, {n} 384 1 1, 384 384 1 3, 384 384 3 1, "
    "{n} 448 1 1, 448 384 3 3, 384 384 1 3, 384 384 3 1, {n} 192 1 1"
)
TABLE = [STEM, *(A.format(n=n, pool=pool) for n, pool in ((192, 32), (256, 64), (288, 64))), B]
TABLE += [*(C.format(c=c) for c in (128, 160, 160, 192)), D, E.format(n=1280), E.format(n=2048)]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random, scaled so that signals neither die nor explode, with variances that make eps matter."""
    generator = torch.Generator().manual_seed(0)
    found: Weights = {}
    for key, shape in inception_state_dict_shapes().items():
        value = torch.randn(shape, generator=generator)
        if key.endswith("conv.weight"):
            value *= (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            value = 0.05 + value.abs()
        found[key] = value
    return found


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def network(file: Path) -> InceptionV3Features:
    return load_inception(file)


def pictures(batch: int = 1, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_key_has_the_shape_of_the_papers_table() -> None:
    shapes = inception_state_dict_shapes()
    assert len(shapes) == 94 * 5 + 2
    kernels = [shape for key, shape in shapes.items() if key.endswith("conv.weight")]
    rows = [[int(number) for number in row.split()] for row in ", ".join(TABLE).split(", ")]
    assert kernels == [(out, into, height, width) for into, out, height, width in rows]
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3dbl_3.bn.running_var"] == (96,)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_6e.branch7x7dbl_5.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.bn.bias"] == (192,)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert (shapes["fc.weight"], shapes["fc.bias"]) == ((1008, 2048), (1008,))


def test_the_number_of_parameters_is_the_published_one() -> None:
    shapes = inception_state_dict_shapes()
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total == 23_885_392
    # Keras publishes 21,802,784 for its Inception v3 without the classifier, which has no batch-norm weights.
    gammas = sum(shape[0] for key, shape in shapes.items() if key.endswith("bn.weight"))
    assert total - gammas - 1008 * 2049 == 21_802_784


@pytest.mark.slow
def test_loading_restores_the_file_and_only_the_file(network: InceptionV3Features, weights: Weights) -> None:
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert {key for key in state if key not in weights} == {
        key.replace("running_var", "num_batches_tracked") for key in weights if key.endswith("running_var")
    }
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["old.pth", "new.safetensors"])
def test_other_containers_and_extra_entries_load(weights: Weights, tmp_path: Path, name: str) -> None:
    extra = {"AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1)}
    extra |= {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    path = tmp_path / name
    if name == "old.pth":  # the published files are older than torch's zip container
        torch.save(weights | extra, path, _use_new_zipfile_serialization=False)
    else:
        save_file(weights | extra, path)
    assert torch.equal(load_inception(path).fc.weight, weights["fc.weight"])


@pytest.mark.slow
def test_loading_draws_no_random_numbers(file: Path) -> None:
    before = torch.get_rng_state()
    load_inception(file)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_features(network: InceptionV3Features) -> None:
    images = pictures(2)
    features = network(images)
    assert (features.shape, features.dtype) == ((2, 2048), torch.float32)
    assert network.num_features == 2048
    assert features.isfinite().all()
    assert (features >= 0).all()
    assert (features[0] - features[1]).abs().max() > 1e-3
    # An image's features depend neither on its batch nor on what 8 bits cannot hold.
    eight_bits = ((images[:1] + 1) * 127.5).round() / 127.5 - 1
    for same in (images[:1], eight_bits + 0.003, eight_bits.double() - 0.003):
        torch.testing.assert_close(network(same), features[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_grey_is_repeated_and_values_are_clamped(network: InceptionV3Features) -> None:
    grey = pictures(channels=1) * 1.5
    assert torch.equal(network(grey), network(grey.clamp(-1, 1).repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 2, 32, 32), (1, 32, 32, 3)])
def test_other_shapes_are_refused(network: InceptionV3Features, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\)"):
        network(torch.zeros(shape))


def test_integer_images_are_refused(network: InceptionV3Features) -> None:
    with pytest.raises(ValueError, match=r"floating-point images.*uint8"):
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.slow
def test_input_scaling_is_that_of_the_graph(network: InceptionV3Features) -> None:
    seen: list[Tensor] = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1).expand(1, 3, 40, 40))
    hook.remove()
    assert seen[0].shape == (1, 3, 299, 299)
    assert seen[0].amin((0, 2, 3)).tolist() == seen[0].amax((0, 2, 3)).tolist()
    assert seen[0][0, :, 0, 0].tolist() == [(v - 128) / 128 for v in (0, 159, 255)]


def input_of_pool_branch(network: InceptionV3Features, block: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    conv = network.get_submodule(f"{block}.branch_pool")
    hook = conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.get_submodule(block)(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("block", "channels"), [("Mixed_5b", 192), ("Mixed_6c", 768), ("Mixed_7b", 1280)])
def test_average_pools_leave_the_padding_out(network: InceptionV3Features, block: str, channels: int) -> None:
    x = torch.randn(1, channels, 5, 4, generator=torch.Generator().manual_seed(2))
    pooled = input_of_pool_branch(network, block, x)
    for row, column in [(0, 0), (0, 2), (2, 3), (4, 3), (2, 1)]:
        window = x[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        torch.testing.assert_close(pooled[..., row, column], window.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_the_last_block_takes_the_maximum(network: InceptionV3Features) -> None:
    x = -torch.rand(1, 2048, 4, 4, generator=torch.Generator().manual_seed(3)) - 1
    pooled = input_of_pool_branch(network, "Mixed_7c", x)
    for row, column in [(0, 0), (1, 2), (3, 3)]:
        window = x[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert torch.equal(pooled[..., row, column], window.amax((2, 3)))


def reference(w: Weights, block: str, x: Tensor) -> Tensor:
    """The block once more in float64, written as one reads the paper's figures."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        def at(key: str) -> Tensor:
            return w[f"{block}.{name}.{key}"].double()

        kernel = at("conv.weight")
        padding = [side // 2 if stride == 1 else 0 for side in kernel.shape[2:]]
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, var, gamma, beta = (
            at(f"bn.{key}")[:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * gamma + beta).clamp(min=0)

    def chain(x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = conv(x, name)
        return x

    one = torch.ones_like(x)
    mean = 9 * F.avg_pool2d(x, 3, 1, 1) / (9 * F.avg_pool2d(one, 3, 1, 1))
    kind = block[6:]
    if kind.startswith("5"):
        double = chain(x, *(f"branch3x3dbl_{i}" for i in (1, 2, 3)))
        parts = [
            conv(x, "branch1x1"),
            chain(x, "branch5x5_1", "branch5x5_2"),
            double,
            conv(mean, "branch_pool"),
        ]
    elif kind == "6a":
        double = conv(chain(x, "branch3x3dbl_1", "branch3x3dbl_2"), "branch3x3dbl_3", 2)
        parts = [conv(x, "branch3x3", 2), double, F.max_pool2d(x, 3, 2)]
    elif kind.startswith("6"):
        sevens = chain(x, *(f"branch7x7_{i}" for i in range(1, 4)))
        double = chain(x, *(f"branch7x7dbl_{i}" for i in range(1, 6)))
        parts = [conv(x, "branch1x1"), sevens, double, conv(mean, "branch_pool")]
    elif kind == "7a":
        sevens = conv(chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3))), "branch7x7x3_4", 2)
        parts = [conv(conv(x, "branch3x3_1"), "branch3x3_2", 2), sevens, F.max_pool2d(x, 3, 2)]
    else:
        pool = mean if kind == "7b" else F.max_pool2d(x, 3, 1, 1)
        three, double = conv(x, "branch3x3_1"), chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        forks = [conv(three, "branch3x3_2a"), conv(three, "branch3x3_2b")]
        forks += [conv(double, "branch3x3dbl_3a"), conv(double, "branch3x3dbl_3b")]
        parts = [conv(x, "branch1x1"), *forks, conv(pool, "branch_pool")]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("block", ["5b", "5c", "5d", "6a", "6b", "6e", "7a", "7b", "7c"])
def test_blocks_against_an_independent_recomputation(
    network: InceptionV3Features, weights: Weights, block: str
) -> None:
    channels = {"5b": 192, "5c": 256, "5d": 288, "6a": 288, "7b": 1280, "7c": 2048}.get(block, 768)
    x = torch.randn(1, channels, 5, 7, generator=torch.Generator().manual_seed(4))
    expected = reference(weights, f"Mixed_{block}", x.double())
    found = network.get_submodule(f"Mixed_{block}")(x)
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * float(expected.max()), rtol=1e-3)


@pytest.mark.slow
def test_sizes_on_the_way_to_the_spatial_mean(network: InceptionV3Features) -> None:
    outputs: Weights = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output})

    hooks = [child.register_forward_hook(keep(name)) for name, child in network.named_children()]
    features = network(pictures())
    for hook in hooks:
        hook.remove()
    stem = {"Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147), "Conv2d_2b_3x3": (64, 147, 147)}
    stem |= {"Conv2d_3b_1x1": (80, 73, 73), "Conv2d_4a_3x3": (192, 71, 71)}
    mixed = {"Mixed_5b": (256, 35, 35), "Mixed_5c": (288, 35, 35), "Mixed_5d": (288, 35, 35)}
    mixed |= {f"Mixed_6{letter}": (768, 17, 17) for letter in "abcde"}
    mixed |= {"Mixed_7a": (1280, 8, 8), "Mixed_7b": (2048, 8, 8), "Mixed_7c": (2048, 8, 8)}
    assert {name: tuple(output.shape[1:]) for name, output in outputs.items()} == stem | mixed
    assert list(outputs) == [*stem, *mixed]
    torch.testing.assert_close(features, outputs["Mixed_7c"].mean((2, 3)))


def numpy_resize(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape
    out = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 23), (32, 32, 45), (19, 12, 8), (1, 3, 4), (6, 6, 6)])
def test_resize_against_an_explicit_loop(height: int, width: int, size: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    found = resize_bilinear_tf1(torch.from_numpy(image)[None, None], size)[0, 0].numpy()
    np.testing.assert_allclose(found, numpy_resize(image, size), rtol=0, atol=1e-10)


def test_resize_has_no_half_pixel_offset_and_repeats_the_border() -> None:
    ramp = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    assert resize_bilinear_tf1(ramp, 4)[0, 0, 0].tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("images", "size"),
    [
        (torch.zeros(3, 4, 4), 8),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8),
        (torch.zeros(1, 3, 4, 4), 0),
    ],
)
def test_resize_refuses_other_input(images: Tensor, size: int) -> None:
    with pytest.raises(ValueError, match="resize_bilinear_tf1 takes floating-point"):
        resize_bilinear_tf1(images, size)


def test_missing_file_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.pth: no such file; .*pt_inception-2015-12-05-6726825d\.pth"):
        load_inception(tmp_path / "nowhere.pth")


@pytest.mark.slow
def test_torchvisions_inception_is_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "inception_v3_google.pth"
    torch.save(weights | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=r"inception_v3_google.*fc\.weight \(1000, 2048\) for \(1008, 2048\)"):
        load_inception(path)


def test_another_model_is_refused_with_its_first_keys(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(ValueError, match=r"resnet\.pth does not hold FID's Inception") as caught:
        load_inception(path)
    assert "missing (e.g. Conv2d_1a_3x3.conv.weight, " in str(caught.value)
    assert "and 469 more)" in str(caught.value)
    assert "1 unexpected (conv1.weight)" in str(caught.value)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("code ran while reading weights",))


@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps(Harmful(), protocol=2)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_files_are_refused_and_run_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, suffix: str
) -> None:
    path = (tmp_path / "weights").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable|cannot be read|file is empty"):
        load_inception(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"fc.bias": torch.zeros(1008)}}])
def test_nested_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "nested.pth")
    with pytest.raises(
        ValueError, match=r"nested\.pth: not a readable torch weights file: it holds a list|does not hold"
    ):
        load_inception(tmp_path / "nested.pth")


@pytest.mark.slow
def test_the_network_survives_a_worker_process_boundary(network: InceptionV3Features) -> None:
    copy = pickle.loads(pickle.dumps(network))
    assert torch.equal(copy(pictures()), network(pictures()))
