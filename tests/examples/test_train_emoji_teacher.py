"""The emoji teachers for a few steps on generated pictures: both folders open in diffusers, held-out texts stay unseen."""

import json
import shutil
import socket
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fewstep import devices
from fewstep.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import emoji_teacher_data as data
import emoji_teacher_models as models
import emoji_teacher_training as training
import train_emoji_teacher as script

# diffusers' Euler scheduler hands torch tensors to NumPy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL = models.Sizes(
    vae_channels=(8, 8, 16), vae_groups=4, unet_channels=(32, 32), text_width=32, text_layers=2,
    first_text_width=32, first_text_layers=2,
)  # fmt: skip
TEXTS = [
    f"{color} {shape}, {kind}s" for color in ("red", "blue") for kind, shape in zip("ab", ("disc", "bar"), strict=True)
]
PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def write_emoji(folder: Path) -> Path:
    """12 noisy pictures, three for each of four texts."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for number in range(12):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            row = {"file_name": f"{number}.png", "text": TEXTS[number % 4], "group": f"group{number % 4}"}
            lines.write(json.dumps(row) + "\n")
    return folder


def run(pictures: Path, out: Path, stage: str, *more: str) -> None:
    options = ["--stage", stage, "--steps", "2", "--batch", "4", "--sampling-steps", "2", "--text-steps", "2"]
    script.main([str(pictures), str(out), *options, *more], SMALL)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emoji(tmp_path_factory.mktemp("emoji") / "pictures")


@pytest.fixture(scope="module")
def finished(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages with networking off."""
    out = tmp_path_factory.mktemp("emoji") / "run"

    def refuse(*args: object) -> None:
        raise AssertionError("the script opened a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(devices, "_fast_precision", lambda device: ("fp32", ""))  # as in tests, which come after it
        for stage in ("vae", "sd", "sdxl"):
            run(emoji, out, stage)
    return out


@pytest.mark.parametrize("stage", PIPELINES)
def test_folder_opens_in_diffusers_and_samples(finished: Path, stage: str) -> None:
    pipeline = PIPELINES[stage].from_pretrained(finished / stage)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["Red DISC, as", "zzz 漢"], num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.01
    expected = {"sd": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}[stage]
    assert type(pipeline.scheduler).__name__ == expected
    assert pipeline.tokenizer.model_max_length == 24


@pytest.mark.parametrize("stage", PIPELINES)
def test_training_conditions_as_the_pipeline_samples(finished: Path, stage: str) -> None:
    """predict_noise gives what the U-Net gives for the pipeline's own embeddings, the empty prompt included."""
    pipeline = PIPELINES[stage].from_pretrained(finished / stage)
    found = pipeline.encode_prompt(
        "blue bar, bs", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    embeddings = torch.cat([found[1], found[0]])
    noisy, timesteps = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), torch.tensor([400, 400])
    added = None
    if stage == "sdxl":
        assert not found[1].any()
        time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
        added = {"text_embeds": torch.cat([found[3], found[2]]), "time_ids": time_ids}
    ids = data.token_ids(pipeline.tokenizer, ["", "blue bar, bs"])
    networks = nn.ModuleDict({n: m for n, m in pipeline.components.items() if n.startswith(("unet", "text_encoder"))})
    with torch.no_grad():
        expected = pipeline.unet(noisy, timesteps, embeddings, added_cond_kwargs=added).sample
        actual = models.predict_noise(networks, noisy, timesteps, ids, torch.tensor([True, False]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-4  # the text reaches the output


def test_files_of_a_folder(finished: Path) -> None:
    for stage in PIPELINES:
        names = {str(path.relative_to(finished / stage)) for path in (finished / stage).rglob("*")}
        assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "split.json", "README.md"} <= names
        weights = load_file(finished / stage / "unet/diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        card = (finished / stage / "README.md").read_text()
        assert f"--stage {stage} --steps 2" in card
        assert "--stage vae --steps 2" in card
        assert "3 trained on, 1 held out" in card
        assert list((finished / "samples").glob(f"{stage}_*.png"))


def test_latents_have_unit_deviation(finished: Path) -> None:
    assert load_file(finished / "vae/latents.safetensors")["latents"].std() == pytest.approx(1, abs=1e-3)
    vae = diffusers.AutoencoderKL.from_pretrained(finished / "sd", subfolder="vae")
    assert vae.config.scaling_factor != 0.18215


def test_held_out_pictures_do_not_change_the_weights(finished: Path, emoji: Path, tmp_path: Path) -> None:
    """The same run with the held-out pictures blackened gives the same autoencoder and the same model."""
    split = json.loads((finished / "sd/split.json").read_text())
    (held_out,) = split["held_out"]
    assert held_out not in split["train"]
    assert split["held_out"] | split["train"] == {text: f"group{number}" for number, text in enumerate(TEXTS)}
    changed = shutil.copytree(emoji, tmp_path / "changed")
    for row in data.read_rows(changed):
        if row["text"] == held_out:
            Image.new("RGB", (64, 64)).save(changed / row["file_name"])
    for stage in ("vae", "sd"):
        run(changed, tmp_path / "again", stage)
    parts = ("vae/latents", "sd/unet/diffusion_pytorch_model", "sd/text_encoder/model")
    for name in (f"{part}.safetensors" for part in parts):
        one, other = load_file(finished / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_any_text_has_tokens(tmp_path: Path) -> None:
    tokenizer = data.build_tokenizer(["red apple, food", "red car, things"], tmp_path / "tokenizer")
    assert tokenizer.tokenize("RED") == ["red</w>"]
    assert len(tokenizer.tokenize("漢")) == 3  # its bytes
    assert tokenizer.decode(tokenizer("Zebra, red 9 ç", add_special_tokens=False).input_ids) == "zebra , red 9 ç"
    start, *_, last = data.token_ids(tokenizer, [""])[0].tolist()
    assert (start, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in tokenizer("xyz ~!", add_special_tokens=False).input_ids


def test_captions_are_drawn_in_their_shares() -> None:
    assert data.caption_variants("hand: left, thumb, body") == (
        "",
        "hand: left, thumb, body",
        "hand: left, thumb",
        "body",
    )
    captions = data.Captions.__new__(data.Captions)
    captions.ids = torch.arange(8).view(2, 4, 1)
    captions.text_of_row = torch.tensor([0, 0, 0, 0, 1])
    captions.weights = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0])
    rows, ids, empty = captions.draw(20_000, torch.Generator().manual_seed(0))
    assert empty.float().mean() == pytest.approx(0.10, abs=0.01)
    assert (rows == 4).float().mean() == pytest.approx(1 / 3, abs=0.02)
    assert torch.equal(ids[:, 0] // 4, (rows == 4).long())
    assert torch.equal(ids[:, 0] % 4 == 0, empty)


def test_loss_weighs_the_error_by_a_cut_signal_to_noise() -> None:
    noise, predicted = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    loss = training.diffusion_loss(predicted, noise, torch.tensor([0.5, 50.0]))
    assert loss.item() == pytest.approx((0.8 / 0.5 + 5.3 / 50) / 2)


def test_both_models_fit_their_budget_and_the_gan_head(tmp_path: Path) -> None:
    tokenizer = data.build_tokenizer(TEXTS, tmp_path / "tokenizer")
    networks = [*models.build_networks("sd", models.Sizes(), tokenizer).values()]
    networks += [*models.build_networks("sdxl", models.Sizes(), tokenizer).values()]
    networks += [models.build_vae(models.Sizes())] * 2
    assert 2 * sum(parameter.numel() for network in networks for parameter in network.parameters()) < 26e6
    assert networks[0].config.block_out_channels[-1] >= 128


def break_nothing(folder: Path) -> None: ...


def remove_pictures(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("")


def garble_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')


def enlarge_picture(folder: Path) -> None:
    Image.new("RGB", (65, 64)).save(folder / "3.png")


def cut_picture(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove_pictures, ["vae"], r"emoji is no folder: give the folder with the emoji pictures"),
        (lambda folder: (folder / "metadata.jsonl").unlink(), ["vae"], r"emoji has no metadata.jsonl"),
        (empty_metadata, ["vae"], r"metadata.jsonl is empty"),
        (garble_metadata, ["vae"], r"metadata.jsonl, line 1: expected JSON with file_name, text and group"),
        (enlarge_picture, ["vae"], r"3.png is 65x64; pictures of 64x64"),
        (cut_picture, ["vae"], r"3.png is named in metadata.jsonl but cannot be read"),
        (break_nothing, ["sd"], r"has no trained autoencoder: run the same command with --stage vae first"),
        (break_nothing, ["vae", "--minutes", "0"], r"--minutes must be more than 0, not 0"),
        (break_nothing, ["vae", "--sampling-steps", "-1"], r"--sampling-steps must be more than 0, not -1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, damage, options: list[str], message: str) -> None:
    folder = write_emoji(tmp_path / "emoji")
    damage(folder)
    with pytest.raises(UserError, match=message):
        script.main([str(folder), str(tmp_path / "run"), "--stage", *options], SMALL)


def test_one_text_cannot_be_split() -> None:
    with pytest.raises(UserError, match="needs at least two"):
        data.split_texts({"a, b": "c"})


def test_other_pictures_than_the_autoencoders_are_refused(finished: Path, emoji: Path, tmp_path: Path) -> None:
    fewer = shutil.copytree(emoji, tmp_path / "fewer")
    lines = (fewer / "metadata.jsonl").read_text().splitlines()
    (fewer / "metadata.jsonl").write_text("\n".join(lines[:8]) + "\n")
    with pytest.raises(UserError, match="was trained on other pictures"):
        run(fewer, finished, "sd")


def test_more_trains_the_earlier_model_on(finished: Path, emoji: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = load_file(tmp_path / "run/sd/unet/diffusion_pytorch_model.safetensors")
    run(emoji, tmp_path / "run", "sd", "--more", "--seed", "1")
    after = load_file(tmp_path / "run/sd/unet/diffusion_pytorch_model.safetensors")
    moved = sum((after[name].float() - value.float()).norm() for name, value in before.items())
    size = sum(value.float().norm() for value in before.values())
    assert 0 < moved < 0.05 * size  # two steps away from the earlier weights, not from new random ones
    card = (tmp_path / "run/sd/README.md").read_text()
    assert card.count("--stage sd ") == 2
    assert "--stage sd --steps 2 --batch 4 --sampling-steps 2 --text-steps 2 --more --seed 1" in card


def test_more_needs_an_earlier_model_of_the_same_size(finished: Path, emoji: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "vae", tmp_path / "run/vae")
    with pytest.raises(UserError, match="has no model to train on: leave out --more"):
        run(emoji, tmp_path / "run", "sd", "--more")
    shutil.copytree(finished / "sdxl", tmp_path / "run/sd")
    with pytest.raises(UserError, match="does not hold this network: leave out --more"):
        run(emoji, tmp_path / "run", "sd", "--more")
