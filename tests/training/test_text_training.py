"""Text-to-image runs through the one trainer: every memory mode, resumed exactly, and the generator they write."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.data.captioned_images import open_captioned_images
from fewstep.diffusion.denoiser import guided_denoise
from fewstep.distillation.terms import DistributionMatching
from fewstep.errors import UserError
from fewstep.estimate import describe
from fewstep.evaluation.evaluate import EvaluateOptions
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.export.export import ExportOptions, export_generator
from fewstep.families.registry import recognise
from fewstep.formats.fingerprints import network_fingerprint, vae_fingerprint
from fewstep.preparation.latents import prepare_latents
from fewstep.settings import TrainSettings, flatten_settings, parse_settings
from fewstep.training.build import build_chosen_roles, build_distillation, open_teacher
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.checkpoint_models import CheckpointModels
from fewstep.training.distill import DistillationJob
from fewstep.training.run import train
from fewstep.training.scoring import watch_run
from tests.cli.test_main import fewstep as fewstep_command
from tests.tiny_flow_models import tiny_flux2_klein_folder, tiny_qwen_image_folder, tiny_z_image_folder
from tests.tiny_models import tiny_sd2_folder, tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder
from tests.training.helpers import _merged

pytestmark = pytest.mark.usefixtures("few_teacher_steps")

PROMPTS = ["red cat", "a dog", "blue bird", "dog", "cat"]
FOLDERS = {
    "sd": tiny_sd_folder, "sd2": tiny_sd2_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder,
    "z-image": tiny_z_image_folder,
    "flux2-klein": tiny_flux2_klein_folder,
    "qwen-image": tiny_qwen_image_folder,
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and captioned pictures."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pictures = folder / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": PROMPTS[number % 5]}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    for family, make in FOLDERS.items():
        make(folder / family)
        known: Any = recognise(folder / family)
        prepare_latents(
            known.autoencoder(folder / family), known.text_encoders(folder / family), open_captioned_images(str(pictures)),
            folder / f"latents-{family}", resolution=16, vae_fingerprint=vae_fingerprint(folder / family),
        )  # fmt: skip
    return folder


def settings(work: Path, family: str, folder: Path, **changes: dict[str, Any]) -> TrainSettings:
    """Four-step DMD2 with GAN on a tiny model."""
    values: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(work / family), "guidance_scale": 3.0},
        "generator": {"step_indices": [999, 749, 499, 249]},
        "data": {"prompts": str(work / "prompts.txt"), "latents": str(work / f"latents-{family}")},
        "memory": {"lora_rank": 4},
        "losses": {"gan_generator_weight": 5e-3, "gan_discriminator_weight": 1e-2},
        "optimizer": {"generator_lr": 1e-3, "fake_score_lr": 1e-3, "warmup_steps": 2},
        "training": {"num_steps": 4, "batch_size": 3, "generator_every": 2, "seed": 3},
        "compute": {"device": "cpu", "precision": "fp32"},
        "run": {
            "folder": str(folder), "log_every": 2, "sample_every": 100, "checkpoint_every": 2, "sample_images": 3,
        },
    }  # fmt: skip
    return parse_settings(TrainSettings, _merged(values, changes), "test")


MODES = {
    "full": {"mode": "full"},
    "full, recomputed": {"mode": "full", "checkpoint_activations": True},
    "lora_generator": {"mode": "lora_generator", "lora_rank": 4},
    "shared_base": {"mode": "shared_base", "lora_rank": 4},
    "shared_base, recomputed": {
        "mode": "shared_base", "lora_rank": 4, "checkpoint_activations": True, "lora_dropout": 0.2,
    },
    "lora_generator, int8": {"mode": "lora_generator", "lora_rank": 4, "base": "int8"},
    "shared_base, nf4, recomputed": {
        "mode": "shared_base", "lora_rank": 4, "base": "nf4", "checkpoint_activations": True, "lora_dropout": 0.2,
    },
}  # fmt: skip


TAPS = {mode: {"gan_taps": [0.5, 1.0]} for mode in ("lora_generator", "shared_base, nf4, recomputed")}  # elsewhere one


@pytest.mark.parametrize(
    ("family", "mode"),
    [  # each family, each mode, with and without recomputing; the other pairs in the long run
        ("sd", "lora_generator, int8"),
        ("sdxl", "full, recomputed"),
        ("sd3", "shared_base, nf4, recomputed"),
        ("qwen-image", "lora_generator"),
        # of Z-Image, test_teacher_loras.py trains a shared base in the default run
        *(
            pytest.param(family, mode, marks=pytest.mark.long)
            for family in ("z-image", "flux2-klein", "qwen-image")
            for mode in ("full", "lora_generator", "shared_base, recomputed", "shared_base, nf4, recomputed")
            if (family, mode) != ("qwen-image", "lora_generator")
        ),
        *(pytest.param("sd", mode, marks=pytest.mark.long) for mode in MODES if mode != "lora_generator, int8"),
        pytest.param("sd3", "shared_base, recomputed", marks=pytest.mark.long),
        pytest.param("sdxl", "shared_base", marks=pytest.mark.long),
    ],
)
def test_trains_resumes_exactly_and_writes_a_generator(work: Path, family: str, mode: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"memory": MODES[mode], "losses": TAPS.get(mode, {})}
    whole = train(settings(work, family, tmp_path / "whole", **changes)).model_folder
    train(settings(work, family, tmp_path / "parts", training={"num_steps": 2}, **changes))
    parts = train(settings(work, family, tmp_path / "parts", **changes)).model_folder
    expected, _ = read_checkpoint(list_checkpoints(tmp_path / "whole/checkpoints")[-1])
    found, _ = read_checkpoint(list_checkpoints(tmp_path / "parts/checkpoints")[-1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    generator = fewstep.load_generator(whole, device="cpu")
    pictures = generator.sample(["red cat", "a dog"], seed=1, output="tensor")
    watched = CheckpointModels(tmp_path / "whole", device="cpu", precision="fp32")
    _, models = watched.read(list_checkpoints(tmp_path / "whole/checkpoints")[-1])
    (raw,) = [model.sample(["red cat", "a dog"], seed=1, output="tensor") for _, model in models]
    assert torch.equal(pictures, raw)  # as `fewstep evaluate --watch` reads it
    again = fewstep.load_generator(parts, device="cpu")
    assert torch.equal(pictures, again.sample(["red cat", "a dog"], seed=1, output="tensor"))
    assert (tmp_path / "whole/samples/generator_00000001.png").is_file()
    assert (tmp_path / "whole/samples/prompts.txt").read_text().splitlines() == PROMPTS[:3]
    metrics = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert any(line.get("gan_generator_norm_at_x0", 0) > 0 for line in metrics)
    teacher = fewstep.load_teacher(work / family, device="cpu")
    start = teacher.student(teacher.denoiser, generator.card).sample(["red cat", "a dog"], seed=1, output="tensor")  # type: ignore[attr-defined]
    assert (start - pictures).abs().max() > 1e-4  # it moved


@pytest.mark.slow
def test_a_watched_run_of_loras_is_scored_to_its_end(work: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    SmallClassifier(3, 4, 4).eval().save(tmp_path / "features")
    train(settings(work, "sd", tmp_path / "run", memory=MODES["shared_base"]))
    options = EvaluateOptions(
        str(tmp_path / "features"), images=str(work / "pictures"), prompts=tuple(PROMPTS), num_images=6, cache=False,
        device="cpu", precision="fp32",
    )  # fmt: skip
    watch_run(tmp_path / "run", options)
    found = json.loads((tmp_path / "run/evaluation.json").read_text(encoding="utf-8"))
    assert [(row["step"], row["weights"]) for row in found] == [(2, "raw"), (4, "raw")]
    best = fewstep.load_generator(tmp_path / "run/evaluation_best", device="cpu")
    assert best.card.made_with["num_steps"] == min(found, key=lambda row: row["frechet_distance"])["step"]


def test_memory_modes_agree_at_the_first_step(work: Path, tmp_path: Path) -> None:
    """Before anything is trained all modes are the same three networks: the first losses are equal."""
    first = {}
    for mode, memory in MODES.items():
        if "recomputed" in mode or "int8" in mode:  # equal to what is kept: tests/networks/test_adapters.py
            continue
        folder = tmp_path / mode.replace(", ", "-")
        train(settings(work, "sdxl", folder, memory=memory, training={"num_steps": 1}))
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        names = ("distribution_matching_loss", "fake_score_loss", "gan_discriminator_loss", "gan_generator_loss")
        first[mode] = [line[name] for name in names]
    for mode in first:
        assert first[mode] == pytest.approx(first["full"], rel=1e-4), mode


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("sd3", "full"),
        *(
            (family, mode)
            for family in ("z-image", "flux2-klein", "qwen-image")
            for mode in ("full", "lora_generator", "shared_base")
        ),
    ],
)
def test_flow_models_train_50_steps(work: Path, tmp_path: Path, family: str, mode: str) -> None:
    changes = {"training": {"num_steps": 50}, "optimizer": {"generator_lr": 1e-4, "fake_score_lr": 1e-3}}
    train(
        settings(
            work,
            family,
            tmp_path / "run",
            run={"checkpoint_every": 50, "folder": str(tmp_path / "run")},
            memory=MODES[mode],
            **changes,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["fake_score_loss"] for line in lines if "fake_score_loss" in line]
    assert len(losses) == 50
    assert sum(losses[-10:]) < sum(losses[:10])  # the fake score follows the generator


def test_prompts_alone_are_enough_without_gan(work: Path, tmp_path: Path) -> None:
    no_gan = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
    for name, kind in (("stored", "stored"), ("computed", "computed")):
        data = {"latents": "", "text_embeddings": kind}
        train(settings(work, "sd", tmp_path / name, losses=no_gan, data=data))
    assert (tmp_path / "stored/embeddings/manifest.json").is_file()
    assert not (tmp_path / "computed/embeddings").exists()
    stored, _ = read_checkpoint(list_checkpoints(tmp_path / "stored/checkpoints")[-1])
    computed, _ = read_checkpoint(list_checkpoints(tmp_path / "computed/checkpoints")[-1])
    for name, value in stored.items():  # float16 on disk against float32
        if name.startswith("generator."):
            assert torch.allclose(value, computed[name], atol=2e-3), name


def test_noised_data_ablation_trains(work: Path, tmp_path: Path) -> None:
    generator = {"step_indices": [999, 749, 499, 249], "training_inputs": "noised_data"}
    asked = settings(work, "sd", tmp_path / "run", generator=generator)
    train(asked)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fake_score_loss" in line] == list(range(asked.training.num_steps))


def test_a_one_step_generator_at_399(work: Path, tmp_path: Path) -> None:
    result = train(settings(work, "sdxl", tmp_path / "run", generator={"step_indices": [399]})).model_folder
    generator = fewstep.load_generator(result, device="cpu")
    assert generator.card.step_indices == (399,)
    assert generator.evaluations() == 1


def test_average_of_a_lora_generator(work: Path, tmp_path: Path) -> None:
    generator = {"step_indices": [999], "ema_half_life_images": 5}
    result = train(
        settings(work, "sd", tmp_path / "run", generator=generator, memory=MODES["shared_base"])
    ).model_folder
    tensors, _ = read_checkpoint(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    names = [name for name in tensors if name.startswith("average.")]
    assert names
    assert any(not torch.equal(tensors[n], tensors[n.replace("average.", "generator.")]) for n in names)
    exported = fewstep.load_generator(result, device="cpu").denoiser
    state = exported.state_dict()
    assert all(torch.equal(state[name.removeprefix("average.")], tensors[name]) for name in names)


@pytest.mark.parametrize(
    "mode", [*(pytest.param(name, marks=pytest.mark.long) for name in ("full", "lora_generator")), "shared_base"]
)
def test_continues_from_an_earlier_run(work: Path, tmp_path: Path, mode: str) -> None:
    """The second run starts from the first one's generator and fake score; its head is new, the first had none."""
    no_gan = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
    train(settings(work, "sd", tmp_path / "first", losses=no_gan, memory=MODES[mode]))
    first, _ = read_checkpoint(list_checkpoints(tmp_path / "first/checkpoints")[-1])
    generator = {"step_indices": [999], "start_from": str(tmp_path / "first")}
    second = settings(work, "sd", tmp_path / "second", memory=MODES[mode], generator=generator)
    teacher = open_teacher(second)
    roles = DistillationJob(second, teacher).run.roles
    fresh = build_chosen_roles(second, open_teacher(second).denoiser)
    for name in ("generator", "fake_score"):
        start = getattr(roles, name).state_dict()
        assert {f"{name}.{key}" for key in start} == {key for key in first if key.startswith(f"{name}.")}
        assert all(torch.equal(value, first[f"{name}.{key}"]) for key, value in start.items())
        untrained = getattr(fresh, name).state_dict()
        assert any(not torch.equal(value, untrained[key]) for key, value in start.items())
    train(second)


