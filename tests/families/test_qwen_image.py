"""Qwen-Image behind the contract: its own pipeline's pictures, its own forward's numbers, native loss and bottleneck recomputed."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import sample_noise
from fewstep.errors import UserError
from fewstep.families.registry import build_released, family_named, recognise, single_file_layouts, unread_files
from fewstep.formats.kohya_lora import LoraWeights, read_lora, write_kohya_lora, write_peft_lora
from fewstep.formats.single_file import read_single_file
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, choose_targets
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import open_teacher
from tests.conftest import relative_error
from tests.tiny_flow_models import klein_tokens, tiny_qwen_image_folder

PROMPTS = ["red cat", "a dog that sleeps on a chair"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_image_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Model:
    return load_teacher(folder, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe: Any = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(teacher: Model, prompts: list[str] = PROMPTS) -> Condition:
    return teacher.conditioner.table(prompts, teacher.size).rows(torch.arange(len(prompts)))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "steps", "guidance"), [(None, 4, 1.0), (None, 5, 4.0), ((24, 8), 2, 2.5)])
def test_pictures_are_the_pipelines(
    teacher: Model, pipe: Any, size: tuple[int, int] | None, steps: int, guidance: float
) -> None:
    """Same noise, steps and guidance, each token rescaled; the shift goes by the tokens and ends at 0.02."""
    height, width = size or (16, 16)
    noise = sample_noise(teacher.denoiser, 0, 0, 2, torch.device("cpu"), shape=(4, height // 2, width // 2))
    theirs = pipe(
        prompt=list(PROMPTS), negative_prompt=[" "] * 2, num_inference_steps=steps, true_cfg_scale=guidance,
        latents=klein_tokens(noise), height=height, width=width, output_type="pt",
    ).images  # fmt: skip
    ours = teacher.sample(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, size=size, output="tensor", progress=False
    )
    assert (ours - (theirs * 2 - 1)).abs().max() < 1e-4
    assert ours.std() > 0.05


def test_guidance_keeps_the_norm_of_each_token(teacher: Model) -> None:
    """In float64: the direction is that of neg + w (pos - neg), the norm of each 2x2 patch's velocity that of pos."""
    torch.manual_seed(0)
    noisy, positive, negative = torch.randn(3, 2, 4, 8, 6, dtype=torch.float64)
    found = teacher.denoiser.guide(negative, positive, noisy, torch.tensor([0.5, 0.9]), 4.0)
    velocity, plain, strong = (
        klein_tokens(noisy - x0) for x0 in (found, positive, negative + 4 * (positive - negative))
    )
    torch.testing.assert_close(velocity.norm(dim=-1), plain.norm(dim=-1))
    torch.testing.assert_close(
        velocity / velocity.norm(dim=-1, keepdim=True), strong / strong.norm(dim=-1, keepdim=True)
    )
    still = teacher.denoiser.guide(noisy, noisy, noisy, torch.tensor([0.5, 0.9]), 4.0)
    assert torch.equal(still, noisy)  # no velocity, no direction


def test_a_norm_cap_below_one_still_holds(teacher: Model) -> None:
    torch.manual_seed(0)
    noisy, positive, negative = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    teacher.denoiser.guidance_norm_cap = 0.5
    try:
        found = teacher.denoiser.guide(negative, positive, noisy, torch.tensor([0.5, 0.9]), 4.0)
    finally:
        teacher.denoiser.guidance_norm_cap = 0.0
    norms = [(noisy - x0).flatten(1).norm(dim=1) for x0 in (found, positive)]
    torch.testing.assert_close(norms[0], 0.5 * norms[1])


