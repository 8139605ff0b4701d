"""LoRA files: round trips, other tools' layouts, LoRAs that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.formats.kohya_lora import (
    LoraWeights,
    read_lora,
    write_kohya_lora,
    write_peft_lora,
)

LINEAR, CONV = "network.mid_block.attentions.0.to_out.0", "network.down_blocks.0.resnets.1.conv1"
MODULES = ["", "network", "network.mid_block.attentions.0.to_out", LINEAR, CONV, "network.conv_in"]


def some_lora(rank: int = 3, alpha: float = 2.0) -> LoraWeights:
    torch.manual_seed(0)
    state = {
        f"{LINEAR}.lora_A.weight": torch.randn(rank, 8), f"{LINEAR}.lora_B.weight": torch.randn(6, rank),
        f"{CONV}.lora_A.weight": torch.randn(rank, 4, 3, 3), f"{CONV}.lora_B.weight": torch.randn(5, rank, 1, 1),
    }  # fmt: skip
    return LoraWeights(rank, alpha, state)


def updates(lora: LoraWeights) -> dict[str, torch.Tensor]:
    """alpha / rank * up @ down of every layer."""
    return {
        name: lora.alpha / lora.rank * torch.einsum(
            "or,ri->oi", lora.state[f"{name}.lora_B.weight"].flatten(1), lora.state[f"{name}.lora_A.weight"].flatten(1)
        )
        for name in lora.targets
    }  # fmt: skip


def assert_equal(a: LoraWeights, b: LoraWeights) -> None:
    assert (a.rank, a.alpha) == (b.rank, b.alpha)
    assert list(a.state) == list(b.state) or sorted(a.state) == sorted(b.state)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


def test_kohya_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_kohya_lora(path, some_lora(), {"licence": "mit"})
    assert_equal(read_lora(path, MODULES), some_lora())
    tensors = load_file(path)
    name = "lora_unet_mid_block_attentions_0_to_out_0"
    assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= set(tensors)
    assert tensors[f"{name}.alpha"].shape == ()
    again = tmp_path / "again.safetensors"
    write_kohya_lora(again, read_lora(path, MODULES), {"licence": "mit"})
    twice = load_file(again)
    assert twice.keys() == tensors.keys()
    assert all(torch.equal(twice[key], tensors[key]) for key in tensors)


def test_peft_round_trip_has_alpha_multiplied_in(tmp_path: Path) -> None:
    """diffusers takes alpha = rank where a file says nothing."""
    path = tmp_path / "lora.safetensors"
    write_peft_lora(path, some_lora(), "unet", {})
    assert set(load_file(path)) == {f"unet.{name.removeprefix('network.')}" for name in some_lora().state}
    found = read_lora(path, MODULES)
    assert found.alpha == found.rank == 3
    for name, update in updates(some_lora()).items():
        torch.testing.assert_close(updates(found)[name], update)
    back = LoraWeights(
        3, 2.0, {name: value * found.alpha / 2 if ".lora_B." in name else value for name, value in found.state.items()}
    )
    for name, value in some_lora().state.items():
        torch.testing.assert_close(back.state[name], value)


@pytest.mark.parametrize("source", ["ours", "diffusers", "a network of diffusers", "peft", "keys"])
def test_alpha_of_peft_files(tmp_path: Path, source: str) -> None:
    lora, header = some_lora(), {}
    prefix = {"peft": "base_model.model.", "a network of diffusers": ""}.get(source, "unet.")
    tensors = {f"{prefix}{name.removeprefix('network.')}": value for name, value in lora.state.items()}
    if source == "ours":
        header = {"lora": json.dumps({"rank": 3, "alpha": 2.0, "targets": []})}
    elif source == "diffusers":
        header = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 2})}
    elif source == "a network of diffusers":  # as its save_lora_adapter writes
        header = {"lora_adapter_metadata": json.dumps({"r": 3, "lora_alpha": 2})}
    elif source == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 2}))
    else:
        for name in lora.targets:
            tensors[f"unet.{name.removeprefix('network.')}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors", metadata=header)
    assert_equal(read_lora(tmp_path / "lora.safetensors", MODULES), lora)


def test_a_config_beside_kohyas_file_is_anothers(tmp_path: Path) -> None:
    """Whose keys carry their scale; without alpha it is the rank, as everybody takes it."""
    lora = some_lora()
    write_kohya_lora(tmp_path / "style.safetensors", lora, {})
    tensors = {key: value for key, value in load_file(tmp_path / "style.safetensors").items() if ".alpha" not in key}
    save_file(tensors, tmp_path / "style.safetensors")
    expected = read_lora(tmp_path / "style.safetensors", MODULES)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 60, "use_dora": True}))
    assert_equal(read_lora(tmp_path / "style.safetensors", MODULES), expected)


def plain_updates(lora: LoraWeights) -> dict[str, torch.Tensor]:
    return {name: update * lora.rank / lora.alpha for name, update in updates(lora).items()}


def peft_folder(folder: Path, **config: object) -> Path:
    """PEFT's adapter of `some_lora`'s matrices."""
    tensors = {f"base_model.model.{name.removeprefix('network.')}": value for name, value in some_lora().state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("config", "linear", "conv"),
    [
        ({}, 2, 2),
        ({"use_rslora": True}, 6 / 3**0.5, 6 / 3**0.5),
        ({"alpha_pattern": {"conv1": 3}, "rank_pattern": {"conv1": 3}}, 2, 1),
        ({"alpha_pattern": {"attentions.0.to_out.0": 12}, "use_rslora": True}, 12 / 3**0.5, 6 / 3**0.5),
        ({"alpha_pattern": {"v1": 3}}, 2, 2),
        ({"r": 5, "rank_pattern": {".*attn.*|.*conv.*": 3}}, 2, 2),
        ({"use_dora": False, "lora_bias": False, "modules_to_save": None, "loftq_config": {}}, 2, 2),
    ],
)
def test_the_scale_is_pefts_own(tmp_path: Path, config: dict[str, object], linear: float, conv: float) -> None:
    found, plain = updates(read_lora(peft_folder(tmp_path, **config), MODULES)), plain_updates(some_lora())
    torch.testing.assert_close(found[LINEAR], plain[LINEAR] * linear)
    torch.testing.assert_close(found[CONV], plain[CONV] * conv)


def test_peft_itself_scales_so(tmp_path: Path) -> None:
    """The same facts through PEFT's own layers."""
    from peft import LoraConfig, inject_adapter_in_model

    facts = {"use_rslora": True, "alpha_pattern": {"first": 5}, "rank_pattern": {"first": 4}}
    network = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 6), "second": torch.nn.Linear(6, 5)})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], **facts)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)
    state = {
        name.replace(".default", ""): torch.randn_like(value)
        for name, value in network.state_dict().items()
        if "lora_" in name
    }
    save_file(
        {f"base_model.model.{name}": value for name, value in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    values = {"r": 2, "lora_alpha": 6, **facts}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    found = updates(read_lora(tmp_path / "adapter_model.safetensors", ["first", "second"]))
    for name in ("first", "second"):
        layer: Any = network[name]
        theirs = layer.scaling["default"] * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found[name], theirs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"adapter_config\.json: use_dora=true changes what the LoRA computes"),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true"),
        ({"some_new_scale": 3}, "some_new_scale=3"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base's own weights"),
        ({"peft_type": "LOHA"}, "kind 'LOHA'"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "more than the end of a layer's name"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"lora_alpha": "six"}, "about alpha is damaged"),
        ({"r": "3"}, "about rank is damaged"),
        ({"use_rslora": "yes"}, r"about use_rslora is damaged \(it is 'yes', not true or false\)"),
        ({"use_rslora": 1}, "about use_rslora is damaged"),
        ({"r": 0}, r"has rank 3, adapter_config\.json or the header says 0"),
        ({"r": 4, "rank_pattern": {"conv1": 3}}, r"to_out\.0 has rank 3, .* says 4"),
    ],
)
def test_facts_that_are_not_honoured_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_lora(peft_folder(tmp_path, **config), MODULES)
    assert str(error.value).count(str(tmp_path)) == 1  # the file is named once


