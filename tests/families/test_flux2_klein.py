"""FLUX.2 klein behind the contract: its own pipeline's pictures, its own forward's numbers, native loss and bottleneck recomputed."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import sample_noise
from fewstep.errors import UserError
from fewstep.families.flux2_klein.original_names import original_names
from fewstep.families.flux2_klein.shapes import empirical_mu
from fewstep.families.registry import build_released, recognise, single_file_layouts, unread_files
from fewstep.formats.kohya_lora import LoraWeights, read_lora, write_kohya_lora, write_peft_lora
from fewstep.formats.single_file import read_single_file
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, choose_targets
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import open_teacher
from tests.conftest import relative_error
from tests.tiny_flow_models import klein_latents, klein_tokens, tiny_flux2_klein_folder

PROMPTS = ["red cat", "a dog that sleeps on a chair"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux2_klein_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Model:
    return load_teacher(folder, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe: Any = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(teacher: Model) -> Condition:
    return teacher.conditioner.table(PROMPTS, teacher.size).rows(torch.arange(len(PROMPTS)))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "steps", "guidance"), [(None, 4, 1.0), (None, 5, 4.0), ((24, 8), 2, 2.5)])
def test_pictures_are_the_pipelines(
    teacher: Model, pipe: Any, size: tuple[int, int] | None, steps: int, guidance: float
) -> None:
    """Same noise, steps and guidance; the shift goes by the tokens and the steps."""
    height, width = size or (16, 16)
    noise = sample_noise(teacher.denoiser, 0, 0, 2, torch.device("cpu"), shape=(4, height // 2, width // 2))
    theirs = pipe(
        prompt=list(PROMPTS), num_inference_steps=steps, guidance_scale=guidance, latents=klein_latents(noise),
        height=height, width=width, output_type="pt",
    ).images  # fmt: skip
    ours = teacher.sample(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, size=size, output="tensor", progress=False
    )
    assert (ours - (theirs * 2 - 1)).abs().max() < 1e-4
    assert ours.std() > 0.05


def test_mu_is_the_pipelines(teacher: Model) -> None:
    for tokens in (16, 1024, 4096, 4300, 4301, 16384):
        for steps in (1, 4, 50, 200):
            assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-12)
    network: Any = teacher.denoiser.base_network
    expected = torch.tensor(compute_empirical_mu(16, 50)).exp()  # latents of 8x8 are 16 tokens; the default steps
    assert network.noise_schedule.shift == pytest.approx(float(expected))


def their_forward(network: Any, noisy: Tensor, level: Tensor, text: Tensor, middle: Any) -> tuple[Tensor, Tensor]:
    """Its own forward over packed tokens in float64, and the image tokens after the middle block as maps."""
    seen: list[Any] = []
    hook = middle.register_forward_hook(lambda *call: seen.append(call[2]))
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    packed = klein_latents(noisy)
    with torch.no_grad():
        raw = network(
            klein_tokens(noisy), text, level, Flux2KleinPipeline._prepare_latent_ids(packed),
            Flux2KleinPipeline._prepare_text_ids(text), return_dict=False,
        )[0]  # fmt: skip
    hook.remove()
    tokens = seen[0][1] if isinstance(seen[0], tuple) else seen[0][:, text.shape[1] :]
    maps = torch.stack([torch.stack([tokens[:, y * width + x] for x in range(width)], -1) for y in range(height)], 2)
    return torch.nn.functional.pixel_shuffle(raw.transpose(1, 2).unflatten(2, (height, width)), 2), maps


@pytest.mark.parametrize("middle", ["single", "double"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_x0_native_loss_and_bottleneck_recomputed(
    folder: Path, teacher: Model, shape: tuple[int, int], middle: str
) -> None:
    """v = raw, x0 = noisy - sigma v, loss mse(v, noise - x0); the middle block may be of either kind."""
    denoiser: Any = recognise(folder).load(folder)
    denoiser.eval().double()
    assert denoiser.middle == 2  # of five
    denoiser.middle = {"single": 2, "double": 1}[middle]
    block = denoiser.blocks()[denoiser.middle]
    text = conditions(teacher)["text"].double()
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, *shape, dtype=torch.float64)
    level = torch.tensor([0.9, 0.2], dtype=torch.float64)
    sigma = level.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * clean + sigma * noise
    double = Condition(2, {"text": text}, {"text": text[:1]})
    velocity, maps = their_forward(denoiser.network, noisy, level, text, block)
    denoiser.requires_grad_(False)
    both = denoiser(noisy, level, double, "both")
    assert relative_error(both.x0, noisy - sigma * velocity) < 1e-6
    assert relative_error(both.features[0], maps) < 1e-6
    assert torch.equal(denoiser(noisy, level, double, "features").features[0], both.features[0])
    weight = denoiser.denoising_weight(level).double().view(-1, 1, 1, 1)
    native = (weight * (both.x0 - clean) ** 2).mean()
    assert float(native) == pytest.approx(float(((velocity - (noise - clean)) ** 2).mean()), rel=1e-5)


def test_captions_are_encoded_as_the_pipeline_does(teacher: Model, pipe: Any) -> None:
    """512 tokens of each, its padding among them; longer ones lose their end, and are told so."""
    encoders = teacher.conditioner.encoders
    long = "a" * 600 + " the end"
    theirs, _ = pipe.encode_prompt([*PROMPTS, long])
    found = encoders.encode([*PROMPTS, long])
    assert found.lengths is None
    torch.testing.assert_close(found.text, theirs)
    assert (encoders.max_tokens, found.text.shape[1:]) == (512, (512, 24))
    assert encoders.cut_part(long) == long[512 - 6 :]  # <|im_start|>, user and the line's end take 6 of single bytes
    assert encoders.cut_part("short") == ""


def test_latents_are_normalised_as_the_pipeline_does(teacher: Model, pipe: Any) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    autoencoder: Any = teacher.decoder.autoencoder  # type: ignore[attr-defined]
    found = autoencoder.encode(images)
    torch.testing.assert_close(klein_latents(found), pipe._encode_vae_image(images, None))
    plain = pipe.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(autoencoder.decode(found), pipe.vae.decode(plain).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 18), (14, 16)])
def test_sizes_the_packing_cannot_take_are_refused(teacher: Model, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"size {size[0]}x{size[1]}: this model .*multiples of 4"):
        teacher.check_size(*size)


def test_a_size_whose_shift_leaves_no_levels_is_refused(folder: Path, teacher: Model) -> None:
    with pytest.raises(UserError, match=r"1048576 image tokens are so many that .* \(teacher.resolution\)"):
        load_teacher(folder, device="cpu", resolution=4096)
    with pytest.raises(UserError, match=r"size 100000x100000: 625000000 image tokens are so many"):
        teacher.check_size(100_000, 100_000)


def test_a_resolution_the_packing_cannot_take_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"latents of 9x9 do not fit .* multiples of its patch size 2"):
        load_teacher(folder, device="cpu", resolution=18)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("transformer/config.json", {"patch_size": 2}, r"transformer cannot be loaded .*proj_out"),
        ("vae/config.json", {"patch_size": [1, 1]}, r"vae cannot be loaded .*bn\.running_mean"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "its vae is a AutoencoderKL; AutoencoderKLFlux2 is read"),
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


def test_guidance_as_an_input_is_refused(folder: Path, tmp_path: Path) -> None:
    """As FLUX.2-dev has it."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    network: Any = Flux2Transformer2DModel.from_pretrained(copied / "transformer")
    guided: Any = Flux2Transformer2DModel.from_config({**network.config, "guidance_embeds": True})
    guided.save_pretrained(copied / "transformer")
    with pytest.raises(UserError, match=r"takes guidance as an input .*FLUX\.2-klein-base-4B and -9B"):
        recognise(copied).load(copied)


