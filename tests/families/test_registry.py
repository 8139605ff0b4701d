"""A family's name stands in its own folder and on one line of the registry; everything else asks the family."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.families.registry import (
    FAMILIES,
    all_families,
    build_on_meta,
    build_released,
    family_named,
    family_of,
    recognise,
    released_shapes,
)
from tests.tiny_flow_models import tiny_flux2_klein_folder, tiny_qwen_image_folder, tiny_z_image_folder
from tests.tiny_models import tiny_sd2_folder, tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder

PACKAGE = Path(__file__).parents[2] / "src/fewstep"
FOLDERS = {
    "sd": tiny_sd_folder, "sd2": tiny_sd2_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder,
    "z-image": tiny_z_image_folder, "flux2-klein": tiny_flux2_klein_folder,
    "qwen-image": tiny_qwen_image_folder,
}  # fmt: skip
OWN = (
    "families/edm/", "families/stable_diffusion/", "families/sd3/", "families/z_image/", "families/flux2_klein/",
    "families/qwen_image/", "families/registry.py",
)  # fmt: skip
NAMED = re.compile(
    r"\bsd3\b|\bsdxl\b|\bsd\b|SD3|Stable ?Diffusion|SDXL|diffusers-unet|has_time_ids|EDMDenoiser|EDMUNet\b|[zZ]-?_?[iI]mage|[qQ]wen-?_?[iI]mage|[fF]lux\.?2|[kK]lein"
)
BUNDLED = re.compile(r"emoji-sd(xl)?")  # names of bundled folders, as users type them
# modules whose facts are one family's; they ask it, and nobody outside imports from its folder
OF_ONE_FAMILY = re.compile(r"fewstep\.families\.(edm|stable_diffusion|sd3|z_image|flux2_klein|qwen_image)\b")


def names_a_family(text: str) -> bool:
    return NAMED.search(BUNDLED.sub("", text)) is not None


def names_in(path: Path) -> Iterator[str]:
    """Identifiers, imported names and strings of a module's code; docstrings and comments are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


@pytest.mark.slow
def test_a_familys_name_stands_in_its_own_folder() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(OWN) and (names := {name for name in names_in(path) if names_a_family(name)}):
            found[place] = names
    assert not found  # 20 files named SD3 alone, and nine tables


def test_nobody_reaches_into_a_familys_folder() -> None:
    """The registry hands out the object; what is one family's fact is asked of it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(OWN) and (names := OF_ONE_FAMILY.findall(path.read_text(encoding="utf-8"))):
            found[place] = names
    assert not found


def test_the_reader_of_names_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""About sd3."""\nfrom x import SD3Thing\nif family == "sdxl":  # sd3\n    a.has_time_ids\n')
    assert {name for name in names_in(path) if names_a_family(name)} == {"SD3Thing", "sdxl", "has_time_ids"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name: str) -> None:
    family = family_named(name)
    assert family.name == name
    assert family is family_named(name)
    assert family.takes in ("labels", "prompts")
    assert family.default_num_steps == (18 if name == "edm" else 50)
    assert family.evaluations(family.default_num_steps) == (35 if name == "edm" else 50)
    assert bool(family.component) == bool(family.network_class) == bool(family.scheduler_class)
    for released, description in family.shapes.items():
        assert released_shapes()[released] == description
        assert family_of(description) is family


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_one_familys(tmp_path: Path, folder: str) -> None:
    path = FOLDERS[folder](tmp_path / folder)
    family = recognise(path)
    assert family.name == folder.replace("sd2", "sd")
    assert [other.name for other in all_families() if other.recognise(path)] == [family.name]
    description = family.describe_folder(path)
    denoiser = build_on_meta(description)
    assert denoiser.describe() == description == family.load(path).describe()
    assert family_of(description) is family
    assert family.resolution(path) == 16
    condition = family.example_condition(denoiser, 3).to("meta")
    level = denoiser.noise_schedule.expanded(0, 3, torch.device("cpu")).to("meta")
    noisy = torch.zeros(3, *denoiser.image_shape, device="meta")
    x0 = denoiser.run_network(noisy, level, condition, "x0")[0]  # type: ignore[operator]
    assert x0.shape == (3, *denoiser.image_shape)
    assert len(condition.unconditional()) == 3


def test_what_is_of_no_family_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a fewstep model: unet/config\.json is missing"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="model family 'x' is unknown; this version knows"):
        family_of({"family": "x"})
    with pytest.raises(ValueError, match="is not a released network; choose one of"):
        build_released("x")


@pytest.mark.slow
def test_the_registry_is_light() -> None:
    """Asking for the names of families imports neither torch nor diffusers; EDM needs no diffusers."""
    code = "import sys, fewstep.families.registry as r; print('torch' in sys.modules, 'diffusers' in sys.modules);"
    code += "r.recognise(__import__('pathlib').Path(sys.argv[1])); print('diffusers' in sys.modules)"
    teacher = PACKAGE / "assets/fashion-mnist/teacher"
    run = subprocess.run([sys.executable, "-c", code, teacher], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["False", "False", "False"]


@pytest.mark.parametrize("name", ["z_image", "flux2_klein", "qwen_image"])
def test_the_docs_count_what_a_family_took(name: str) -> None:
    """docs/new-family.md says lines and files of each folder, by `wc -l`."""
    root = Path(__file__).parents[2]
    files = sorted((root / f"src/fewstep/families/{name}").glob("*.py"))
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in files)
    said = (root / "docs/new-family.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"`families/{name}/`, of (\d+) lines in (\w+) files", said)
    assert (int(found[0]), {"five": 5}.get(found[1]) or int(found[1])) == (lines, len(files))
