"""Names of models distilled to few steps, as they are published, and of ordinary ones."""

import pytest

from fewstep.formats.few_step_names import few_steps_named, method_named, predicts_v_by_name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", "turbo"), ("RealVisXL_V4.0_Lightning", "lightning"), ("dreamshaper_8LCM", "lcm"),
        ("dreamshaperXL_lightningDPMSDE", "lightning"), ("realvisxlV40_v40LightningBakedvae", "lightning"), ("TurboVisionXL", "turbo"),
        ("Hyper-SD15", "hyper"), ("sdxl-flash", "flash"), ("dmd2_sdxl_4step", "dmd"), ("my-sd15-8steps", "8steps"),
        ("stable-diffusion-v1-5", ""), ("sdxl-base-1.0", ""), ("hyperRealism_v3", ""), ("hyper_realistic_v3", ""), ("flash_photography", ""),
        ("teacher_for_dmd2", ""), ("epoch_8_step_400", ""), ("model_10000steps", ""), ("SDXL_v6_steps", ""), ("v1-5-pruned-emaonly", ""),
    ],
)  # fmt: skip
def test_names_of_whole_models(name: str, said: str) -> None:
    assert few_steps_named(name, ("sd", "sdxl", "xl")) == said


def test_a_word_alone_is_another_thing() -> None:
    assert few_steps_named("hyper_sd", ()) == ""


def test_every_word_of_another_method_counts_where_steps_would_be_guessed() -> None:
    assert [method_named(name) for name in ("Hyper-SDXL-4steps", "flash_sdxl", "dmd2_sdxl_4step", "4step_lora")] == [
        "hyper", "flash", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_said"),
    [
        ("noobaiXLNAIXL_vPred10Version.safetensors", True), ("NoobAI-XL-Vpred-1.0", True), ("fluffyrock-e92-vpred", True), ("sd2.1 v-prediction", True),
        ("my_v_pred_model", True), ("MixVpred", True), ("v1-5-pruned", False), ("vprediktor", False), ("v2_predator", False), ("eps-pred-v2", False),
        ("heav pred", False), ("V_predictor_art", False),
    ],
)  # fmt: skip
def test_names_that_say_prediction_of_v(name: str, is_said: bool) -> None:
    assert predicts_v_by_name(name) == is_said