def test_the_released_shapes() -> None:
    found = {name: build_released(name, 512) for name in ("flux2-klein-4b", "flux2-klein-9b")}
    sizes = {name: round(sum(p.numel() for p in net.parameters()) / 1e6) for name, net in found.items()}
    assert sizes == {"flux2-klein-4b": 3876, "flux2-klein-9b": 9079}
    assert all(net.image_shape == (32, 64, 64) for net in found.values())
    assert [len(net.blocks()) for net in found.values()] == [25, 32]


def test_lora_names_of_the_released_shape(tmp_path: Path) -> None:
    """All 60 layers, as diffusers and as `diffusion_model.` names them; diffusers' own converter reads both as the same."""
    denoiser: Any = build_released("flux2-klein-4b")
    modules = [name for name, _ in denoiser.named_modules()]
    targets = choose_targets(denoiser, LoraShape(4, 4.0))
    layers = [name for name in modules if name.endswith(tuple(f".{target}" for target in targets))]
    assert len(layers) == 5 * 4 + 20 * 2
    state = {
        f"{name}.lora_{part}.weight": torch.full((1, 1), float(n)) for n, name in enumerate(layers) for part in "AB"
    }
    write_peft_lora(tmp_path / "peft.safetensors", LoraWeights(1, 1.0, state), "transformer", {})
    peft = load_file(tmp_path / "peft.safetensors")
    save_file(
        {k.replace("transformer.", "diffusion_model.", 1): v for k, v in peft.items()}, tmp_path / "other.safetensors"
    )
    for name in ("peft", "other"):
        theirs = Flux2KleinPipeline.lora_state_dict(tmp_path, weight_name=f"{name}.safetensors")
        assert theirs.keys() == peft.keys()
        assert all(torch.equal(theirs[key], peft[key]) for key in peft)
        assert set(read_lora(tmp_path / f"{name}.safetensors", modules).targets) == set(layers)