@pytest.fixture(scope="module")
def shared_base_run(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of a shared base without GAN."""
    no_gan = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
    folder = tmp_path_factory.mktemp("earlier") / "run"
    train(settings(work, "sd", folder, losses=no_gan, memory=MODES["shared_base"], training={"num_steps": 1}))
    return folder


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        ({"lora_alpha": 16.0}, "memory.lora was [4, 8.0] in that run and is [4, 16.0] here; set it back"),
        ({"lora_rank": 8}, "memory.lora was [4, 8.0] in that run and is [8, 8.0] here; set it back"),
        ({"mode": "lora_generator"}, "memory.mode was 'shared_base' in that run and is 'lora_generator' here; set it back"),
        ({"mode": "full"}, "memory.mode was 'shared_base' in that run and is 'full' here; set it back"),
    ],
)  # fmt: skip
def test_an_earlier_run_of_another_memory_is_refused(
    work: Path, shared_base_run: Path, tmp_path: Path, memory: dict[str, Any], told: str
) -> None:
    """The same LoRA under another alpha or rank would be another update; nothing is trained."""
    shutil.copytree(shared_base_run, tmp_path / "first")
    generator = {"step_indices": [999], "start_from": str(tmp_path / "first")}
    second = settings(work, "sd", tmp_path / "second", memory=MODES["shared_base"] | memory, generator=generator)
    with pytest.raises(UserError) as error:
        train(second)
    assert str(error.value) == f"generator.start_from={tmp_path / 'first'}: {told}"
    assert not (tmp_path / "second/checkpoints").exists()
    (tmp_path / "first/settings.json").unlink()
    if second.memory.mode != "full":
        with pytest.raises(UserError, match=r"settings\.json, which says how its LoRA is scaled, cannot be read"):
            train(second)


def test_a_schedule_that_no_stock_scheduler_carries_is_told_at_the_start(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words in which the export refuses it, on the console and in a dry run; the run goes on."""
    steps = {"step_indices": [999, 666, 333]}
    odd = settings(work, "sd", tmp_path / "run", generator=steps, training={"num_steps": 1})
    console = Console(file=io.StringIO(), width=300)
    result = train(odd, console=console).model_folder
    with pytest.raises(
        UserError, match=r"cannot travel .*: the nearest are generator\.step_indices=\[998, 665, 332\]$"
    ) as error:
        export_generator(result, tmp_path / "out", ExportOptions(num_samples=0, device="cpu"))
    assert f"warning: {error.value}\n" in console.file.getvalue()  # type: ignore[attr-defined]
    known = describe.estimate_run(odd, open_teacher(odd).denoiser, autoencoder=None, pictures=True)
    monkeypatch.setattr(describe, "estimate_run", lambda *_, **__: known)  # memory is not the subject
    assert f"warning: {error.value}" in describe.describe_distillation(odd)
    even = settings(work, "sd", tmp_path / "run", generator={"step_indices": [998, 665, 332]})
    assert not any("warning" in line for line in describe.describe_distillation(even))


def test_steps_beyond_the_teachers_grid_are_refused(work: Path, tmp_path: Path) -> None:
    short = shutil.copytree(work / "sd", tmp_path / "short")
    config = short / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 500'))
    changes: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(short)},
        "data": {"latents": str(work / "latents-sd")},
    }
    with pytest.raises(UserError, match=r"generator\.step_indices \[999\] lie outside 0\.\.499"):
        train(settings(work, "sd", tmp_path / "run", generator={"step_indices": [999, 499]}, **changes))
    with pytest.raises(UserError, match=r"losses\.level_indices=\[20, 980\]: the teacher's grid ends at 499"):
        train(settings(work, "sd", tmp_path / "run", generator={"step_indices": [499]}, **changes))


