"""Z-Image behind the contract: its own pipeline's pictures, its own forward's numbers, native loss and bottleneck recomputed."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import sample_noise
from fewstep.errors import UserError
from fewstep.families.registry import build_released, family_named, recognise, single_file_layouts, unread_files
from fewstep.families.z_image.shapes import LORA_TARGETS
from fewstep.formats.kohya_lora import LoraWeights, read_lora, write_kohya_lora, write_peft_lora
from fewstep.formats.single_file import read_single_file
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.merged_loras import update_of
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import open_teacher
from tests.conftest import relative_error
from tests.tiny_flow_models import tiny_z_image_folder

PROMPTS = ["red cat", "a dog that sleeps on a chair of wood in the garden behind the house"]  # 1 and 2 times 32 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image_folder(tmp_path_factory.mktemp("models") / "z-image")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Model:
    return load_teacher(folder, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe: Any = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(teacher: Model, prompts: list[str] = PROMPTS) -> Condition:
    return teacher.conditioner.table(prompts, teacher.size).rows(torch.arange(len(prompts)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "steps", "guidance", "cap"),
    [(None, 4, 0.0, 0.0), (None, 7, 4.0, 0.0), (None, 3, 4.0, 0.8), ((24, 8), 2, 2.5, 1.0)],
)
def test_pictures_are_the_pipelines(
    teacher: Model, pipe: Any, size: tuple[int, int] | None, steps: int, guidance: float, cap: float
) -> None:
    """Same noise, steps and guidance, its cap of the norm included; its g is our w - 1."""
    height, width = size or (16, 16)
    noise = sample_noise(teacher.denoiser, 0, 0, 2, torch.device("cpu"), shape=(4, height // 2, width // 2))
    theirs = pipe(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=guidance, cfg_normalization=cap, latents=noise.clone(),
        height=height, width=width, output_type="pt",
    ).images  # fmt: skip
    teacher.denoiser.guidance_norm_cap = cap
    try:
        ours = teacher.sample(
            PROMPTS, num_inference_steps=steps, guidance_scale=guidance + 1, size=size, output="tensor", progress=False
        )
    finally:
        teacher.denoiser.guidance_norm_cap = 0.0
    assert (ours - (theirs * 2 - 1)).abs().max() < 1e-4
    assert ours.std() > 0.05


def their_forward(network: Any, noisy: Tensor, level: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Its own forward over lists, in float64 but for what it rounds itself, and the image tokens after the middle layer as maps."""
    seen: list[Tensor] = []
    hook = network.layers[(len(network.layers) - 1) // 2].register_forward_hook(lambda *call: seen.append(call[2]))
    captions = [row[:length] for row, length in zip(condition["text"], condition["text_length"].tolist(), strict=True)]
    with torch.no_grad():
        raw = network(list(noisy.unsqueeze(2)), 1 - level, captions, return_dict=False)[0]
    hook.remove()
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    tokens = seen[0][:, : height * width]
    maps = torch.stack([torch.stack([tokens[:, y * width + x] for x in range(width)], -1) for y in range(height)], 2)
    return torch.stack([part[:, 0] for part in raw]), maps


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (12, 12)])
def test_x0_native_loss_and_bottleneck_recomputed(folder: Path, teacher: Model, shape: tuple[int, int]) -> None:
    """From the network's own forward: v = -raw, x0 = noisy - sigma v, loss mse(v, noise - x0); 36 patches need no padding of 32."""
    denoiser: Any = recognise(folder).load(folder, 2 * max(shape))
    assert denoiser.image_shape[-1] == max(shape)
    denoiser.eval().double()
    condition = conditions(teacher)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, *shape, dtype=torch.float64)
    level = torch.tensor([0.9, 0.2], dtype=torch.float64)
    sigma = level.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * clean + sigma * noise
    double = Condition(2, {"text": condition["text"].double(), "text_length": condition["text_length"]})
    raw, maps = their_forward(denoiser.network, noisy, level, double)
    output = denoiser(noisy, level, double, "both")
    # rotations are complex64 in the network, so its own float64 rounds them
    assert relative_error(output.x0, noisy + sigma * raw) < 1e-6
    assert relative_error(output.features[0], maps) < 1e-6
    assert torch.equal(denoiser(noisy, level, double, "features").features[0], output.features[0])
    native = ((-raw - (noise - clean)) ** 2).flatten(1).mean(1)
    weighted = denoiser.denoising_weight(level).double() * ((output.x0 - clean) ** 2).flatten(1).mean(1)
    assert relative_error(weighted, native) < 1e-5
    assert denoiser.feature_shapes[0] == (32, max(shape) // 2, max(shape) // 2)


def test_a_caption_does_not_depend_on_its_neighbours(teacher: Model) -> None:
    """Alone, beside a longer one, and in a batch padded further."""
    noisy, level = torch.randn(1, 4, 8, 8), torch.tensor([0.7])
    alone = conditions(teacher, PROMPTS[:1])
    both = conditions(teacher)
    assert both["text_length"].tolist() == [alone["text_length"].item(), both["text"].shape[1]]
    assert both["text"].shape[1] > 64 > 32 > alone["text_length"].item() - 32
    twin = Condition.cat([both.unconditional(), both])[2:]
    expected = teacher.denoiser.denoise(noisy, level, alone).detach()
    for other in (both, twin):
        x0 = teacher.denoiser.denoise(noisy.expand(2, -1, -1, -1), level.expand(2), other)
        assert relative_error(x0[:1], expected) < 1e-5
    assert not torch.allclose(x0[0], x0[1], atol=1e-2)


def test_captions_are_encoded_as_the_pipeline_does(teacher: Model, pipe: Any) -> None:
    theirs, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    found = teacher.conditioner.encoders.encode(PROMPTS)
    assert found.lengths is not None
    assert found.lengths.tolist() == [len(row) for row in theirs]
    for ours, row in zip(found.text, theirs, strict=True):
        torch.testing.assert_close(ours[: len(row)], row)
        assert not ours[len(row) :].any()
    encoders = teacher.conditioner.encoders
    assert encoders.count_tokens(PROMPTS[0]) == len(theirs[0])
    assert encoders.max_tokens == 512
    long = "a" * 600 + " the end"
    assert encoders.cut_part(long) == long[512 - 6 :]  # <|im_start|>, user and the line's end take 6 of single bytes
    assert encoders.cut_part("short") == ""


@pytest.mark.parametrize(
    ("size", "told"),
    [((16, 18), "multiples of 4"), ((16, 132), "positions for sides up to 128")],
)
def test_sizes_the_patches_cannot_take_are_refused(teacher: Model, size: tuple[int, int], told: str) -> None:
    with pytest.raises(UserError, match=rf"size {size[0]}x{size[1]}: this model .*{told}"):
        teacher.check_size(*size)


@pytest.mark.slow
def test_more_image_tokens_than_a_dynamic_shift_is_known_for(tmp_path: Path) -> None:
    options = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 20}
    folder = tiny_z_image_folder(tmp_path / "dynamic", **options)
    teacher = load_teacher(folder, device="cpu")
    teacher.check_size(16, 20)
    told = r"30 image tokens are more than the 20 \(about 4x4\) that the scheduler's dynamic shift is known for"
    with pytest.raises(UserError, match=rf"size 20x24: {told}"):
        teacher.check_size(20, 24)
    with pytest.raises(UserError, match=r"36 image tokens .* \(teacher\.resolution\)"):
        load_teacher(folder, device="cpu", resolution=24)