def test_diffusers_header_has_the_same_facts(tmp_path: Path) -> None:
    tensors = {f"unet.{name.removeprefix('network.')}": value for name, value in some_lora().state.items()}
    facts = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True, "text_encoder.lora_alpha": 99}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    found = updates(read_lora(tmp_path / "lora.safetensors", MODULES))
    torch.testing.assert_close(found[LINEAR], plain_updates(some_lora())[LINEAR] * 6 / 3**0.5)
    facts["unet.use_dora"] = True
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    with pytest.raises(UserError, match="use_dora=true"):
        read_lora(tmp_path / "lora.safetensors", MODULES)


def processor(name: str, part: str) -> str:
    """As diffusers' training scripts of early 2023 wrote attention layers."""
    block, _, layer = name.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{layer}_lora.{part}.weight"


@pytest.mark.parametrize(
    "prefix", ["", "unet.", "base_model.model.", "module.", "unet._orig_mod.", "_orig_mod.unet.base_model.model."]
)
@pytest.mark.parametrize(
    "spelling",
    [
        "processor",
        "{}.lora.{}.weight",
        "{}.lora_linear_layer.{}.weight",
        "{}.lora_{}.weight",
        "{}.lora_{}.default.weight",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_older_spellings_are_read(tmp_path: Path, spelling: str, prefix: str, suffix: str) -> None:
    lora, tensors = some_lora(3, 3.0), {}
    lora = LoraWeights(3, 3.0, {name: value for name, value in lora.state.items() if LINEAR in name})
    for name, value in lora.state.items():
        layer, matrix = name.removeprefix("network.").removesuffix(".weight").rsplit(".lora_", 1)
        part = matrix if "default" in spelling else {"A": "down", "B": "up"}[matrix]
        key = processor(layer, part) if spelling == "processor" else spelling.format(layer, part)
        tensors[prefix + key] = value
    path = tmp_path / f"lora{suffix}"
    torch.save(tensors, path) if suffix == ".bin" else save_file(tensors, path)
    assert_equal(read_lora(path, MODULES), lora)


def test_layers_of_other_rank_and_alpha_keep_their_updates(tmp_path: Path) -> None:
    big, small = some_lora(4, 4.0), some_lora(2, 1.0)
    write_kohya_lora(tmp_path / "a.safetensors", big, {})
    write_kohya_lora(tmp_path / "b.safetensors", small, {})
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    mixed = {key: value for key, value in a.items() if "conv1" not in key} | {
        k: v for k, v in b.items() if "conv1" in k
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    found = read_lora(tmp_path / "mixed.safetensors", MODULES)
    assert found.rank == 4
    assert {value.shape[0] for name, value in found.state.items() if "lora_A" in name} == {4}
    torch.testing.assert_close(updates(found)[LINEAR], updates(big)[LINEAR])
    torch.testing.assert_close(updates(found)[CONV], updates(small)[CONV])


def test_a_lora_for_another_base_is_refused_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    for write in (
        lambda: write_kohya_lora(path, some_lora(), {}),
        lambda: write_peft_lora(path, some_lora(), "unet", {}),
    ):
        write()
        with pytest.raises(UserError, match=r"LoRA for another base: [23] of its [46] keys .*resnets.1.conv1") as error:
            read_lora(path, MODULES[:4])
        assert "\n" not in str(error.value)


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_kohya_lora(path, some_lora(), {})
    with pytest.raises(UserError, match="name layers that this network does not have"):
        read_lora(path, [*MODULES, LINEAR.replace(".0.to_out.0", "_0.to_out.0")])


def conv_in(down: torch.Tensor, up: torch.Tensor, alpha: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """One layer's entries."""
    parts = {"lora_down.weight": down, "lora_up.weight": up} | ({} if alpha is None else {"alpha": alpha})
    return {f"lora_unet_conv_in.{part}": value for part, value in parts.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_te_text_model_encoder.lora_down.weight": torch.ones(1)}, "belong to no plain LoRA"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "belong to no plain LoRA"),
        ({"unet.conv_in.lora_magnitude_vector": torch.ones(1)}, "belong to no plain LoRA"),
        ({"conv_in.weight": torch.ones(1)}, "belong to no plain LoRA"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 2)}, "no complete LoRA"),
        ({}, "is an empty LoRA: it has no layers"),
        (
            {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "conv_in.lora_A.weight": torch.ones(1, 2)},
            "two keys for one",
        ),
        (conv_in(torch.ones(()), torch.ones(3, 1)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(2, 4), torch.ones(3, 1)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(0, 4), torch.ones(3, 0)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(2, 4, 3, 3), torch.ones(3, 2)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(2, 4, 3, 3), torch.ones(3, 2, 3, 1)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(1, 4) * 1j, torch.ones(3, 1)), "layer network.conv_in is no LoRA's"),
        (conv_in(torch.ones(1, 4), torch.ones(3, 1), torch.ones(2)), "layer network.conv_in is no LoRA's"),
        (
            conv_in(torch.ones(1, 4), torch.ones(3, 1), torch.tensor(0.0)),
            r"alpha of the layer network\.conv_in is 0\.0",
        ),
        (
            conv_in(torch.ones(1, 4), torch.ones(3, 1), torch.tensor(torch.nan)),
            "alpha of the layer network.conv_in is nan",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "lora.safetensors", MODULES)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(path, MODULES)
    write_kohya_lora(path, some_lora(), {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(path, MODULES)
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, path, metadata={"lora": "[1"})
    with pytest.raises(UserError, match=r"no complete LoRA|alpha is damaged"):
        read_lora(path, MODULES)


def test_infinities_in_fp16_are_refused(tmp_path: Path) -> None:
    lora = some_lora()
    lora.state[f"{LINEAR}.lora_B.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"to_out\.0\.lora_B\.weight reaches 1e\+06"):
        write_kohya_lora(tmp_path / "lora.safetensors", lora, {}, torch.float16)


def test_one_layer_of_a_huge_rank_does_not_blow_up_the_others(tmp_path: Path) -> None:
    """All layers are padded to one rank; a small file must not become a large one."""
    small, layers = some_lora(1, 1.0), {f"network.layer_{number}": 1 for number in range(100)}
    state = {f"{name}.lora_{part}.weight": torch.ones(1, 1) for name in layers for part in "AB"} | small.state
    write_kohya_lora(tmp_path / "lora.safetensors", LoraWeights(1, 1.0, state), {})
    tensors = load_file(tmp_path / "lora.safetensors")
    tensors |= conv_in(torch.ones(10_000, 1), torch.ones(1, 10_000))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="one layer has rank 10000, most others less than a 64th of it"):
        read_lora(tmp_path / "lora.safetensors", [*MODULES, *layers])


@pytest.mark.parametrize(
    "value", ["[" * 100_000, "1" * 5000, "[]", '{"alpha": 1' + "0" * 400 + "}", '{"alpha": "x\\ny"}']
)
def test_damaged_alpha_in_a_header(tmp_path: Path, value: str) -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight": torch.ones(3, 1)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora": value})
    with pytest.raises(UserError, match="what it says about alpha is damaged") as error:
        read_lora(tmp_path / "lora.safetensors", MODULES)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_wrappers_in_the_middle_of_names(tmp_path: Path) -> None:
    """Blocks that are compiled, sharded or recomputed one by one."""
    lora, path = some_lora(3, 3.0), tmp_path / "lora.safetensors"
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        names = {name: name.removeprefix("network.").replace(".0.", f".0.{wrapper}", 1) for name in lora.state}
        save_file({names[name]: value for name, value in lora.state.items()}, path)
        assert_equal(read_lora(path, MODULES), lora)


def test_two_spellings_in_one_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_kohya_lora(path, some_lora(), {})
    save_file({**load_file(path), "unet.conv_in.lora_A.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"mixes kohya's spelling \(lora_unet_\.\.\.\) and others in one file"):
        read_lora(path, MODULES)