@pytest.mark.parametrize("mode", ["full", "lora_generator", "shared_base"])
def test_the_norm_of_guidance_is_limited_in_every_memory_mode(work: Path, tmp_path: Path, mode: str) -> None:
    """The term's estimate of a step is the capped one, and so are the teacher's sample pictures."""
    teachers = []
    for number, scale in enumerate((4.0, [4.0, 0.5])):
        chosen = settings(
            work, "z-image", tmp_path / str(number), teacher={"guidance_scale": scale}, memory={"mode": mode},
            training={"num_steps": 1},
        )  # fmt: skip
        run = build_distillation(
            chosen, teacher := open_teacher(chosen), teacher.conditioner.table(PROMPTS, teacher.size)
        )
        torch.manual_seed(0)
        noisy, level = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4])
        condition = teacher.conditioner.table(PROMPTS, teacher.size).rows(torch.arange(2))
        (matching,) = (term for term in run.generator_terms if isinstance(term, DistributionMatching))
        plain, guided = (
            guided_denoise(matching.teacher, noisy, level, condition, w) for w in (1.0, matching.guidance_scale)
        )
        teachers.append([(noisy - x0).flatten(1).norm(dim=1) for x0 in (plain, guided)])
        train(chosen)
    torch.testing.assert_close(teachers[1][1], 0.5 * teachers[1][0])
    assert (teachers[0][1] > 0.6 * teachers[0][0]).all()
    first, second = ((tmp_path / name / "samples").glob("teacher_*.png") for name in "01")
    assert next(first).read_bytes() != next(second).read_bytes()


