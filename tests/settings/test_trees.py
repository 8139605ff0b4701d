import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fewstep.errors import UserError
from fewstep.settings import (
    PretrainSettings,
    TrainSettings,
    Tree,
    describe_settings,
    flatten_settings,
    load_settings,
    parse_settings,
)
from fewstep.settings.python import gather_settings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
KINDS: list[type[Tree]] = [TrainSettings, PretrainSettings]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(kind: type[Tree], values: dict[str, Any]) -> str:
    """The message a user meets."""
    with pytest.raises(UserError) as error:
        parse_settings(kind, values, "recipe.toml")
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_need_no_recipe(kind: type[Tree]) -> None:
    assert parse_settings(kind, {}, "nothing") == kind()


def test_published_defaults() -> None:
    settings = TrainSettings()
    assert settings.generator.step_indices == (999,)
    assert (settings.losses.min_level_index, settings.losses.max_level_index) == (20, 980)
    assert settings.optimizer.betas == (0.9, 0.999)
    assert (settings.optimizer.weight_decay, settings.optimizer.max_grad_norm) == (0.01, 10)
    assert (settings.optimizer.warmup_steps, settings.optimizer.decay) == (500, "constant")
    assert (settings.training.generator_every, settings.training.batch_size) == (5, 7 * 40)
    assert (settings.teacher.guidance, settings.teacher.guidance_norm_cap) == (1, 0)
    assert settings.generator.ema_half_life_images == 0


# unknown keys


