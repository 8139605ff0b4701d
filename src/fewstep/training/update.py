"""From losses to changed weights: one `Update` for each trained role. Nobody else calls `backward` or an optimiser's `step`.

The learning rate is a pure function of progress, so that a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fewstep.distillation.loss_scale import NO_SCALE, LossScale
from fewstep.distillation.sharding import as_placed, gradient_norm, is_sharded, local, synchronise
from fewstep.errors import UserError
from fewstep.parallel import average_gradients
from fewstep.settings import OptimizerSettings


class Update:
    """Owns what stands between a role's losses and its weights: optimiser, loss scale, accumulation, clipping.

    Gradients add up over any number of `backward` calls; `step` makes one update of their sum. In fp16 a step whose
    gradients overflowed is not made: weights, moments and counters stay and the scale is halved.

    Args:
        parameters: what is trained, by name; looked up when the update is built, so after sharding.
        lr: base learning rate.
        optimizer: over exactly these parameters, in their order.
        max_grad_norm: the norm of all gradients together is clipped at this; 0: never.
        scale: loss scale; the terms that ask for gradients at the role's output share it.
        prefix: of the metrics' names.
        modules: that have the parameters, whose processes exchange gradients in a step's last backward pass only.

    Attributes:
        made: in fp16, whether the last step was made: a scalar on the device, 1 or 0; None where every step is.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], lr: float, optimizer: torch.optim.Optimizer, max_grad_norm: float,
        scale: LossScale = NO_SCALE, prefix: str = "", modules: Iterable[nn.Module] = (),
    ) -> None:  # fmt: skip
        self.parameters, self.lr, self.optimizer, self.modules = dict(parameters), lr, optimizer, list(modules)
        self.max_grad_norm, self.scale, self.prefix = max_grad_norm, scale, prefix
        self.made: Tensor | None = None

    def set_rate(self, factor: float) -> None:
        """Train with `factor` times the base rate from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add a scalar loss's gradients; `last`: the step's last ones of this update."""
        synchronise(self.modules, last)
        self.scale.scaled(loss).backward()

    def backward_at(self, output: Tensor, gradient: Tensor, last: bool = True) -> None:
        """Add the gradients that follow from `gradient` at the role's `output`, of the same shape; `last` as in `backward`."""
        synchronise(self.modules, last)
        output.backward(self.scale.scaled(gradient))

    def step(self) -> dict[str, Tensor]:
        """One update by the added gradients, which are cleared.

        Returns:
            Metrics on the device: the gradients' norm before clipping, 0 where an overflow kept the step from being
            made; in fp16 the loss scale too. A norm that is not finite says that the run is lost.
        """
        scaler = self.scale.scaler
        gradients = [part.grad for part in self.parameters.values() if part.grad is not None]
        # an overflow of one is all's
        average_gradients([gradient for gradient in gradients if not is_sharded(gradient)])
        scaler.unscale_(self.optimizer)
        norm = self._clip(gradients)
        scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if not self.scale.is_on:
            return {f"{self.prefix}grad_norm": norm}
        self.made = norm.isfinite().float()
        scale, norm = self.scale.value(norm.device), self.scale.told(norm)
        scaler.update()
        return {f"{self.prefix}grad_norm": norm, f"{self.prefix}loss_scale": scale}

    @torch.no_grad()
    def _clip(self, gradients: list[Tensor]) -> Tensor:
        """Returns the norm before clipping."""
        norm = gradient_norm(gradients)
        if gradients:
            factor = ((self.max_grad_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The optimiser's state under `name.<parameter>.<field>`, and in fp16 the scale's under `name.loss_scale`."""
        state = self.optimizer.state_dict()["state"]
        names = list(self.parameters)
        tensors = {
            f"{name}.{names[number]}.{field}": value
            for number, fields in state.items()
            for field, value in fields.items()
        }
        return tensors | ({f"{name}.loss_scale": self.scale.state()} if self.scale.is_on else {})

    def layout(self, name: str) -> dict[str, Tensor]:
        """The parameter that each moment of `tensors` lies in the processes like."""
        return {
            f"{name}.{key}.{field}": parameter
            for key, parameter in self.parameters.items()
            for field in ("exp_avg", "exp_avg_sq")
        }

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; the states of earlier versions, which number the parameters, are read too.

        Raises:
            UserError: the state is that of other parameters, or a part of it is missing.
        """
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        scale = own.pop("loss_scale", None)
        if scale is not None and self.scale.is_on:
            self.scale.restore(scale)
        state = _by_number(own, list(self.parameters), name)
        parameters = list(self.parameters.items())
        state = {
            number: {
                field: as_placed({"": value}, {"": parameters[number][1]})[""] if value.dim() else value
                for field, value in fields.items()
            }
            for number, fields in state.items()
        }
        for number, fields in state.items():
            key, parameter = parameters[number]
            if fields.keys() != _fields(state) or any(
                value.shape not in (parameter.shape, torch.Size()) for value in fields.values()
            ):
                raise UserError(f"the checkpoint's {name}.{key} is incomplete or of another shape than the run's")
        if not state and own:
            raise UserError(f"the checkpoint's {name} holds nothing of the run's parameters")
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _by_number(own: Mapping[str, Tensor], names: list[str], where: str) -> dict[int, dict[str, Tensor]]:
    """{parameter's number: {field: tensor}} from keys `<parameter>.<field>`, the parameter by name or number."""
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in own.items():
        parameter, _, field = key.rpartition(".")
        if parameter.isdecimal() and int(parameter) < len(names):
            number = int(parameter)
        elif parameter in numbers:
            number = numbers[parameter]
        else:
            raise UserError(f"the checkpoint's {where} is that of another network: it has {parameter}")
        state.setdefault(number, {})[field] = value
    return state


def _fields(state: Mapping[int, Mapping[str, Tensor]]) -> set[str]:
    """Every field that any parameter has."""
    return {field for fields in state.values() for field in fields}


def build_update(
    parameters: Mapping[str, nn.Parameter], lr: float, settings: OptimizerSettings, scale: LossScale = NO_SCALE,
    prefix: str = "", modules: Iterable[nn.Module] = (),
) -> Update:  # fmt: skip
    """AdamW as published over named parameters, with the settings' clipping."""
    adamw = build_adamw(parameters.values(), lr, settings)
    return Update(parameters, lr, adamw, settings.max_grad_norm, scale, prefix, modules)


def build_adamw(parameters: Iterable[nn.Parameter], lr: float, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, as published (betas 0.9, 0.999, weight decay 0.01)."""
    return torch.optim.AdamW(
        list(parameters), lr=lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def learning_rate_factor(settings: OptimizerSettings, step: int, progress: float) -> float:
    """Multiple of the base rate at a step.

    Args:
        settings: warm-up steps and the shape after it.
        step: number of the update about to be made, from 0; the first warm-up update has 1 / warmup_steps.
        progress: share of the whole run that is done, 0..1 (by steps, or by the clock under a time limit).
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay == "constant":
        return warmup
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return warmup * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)
