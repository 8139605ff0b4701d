"""One object between losses and weights: accumulation, the fp16 loss scale, and state that knows its parameters by name."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fewstep.distillation.loss_scale import NO_SCALE, SMALLEST_SCALE, LossScale
from fewstep.errors import UserError
from fewstep.settings import OptimizerSettings
from fewstep.training.ema import WeightAverage
from fewstep.training.update import Update, build_adamw, build_update

START = 2.0**16  # torch's first scale


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def update_of(module: nn.Module, scale: LossScale, *, fused: bool = True) -> Update:
    parameters = dict(module.named_parameters())
    settings = OptimizerSettings(max_grad_norm=1.0)
    if fused:
        return build_update(parameters, 1e-2, settings, scale, "generator_")
    plain = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=settings.weight_decay)
    return Update(parameters, 1e-2, plain, 1.0, scale, "generator_")


def half_scale() -> LossScale:
    return LossScale.of(torch.float16, "cpu")


def batch(number: int = 0) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def loss_of(module: nn.Module, inputs: Tensor) -> Tensor:
    return module(inputs).square().mean()


def snapshot(module: nn.Module, update: Update) -> dict[str, Tensor]:
    state = {**module.state_dict(), **update.tensors("optimizer")}
    state.pop("optimizer.loss_scale", None)
    return {name: value.clone() for name, value in state.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def overflow(update: Update) -> None:
    """One gradient is infinite, as after an overflow in half precision."""
    next(iter(update.parameters.values())).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_gradients_add_up_to_the_whole_batch(size: int) -> None:
    whole, parts = network().double(), network().double()
    one, many = (
        update_of(whole, LossScale.of(torch.float32, "cpu")),
        update_of(parts, LossScale.of(torch.float32, "cpu")),
    )
    inputs = batch().double()
    one.backward(loss_of(whole, inputs))
    for part in inputs.split(size):
        many.backward(len(part) / len(inputs) * loss_of(parts, part))
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    assert float(one.step()["generator_grad_norm"]) == pytest.approx(
        float(many.step()["generator_grad_norm"]), rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_scaled_outside_fp16(dtype: torch.dtype) -> None:
    module, plain = network(), network()
    update = update_of(module, LossScale.of(dtype, "cpu"))
    optimizer = build_adamw(plain.parameters(), 1e-2, OptimizerSettings())
    for number in range(3):
        update.backward(loss_of(module, batch(number)))
        metrics = update.step()
        loss_of(plain, batch(number)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert list(metrics) == ["generator_grad_norm"]
    assert_equal(module.state_dict(), plain.state_dict())
    assert not any("loss_scale" in name for name in update.tensors("optimizer"))


def test_a_scale_changes_no_update() -> None:
    """The scale is a power of two: gradients come back exactly, clipped at the same norm."""
    plain, scaled = network(), network()
    one, other = update_of(plain, LossScale.of(torch.float32, "cpu")), update_of(scaled, half_scale())
    for number in range(3):
        one.backward(loss_of(plain, batch(number)))
        other.backward(loss_of(scaled, batch(number)))
        expected, found = one.step(), other.step()
        assert float(found["generator_grad_norm"]) == float(expected["generator_grad_norm"])
        assert float(found["generator_loss_scale"]) == START
    assert_equal(snapshot(scaled, other), snapshot(plain, one))


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_is_as_if_the_step_had_not_been(fused: bool) -> None:
    module, undisturbed = network(), network()
    update, other = update_of(module, half_scale(), fused=fused), update_of(undisturbed, half_scale(), fused=fused)
    for number in range(2):
        update.backward(loss_of(module, batch(number)))
        update.step()
        other.backward(loss_of(undisturbed, batch(number)))
        other.step()
    before = snapshot(module, update)
    update.backward(loss_of(module, batch(7)))
    overflow(update)
    metrics = update.step()
    assert float(metrics["generator_grad_norm"]) == 0
    assert float(update.scale.value("cpu")) == START / 2
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_equal(snapshot(module, update), before)
    for number in range(2, 4):  # and it goes on as if nothing had happened
        update.backward(loss_of(module, batch(number)))
        assert float(update.step()["generator_grad_norm"]) > 0
        other.backward(loss_of(undisturbed, batch(number)))
        other.step()
    assert_equal(snapshot(module, update), snapshot(undisturbed, other))


def test_the_scale_recovers() -> None:
    module = network()
    update = update_of(module, half_scale())
    update.scale.scaler.set_growth_interval(2)
    scales = []
    for number in range(6):
        update.backward(loss_of(module, batch(number)))
        if number == 1:
            overflow(update)
        scales.append(float(update.step()["generator_loss_scale"]))
    assert scales == [START, START, START / 2, START / 2, START, START]


def test_an_average_stays_where_a_step_was_not_made() -> None:
    module, averages = network(), [WeightAverage(network(), 100.0) for _ in range(2)]
    for average in averages:  # elsewhere than the weights that it would move to
        average.module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    update = update_of(module, half_scale())
    update.backward(loss_of(module, batch(7)))
    overflow(update)
    update.step()
    averages[0].update(module, 1000, 8, update.made)
    assert_equal(averages[0].module.state_dict(), averages[1].module.state_dict())
    update.backward(loss_of(module, batch(0)))
    update.step()
    averages[0].update(module, 1000, 8, update.made)
    averages[1].update(module, 1000, 8)
    for name, value in averages[1].module.state_dict().items():
        torch.testing.assert_close(averages[0].module.state_dict()[name], value)
    assert update_of(module, NO_SCALE).made is None


def test_overflows_without_end_are_seen() -> None:
    """What no scale mends is no overflow: the norm says so, and the run stops."""
    module = network()
    update = update_of(module, half_scale())
    update.scale.restore(torch.tensor([2 * SMALLEST_SCALE, 0.0], dtype=torch.float64))
    norms = []
    for _ in range(2):
        update.backward(loss_of(module, batch()))
        overflow(update)
        norms.append(float(update.step()["generator_grad_norm"]))
    assert norms == [0, float("inf")]


def test_gradients_for_terms_are_unscaled() -> None:
    x = torch.tensor([1e-4, 2e-4], requires_grad=True)
    for scale in (half_scale(), LossScale.of(torch.float32, "cpu")):
        gradient = scale.gradient_at((x.square()).sum(), x)
        assert torch.equal(gradient, 2 * x.detach())
        assert x.grad is None


def test_small_half_precision_gradients_survive_by_the_scale() -> None:
    """1e-9 is zero in fp16; times the scale it is not."""
    x = torch.ones(1, requires_grad=True)

    def loss() -> Tensor:
        return (x.half().float() * 1e-9).sum()

    assert float(LossScale.of(torch.float32, "cpu").gradient_at(loss(), x)) == 0
    assert float(half_scale().gradient_at(loss(), x)) == pytest.approx(1e-9, rel=1e-3)


# --- State


def trained(scale: LossScale) -> tuple[nn.Module, Update]:
    module = network()
    update = update_of(module, scale)
    update.backward(loss_of(module, batch()))
    update.step()
    return module, update


def test_state_round_trip_with_the_scale() -> None:
    module, update = trained(half_scale())
    update.backward(loss_of(module, batch(1)))
    overflow(update)
    update.step()
    other_module = copy.deepcopy(module)
    other = update_of(other_module, half_scale())
    other.restore("optimizer", {name: value.clone() for name, value in update.tensors("optimizer").items()})
    assert_equal(other.tensors("optimizer"), update.tensors("optimizer"))
    assert "optimizer.0.weight.exp_avg" in update.tensors("optimizer")
    for each, its in ((module, update), (other_module, other)):
        its.backward(loss_of(each, batch(2)))
        its.step()
    assert_equal(snapshot(other_module, other), snapshot(module, update))


def test_states_by_number_are_those_of_earlier_versions() -> None:
    module, update = trained(LossScale.of(torch.float32, "cpu"))
    numbers = {name: str(number) for number, name in enumerate(update.parameters)}
    older = {}
    for key, value in update.tensors("optimizer").items():
        name, field = key.removeprefix("optimizer.").rsplit(".", 1)
        older[f"optimizer.{numbers[name]}.{field}"] = value
    other = update_of(module, LossScale.of(torch.float32, "cpu"))
    other.restore("optimizer", older)
    assert_equal(other.tensors("optimizer"), update.tensors("optimizer"))


def test_the_state_of_other_parameters_is_refused() -> None:
    module, update = trained(LossScale.of(torch.float32, "cpu"))
    tensors = update.tensors("optimizer")
    fresh = update_of(module, LossScale.of(torch.float32, "cpu"))
    missing = {name: value for name, value in tensors.items() if name != "optimizer.0.weight.exp_avg"}
    with pytest.raises(UserError, match=r"the checkpoint's optimizer\.0\.weight is incomplete"):
        fresh.restore("optimizer", missing)
    with pytest.raises(UserError, match=r"optimizer\.0\.weight is incomplete or of another shape"):
        fresh.restore("optimizer", tensors | {"optimizer.0.weight.exp_avg": torch.zeros(3)})
    with pytest.raises(UserError, match=r"optimizer is that of another network: it has 7\.weight"):
        fresh.restore("optimizer", tensors | {"optimizer.7.weight.exp_avg": torch.zeros(3)})


@pytest.mark.parametrize("scale", [NO_SCALE, half_scale()])
def test_a_norm_of_zero_never_clips(scale: LossScale) -> None:
    """As the published warm-up is trained: the gradients are those of the loss, however long."""
    module = network()
    loss_of(module, 1e4 * batch()).backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]
    module.zero_grad()
    update = build_update(dict(module.named_parameters()), 1e-2, OptimizerSettings(max_grad_norm=0.0), scale)
    kept = list[Tensor]()
    update.optimizer.register_step_pre_hook(
        lambda *_: kept.extend(parameter.grad.clone() for parameter in module.parameters())  # type: ignore[union-attr]
    )
    update.backward(loss_of(module, 1e4 * batch()))
    norm = update.step()["grad_norm"]
    assert norm > 1e3
    for found, gradient in zip(kept, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=0)
