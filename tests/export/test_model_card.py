"""The README.md of an export: which tool reads which file, and how; the same bytes from run to run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard

from fewstep.errors import UserError
from fewstep.evaluation.measurement import Measurement, Value
from fewstep.export.card_usage import CardFacts
from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.model_card import render_card, run_figures
from fewstep.formats.model_folder import ModelCard
from fewstep.networks.adapters import LoraShape
from tests.export.text_generators import write_run


def card(kind: str, steps: tuple[int, ...] = (999, 749, 499, 249), **facts: object) -> str:
    made = ModelCard("generator", steps, made_with={"num_steps": 5, "settings": {"a": 1}}, licence="mit")
    common = {"base": "org/name", "network_class": "UNet2DConditionModel", "scheduler_class": "LCMScheduler"}
    common["comfyui_lora"] = "kohya-lora"
    made = facts.pop("card", made)  # type: ignore[assignment]
    return render_card(CardFacts("out", kind, "/x/out", made, "fp16", **{**common, **facts}))  # type: ignore[arg-type]


def test_the_hub_reads_the_header() -> None:
    data = HubCard(card("lora", num_samples=2, prompts=("a", "b"))).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("mit", "text-to-image", "diffusers")
    assert data.base_model == "org/name"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags is not None
    assert "lora" in data.tags
    assert "base_model" not in HubCard(card("diffusers", base="")).data.to_dict()


def test_each_lora_says_who_reads_it() -> None:
    assert "ComfyUI, which skips the layers it does not know" in card("lora")
    assert "`--as kohya-lora`" in card("lora")
    kohya = card("kohya-lora", has_workflow=True)
    assert "`models/loras`, open `comfyui_workflow.json`" in kohya
    assert "sampler `lcm`, scheduler `simple`, 4 steps, cfg 1" in kohya
    assert "<lora:out:1>" in kohya
    assert "**For diffusers and ComfyUI**" in card("lora", comfyui_lora="lora")
    assert "for it, export `--as lora`" in card("kohya-lora", comfyui_lora="lora")
    assert "ComfyUI" not in card("lora", comfyui_lora="")


def test_a_lora_on_a_users_lora_says_what_comes_first() -> None:
    """In code, in words and in stable-diffusion.cpp's prompt."""
    merged = replace(ModelCard("generator", (999, 749, 499, 249)), base_loras=("/x/style.safetensors:0.5", "b.pt:1.0"))
    text = card("kohya-lora", card=merged)
    first, second = (text.index(f"pipe.fuse_lora(lora_scale={strength})") for strength in (0.5, 1.0))
    assert text.index("pipe.load_lora_weights('/x/style.safetensors')") < first < second < text.index("out.safetensors")
    assert "with `style` at 0.5, then `b` at 1.0** merged into it, and is\nright on nothing else" in text
    assert "<lora:style:0.5> <lora:b:1.0> <lora:out:1>" in text
    assert "fuse_lora" not in card("single-file", card=merged) + card("diffusers", card=merged) + card("lora")


def test_single_files_say_how_other_programs_run_them() -> None:
    whole = card("single-file", has_workflow=True)
    assert "`models/checkpoints`, open `comfyui_workflow.json`" in whole
    assert "sd -m out.safetensors -p" in whole
    assert "--sampling-method lcm --scheduler simple --steps 4 --cfg-scale 1" in whole
    assert "scheduler `simple`, 1 step, cfg 1" in card("single-file", (999,))
    early = card("single-file", (399,), has_workflow=True)
    assert "stable-diffusion.cpp takes no list of steps: it cannot run this generator right" in early
    assert "sd -m" not in early


def test_sections_stand_apart_and_nothing_is_left_of_the_template() -> None:
    for kind in ("diffusers", "unet", "lora", "kohya-lora", "single-file"):
        text = card(kind, figures=[("distance", "3.1")])
        assert "\n\n## Figures\n\n| measured | value |\n| --- | --- |\n| distance | 3.1 |\n\n## Origin\n\n" in text
        assert "{{" not in text
        assert "{%" not in text
        assert "\n\n\n" not in text


@pytest.mark.parametrize("kind", ["diffusers", "kohya-lora", "single-file"])
def test_an_export_has_the_same_bytes_each_time_and_others_may_read_it(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path, lora=LoraShape(2, 1.0))
    contents = []
    for number in "ab":
        out = export_generator(run, tmp_path / number / "out", ExportOptions(kind=kind, num_samples=0, device="cpu"))
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "README.md"]
        contents.append({path.relative_to(out): path.read_bytes() for path in files})
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    assert contents[0] == contents[1]


def test_a_link_in_a_component_is_not_published(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "secret.txt").write_text("key")
    (tmp_path / "teacher/tokenizer/notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"notes\.txt is a link to .*secret\.txt, outside of the model"):
        export_generator(run, tmp_path / "out", ExportOptions(num_samples=0, device="cpu"))
    assert not (tmp_path / "out").exists()


def test_what_is_nested_without_end_in_a_run_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[" * 100_000 + "]" * 100_000)
    assert run_figures(tmp_path / "generator", ModelCard("generator", (999,))) == []


def test_figures_keep_what_makes_them_a_proxy_and_the_precision(tmp_path: Path) -> None:
    value = Value(9.0, 30, (8.5, 9.5))
    found = Measurement(
        "runs/mine", {"frechet_distance": value}, 30, "coloured", 16, 40, 4, 3, "coco30k-256", "30 images, not 30,000", "bfloat16"
    )  # fmt: skip
    (tmp_path / "figure.json").write_text(json.dumps(found.to_dict()))
    (tmp_path / "best.json").write_text(json.dumps([{"step": 7, "frechet_distance": 3.5}]))
    made_with = {"settings": {"best": {"files": ["f", "r.npz"], "num_images": 500}, "compute": {"precision": "bf16"}}}
    card = ModelCard("generator", (999,), made_with={**made_with, "num_steps": 7})
    assert run_figures(tmp_path / "generator", card) == [
        ("Frechet distance at step 7 (500 images, features f, precision bf16)", "3.500"),
        (
            "PROXY of coco30k-256 (30 images, not 30,000): Frechet distance of mine (30 images, features coloured, "
            "4 evaluations an image, seed 3, bfloat16)",
            "9.000 ± 0.500",
        ),
    ]


@pytest.mark.parametrize(
    "changes", [{"intervals": 3}, {"features": None}, {"num_images": "many", "intervals": {"frechet_distance": [1]}}]
)
def test_damaged_figures_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = Measurement("mine", {"frechet_distance": Value(9.0, 30)}, 30, "coloured").to_dict() | changes
    (tmp_path / "figure.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    assert run_figures(tmp_path / "generator", ModelCard("generator", (999,))) == []