def their_forward(network: Any, noisy: Tensor, level: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Its own forward over packed tokens in float64, and the image tokens after the middle block as maps."""
    seen: list[Tensor] = []
    hook = network.transformer_blocks[1].register_forward_hook(lambda *call: seen.append(call[2][1]))
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    text, length = condition["text"], condition["text_length"]
    mask = torch.stack([torch.arange(text.shape[1]) < count for count in length])
    with torch.no_grad():
        raw = network(
            klein_tokens(noisy), text, mask, level, [[(1, height, width)]] * len(noisy), return_dict=False
        )[0]  # fmt: skip
    hook.remove()
    tokens = seen[0]
    maps = torch.stack([torch.stack([tokens[:, y * width + x] for x in range(width)], -1) for y in range(height)], 2)
    unpacked = QwenImagePipeline._unpack_latents(raw, 4 * height, 4 * width, 2)
    return unpacked.squeeze(2), maps


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_x0_native_loss_and_bottleneck_recomputed(folder: Path, teacher: Model, shape: tuple[int, int]) -> None:
    """v = raw, x0 = noisy - sigma v, loss mse(v, noise - x0); three rows of patches are counted from their middle too."""
    denoiser: Any = recognise(folder).load(folder)
    denoiser.eval().double()
    condition = conditions(teacher)
    assert condition["text_length"][0] < condition["text_length"][1] == condition["text"].shape[1]
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, *shape, dtype=torch.float64)
    level = torch.tensor([0.9, 0.2], dtype=torch.float64)
    sigma = level.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * clean + sigma * noise
    double = Condition(2, {"text": condition["text"].double(), "text_length": condition["text_length"]})
    velocity, maps = their_forward(denoiser.network, noisy, level, double)
    denoiser.requires_grad_(False)
    both = denoiser(noisy, level, double, "both")
    # rotations are complex64 in the network, so its own float64 rounds them
    assert relative_error(both.x0, noisy - sigma * velocity) < 1e-6
    assert relative_error(both.features[0], maps) < 1e-6
    assert torch.equal(denoiser(noisy, level, double, "features").features[0], both.features[0])
    weight = denoiser.denoising_weight(level).double().view(-1, 1, 1, 1)
    native = (weight * (both.x0 - clean) ** 2).mean()
    assert float(native) == pytest.approx(float(((velocity - (noise - clean)) ** 2).mean()), rel=1e-5)


def test_a_caption_does_not_depend_on_its_neighbours(teacher: Model) -> None:
    """Alone, and beside a longer one whose width it is padded to."""
    noisy, level = torch.randn(1, 4, 8, 8), torch.tensor([0.7])
    expected = teacher.denoiser.denoise(noisy, level, conditions(teacher, PROMPTS[:1])).detach()
    x0 = teacher.denoiser.denoise(noisy.expand(2, -1, -1, -1), level.expand(2), conditions(teacher))
    assert relative_error(x0[:1], expected) < 1e-5
    assert not torch.allclose(x0[0], x0[1], atol=1e-2)


def test_captions_are_encoded_as_the_pipeline_does(teacher: Model, pipe: Any) -> None:
    """34 tokens of the template dropped, 512 kept; longer ones lose their end, and are told so."""
    encoders = teacher.conditioner.encoders
    long = "b" * 600 + " at last"
    theirs, mask = pipe.encode_prompt([*PROMPTS, long], max_sequence_length=512)
    found = encoders.encode([*PROMPTS, long])
    torch.testing.assert_close(found.text, theirs)
    assert found.lengths.tolist() == mask.sum(1).tolist() == [len("red cat") + 5, 33, 512]
    assert (encoders.max_tokens, found.text.shape[1:]) == (512 + 34, (512, 24))
    assert encoders.cut_part(long) == long[512:]
    assert encoders.cut_part("short") == ""
    alone = encoders.encode(PROMPTS[:1])  # without padding its pipeline has no mask
    assert alone.lengths.tolist() == [len("red cat") + 5]


def test_the_unconditional_row_is_its_authors_advice(teacher: Model, pipe: Any) -> None:
    """One space, as their example has it, not the empty prompt."""
    found = teacher.conditioner.encoders.encode_empty()
    torch.testing.assert_close(found.text, pipe.encode_prompt([" "])[0])
    assert found.text.shape != pipe.encode_prompt([""])[0].shape


def test_latents_are_normalised_as_the_pipeline_does(teacher: Model, pipe: Any) -> None:
    """Each channel by the config's mean and deviation; a picture is a video of one frame."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    autoencoder: Any = teacher.decoder.autoencoder  # type: ignore[attr-defined]
    assert (autoencoder.latent_channels, autoencoder.factor) == (4, 2)
    mean, spread = autoencoder.distribution(images)
    plain = pipe.vae.encode(images.unsqueeze(2)).latent_dist
    for channel, (middle, deviation) in enumerate(
        zip(pipe.vae.config.latents_mean, pipe.vae.config.latents_std, strict=True)
    ):
        torch.testing.assert_close(mean[:, channel], (plain.mean[:, channel, 0] - middle) / deviation)
        torch.testing.assert_close(spread[:, channel], plain.std[:, channel, 0] / deviation)
    theirs = pipe.vae.decode(plain.mean).sample[:, :, 0]
    torch.testing.assert_close(autoencoder.decode(mean), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 18), (14, 16)])
def test_sizes_the_packing_cannot_take_are_refused(teacher: Model, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"size {size[0]}x{size[1]}: this model .*multiples of 4"):
        teacher.check_size(*size)


@pytest.mark.parametrize(
    ("resolution", "told"),
    [
        (18, r"latents of 9x9 do not fit .* multiples of its patch size 2"),
        (1024, r"65536 image tokens are more than the 8192 \(about 90x90\)"),
    ],
)
def test_a_resolution_it_cannot_take_is_refused(folder: Path, resolution: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_teacher(folder, device="cpu", resolution=resolution)


def test_a_size_beyond_the_shift_is_refused(teacher: Model) -> None:
    with pytest.raises(UserError, match=r"size 512x400: 12800 image tokens are more than the 8192"):
        teacher.check_size(512, 400)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("transformer/config.json", {"patch_size": 1}, r"transformer cannot be loaded .*proj_out"),
        ("transformer/config.json", {"zero_cond_t": True}, r"zero_cond_t=True.* does not understand for Qwen-Image"),
        ("transformer/config.json", {"guidance_embeds": True}, r"guidance_embeds=True.* does not understand"),
        ("vae/config.json", {"latents_std": [1.0, 1.0, 0.0, 1.0]}, r"latents_std has a value that is not above 0"),
        ("vae/config.json", {"latents_mean": [1.0, 1.0]}, r"latents_mean is not 4 numbers"),
        ("vae/config.json", {"temperal_downsample": 3}, r"temperal_downsample"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "is a AutoencoderKL; AutoencoderKLQwenImage is read"),
    ],
)
def test_configs_of_other_models_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], told: str
) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps({**config, **change}))
    family, part = recognise(copied), "load" if file.startswith("transformer") else "autoencoder"
    with pytest.raises(UserError, match=told):
        getattr(family, part)(copied)