def test_a_stable_diffusion_2_teacher(work: Path, tmp_path: Path) -> None:
    """Two steps on what 2.x has and 1.x has not: gelu encoders, linear projections, heads per block, v-prediction."""
    result = train(
        settings(work, "sd2", tmp_path / "run", memory=MODES["shared_base"], training={"num_steps": 2})
    ).model_folder
    generator = fewstep.load_generator(result, device="cpu")
    assert generator.denoiser.base_network.prediction == "v_prediction"
    assert generator.conditioner.encoders.encode(["red cat"]).text.shape == (1, 16, 32)
    layers = generator.denoiser.describe()["lora"]["targets"]
    assert {"proj_in", "proj_out", "to_q", "conv1"} <= set(layers)  # the projections are linear layers here
    teacher = fewstep.load_teacher(work / "sd2", device="cpu")
    start = teacher.student(teacher.denoiser, generator.card).sample(["red cat"], seed=1, output="tensor")  # type: ignore[attr-defined]
    assert (start - generator.sample(["red cat"], seed=1, output="tensor")).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_eight_steps_train_and_travel(work: Path, tmp_path: Path, family: str) -> None:
    eight = list(range(999, 0, -125))
    result = train(
        settings(work, family, tmp_path / "run", generator={"step_indices": eight}, training={"num_steps": 1})
    ).model_folder
    generator = fewstep.load_generator(result, device="cpu")
    assert generator.evaluations() == 8
    pictures = generator.sample(["red cat"], seed=4, output="tensor")
    options = ExportOptions(num_samples=0, precision="fp32", device="cpu")
    pipeline = fewstep.load_pipeline(export_generator(result, tmp_path / "out", options))
    pipeline.scheduler.set_timesteps(8)
    assert len(pipeline.scheduler.timesteps) == 8
    exported = fewstep.load_generator(tmp_path / "out", device="cpu")
    assert (exported.sample(["red cat"], seed=4, output="tensor") - pictures).abs().max() < 1e-5


