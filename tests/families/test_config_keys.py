"""A config is understood whole or refused by name: schedulers, VAEs, networks, and the classes a folder may name."""

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fewstep
from fewstep.errors import UserError
from fewstep.export.text_pipeline import load_text_pipeline
from fewstep.families.config_keys import refuse_other_keys
from fewstep.families.diffusers_family import _VAE_KEYS, DiffusersFamily
from fewstep.families.registry import all_families, family_named, recognise
from fewstep.formats.diffusers_index import refuse_foreign_code
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder, tiny_vae

TEXT_FAMILIES = [family for family in all_families() if isinstance(family, DiffusersFamily)]
SCHEDULERS = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "SchedulerMixin"]
MAKERS: dict[str, Callable[[Path], Path]] = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        make(place / name)
    return place


def changed(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=lambda family: family.name)
def test_every_scheduler_of_diffusers_is_known_or_refused(family: DiffusersFamily) -> None:
    """With its own default config: what is known passes, everything else is refused by its name."""
    for name in SCHEDULERS:
        kind = getattr(diffusers, name)
        if not hasattr(kind, "_get_init_keys"):
            continue  # needs a library that is not installed
        parameters = inspect.signature(kind.__init__).parameters.values()
        config = {part.name: part.default for part in parameters if part.default is not part.empty}
        config["_class_name"] = name
        if name in family.scheduler_keys.classes:
            refuse_other_keys(config, family.scheduler_keys, "scheduler", family.title)
        else:
            with pytest.raises(ValueError, match=f"its scheduler is a {name}, whose arithmetic is not that of"):
                refuse_other_keys(config, family.scheduler_keys, "scheduler", family.title)