@pytest.mark.slow
def test_pictures_of_a_dynamic_shift_are_the_pipelines(tmp_path: Path) -> None:
    folder = tiny_z_image_folder(tmp_path / "dynamic", use_dynamic_shifting=True, shift_terminal=0.02)
    teacher, pipe = load_teacher(folder, device="cpu"), ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for height, width in ((16, 16), (32, 24)):
        noise = sample_noise(teacher.denoiser, 0, 0, 1, torch.device("cpu"), shape=(4, height // 2, width // 2))
        theirs = pipe(
            "red cat", num_inference_steps=3, guidance_scale=0.0, latents=noise, height=height, width=width,
            output_type="pt",
        ).images  # fmt: skip
        ours = teacher.sample(
            "red cat", num_inference_steps=3, guidance_scale=1, size=(height, width), output="tensor", progress=False
        )
        assert (ours - (theirs * 2 - 1)).abs().max() < 1e-4


def test_the_released_shape() -> None:
    """The defaults of diffusers' class: 30 layers of width 3840."""
    from diffusers import ZImageTransformer2DModel

    denoiser: Any = build_released("z-image", 512)
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel()
    assert {n: p.shape for n, p in denoiser.network.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6) == 6155
    assert denoiser.image_shape == (16, 64, 64)
    assert len(denoiser.blocks()) == 34


@pytest.mark.slow
def test_lora_names_of_the_released_shape(tmp_path: Path) -> None:
    """All 238 layers, in each dialect that trainers write; diffusers' own converter reads ours as the same."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers

    denoiser: Any = build_released("z-image")
    modules = [name for name, _ in denoiser.named_modules()]
    layers = [name for name in modules if name.endswith(tuple(f".{target}" for target in LORA_TARGETS))]
    assert len(layers) == 34 * 7
    state = {
        f"{name}.lora_{part}.weight": torch.full((1, 1), float(n)) for n, name in enumerate(layers) for part in "AB"
    }
    lora = LoraWeights(1, 2.0, state)
    write_kohya_lora(tmp_path / "kohya.safetensors", lora, {})
    write_peft_lora(tmp_path / "peft.safetensors", lora, "transformer", {})
    peft = load_file(tmp_path / "peft.safetensors")
    kohya = load_file(tmp_path / "kohya.safetensors")
    theirs = _convert_non_diffusers_z_image_lora_to_diffusers(dict(kohya))
    assert theirs.keys() == peft.keys()
    for name in layers:
        key = name.replace("network.", "transformer.")
        product = theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"]
        torch.testing.assert_close(product, 2 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"])
    trainers = {
        name.replace("transformer.", "diffusion_model.").replace(".to_out.0.", ".out."): v for name, v in peft.items()
    }
    save_file(trainers, tmp_path / "diffusion_model.safetensors")
    for file in ("kohya", "peft", "diffusion_model"):
        found = read_lora(tmp_path / f"{file}.safetensors", modules, denoiser_aliases(denoiser))
        assert set(found.targets) == set(layers)


def denoiser_aliases(denoiser: Any) -> Any:
    return partial(family_named("z-image").layer_aliases, denoiser.describe())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "its chat template is missing or damaged"), ("{% if %}", "its chat template is missing or damaged"),
        ("{{ messages[0].nothing.more }}", "its chat template is missing or damaged"), ("hello", "leaves the prompt out"),
    ],
)  # fmt: skip
def test_a_chat_template_that_cannot_be_filled_in(
    folder: Path, tmp_path: Path, template: str | None, said: str
) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    path = copied / "tokenizer/tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "chat_template"}
    path.write_text(json.dumps(config))
    (copied / "tokenizer/chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (copied / "tokenizer/chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said):
        recognise(copied).text_encoders(copied)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_queries_keys_and_values_in_one_layer(tmp_path: Path, prefix: str) -> None:
    """As kohya's trainer writes them for ComfyUI's own layout; taken apart as diffusers' converter does it."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers

    denoiser: Any = build_released("z-image")
    torch.manual_seed(0)
    words = "layers.0.attention.qkv" if prefix.endswith(".") else "layers_0_attention_qkv"
    name = f"{prefix}{words}"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(24, 2), f"{name}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(
        tmp_path / "a.safetensors", [name for name, _ in denoiser.named_modules()], denoiser_aliases(denoiser)
    )
    kohya = {key.replace(name, "lora_unet_layers_0_attention_qkv"): value for key, value in tensors.items()}
    theirs = _convert_non_diffusers_z_image_lora_to_diffusers(kohya)
    assert len(found.targets) == len(theirs) // 2 == 3
    for target in found.targets:
        ours = update_of(found, target)
        key = target.replace("network.", "transformer.")
        torch.testing.assert_close(ours, theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"])


def test_a_single_file_is_known_by_its_keys(tmp_path: Path) -> None:
    for prefix in ("model.diffusion_model.", ""):
        save_file({f"{prefix}cap_embedder.0.weight": torch.ones(1)}, tmp_path / "z.safetensors")
        with pytest.raises(UserError, match=r"is Z-Image; single files of .* are read"):
            read_single_file(tmp_path / "z.safetensors", single_file_layouts(), unread_files())


def named_turbo(folder: Path, where: str) -> Path:
    """A copy of a folder that says in one place that it is Z-Image-Turbo."""
    place = {"hub": "models--Tongyi-MAI--Z-Image-Turbo/snapshots/0123", "folder": "my_z_image_turbo"}.get(where, "mine")
    copied = folder.parent / where / place
    shutil.copytree(folder, copied)
    if where in ("model_index.json", "transformer/config.json"):
        config = json.loads((copied / where).read_text())
        (copied / where).write_text(json.dumps({**config, "_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}))
    return copied


@pytest.mark.parametrize("where", ["hub", "folder", "model_index.json", "transformer/config.json"])
def test_turbo_is_no_teacher(folder: Path, where: str) -> None:
    """Its configs are the base's but for the shift; its name says it, wherever it stands."""
    turbo = named_turbo(folder, where)
    settings = parse_settings(TrainSettings, {"teacher": {"path": str(turbo)}, "compute": {"device": "cpu"}}, "test")
    with pytest.raises(UserError, match=r"is z-image-turbo, a distilled release .* distil Tongyi-MAI/Z-Image$"):
        open_teacher(settings)
    model = load_teacher(turbo, device="cpu")
    assert model.default_guidance == 1
    with pytest.raises(UserError, match=r"guidance_scale=6: this is a few-step model, by its scheduler or its name"):
        model.check_guidance(6)


def test_the_base_is_a_teacher(folder: Path) -> None:
    path = {"teacher": {"path": str(folder)}, "compute": {"device": "cpu"}}
    assert open_teacher(parse_settings(TrainSettings, path, "test")).default_guidance == 6
