"""A style LoRA on the emoji teacher, its student, and the base's student with that LoRA: trained, distilled and compared."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.bench import load_bench
from fewstep.formats import bundled
from tests.cli.test_main import fewstep as run
from tests.emoji_assets import made_once

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import emoji_style as script

# peft says so whenever a pipeline has two LoRAs
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
RECIPE = Path(__file__).parents[2] / "recipes/emoji_dmd2_4step_lora.toml"


def test_the_style_is_a_line_of_colours() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    styled = script.blueprint(images)
    assert script.off_style(styled) < 1e-3
    assert script.off_style(images) > 20
    assert script.blueprint(torch.ones(1, 3, 1, 1)).flatten().tolist() == pytest.approx([1, 1, 1])
    assert script.blueprint(-torch.ones(1, 3, 1, 1)).flatten().tolist() == pytest.approx(
        (script.INK / 127.5 - 1).tolist()
    )
    red = torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1, 1) / 127.5 - 1
    along = (script.PAPER - script.INK) / (script.PAPER - script.INK).norm()
    way = torch.tensor([255.0, 0.0, 0.0]) - script.INK
    assert script.off_style(red) == pytest.approx(float((way - (way @ along) * along).norm()), rel=1e-5)


@pytest.mark.slow
def test_trained_distilled_and_compared(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bundled, "ASSETS", made_once(tmp_path_factory) / "assets")
    texts = load_bench(bundled.bundled_path("emoji")).prompts
    pictures, generator = tmp_path / "emoji", np.random.default_rng(0)
    pictures.mkdir()
    rows = [{"file_name": f"{number}.png", "text": text, "group": "a"} for number, text in enumerate(texts)]
    for row in rows:
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(pictures / row["file_name"])
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    style = tmp_path / "style"
    script.main(["train", str(pictures), str(style), "--steps", "2"])
    for name, loras in (("student", [str(style / script.LORA)]), ("base", [])):
        answer = run(
            "train", RECIPE, "best.files=[]", "training.num_steps=2", "training.batch_size=2", "run.sample_images=2", "compute.device=cpu",
            f"teacher.loras={json.dumps(loras)}", f"run.folder={tmp_path / name}",
        )  # fmt: skip
        assert answer.code == 0, answer.err
    out = tmp_path / "compared"
    script.main([
        "compare", str(style), str(tmp_path / "student"), str(tmp_path / "base"), "--out", str(out), "--num-images", "4",
        "--teacher-steps", "2",
    ])  # fmt: skip
    found = json.loads(out.with_suffix(".json").read_text())
    assert list(found)[1:4] == ["its student", "the base's student and the style", "the base's student"]
    assert len({row["off_style"] for row in found.values()}) == 5  # five kinds of pictures
    assert len(re.findall(r"\| \d+\.\d{3} \(4\) \|", capsys.readouterr().out)) == 4
    one_column = script.draw(["a"], {"x": torch.zeros(1, 3, 64, 64)}, 1).width
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.width == one_column + 4 * 68


def test_pictures_of_other_texts_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "nothing known", "group": "a"}))
    with pytest.raises(UserError, match="none of the texts that the bundled teacher was trained on"):
        script.main(["train", str(tmp_path), str(tmp_path / "out")])