@pytest.mark.parametrize(
    ("name", "file", "values", "said"),
    [
        ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0},
         "its scheduler is a EDMDPMSolverMultistepScheduler"),
        ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"},
         "its scheduler is a FlowMatchEulerDiscreteScheduler"),
        ("sd", "scheduler/scheduler_config.json", {"thresholding": True}, "its scheduler has thresholding=True"),
        ("sd", "scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
         "its scheduler has timestep_type='continuous'"),
        ("sd", "scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "its scheduler has use_flow_sigmas=True"),
        ("sd", "scheduler/scheduler_config.json", {"of_tomorrow": 3}, "its scheduler has of_tomorrow=3"),
        ("sd", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
        ("sd3", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("sd3", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "its scheduler is a DDIMScheduler"),
        ("sdxl", "unet/config.json", {"addition_time_embed_dim": 64}, "six leave no room for a pooled text"),
        ("sd", "scheduler/scheduler_config.json", {"trained_betas": [0.001, 0.002]},
         "the scheduler has 2 trained_betas for num_train_timesteps=1000"),
        ("sd", "unet/config.json", {"dual_cross_attention": True}, "its unet has dual_cross_attention=True"),
        ("sd", "unet/config.json", {"sample_size": None}, "its unet does not say the side of its latents (sample_size"),
        ("sd", "model_index.json", {"unet": ["diffusers", "UNetMotionModel"]},
         "model_index.json names UNetMotionModel as its unet, the component's own config.json UNet2DConditionModel"),
        ("sd", "unet/config.json", {"of_tomorrow": 3}, "its unet has of_tomorrow=3, which this version of diffusers"),
        ("sd", "model_index.json", {"scheduler": ["payload", "X"]}, "names the scheduler class X"),
        ("sd", "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "names controlnet (ControlNetModel), which"),
    ],
)  # fmt: skip
def test_what_changes_the_arithmetic_is_refused_by_name(
    models: Path, tmp_path: Path, name: str, file: str, values: dict[str, Any], said: str
) -> None:
    folder = changed(shutil.copytree(models / name, tmp_path / "model"), file, **values)
    for read in (recognise(folder).load, recognise(folder).describe_folder):
        with pytest.raises(UserError) as error:
            read(folder)
        assert said in str(error.value)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("kind", ["LCMScheduler", "PNDMScheduler", "DPMSolverSDEScheduler"])
def test_what_a_config_leaves_out_is_as_its_class_has_it(models: Path, tmp_path: Path, kind: str) -> None:
    """Not as DDIM has it: other schedulers have other betas."""
    folder = changed(shutil.copytree(models / "sd", tmp_path / "model"), "scheduler/scheduler_config.json")
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    changed(folder, "model_index.json", scheduler=["diffusers", kind])
    if not hasattr(getattr(diffusers, kind), "_get_init_keys"):  # it needs a library that is not installed
        with pytest.raises(UserError, match=f"its {kind} leaves out num_train_timesteps"):
            recognise(folder).load(folder)
        return
    signal = recognise(folder).load(folder).noise_schedule.alpha(torch.tensor([500]))
    expected = getattr(diffusers, kind)().alphas_cumprod[500].sqrt()
    torch.testing.assert_close(signal.float(), expected[None].float())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "values",
    [{"latents_mean": [0.1] * 4}, {"latents_std": [2.0] * 4}, {"shift_factor": 0.06}],
    ids=lambda v: next(iter(v)),
)
def test_latents_of_another_scale_are_refused(models: Path, tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    folder = changed(shutil.copytree(models / name, tmp_path / "model"), "vae/config.json", **values)
    with pytest.raises(UserError, match=f"its vae has {next(iter(values))}="):
        recognise(folder).autoencoder(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scaling_factor": 0}, "scaling_factor is 0, not a number above 0"),
        ({"scaling_factor": None}, "scaling_factor is None, not a number above 0"),
        ({"scaling_factor": -0.18}, "scaling_factor is -0.18, not a number above 0"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "its vae is a AsymmetricAutoencoderKL"),
        ({"_class_name": None}, "its vae is a component without _class_name"),
    ],
)
def test_a_vae_is_understood_or_refused(models: Path, tmp_path: Path, values: dict[str, Any], said: str) -> None:
    folder = changed(shutil.copytree(models / "sd", tmp_path / "model"), "vae/config.json", **values)
    with pytest.raises(UserError, match=re.escape(said)):
        recognise(folder).autoencoder(folder)


def _with_vae(models: Path, folder: Path, **options: Any) -> Path:
    shutil.copytree(models / "sd", folder)
    shutil.rmtree(folder / "vae")
    config = {key: value for key, value in tiny_vae(0.2).config.items() if not key.startswith("_")}
    diffusers.AutoencoderKL(**{**config, **options}).save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out_channels": 4}, "its vae has out_channels=4; pictures of 3 channels"),
        ({"in_channels": 4}, "its vae has in_channels=4; pictures of 3 channels"),
        ({"latent_channels": 8}, "its vae has latents of 8 channels, its unet of 4"),
    ],
)
def test_a_vae_of_other_channels(models: Path, tmp_path: Path, options: dict[str, int], said: str) -> None:
    folder = _with_vae(models, tmp_path / "model", **options)
    with pytest.raises(UserError, match=said):
        fewstep.load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)


def test_an_index_that_names_another_vae(models: Path, tmp_path: Path) -> None:
    """Consistency decoders and tiny ones are other arithmetic; diffusers goes by the index."""
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    changed(folder, "model_index.json", vae=["diffusers", "ConsistencyDecoderVAE"])
    with pytest.raises(
        UserError, match=r"names ConsistencyDecoderVAE as its vae, the component's own config\.json Auto"
    ):
        recognise(folder).autoencoder(folder)


def test_one_text_width_for_every_block(models: Path, tmp_path: Path) -> None:
    folder = changed(
        shutil.copytree(models / "sd", tmp_path / "model"), "unet/config.json", cross_attention_dim=[32, 32]
    )
    pictures = [
        fewstep.load_teacher(path, device="cpu").sample(["cat"], num_inference_steps=1, output="tensor")
        for path in (models / "sd", folder)
    ]
    assert torch.equal(*pictures)
    changed(folder, "unet/config.json", cross_attention_dim=[32, 48])
    with pytest.raises(UserError, match=r"U-Nets with cross_attention_dim=\[32, 48\] are not supported"):
        recognise(folder).describe_folder(folder)