def linears(name: str) -> list[str]:
    """Everything of a released network that a LoRA can sit on, in diffusers' names."""
    network: Any = build_released(name).base_network.network
    return [path for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]


def random_lora(layers: list[str], rank: int = 2) -> LoraWeights:
    """alpha 3, widths 4 and 6."""
    torch.manual_seed(0)
    shapes = {"A": (rank, 4), "B": (6, rank)}
    return LoraWeights(rank, 3.0, {f"{n}.lora_{p}.weight": torch.randn(shapes[p]) for n in layers for p in "AB"})


def update(state: dict[str, Tensor], name: str, scale: float = 1.0) -> Tensor:
    return scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]


@pytest.mark.parametrize(("release", "double", "single"), [("flux2-klein-4b", 5, 20), ("flux2-klein-9b", 8, 24)])
def test_original_names_cover_every_layer(release: str, double: int, single: int) -> None:
    """10 layers of a double block, four of which are one for three or are named alone; norm_out's halves change places."""
    modules = linears(release)
    names = original_names(modules)
    found = [part for means in names.values() for part in ((means,) if isinstance(means, str) else means)]
    assert sorted(found) == sorted(set(modules) - {"norm_out.linear"})
    blocks = [name for name in names if "_blocks." in name]
    assert len(blocks) == double * 8 + single * 2
    known = {
        "double_blocks.0.img_attn.qkv",
        "double_blocks.4.txt_mlp.2",
        "single_blocks.19.linear1",
        "final_layer.linear",
    }
    assert known <= set(names)


def read(path: Path, modules: list[str]) -> LoraWeights:
    return read_lora(path, modules, original_names)


def test_kohyas_file_is_read_by_diffusers_and_here(tmp_path: Path) -> None:
    """Of all the layers that train unless told otherwise: 50 in the original code's words, 60 updates again in ours."""
    denoiser: Any = build_released("flux2-klein-4b")
    targets = choose_targets(denoiser, LoraShape(4, 4.0))
    modules = [name for name, _ in denoiser.base_network.network.named_modules()]
    layers = [name for name in modules if f".{name}".endswith(tuple(f".{target}" for target in targets))]
    lora, path = random_lora(layers), tmp_path / "kohya.safetensors"
    write_kohya_lora(path, lora, {}, original=original_names(modules))
    written = load_file(path)
    assert len(written) == 3 * (5 * 2 + 20 * 2)
    fused = written["lora_unet_double_blocks_4_img_attn_qkv.lora_up.weight"]
    assert fused.shape == (18, 6)  # ComfyUI multiplies up, down and alpha / rank of the fused layer
    whole = (
        written["lora_unet_double_blocks_4_img_attn_qkv.alpha"]
        / 6
        * (fused @ written["lora_unet_double_blocks_4_img_attn_qkv.lora_down.weight"])
    )
    expected = [update(lora.state, f"transformer_blocks.4.attn.to_{part}", 1.5) for part in "qkv"]
    torch.testing.assert_close(whole, torch.cat(expected))
    theirs = Flux2KleinPipeline.lora_state_dict(tmp_path, weight_name=path.name)
    assert len(theirs) == 2 * 60
    for name in layers:
        torch.testing.assert_close(update(theirs, f"transformer.{name}"), update(lora.state, name, 1.5))
    found = read(path, modules)
    assert (found.rank, found.alpha) == (2, 3.0)
    assert found.state.keys() == lora.state.keys()
    assert all(torch.equal(found.state[key], lora.state[key]) for key in lora.state)