def typed(settings: TrainSettings) -> list[str]:
    """The settings as a user types them."""
    return [f"{key}={json.dumps(value)}" for key, value in flatten_settings(settings).items()]


@pytest.mark.long
def test_a_gan_weight_is_suggested_for_a_text_model(work: Path, tmp_path: Path) -> None:
    """As a user types it; the weight is the quotient of the norms it names, and no run is started."""
    (tmp_path / "recipe.toml").write_text("")
    one = settings(
        work, "sd", tmp_path / "run", generator={"step_indices": [999]}, memory=MODES["shared_base"],
        training={"generator_every": 1, "batch_size": 2},
    )  # fmt: skip
    answer = fewstep_command("train", tmp_path / "recipe.toml", *typed(one), "--suggest-gan-weight")
    assert answer.code == 0, answer.err
    told = re.fullmatch(
        r"losses\.gan_weights=\[(\S+), 0\.01\] makes the GAN's gradient at the generator's output as strong as distribution "
        r"matching's \((\S+) against (\S+) at weight 1; mean of 20 generator updates\)\.\n", answer.out,
    )  # fmt: skip
    assert told
    weight, matching, gan = map(float, told.groups())
    assert weight == pytest.approx(matching / gan, rel=0.06)  # as many digits as are printed
    assert not (tmp_path / "run/checkpoints").exists()
    alone = ["losses.distribution_matching_weight=0", "--suggest-gan-weight"]
    answer = fewstep_command("train", tmp_path / "recipe.toml", *typed(one), *alone)
    assert (answer.code, answer.out) == (2, "")
    assert "--suggest-gan-weight compares with distribution matching" in answer.err


