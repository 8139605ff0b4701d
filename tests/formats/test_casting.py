import pytest
import torch

from fewstep.errors import UserError
from fewstep.formats.casting import cast_weights


def test_floats_are_cast_and_others_kept() -> None:
    weights = {"a": torch.randn(3, 2).t(), "ids": torch.arange(3)}
    cast = cast_weights(weights, torch.float16)
    assert cast["a"].dtype == torch.float16
    assert cast["a"].is_contiguous()
    assert torch.equal(cast["ids"], weights["ids"])
    assert torch.equal(cast["a"].float(), weights["a"].half().float())


def test_values_that_do_not_fit_are_refused_by_name() -> None:
    weights = {"good": torch.ones(2), "bad": torch.tensor([1.0, -70_000.0])}
    with pytest.raises(
        UserError, match=r"the tensor vae\.bad reaches 7e\+04 and becomes infinite in fp16; choose --dtype"
    ):
        cast_weights(weights, torch.float16, "vae")
    assert torch.isfinite(cast_weights(weights, torch.bfloat16)["bad"]).all()
    with pytest.raises(UserError, match="the tensor bad holds infinities or NaNs"):
        cast_weights({"bad": torch.tensor([float("nan")])}, torch.float32)