@pytest.mark.parametrize("spelling", ["diffusion_model", "kohya"])
def test_files_of_the_original_code_are_read_as_diffusers_does(tmp_path: Path, spelling: str) -> None:
    """One update for queries, keys and values together, and layers around the blocks, which trainers adapt too."""
    torch.manual_seed(0)
    modules = [name for name, _ in build_released("flux2-klein-4b").base_network.network.named_modules()]
    tensors: dict[str, Tensor] = {}
    for words, means in original_names(modules).items():
        if spelling == "kohya" and "modulation" in words:
            continue  # which diffusers' converter leaves out with a warning
        down, up = torch.randn(2, 4), torch.randn(6 if isinstance(means, str) else 18, 2)
        if spelling == "kohya":
            name = "lora_unet_" + words.replace(".", "_")
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(1.0),
            }
        else:
            tensors |= {f"diffusion_model.{words}.lora_A.weight": down, f"diffusion_model.{words}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = Flux2KleinPipeline.lora_state_dict(tmp_path, weight_name="a.safetensors")
    ours = read(tmp_path / "a.safetensors", modules)
    assert len(ours.targets) == len(theirs) // 2
    for name in ours.targets:
        mine = update(ours.state, name, ours.alpha / ours.rank)
        torch.testing.assert_close(mine, update(theirs, f"transformer.{name}"))


def test_one_trained_projection_of_three_comes_back_alone(tmp_path: Path) -> None:
    modules = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    lora = random_lora(modules[1:2])
    write_kohya_lora(tmp_path / "a.safetensors", lora, {}, original=original_names(modules))
    found = read(tmp_path / "a.safetensors", modules)
    assert found.state.keys() == lora.state.keys()
    torch.testing.assert_close(found.state, lora.state)


def test_rows_that_are_not_three_layers_are_refused(tmp_path: Path) -> None:
    name, modules = "lora_unet_double_blocks_0_img_attn_qkv", [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(25, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match=r"is damaged: its layer of .*to_q, .* has 25 rows for 3 layers"):
        read(tmp_path / "a.safetensors", modules)
    both = {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(24, 1)}
    plain = "lora_unet_transformer_blocks_0_attn_to_q"
    both |= {f"{plain}.lora_down.weight": torch.ones(1, 8), f"{plain}.lora_up.weight": torch.ones(8, 1)}
    save_file(both, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"two keys for one matrix, of transformer_blocks\.0\.attn\.to_q"):
        read(tmp_path / "b.safetensors", modules)


def test_the_last_modulation_is_refused_in_the_original_words(tmp_path: Path) -> None:
    """Its rows stand in another order in diffusers: read as they are they would be wrong without a word."""
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(8, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="name layers that this network does not have"):
        read(tmp_path / "a.safetensors", linears("flux2-klein-4b"))


def test_a_single_file_is_known_by_its_keys(tmp_path: Path) -> None:
    save_file({"single_stream_modulation.lin.weight": torch.ones(1)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match=r"is FLUX\.2; single files of .* are read"):
        read_single_file(tmp_path / "z.safetensors", single_file_layouts(), unread_files())


def settings(folder: Path) -> TrainSettings:
    return parse_settings(TrainSettings, {"teacher": {"path": str(folder)}, "compute": {"device": "cpu"}}, "test")


@pytest.mark.parametrize(
    ("place", "build", "told"),
    [
        (
            "models--black-forest-labs--FLUX.2-klein-4B/snapshots/1",
            tiny_flux2_klein_folder,
            r"flux\.2-klein-4b.*klein-base-4B$",
        ),
        ("my_flux.2_klein_9b", tiny_flux2_klein_folder, r"flux\.2-klein-9b.*klein-base-9B$"),
        (
            "mine",
            partial(tiny_flux2_klein_folder, is_distilled=True),
            r"flux\.2-klein without base.*klein-base-4B or -9B$",
        ),
    ],
)
def test_distilled_releases_are_no_teachers(tmp_path: Path, place: str, build: Any, told: str) -> None:
    """By their names, or by what their index says."""
    with pytest.raises(UserError, match=rf"is {told}"):
        open_teacher(settings(build(tmp_path / place)))
    model = load_teacher(tmp_path / place, device="cpu")
    assert model.default_guidance == 1


def test_the_base_is_a_teacher(tmp_path: Path) -> None:
    place = tmp_path / "models--black-forest-labs--FLUX.2-klein-base-4B/snapshots/1"
    assert open_teacher(settings(tiny_flux2_klein_folder(place))).default_guidance == 4


def test_a_text_encoder_of_too_few_layers(folder: Path, tmp_path: Path) -> None:
    """The pipeline reads it after layers 9, 18 and 27."""
    copied = shutil.copytree(folder, tmp_path / "model")
    path = copied / "text_encoder/config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has 8 layers; FLUX\.2 klein reads its text between them, up to layer 27"):
        recognise(copied).text_encoders(copied)