@pytest.mark.parametrize(
    ("kind", "values", "key", "suggestion"),
    [
        (TrainSettings, {"loses": {}}, "loses", "losses"),
        (TrainSettings, {"optimiser": {"generator_lr": 1.0}}, "optimiser", "optimizer"),
        (TrainSettings, {"batch_size": 3}, "batch_size", "training.batch_size"),
        (TrainSettings, {"training": {"batchsize": 3}}, "training.batchsize", "training.batch_size"),
        (TrainSettings, {"losses": {"gan_weight": 1.0}}, "losses.gan_weight", "losses.gan_weights"),
        (TrainSettings, {"losses": {"gan_generator_wieght": 1}}, "losses.gan_generator_wieght", "losses.gan_weights"),
        (TrainSettings, {"memory": {"offload_block": True}}, "memory.offload_block", "memory.teacher"),
        (TrainSettings, {"optimizer": {"flip": True}}, "optimizer.flip", "data.flip"),
        (PretrainSettings, {"network": {"img_resolutions": 3}}, "network.img_resolutions", "network.img_resolution"),
        (PretrainSettings, {"ema_half_life": 3.0}, "ema_half_life", "ema_half_life_images"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(
    kind: type[Tree], values: dict[str, Any], key: str, suggestion: str
) -> None:
    assert refused(kind, values) == f"recipe.toml: unknown setting {key}; did you mean {suggestion}?"


@pytest.mark.parametrize(("values", "key"), [({"qqqq": 1}, "qqqq"), ({"training": {"qqqq": 1}}, "training.qqqq")])
def test_a_key_like_no_other_gets_no_suggestion(values: dict[str, Any], key: str) -> None:
    assert refused(TrainSettings, values) == f"recipe.toml: unknown setting {key}"


@pytest.mark.parametrize("values", [{"training": {"generator_lr": 1.0}}, {"generator_lr": 1.0}])
def test_a_key_in_the_wrong_section_is_sent_to_its_own(values: dict[str, Any]) -> None:
    assert "did you mean optimizer.lr?" in refused(TrainSettings, values)


def test_suggestions_are_settings_of_the_same_command() -> None:
    message = refused(TrainSettings, {"training": {"label_dim": 10}})
    assert "network.label_dim" not in message


# wrong values


INTEGER, STRING, BOOLEAN = (f"Input should be a valid {kind}" for kind in ("integer", "string", "boolean"))
ABOVE, AT_LEAST = "Input should be greater than", "Input should be greater than or equal to"
BELOW, AT_MOST = "Input should be less than", "Input should be less than or equal to"
FINITE = "Input should be a finite number"


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (TrainSettings, "training.batch_size", "64", INTEGER),
        (TrainSettings, "training.batch_size", 6.5, INTEGER),
        (TrainSettings, "training.batch_size", True, INTEGER),
        (TrainSettings, "training.batch_size", 0, f"{ABOVE} 0"),
        (TrainSettings, "training.num_steps", -5, f"{ABOVE} 0"),
        (TrainSettings, "training.batch_size", 10**22, f"{BELOW} {2**31}"),
        (TrainSettings, "training.generator_every", 0, f"{ABOVE} 0"),
        (TrainSettings, "training.time_limit_minutes", -1, f"{AT_LEAST} 0"),
        (TrainSettings, "training.seed", -1, f"{AT_LEAST} 0"),
        (TrainSettings, "training.seed", 2**63, f"{BELOW} {2**63}"),
        (TrainSettings, "run.folder", 3, STRING),
        (TrainSettings, "compute.compile", "yes", BOOLEAN),
        (TrainSettings, "compute.compile", 1, BOOLEAN),
        (PretrainSettings, "optimizer.lr", 0, f"{ABOVE} 0"),
        (TrainSettings, "data.fit", "squash", "Input should be 'crop', 'pad' or 'exact'"),
        (TrainSettings, "compute.precision", "fp8", "Input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        (PretrainSettings, "optimizer.lr", "2e-6", "Input should be a valid number"),
        (TrainSettings, "generator.step_indices", 999, "Input should be a valid"),
        (TrainSettings, "losses.regression_weight", -1.0, f"{AT_LEAST} 0"),
        (TrainSettings, "losses.regression_weight", float("nan"), FINITE),
        (TrainSettings, "losses.regression_weight", float("inf"), FINITE),
        (PretrainSettings, "network.img_channels", 2, "Input should be 0, 1 or 3"),
        (PretrainSettings, "network.label_dim", -2, f"{AT_LEAST} -1"),
        (PretrainSettings, "network.label_dropout", 1.5, f"{AT_MOST} 1"),
        (PretrainSettings, "network.sigma_data", 0.0, f"{ABOVE} 0"),
        (PretrainSettings, "noise.log_sigma_std", 0.0, f"{ABOVE} 0"),
        (PretrainSettings, "ema_half_life_images", 0, f"{ABOVE} 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(kind: type[Tree], key: str, value: Any, message: str) -> None:
    section, _, name = key.rpartition(".")
    actual = refused(kind, {section: {name: value}} if section else {name: value})
    assert actual.startswith(f"recipe.toml: {key}={value!r}: {message}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1=1.5: Input should be less than or equal to 1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1"),
        ({"optimizer": {"lr": 0}}, f"optimizer.lr.0=0: {ABOVE} 0; optimizer.lr.1=0: {ABOVE} 0"),
        ({"optimizer": {"lr": [1e-5, "2e-6"]}}, "optimizer.lr.1='2e-6': Input should be a valid number"),
        ({"optimizer": {"lr": [1e-5]}}, "optimizer.lr.1"),
        ({"memory": {"lora": [0, 8]}}, f"memory.lora.0=0: {ABOVE} 0"),
        ({"memory": {"lora": [64, 0]}}, f"memory.lora.1=0: {ABOVE} 0"),
        ({"run": {"samples": [100, 2000]}}, f"run.samples.1=2000: {AT_MOST} 1024"),
        ({"losses": {"gan_weights": [-1, 0]}}, f"losses.gan_weights.0=-1: {AT_LEAST} 0"),
        ({"losses": {"level_indices": [20]}}, "losses.level_indices.1"),
        ({"losses": {"level_indices": [20, 980, 0]}}, f"losses.level_indices.2=0: {ABOVE} 0"),
        ({"losses": {"level_indices": [20, 980, 3.0, 1]}}, "losses.level_indices"),
        ({"teacher": {"guidance_scale": -1.0}}, f"teacher.guidance_scale.0=-1.0: {AT_LEAST} 0"),
        ({"teacher": {"guidance_scale": [4.0, -1]}}, f"teacher.guidance_scale.1=-1: {AT_LEAST} 0"),
        ({"teacher": {"guidance_scale": "4"}}, "teacher.guidance_scale.0='4': Input should be a valid number"),
        (
            {"losses": {"level_indices": [-1, 20]}},
            "losses.level_indices.0=-1: Input should be greater than or equal to 0",
        ),
        ({"generator": {"step_indices": [999, "a"]}}, "generator.step_indices.1='a': Input should be a valid integer"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named_with_its_place(values: dict[str, Any], message: str) -> None:
    assert refused(TrainSettings, values).startswith(f"recipe.toml: {message}")


def test_all_wrong_values_are_named_at_once() -> None:
    message = refused(TrainSettings, {"training": {"batch_size": 0, "seed": -1}, "data": {"fit": "x"}})
    assert all(f"{key}=" in message for key in ("training.batch_size", "training.seed", "data.fit"))


@pytest.mark.parametrize("value", [3, "adam", [1]])
def test_a_section_is_not_a_value(value: Any) -> None:
    expected = "recipe.toml: losses is a section, not a value: set losses.<name>"
    assert refused(TrainSettings, {"losses": value}) == expected


# impossible combinations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"losses": {"distribution_matching_weight": 0.0}},
            "losses.distribution_matching_weight, losses.regression_weight and the first of losses.gan_weights are all 0: "
            "the generator has nothing to learn from",
        ),
        (
            {"losses": {"gan_weights": [3e-3, 0]}},
            "losses.gan_weights=[0.003, 0.0]: the generator's is set but the discriminator's is 0, and an untrained "
            "discriminator teaches nothing; set both (published: [3e-3, 1e-2])",
        ),
        (
            {"teacher": {"guidance_scale": [1.0, 1.0]}},
            "teacher.guidance_scale=[1.0, 1.0]: a scale of 1 is no guidance, and there is no norm to limit",
        ),
        (
            {"losses": {"level_indices": [500, 499]}},
            "losses.level_indices=[500, 499]: the lowest comes first",
        ),
        (
            {"losses": {"regression_weight": 0.25, "lpips_files": ["vgg16.pth"]}},
            "losses.lpips_files=['vgg16.pth'] must name two files, VGG16 and the LPIPS heads",
        ),
        (
            {"losses": {"regression_weight": 0.25, "regression_distance": "lpips", "lpips_weights": "vgg.pth"}},
            "losses.regression_distance='lpips' needs losses.vgg_weights; today both are one setting, losses.lpips_files",
        ),
        (
            {"losses": {"regression_weight": 0.25, "regression_distance": "lpips", "vgg_weights": "vgg16.pth"}},
            "losses.regression_distance='lpips' needs losses.lpips_weights",
        ),
        (
            {"generator": {"step_indices": [249, 999]}},
            "generator.step_indices=[249, 999] must be grid indices of 0 or more, falling, at least one",
        ),
        (
            {"losses": {"gan_weights": [1, 1], "gan_taps": []}},
            "losses.gan_taps=[] must be depths above 0 and up to 1, rising, at least one",
        ),
        (
            {"losses": {"gan_weights": [1, 1], "gan_taps": [0.5, 0.5]}},
            "losses.gan_taps=[0.5, 0.5] must be depths above 0",
        ),
        (
            {"losses": {"gan_weights": [1, 1], "gan_taps": [0.7, 0.5]}},
            "losses.gan_taps=[0.7, 0.5] must be depths above 0",
        ),
        (
            {"losses": {"gan_taps": [0.7]}},
            "losses.gan_taps=[0.7] are read by the discriminator and there is none: set losses.gan_weights",
        ),
        (
            {"losses": {"gan_weights": [1, 1], "gan_taps": [0.5, 1.5]}},
            "losses.gan_taps.1=1.5: Input should be less than or equal to 1",
        ),
        (
            {"losses": {"gan_weights": [1, 1], "gan_taps": [0.0]}},
            "losses.gan_taps.0=0.0: Input should be greater than 0",
        ),
        ({"generator": {"step_indices": []}}, "generator.step_indices=[] must be grid indices"),
        ({"generator": {"step_indices": [-1]}}, "generator.step_indices=[-1] must be grid indices"),
        ({"generator": {"step_indices": [999, 999]}}, "generator.step_indices=[999, 999] must be grid indices"),
        (
            {"losses": {"regression_weight": 0.25}, "generator": {"step_indices": [999, 499]}},
            "losses.regression_weight beside other losses needs a one-step generator: generator.step_indices has 2 entries; the "
            "regression alone warms up any number of steps",
        ),
    ],
)
def test_impossible_combinations_say_why(values: dict[str, Any], message: str) -> None:
    assert refused(TrainSettings, values).startswith(f"recipe.toml: {message}")


@pytest.mark.parametrize(
    "losses",
    [
        {"distribution_matching_weight": 0.0, "regression_weight": 1.0},
        {"distribution_matching_weight": 0.0, "gan_weights": [1e-3, 1e-2]},
        {"gan_weights": [0.0, 1e-2]},
        {"gan_weights": [1e-3, 1e-2], "gan_taps": [0.5, 0.75, 1.0]},
        {"gan_taps": [0.5]},
        {"level_indices": [500, 500]},
        {"level_indices": [20, 1500]},
        {"level_indices": [20, 980, 3.0]},
        {"regression_weight": 0.25, "lpips_files": ["a", "b"]},
        {"regression_weight": 0.25, "lpips_files": ["a", "b", "vae"]},
    ],
)
def test_combinations_next_to_the_impossible_ones_are_allowed(losses: dict[str, Any]) -> None:
    settings = parse_settings(TrainSettings, {"losses": losses}, "recipe.toml")
    assert json.loads(settings.losses.model_dump_json(include=set(losses))) == losses


@pytest.mark.parametrize("scale", [4.0, [4.0, 1.0]])
def test_a_guidance_scale_has_a_limit_where_one_is_named(scale: Any) -> None:
    """And is stored as recipes have it, so that runs of earlier versions are continued."""
    settings = parse_settings(TrainSettings, {"teacher": {"guidance_scale": scale}}, "recipe.toml")
    assert (settings.teacher.guidance, settings.teacher.guidance_norm_cap) == (4, 1 if isinstance(scale, list) else 0)
    stored = settings.model_dump(mode="json")
    assert stored["teacher"]["guidance_scale"] == scale
    assert parse_settings(TrainSettings, stored, "stored") == settings


# recipes and overrides


def test_a_recipe_and_its_overrides(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.toml", "[training]\nbatch_size = 8\nseed = 3\n[optimizer]\nbetas = [0.5, 0.6]\n")
    settings = load_settings(TrainSettings, recipe, ["training.batch_size=16", "run.folder=runs/a"])
    assert (settings.training.batch_size, settings.training.seed) == (16, 3)
    assert settings.optimizer.betas == (0.5, 0.6)
    assert settings.run.folder == "runs/a"
    assert settings.training.num_steps == TrainSettings().training.num_steps
    assert load_settings(TrainSettings, str(recipe)).training.batch_size == 8


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.batch_size=64", "training.batch_size", 64),
        ("training.num_steps=20_000", "training.num_steps", 20000),
        (" training.batch_size = 64", "training.batch_size", 64),
        ("optimizer.lr=2e-6", "optimizer.lr", [2e-6, 2e-6]),
        ("optimizer.lr=1", "optimizer.lr", [1.0, 1.0]),
        ("optimizer.lr=[1e-5, 4e-5]", "optimizer.lr", [1e-5, 4e-5]),
        ("memory.lora=[32, 16]", "memory.lora", [32, 16.0]),
        ("losses.gan_weights=[0, 0.01]", "losses.gan_weights", [0.0, 0.01]),
        ("optimizer.betas=[0, 0.99]", "optimizer.betas", [0.0, 0.99]),
        ("generator.step_indices=[999, 749, 499, 249]", "generator.step_indices", [999, 749, 499, 249]),
        ("compute.compile=false", "compute.compile", False),
        ("compute.compile=true", "compute.compile", True),
        ("compute.precision=fp32", "compute.precision", "fp32"),
        ("run.folder=runs/my run", "run.folder", "runs/my run"),
        ('run.folder="runs/quoted"', "run.folder", "runs/quoted"),
        ("run.folder='007'", "run.folder", "007"),
        ("teacher.path=bundled:fashion-mnist", "teacher.path", "bundled:fashion-mnist"),
        ("data.images=~/a=b#c", "data.images", "~/a=b#c"),
        ("data.images=C:\\pictures", "data.images", "C:\\pictures"),
        ("run.folder=", "run.folder", ""),
        ("expected=FID 2.61", "expected", "FID 2.61"),
    ],
)
def test_overrides_are_read_as_a_shell_user_writes_them(tmp_path: Path, override: str, key: str, value: Any) -> None:
    settings = load_settings(TrainSettings, write(tmp_path, "r.toml", ""), [override])
    actual = flatten_settings(settings)[key]
    assert actual == value
    assert type(actual) is type(value)


def test_later_overrides_win(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.toml", "")
    settings = load_settings(TrainSettings, recipe, ["training.seed=1", "training.seed=2"])
    assert settings.training.seed == 2


@pytest.mark.parametrize("override", ["training.batch_size", "", "=3", "  =3", "--batch-size"])
def test_an_override_must_be_key_equals_value(tmp_path: Path, override: str) -> None:
    expected = f"{override!r} is not a setting: write section.key=value, e.g. training.batch_size=64"
    with pytest.raises(UserError, match=re.escape(expected)):
        load_settings(TrainSettings, write(tmp_path, "r.toml", ""), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_sise=3", "unknown setting training.batch_sise; did you mean training.batch_size?"),
        ("training=3", "training is a section, not a value: set training.<name>"),
        ("training.batch_size=many", "training.batch_size='many': Input should be a valid integer"),
        ("teacher.path.name=3", "'teacher.path.name=3': path is a value, not a section"),
        ("compute.compile=True", "compute.compile='True': Input should be a valid boolean"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    recipe = write(tmp_path, "r.toml", '[teacher]\npath = "a"\n')
    with pytest.raises(UserError, match=re.escape(message)):
        load_settings(TrainSettings, recipe, [override])


def test_a_type_toml_has_and_settings_have_not_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.toml", "[training]\nseed = 2024-01-01\n")
    with pytest.raises(UserError, match=r"training\.seed=2024-01-01 has a type no setting has"):
        load_settings(TrainSettings, recipe)


def test_a_date_as_folder_is_named_or_taken_as_a_word(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.toml", "")
    try:
        assert load_settings(TrainSettings, recipe, ["run.folder=2024-01-01"]).run.folder == "2024-01-01"
    except UserError as error:
        assert "run.folder" in str(error)  # noqa: PT017


def test_extends_states_only_the_differences(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", '[training]\nbatch_size = 8\nseed = 1\n[data]\nimages = "a"\n')
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "middle.toml", 'extends = "../base.toml"\n[training]\nseed = 2\nnum_steps = 7\n')
    text = 'extends = "more/middle.toml"\n[training]\nnum_steps = 9\n[run]\nfolder = "r"\n'
    child = write(tmp_path, "child.toml", text)
    settings = load_settings(TrainSettings, child, ["data.images=b"])
    training = settings.training
    assert (training.batch_size, training.seed, training.num_steps) == (8, 2, 9)
    assert (settings.data.images, settings.run.folder) == ("b", "r")


def test_extends_replaces_lists_whole(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[generator]\nstep_indices = [999, 749, 499, 249]\n")
    child = write(tmp_path, "child.toml", 'extends = "base.toml"\n[generator]\nstep_indices = [999]\n')
    assert load_settings(TrainSettings, child).generator.step_indices == (999,)


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_of_recipes_is_refused(tmp_path: Path, chain: list[str]) -> None:
    for name, following in zip(chain, [*chain[1:], chain[0]], strict=True):
        write(tmp_path, f"{name}.toml", f'extends = "{following}.toml"\n')
    with pytest.raises(UserError, match=r"a\.toml extends itself"):
        load_settings(TrainSettings, tmp_path / "a.toml")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.b=3 does not exist; .* recipes/, and one comes before the settings"):
        load_settings(TrainSettings, tmp_path / "a.b=3")
    with pytest.raises(UserError, match=r"recipe .*nothing\.toml does not exist; the shipped ones lie in recipes/"):
        load_settings(TrainSettings, tmp_path / "nothing.toml")
    child = write(tmp_path, "child.toml", 'extends = "gone.toml"\n')
    with pytest.raises(UserError, match=r"recipe .*gone\.toml does not exist"):
        load_settings(TrainSettings, child)


@pytest.mark.parametrize("content", [b"[training\n", b"batch_size = = 3\n", b"\xff\xfe\x00", b"[a]\nx=1\nx=2\n"])
def test_a_recipe_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"recipe .*r\.toml is not valid TOML: "):
        load_settings(TrainSettings, path)


@pytest.mark.parametrize("parent", ["3", '["a.toml"]'])
def test_extends_must_name_a_file(tmp_path: Path, parent: str) -> None:
    recipe = write(tmp_path, "r.toml", f"extends = {parent}\n")
    with pytest.raises(UserError, match=r"r\.toml: extends must name a recipe file"):
        load_settings(TrainSettings, recipe)


def raw_sections(path: Path) -> set[str]:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    parent = values.pop("extends", None)
    return set(values) | (raw_sections(path.parent / parent) if parent else set())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    kind = PretrainSettings if "network" in raw_sections(recipe) else TrainSettings
    settings = load_settings(kind, recipe)
    assert flatten_settings(settings) != flatten_settings(kind())


def test_recipes_are_shipped() -> None:
    assert {"network" in raw_sections(recipe) for recipe in RECIPES} == {True, False}


# the tree itself


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_frozen(kind: type[Tree]) -> None:
    settings: Any = kind()
    with pytest.raises(ValidationError, match="frozen"):
        settings.training = None
    with pytest.raises(ValidationError, match="frozen"):
        settings.training.seed = 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_meaning_and_its_real_default(kind: type[Tree]) -> None:
    rows = describe_settings(kind)
    flat = flatten_settings(kind())
    assert [key for key, *_ in rows] == [key for key in flat if key != "expected"]
    defaults: Any = kind()
    for key, type_name, default, meaning in rows:
        assert type_name, key
        assert len(meaning) > 5, key
        value = defaults
        for part in key.split("."):
            value = getattr(value, part)
        assert default == repr(value), key


def test_a_section_default_of_the_command_is_described_not_that_of_the_section() -> None:
    defaults = {row[0]: row[2] for row in describe_settings(PretrainSettings)}
    assert defaults["optimizer.lr"] == "0.001"
    assert defaults["training.batch_size"] == "128"


def test_settings_stay_few() -> None:
    assert len(describe_settings(TrainSettings)) <= 55
    assert len(describe_settings(PretrainSettings)) <= 33


@pytest.mark.parametrize("kind", KINDS)
def test_a_documented_default_survives_its_neighbours(kind: type[Tree]) -> None:
    """A section with one key leaves every other setting at what `--help` and the docs say."""
    flat = flatten_settings(kind())
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        changed = flatten_settings(parse_settings(kind, {section: {name: value}} if section else {name: value}, "one"))
        assert changed == flat, key


def test_every_section_alone_keeps_the_defaults_of_its_command(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.toml", "[optimizer]\nwarmup_steps = 10\n[training]\nseed = 3\n")
    settings = load_settings(PretrainSettings, recipe)
    assert (settings.optimizer.lr, settings.optimizer.weight_decay) == (1e-3, 0)
    assert settings.training.batch_size == 128
    shipped = load_settings(PretrainSettings, RECIPES[0].parent / "my_pictures.toml")
    assert (shipped.optimizer.weight_decay, shipped.optimizer.lr) == (0, 1e-3)


# what earlier versions wrote


@pytest.mark.parametrize(
    ("kind", "old", "new", "said"),
    [
        (
            TrainSettings, {"losses": {"min_level_index": 150, "max_level_index": 750}},
            {"losses": {"level_indices": [150, 750]}},
            "losses.min_level_index, losses.max_level_index: now losses.level_indices = [150, 750]",
        ),
        (
            TrainSettings, {"losses": {"max_level_index": 750}}, {"losses": {"level_indices": [20, 750]}},
            "losses.max_level_index: now losses.level_indices = [20, 750]",
        ),
        (
            TrainSettings,
            {"losses": {"regression_distance": "lpips", "vgg_weights": "a", "lpips_weights": "b", "regression_autoencoder": "c"}},
            {"losses": {"lpips_files": ["a", "b", "c"]}},
            "losses.regression_distance, losses.vgg_weights, losses.lpips_weights, losses.regression_autoencoder: now "
            "losses.lpips_files = ['a', 'b', 'c']",
        ),
        (
            TrainSettings, {"losses": {"regression_distance": "pixel", "vgg_weights": "a"}}, {},
            "losses.regression_distance, losses.vgg_weights: now left out",
        ),
        (
            TrainSettings, {"optimizer": {"decay": "cosine"}}, {"optimizer": {"final_lr_fraction": 0.0}},
            "optimizer.decay: now optimizer.final_lr_fraction = 0.0",
        ),
        (
            PretrainSettings, {"optimizer": {"decay": "cosine", "final_lr_fraction": 0.1}},
            {"optimizer": {"final_lr_fraction": 0.1}}, "optimizer.decay: now left out",
        ),
        (
            TrainSettings, {"optimizer": {"decay": "constant", "final_lr_fraction": 0.0}}, {},
            "optimizer.decay: now optimizer.final_lr_fraction = 1.0",
        ),
        (
            TrainSettings, {"data": {"label_column": "label", "prompt_column": "words"}}, {"data": {"column": "words"}},
            "data.label_column, data.prompt_column: now data.column = 'words'",
        ),
        (
            TrainSettings, {"best": {"metric": "frechet_distance", "features": "f", "reference": "r"}},
            {"best": {"files": ["f", "r"]}},
            "best.metric, best.features, best.reference: now best.files = ['f', 'r']",
        ),
        (
            TrainSettings, {"best": {"metric": "", "features": "f"}}, {}, "best.metric, best.features: now left out",
        ),
        (
            TrainSettings, {"best": {"features": "", "reference": "r"}}, {},  # nothing was measured
            "best.features, best.reference: now left out",
        ),
        (
            TrainSettings, {"optimizer": {"generator_lr": 1e-5, "fake_score_lr": 4e-5}}, {"optimizer": {"lr": [1e-5, 4e-5]}},
            "optimizer.generator_lr, optimizer.fake_score_lr: now optimizer.lr = [1e-05, 4e-05]",
        ),
        (
            TrainSettings, {"optimizer": {"fake_score_lr": 4e-5}}, {"optimizer": {"lr": [2e-6, 4e-5]}},
            "optimizer.fake_score_lr: now optimizer.lr = [2e-06, 4e-05]",
        ),
        (
            PretrainSettings, {"optimizer": {"generator_lr": 1e-5}}, {"optimizer": {"lr": 1e-5}},
            "optimizer.generator_lr: now optimizer.lr = 1e-05",
        ),
        (
            TrainSettings, {"losses": {"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2}},
            {"losses": {"gan_weights": [3e-3, 1e-2]}},
            "losses.gan_generator_weight, losses.gan_discriminator_weight: now losses.gan_weights = [0.003, 0.01]",
        ),
        (
            TrainSettings, {"memory": {"lora_rank": 4, "lora_alpha": 16.0}}, {"memory": {"lora": [4, 16.0]}},
            "memory.lora_rank, memory.lora_alpha: now memory.lora = [4, 16.0]",
        ),
        (
            TrainSettings, {"memory": {"lora_rank": 4}}, {"memory": {"lora": [4, 8.0]}},
            "memory.lora_rank: now memory.lora = [4, 8.0]",
        ),
        (
            TrainSettings, {"memory": {"lora": [4, 16.0], "lora_dropout": 0.1}}, {"memory": {"lora": [4, 16.0, 0.1]}},
            "memory.lora_dropout: now memory.lora = [4, 16.0, 0.1]",
        ),
        (
            TrainSettings, {"memory": {"lora": [4, 16.0], "lora_dropout": 0.0}}, {"memory": {"lora": [4, 16.0]}},
            "memory.lora_dropout: now left out",
        ),
        (
            TrainSettings, {"memory": {"teacher": "replicated", "offload_blocks": True, "mode": "shared_base",
             "checkpoint_activations": True}},
            {"memory": {"teacher": "offloaded_blocks", "mode": "shared_base", "checkpoint_activations": True}},
            "memory.offload_blocks: now memory.teacher = 'offloaded_blocks'",
        ),
        (
            TrainSettings, {"memory": {"teacher": "replicated", "offload_blocks": False}},
            {"memory": {"teacher": "replicated"}}, "memory.offload_blocks: now left out",
        ),
        (
            TrainSettings, {"data": {"latents": "l", "images": ""}}, {"data": {"images": "l"}},
            "data.latents: now data.images = 'l'",
        ),
        (
            TrainSettings, {"data": {"latents": "", "images": "p"}}, {"data": {"images": "p"}},
            "data.latents: now left out",
        ),
        (
            PretrainSettings, {"run": {"sample_every": 7, "sample_images": 9}}, {"run": {"samples": [7, 9]}},
            "run.sample_every, run.sample_images: now run.samples = [7, 9]",
        ),
        (TrainSettings, {"run": {"log_every": 7}}, {}, "run.log_every: now left out"),
        (PretrainSettings, {"training": {"generator_every": 5}}, {}, "training.generator_every: now left out"),
        (
            PretrainSettings, {"data": {"pairs": "", "prompts": "", "text_embeddings": "stored"}}, {},
            "data.pairs, data.prompts, data.text_embeddings: now left out",
        ),
    ],
)  # fmt: skip
def test_keys_of_earlier_versions_are_read_and_said(
    kind: type[Tree], old: dict[str, Any], new: dict[str, Any], said: str
) -> None:
    lines: list[str] = []
    assert parse_settings(kind, old, "old", lines.append) == parse_settings(kind, new, "new")
    assert lines == [said]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            TrainSettings,
            {"optimizer": {"decay": "linear"}},
            "optimizer.decay='linear': set optimizer.final_lr_fraction",
        ),
        (TrainSettings, {"best": {"metric": "fid"}}, "best.metric='fid': the Frechet distance is the one there is"),
        (TrainSettings, {"best": {"metric": "frechet_distance"}}, "best.metric='frechet_distance' needs best.files"),
        (
            TrainSettings,
            {"data": {"label_column": "a", "prompt_column": "b"}},
            "data.column is one setting for what were",
        ),
        (TrainSettings, {"data": {"label_column": "a", "column": "b"}}, "data.column is one setting for what were"),
        (
            TrainSettings,
            {"losses": {"min_level_index": 1, "level_indices": [1, 2]}},
            "losses.level_indices is one setting for what was ",
        ),
        (
            TrainSettings,
            {"optimizer": {"generator_lr": 1e-5, "lr": 1e-4}},
            "optimizer.lr is one setting for what was optimizer.generator_lr and optimizer.fake_score_lr: set it alone",
        ),
        (
            TrainSettings,
            {"memory": {"frozen_precision": "bf16", "base": "int8"}},
            "memory.base is one setting for what was ",
        ),
        (
            TrainSettings,
            {"data": {"latents": "l", "images": "p"}},
            "data.images is one setting for what was data.latents",
        ),
        (TrainSettings, {"best": {"reference": "r"}}, "best.files=['', 'r'] must name two files"),
        (TrainSettings, {"best": {"files": ["f"]}}, "best.files=['f'] must name two files"),
        (
            TrainSettings,
            {"losses": {"regression_distance": "l1"}},
            "losses.regression_distance='l1': set losses.lpips_files",
        ),
        (PretrainSettings, {"data": {"prompts": "p.txt"}}, "unknown setting data.prompts; it belongs to recipes of"),
        (PretrainSettings, {"optimizer": {"fake_score_lr": 1e-3}}, "unknown setting optimizer.fake_score_lr"),
        (PretrainSettings, {"training": {"generator_every": 2}}, "unknown setting training.generator_every"),
    ],
)
def test_keys_of_earlier_versions_that_say_two_things_are_refused(
    kind: type[Tree], values: dict[str, Any], message: str
) -> None:
    assert refused(kind, values).startswith(f"recipe.toml: {message}")


def test_settings_of_an_earlier_run_folder_are_read() -> None:
    """Every key that version 0.1.0 wrote, at its default."""
    earlier = json.loads((Path(__file__).parent / "earlier_settings.json").read_text())
    assert parse_settings(TrainSettings, earlier["train"], "train").losses == TrainSettings().losses
    pretrain = parse_settings(PretrainSettings, earlier["pretrain"], "pretrain")
    assert flatten_settings(pretrain) == flatten_settings(PretrainSettings()) | {
        "compute.precision": "bf16", "network.img_resolution": 32, "network.img_channels": 3, "network.label_dim": 0,
    }  # fmt: skip


def test_frozen_precision_is_called_base() -> None:
    told: list[str] = []
    found = parse_settings(TrainSettings, {"memory": {"frozen_precision": "bf16"}}, "recipe.toml", told.append)
    assert found.memory.base == "bf16"
    assert told == ["memory.frozen_precision: now memory.base = 'bf16'"]


@pytest.mark.parametrize(
    ("old", "key", "value"),
    [
        ("optimizer.fake_score_lr=1e-3", "optimizer.lr", [5e-7, 1e-3]),
        ("losses.gan_generator_weight=0", "losses.gan_weights", [0.0, 1e-2]),
        ("losses.max_level_index=500", "losses.level_indices", [10, 500]),
        ("memory.lora_alpha=64", "memory.lora", [16, 64.0]),
        ("memory.lora_dropout=0.2", "memory.lora", [16, 16.0, 0.2]),
        ("memory.offload_blocks=false", "memory.teacher", "sharded"),
        ("memory.frozen_precision=fp32", "memory.base", "fp32"),
        ("data.latents=", "data.images", ""),
        ("data.latents=other", "data.images", "other"),
        ("run.sample_images=3", "run.samples", [50, 3]),
        ("best.reference=other.npz", "best.files", ["f", "other.npz"]),
        ("best.features=", "best.files", []),
        ("best.metric=", "best.files", []),
        ("best.metric=frechet_distance", "best.files", ["f", "r.npz"]),
        ("optimizer.decay=constant", "optimizer.final_lr_fraction", 1.0),
    ],
)
def test_an_earlier_key_changes_its_part_of_a_recipe(tmp_path: Path, old: str, key: str, value: Any) -> None:
    """On the command line, in a recipe that extends another, and from Python: what lies under it stays where it says nothing."""
    text = """
    [optimizer]\nlr = 5e-7\nfinal_lr_fraction = 0.5\n[losses]\ngan_weights = [3e-3, 1e-2]\nlevel_indices = [10, 990]
    [memory]\nlora = [16, 16.0]\nmode = "shared_base"\nteacher = "offloaded_blocks"\ncheckpoint_activations = true\nbase = "int8"
    [data]\nimages = "some"\n[run]\nsamples = [50, 20]\n[best]\nfiles = ["f", "r.npz"]
    """
    recipe = write(tmp_path, "r.toml", text)
    section, _, rest = old.partition(".")
    name, _, word = rest.partition("=")
    plain = word if re.fullmatch(r"[0-9.e-]+|false", word) else f'"{word}"'
    child = write(tmp_path, "child.toml", f'extends = "r.toml"\n[{section}]\n{name} = {plain}\n')
    before = flatten_settings(load_settings(TrainSettings, recipe))
    assert before[key] != value or "decay" in old or word == "frechet_distance"
    found = [load_settings(TrainSettings, recipe, [old]), load_settings(TrainSettings, child)]
    found.append(gather_settings(TrainSettings, recipe, {f"{section}__{name}": json.loads(plain)}))
    for settings in found:
        assert flatten_settings(settings) == before | {key: value}


@pytest.mark.parametrize("kind", KINDS)
def test_flat_settings_round_trip(kind: type[Tree]) -> None:
    nested: dict[str, Any] = {}
    for key, value in flatten_settings(kind()).items():
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    assert parse_settings(kind, nested, "flat") == kind()


def test_keys_that_are_gone_are_told() -> None:
    """TensorBoard files are written where it is installed, the number of threads is the environment's."""
    told: list[str] = []
    values = {"compute": {"threads": 4, "device": "cpu"}, "run": {"tensorboard": False}}
    settings = parse_settings(TrainSettings, values, "earlier", told.append)
    assert settings.compute.device == "cpu"
    assert told == [
        "compute.threads: now the environment's OMP_NUM_THREADS, or torch's choice without it",
        "run.tensorboard: now left out",
    ]


def test_recipes_of_other_editors_and_other_commands(tmp_path: Path) -> None:
    """Windows' mark at the start is none of the text; a key of thousands of parts would take the parser gigabytes."""
    recipe = tmp_path / "a.toml"
    recipe.write_bytes(b"\xef\xbb\xbf[training]\r\nnum_steps = 7\r\n")
    assert load_settings(TrainSettings, recipe).training.num_steps == 7
    for text, told in (
        ("a." * 50_000 + "b = 1", "is nested without end"),
        ("[" + "a." * 50_000 + "b]", "is nested without end"),
        ("[network]\nname = 'small'", "unknown setting network; it belongs to recipes of `fewstep pretrain`"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=told):
            load_settings(TrainSettings, recipe)
    with pytest.raises(UserError, match="is no file; the shipped ones"):
        load_settings(TrainSettings, tmp_path)
