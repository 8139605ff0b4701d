"""Small models, pictures and golden tensors that many tests share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep import devices
from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import build_network_config
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.formats.model_folder import ModelCard, write_model_folder

GOLDEN = Path(__file__).parent / "golden"


END_TO_END = (
    "app/", "benchmarks/", "demos/", "examples/", "export/", "identity/", "cli/test_sample.py", "cli/test_text.py",
    "distillation/test_text_parity.py", "estimate/test_describe.py", "estimate/test_memory.py", "models/test_text_models.py", "networks/test_untrained.py", "preparation/test_conversion.py",
    "training/test_bad_input.py", "training/test_build.py", "training/test_generator_job.py", "training/test_micro_batches.py", "training/test_resume.py", "training/test_stability.py",
    "training/test_start_from_checkpoints.py", "training/test_text_training.py",
)  # fmt: skip
"""Folders and files of `slow` tests; other files mark theirs one by one."""

FAST = "not slow and not long"  # `make test-fast`


def is_end_to_end(path: Path) -> bool:
    """A file, or a folder, of `slow` tests only."""
    place = path.relative_to(Path(__file__).parent).as_posix()
    return f"{place}/".startswith(END_TO_END) or place.startswith(END_TO_END)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not even import what it leaves out: gradio, diffusers' pipelines and others, in each process."""
    return True if config.getoption("markexpr") == FAST and is_end_to_end(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out, before anything is left out."""
    for item in items:
        if is_end_to_end(item.path):
            item.add_marker(pytest.mark.slow)


def golden_denoiser(family: str) -> tuple[EDMDenoiser, dict[str, torch.Tensor]]:
    """One golden network with its tensors."""
    values = json.loads((GOLDEN / "edm_networks.json").read_text())[family]
    kind = {"DhariwalUNet": "adm", "SongUNet": "song"}[values.pop("model_type")]
    sigma_data = values.pop("sigma_data")
    values.pop("decoder_type", None)
    denoiser = EDMDenoiser(EDMUNetConfig(family=kind, **values), sigma_data)
    tensors = load_file(GOLDEN / f"edm_{family}.safetensors")
    weights = {k.removeprefix("weights."): v.float() for k, v in tensors.items() if k.startswith("weights.")}
    denoiser.load_state_dict(weights)
    return denoiser.eval(), tensors


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|, the measure of the golden tolerances."""
    return float((actual.detach().double() - expected.double()).abs().max() / expected.double().abs().max())


def tiny_denoiser(num_classes: int = 4, channels: int = 1, resolution: int = 16, seed: int = 0) -> EDMDenoiser:
    """A network of a few thousand parameters whose output depends on everything it is given."""
    torch.manual_seed(seed)
    config = build_network_config("tiny", img_resolution=resolution, img_channels=channels, label_dim=num_classes)
    denoiser = EDMDenoiser(config)
    with torch.no_grad():  # the zero-like starts of real training would hide wrong gradients
        for name, parameter in denoiser.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "out_conv.weight")):
                parameter.normal_(0, 0.05)
    return denoiser.eval()


def write_pictures(folder: Path, count: int = 24, classes: int = 4, size: int = 16, channels: int = 1) -> Path:
    """An imagefolder: `classes` folders of PNG pictures whose brightness depends on the class."""
    generator = np.random.default_rng(0)
    for number in range(count):
        label = number % classes
        shape = (size, size) if channels == 1 else (size, size, 3)
        pixels = np.clip(generator.normal(60 + 40 * label, 25, shape), 0, 255).astype(np.uint8)
        place = folder / "train" / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    denoiser = tiny_denoiser()
    card = ModelCard(role="teacher", class_names=tuple(f"class{i}" for i in range(4)), can_be_guided=True)
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def few_teacher_steps() -> Iterator[None]:
    """Teachers in diffusers folders usually take 50 guided steps; 4 where the subject is something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusersFamily, "default_num_steps", 4)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny networks are fastest so, one test runner to a core; a run that asks for more threads leaves them behind."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _the_same_precision_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is fp32 in tests, whatever the processor likes: never slow, the same numbers and lines on every machine."""
    if not request.node.get_closest_marker("real_precision"):
        monkeypatch.setattr(devices, "_fast_precision", lambda device: ("fp32", ""))
        monkeypatch.setattr(devices, "_slow_warning", lambda name, device: "")


@pytest.fixture(autouse=True)
def _isolated_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept in, or read from, the cache folder of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