def test_models_that_edit_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    """Their network has the same class; a processor of pictures stands beside it."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    index = json.loads((copied / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names processor \(Qwen2VLProcessor\), which Qwen-Image does not have here"):
        load_teacher(copied, device="cpu")


def test_what_released_configs_say_besides_is_no_message(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pooled_projection_dim is in them, and no layer is of it."""
    family = recognise(folder)
    description = family.describe_folder(folder)
    with caplog.at_level("WARNING"), capture_diffusers(caplog):
        assert "pooled_projection_dim" not in family.build(description).describe()["network"]
        family.build_autoencoder(family.read_autoencoder_config(folder))
    assert caplog.messages == []


@contextmanager
def capture_diffusers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """diffusers' own logger passes nothing up."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def test_the_released_shape() -> None:
    network = build_released("qwen-image", 512)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 20430
    assert (network.image_shape, len(network.blocks())) == ((16, 64, 64), 60)
    family = family_named("qwen-image")
    with torch.device("meta"):
        vae = family.build_autoencoder(family.autoencoder_config)
    assert (vae.latent_channels, vae.factor) == (16, 8)
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6) == 127
    with pytest.raises(
        UserError, match="a vae of class AutoencoderKL is not read; of Qwen-Image AutoencoderKLQwenImage"
    ):
        family.build_autoencoder({"_class_name": "AutoencoderKL"})


def test_lora_names_of_the_released_shape(tmp_path: Path) -> None:
    """All 720 layers, in each dialect that trainers write; diffusers' own converter reads ours as the same."""
    denoiser: Any = build_released("qwen-image")
    modules = [name for name, _ in denoiser.named_modules()]
    targets = choose_targets(denoiser, LoraShape(4, 4.0))
    layers = [name for name in modules if name.endswith(tuple(f".{target}" for target in targets))]
    assert len(layers) == 60 * 12
    state = {
        f"{name}.lora_{part}.weight": torch.full((1, 1), float(n)) for n, name in enumerate(layers) for part in "AB"
    }
    lora = LoraWeights(1, 2.0, state)
    write_kohya_lora(tmp_path / "kohya.safetensors", lora, {})
    write_peft_lora(tmp_path / "peft.safetensors", lora, "transformer", {})
    peft, kohya = (load_file(tmp_path / f"{name}.safetensors") for name in ("peft", "kohya"))
    bare = {key.removeprefix("transformer."): value for key, value in peft.items()}
    theirs = _convert_non_diffusers_qwen_lora_to_diffusers(dict(kohya))
    assert {key.removeprefix("transformer.") for key in theirs} == bare.keys()
    for name in layers:
        key = name.replace("network.", "transformer.")
        product = theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"]
        torch.testing.assert_close(product, 2 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"])
    save_file({f"diffusion_model.{key}": value for key, value in bare.items()}, tmp_path / "other.safetensors")
    for file in ("kohya", "peft", "other"):
        assert set(read_lora(tmp_path / f"{file}.safetensors", modules).targets) == set(layers)


def test_a_single_file_is_known_by_its_keys(tmp_path: Path) -> None:
    save_file({"transformer_blocks.0.img_mod.1.weight": torch.ones(1)}, tmp_path / "q.safetensors")
    with pytest.raises(UserError, match=r"is Qwen-Image; single files of .* are read"):
        read_single_file(tmp_path / "q.safetensors", single_file_layouts(), unread_files())


def settings(folder: Path) -> TrainSettings:
    return parse_settings(TrainSettings, {"teacher": {"path": str(folder)}, "compute": {"device": "cpu"}}, "test")


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("models--lightx2v--Qwen-Image-Lightning/snapshots/1", "qwen-image-lightning.*distil Qwen/Qwen-Image$"),
        ("Qwen_Image_2512_Lightning_4steps", "qwen-image-2512-lightning.*distil Qwen/Qwen-Image-2512$"),
        ("models--DiffSynth-Studio--Qwen-Image-Distill-Full/snapshots/1", "qwen-image-distill"),
    ],
)
def test_distilled_releases_are_no_teachers(tmp_path: Path, place: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"is {told}"):
        open_teacher(settings(tiny_qwen_image_folder(tmp_path / place)))
    assert load_teacher(tmp_path / place, device="cpu").default_guidance == 1


def test_the_base_is_a_teacher(tmp_path: Path) -> None:
    place = tmp_path / "models--Qwen--Qwen-Image/snapshots/1"
    assert open_teacher(settings(tiny_qwen_image_folder(place))).default_guidance == 4