def test_the_best_generator_of_a_text_run_is_kept(work: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    SmallClassifier(3, 4, width=4, name="tiny").eval().save(tmp_path / "features")
    pictures = torch.rand(60, 3, 16, 16) * 2 - 1
    FeatureStatistics.of(SmallClassifier.load(tmp_path / "features")(pictures)).save(tmp_path / "real.npz")
    (tmp_path / "recipe.toml").write_text("")
    best = {
        "metric": "frechet_distance", "features": str(tmp_path / "features"), "reference": str(tmp_path / "real.npz"),
        "num_images": 50,
    }  # fmt: skip
    run = settings(
        work, "sd", tmp_path / "run", generator={"step_indices": [999]}, best=best, memory=MODES["shared_base"]
    )
    answer = fewstep_command("train", tmp_path / "recipe.toml", *typed(run))
    assert answer.code == 0, answer.err
    rows = json.loads((tmp_path / "run/best.json").read_text())
    assert [row["step"] for row in rows] == [2, 4]
    kept = fewstep.load_generator(tmp_path / "run/best", device="cpu")
    assert kept.card.made_with["num_steps"] == min(rows, key=lambda row: row["frechet_distance"])["step"]
    answer = fewstep_command(
        "evaluate", tmp_path / "run/best", "--features", best["features"], "--reference", best["reference"], "--prompts",
        work / "prompts.txt", "--num-images", 50, "--seed", 1, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert f"{min(row['frechet_distance'] for row in rows):.3f}" in answer.out  # what was measured is what is kept


def test_a_few_step_model_is_not_guided(work: Path, tmp_path: Path) -> None:
    """Its scheduler says so; without guidance it may be a teacher. A network that says nothing cannot be told."""
    folder = shutil.copytree(work / "sd", tmp_path / "consistent")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", "LCMScheduler"))
    teacher = {"path": str(folder), "guidance_scale": 3.0}
    with pytest.raises(UserError, match=r"guidance_scale=3\.0: this is a few-step model, by its scheduler or its name"):
        train(settings(work, "sd", tmp_path / "run", teacher=teacher))
    train(settings(work, "sd", tmp_path / "run", teacher=teacher | {"guidance_scale": 1.0}, training={"num_steps": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"prompts": "", "latents": ""}, "losses": {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}},
            r"data\.prompts is not set",
        ),
        ({"data": {"prompts": "nothing.txt"}}, r"nothing\.txt"),
        ({"data": {"latents": ""}}, r"data\.images is not set"),
        ({"data": {"latents": "LATENTS-sdxl"}}, "another VAE|another encoder"),
        ({"memory": {"mode": "shared_base", "lora_targets": ["to_quarry"]}}, r"memory\.lora_targets \['to_quarry'\] match no layer"),
        ({"teacher": {"path": "missing"}}, "missing does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(work: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = json.loads(json.dumps(changes).replace("LATENTS", str(work / "latents")))
    with pytest.raises(UserError, match=message):
        train(settings(work, "sd", tmp_path / "run", **changes))
    assert not (tmp_path / "run/checkpoints").exists()


def test_warm_up_then_distillation(work: Path, tmp_path: Path) -> None:
    """Pairs, regression alone, and a run that starts from its generator; the warm-up resumes exactly."""
    run_command("prepare", "pairs", work / "sdxl", tmp_path / "pairs", "--num-pairs", 6, "--teacher-steps", 3,
                "--guidance-scale", 3, "--prompts", work / "prompts.txt", "--device", "cpu")  # fmt: skip
    alone = {
        "distribution_matching_weight": 0.0, "gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0,
        "regression_weight": 1.0,
    }  # fmt: skip
    one_step = {"step_indices": [399]}
    data = {"pairs": str(tmp_path / "pairs"), "prompts": "", "latents": ""}
    many = {"num_steps": 16}
    options: dict[str, Any] = {"losses": alone, "generator": one_step, "data": data}
    train(settings(work, "sdxl", tmp_path / "warm", training=many, **options))
    lines = [json.loads(line) for line in (tmp_path / "warm/metrics.jsonl").read_text().splitlines()]
    losses = [line["regression_loss"] for line in lines if "regression_loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    train(settings(work, "sdxl", tmp_path / "parts", training={"num_steps": 8}, **options))
    train(settings(work, "sdxl", tmp_path / "parts", training=many, **options))
    whole, _ = read_checkpoint(list_checkpoints(tmp_path / "warm/checkpoints")[-1])
    parts, _ = read_checkpoint(list_checkpoints(tmp_path / "parts/checkpoints")[-1])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(name.startswith("fake_score") for name in whole)
    after = {"step_indices": [399], "start_from": str(tmp_path / "warm")}
    train(settings(work, "sdxl", tmp_path / "after", generator=after, training={"num_steps": 1}))
    end, _ = read_checkpoint(list_checkpoints(tmp_path / "after/checkpoints")[-1])
    moved = max((end[n] - whole[n]).abs().max().item() for n in whole if n.startswith("generator."))
    assert moved < 5e-3  # one small step away from the warm-up, not from the teacher


def test_pairs_belong_to_one_network(work: Path, tmp_path: Path) -> None:
    """A fine-tune with the same encoders and VAE is another teacher; pairs that do not say whose they are get a warning."""
    run_command("prepare", "pairs", work / "sd", tmp_path / "pairs", "--num-pairs", 2, "--teacher-steps", 1,
                "--prompts", work / "prompts.txt", "--device", "cpu")  # fmt: skip
    other = shutil.copytree(work / "sd", tmp_path / "tuned")
    weights = load_file(other / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, other / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def warm_up(path: Path, name: str) -> str:
        alone = {"distribution_matching_weight": 0.0, "gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
        console = Console(file=io.StringIO(), width=300)
        train(settings(
            work, "sd", tmp_path / name, losses={**alone, "regression_weight": 1.0}, generator={"step_indices": [999]},
            teacher={"path": str(path)}, training={"num_steps": 1},
            data={"pairs": str(tmp_path / "pairs"), "prompts": "", "latents": ""},
        ), console=console)  # fmt: skip
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    assert "warning" not in warm_up(work / "sd", "own")
    with pytest.raises(
        UserError, match=r"pairs was made by another network than the teacher's .*prepare pairs with this"
    ):
        warm_up(other, "other")
    manifest = json.loads((tmp_path / "pairs/manifest.json").read_text())
    assert manifest["job"].pop("network") == network_fingerprint(work / "sd")
    (tmp_path / "pairs/manifest.json").write_text(json.dumps(manifest))
    assert "does not say which network made it" in warm_up(other, "older")


def run_command(*arguments: object) -> None:
    from typer.testing import CliRunner

    from fewstep.cli.main import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