def test_a_model_without_text_is_named(models: Path, tmp_path: Path) -> None:
    """Image variations and the like."""
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    changed(folder, "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(
        UserError, match=r"makes no pictures from text alone: its model_index\.json names scheduler, unet"
    ):
        recognise(folder)


@pytest.mark.slow
def test_a_samplers_own_settings_change_nothing(models: Path, tmp_path: Path) -> None:
    folder = changed(
        shutil.copytree(models / "sd", tmp_path / "model"), "scheduler/scheduler_config.json",
        timestep_spacing="trailing", steps_offset=0, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True,
    )  # fmt: skip
    pictures = [
        fewstep.load_teacher(path, device="cpu").sample(["cat"], num_inference_steps=2, output="tensor")
        for path in (models / "sd", folder)
    ]
    assert torch.equal(*pictures)


# --- Classes a folder names, code it brings, weights it stores otherwise


def test_nothing_but_the_folders_weights_is_loaded(models: Path, tmp_path: Path) -> None:
    """transformers adds an adapter that lies beside them, in some versions to the base that it names, and kernels of the hub."""
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    for name in ("_attn_implementation", "attn_implementation"):
        text = json.loads((models / "sd/text_encoder/config.json").read_text())
        (folder / "text_encoder/config.json").write_text(json.dumps({**text, name: "someone/kernels"}))
        with pytest.raises(UserError, match=f"config.json has {name}='someone/kernels', code of the hub"):
            recognise(folder).text_encoders(folder)
    shutil.copyfile(models / "sd/text_encoder/config.json", folder / "text_encoder/config.json")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(models / "sdxl/text_encoder"), "r": 4}
    (folder / "text_encoder/adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=r"text_encoder has an adapter beside its weights \(adapter_config.json\)"):
        recognise(folder).text_encoders(folder)


def test_no_code_of_a_folder_is_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .py beside every component, an auto_map in every config, and nobody is asked on standard input."""
    canary = tmp_path / "canary"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    for part in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        (folder / part / "payload.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
        for config in (folder / part).glob("*config.json"):
            changed(
                folder / part, config.name, auto_map={"AutoModel": "payload.X", "AutoTokenizer": ["payload.X", None]}
            )
    family = recognise(folder)
    family.text_encoders(folder).encode(["cat"])
    family.autoencoder(folder)
    for part in ("text_encoder", "tokenizer"):
        index = {**json.loads((models / "sd/model_index.json").read_text()), part: ["payload", "X"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=f"its {part} is a X; of Stable Diffusion"):
            recognise(folder).text_encoders(folder)
    with pytest.raises(UserError, match="has auto_map="):  # a setting that no network here has
        family.load(folder)
    assert not canary.exists()


def test_a_pipeline_with_classes_of_its_own_is_refused(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    refuse_foreign_code(folder)
    changed(folder, "model_index.json", vae=["payload", "X"])
    with pytest.raises(UserError, match="its vae is a class of 'payload', and no code of a model folder is run here"):
        load_text_pipeline(folder)


def test_a_refiner_is_refused_in_one_sentence(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "sdxl", tmp_path / "model")
    changed(folder, "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(
        UserError, match=r"SDXL needs text_encoder and tokenizer, which model_index\.json does not name"
    ):
        recognise(folder).text_encoders(folder)


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("sdxl", "RealVisXL_V4.0_Lightning", r"of few steps by its name \(lightning\)"),
        ("sd", "models--me--dreamshaper-lcm/snapshots/0123", r"of few steps by its name \(lcm\)"),
        ("sd3", "stable-diffusion-3.5-large-turbo", "distil stabilityai/stable-diffusion-3.5-large$"),
    ],
)
def test_fine_tunes_of_few_steps_are_no_teachers(
    models: Path, tmp_path: Path, name: str, place: str, said: str
) -> None:
    folder = shutil.copytree(models / name, tmp_path / place)
    family = recognise(folder)
    with pytest.raises(UserError, match=said):
        family.refuse_as_teacher(folder)
    assert not family.read_card(folder).can_be_guided
    family.refuse_as_teacher(models / name)
    assert family.read_card(models / name).can_be_guided


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [("sd", "LatentConsistencyModelPipeline"), ("sdxl", "StableDiffusionXLInstructPix2PixPipeline")],
)
def test_pipelines_that_sample_in_another_way_are_refused(
    models: Path, tmp_path: Path, name: str, pipeline: str
) -> None:
    folder = shutil.copytree(models / name, tmp_path / "mine")
    changed(folder, "model_index.json", _class_name=pipeline)
    for read in (recognise(folder).load, recognise(folder).describe_folder):
        with pytest.raises(
            UserError, match=rf"model_index\.json names {pipeline}, which makes pictures in another way"
        ):
            read(folder)


@pytest.mark.slow
def test_a_variant_alone_is_read(models: Path, tmp_path: Path) -> None:
    """What `variant="fp16"` leaves on the disk: *.fp16.safetensors only."""
    folder = shutil.copytree(models / "sd", tmp_path / "model")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    pictures = [
        fewstep.load_teacher(path, device="cpu").sample(["cat"], num_inference_steps=2, output="tensor")
        for path in (models / "sd", folder)
    ]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_networks_own_defaults_are_understood_and_other_values_are_not(name: str) -> None:
    """Every key that diffusers writes for the class, and for the shipped teachers."""
    family: Any = family_named(name)
    kind = getattr(diffusers, family.network_class)
    written = {key: part.default for key, part in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    assert set(family.network_keys.read) <= set(written)
    config = {"_class_name": family.network_class, **written}
    refuse_other_keys(config, family.network_keys, family.component, family.title)
    for key in set(written) - set(family.network_keys.read) | {"a_key_of_tomorrow"}:
        with pytest.raises(ValueError, match=f"has {key}='another', which this version does not understand"):
            refuse_other_keys({**config, key: "another"}, family.network_keys, family.component, family.title)


@pytest.mark.parametrize("bundled", ["sd", "sdxl"])
def test_the_shipped_configs_are_understood(bundled: str) -> None:
    folder = Path(fewstep.__file__).parent / "assets/emoji" / bundled
    family: Any = family_named(bundled)
    for part in (family.component, "vae"):
        config = json.loads((folder / part / "config.json").read_text())
        known = family.network_keys if part == family.component else _VAE_KEYS
        refuse_other_keys(config, known, part, family.title)
    with pytest.raises(ValueError, match="its vae has tomorrow=1, which this version does not understand"):
        refuse_other_keys({**config, "tomorrow": 1}, _VAE_KEYS, "vae", family.title)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("unet/config.json", {"addition_time_embed_dim": 4}, "its text encoders give pooled embeddings of width"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 5}, "its tokenizers say other numbers of tokens"),
        (
            "tokenizer*/tokenizer_config.json",
            {"model_max_length": 40},
            r"tokenizer cuts prompts at 40 tokens \(model_max_length\), its encoder has places for 16",
        ),
    ],
)
def test_parts_that_do_not_belong_together(
    models: Path, tmp_path: Path, file: str, values: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(models / "sdxl", tmp_path / "model")
    for path in folder.glob(file):
        changed(folder, str(path.relative_to(folder)), **values)
    with pytest.raises(UserError, match=said):
        fewstep.load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)


def test_a_text_encoder_of_another_width(models: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = shutil.copytree(models / "sd", tmp_path / "model")
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_size = 2 * config.hidden_size
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    with pytest.raises(UserError, match="its text encoders give text embeddings of width 64, its network takes 32"):
        fewstep.load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)
