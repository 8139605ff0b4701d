"""Several roles on one frozen network: each role is a LoRA adapter, bound for the duration of one forward.

Outside of any forward no adapter is bound, so the base itself is the teacher. What is bound is one object that all LoRA
layers look at; compiled blocks are guarded by it, so that each role has a compiled form of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.devices import device_of
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Checkpoint, Denoiser, DenoiserOutput, Want, plain_checkpoint
from fewstep.errors import UserError
from fewstep.formats.compare import state_difference
from fewstep.networks.lora_layers import Binding, cast_factors, wrap_layers


@dataclass(frozen=True)
class LoraShape:
    """Rank, alpha (the update is scaled by alpha / rank) and target layers; no targets: the family's published ones.

    `dropout` is the share of each update's inputs that forwards with gradients leave out; it is no part of what is trained.
    """

    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0


class SharedBase:
    """One frozen network with LoRA layers, and which role's adapter is bound now.

    Args:
        base: the teacher; frozen, changed in place: its target layers are wrapped.
        lora: shape of every role's adapter.

    Raises:
        UserError: targets that match no layer, or a family without known targets.
    """

    def __init__(self, base: Denoiser, lora: LoraShape) -> None:
        self.base, self.lora = base, lora
        self.targets = choose_targets(base, lora)
        self.binding = Binding(dropout=lora.dropout)
        base.requires_grad_(False)
        self.layers = wrap_layers(base, self.targets, self.binding, lora.alpha / lora.rank)
        self.is_compiled = False

    @property
    def role(self) -> str | None:
        """The role whose adapter is bound now."""
        return self.binding.role

    def add_role(self, role: str) -> "AdapterRole":
        """A new adapter, trainable, float32, that starts as no change at all.

        Raises:
            ValueError: the role exists, or a role is bound now.
        """
        if self.role is not None or any(role in layer.lora_A for layer in self.layers.values()):
            raise ValueError(f"role {role!r} exists already, or roles are added inside a forward of {self.role!r}")
        device = device_of(self.base)  # whose layers may lie elsewhere
        for layer in self.layers.values():
            layer.add_role(role, self.lora.rank, device)
        return AdapterRole(self, role)

    @contextmanager
    def bound(self, role: str | None) -> Iterator[None]:
        """Use one role's adapter inside the block and the earlier one after it."""
        if role == self.role:
            yield
            return
        with self._rebound(Binding(role, self._factors(role))):
            yield

    def checkpoint(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Activation checkpoint that binds, when it recomputes, the role of the forward it belongs to."""
        random = self.lora.dropout > 0
        if torch.compiler.is_compiling():  # the role is a constant of the compiled form
            return plain_checkpoint(block, *inputs, random=random)
        of_this_forward = replace(self.binding)

        def run(*inputs: Any) -> Any:
            with self._rebound(of_this_forward):
                return block(*inputs)

        return plain_checkpoint(run, *inputs, random=random)

    def checkpoint_activations(self) -> None:
        """Keep block inputs only, in every role."""
        self.base.checkpoint_activations(self.checkpoint)

    def compile_network(self) -> None:
        """Compile the base for every role; each has compiled forms of its own."""
        if not self.is_compiled:
            self.is_compiled = True
            self.base.compile_network()

    @contextmanager
    def _rebound(self, other: Binding) -> Iterator[None]:
        binding = self.binding
        earlier = replace(binding)
        binding.role, binding.factors = other.role, other.factors
        try:
            yield
        finally:
            binding.role, binding.factors = earlier.role, earlier.factors

    def _factors(self, role: str | None) -> tuple[Tensor, ...]:
        """The role's factors in the base's precision; none where they are in it, or the compiled form casts them."""
        dtype = self.base.compute_dtype
        if role is None or self.is_compiled or dtype == torch.float32:
            return ()
        return cast_factors([part for layer in self.layers.values() for part in layer.parameters_of(role)], dtype)


class AdapterRole(Denoiser):
    """A shared base under one role's adapter. Its parameters and state dict are the adapter's alone.

    It keeps no parameter: each is looked up in the base when asked for, because sharding replaces the base's objects.
    """

    def __init__(self, shared: SharedBase, role: str) -> None:
        super().__init__()
        self._shared = (shared,)  # in a tuple: the base's parameters belong to nobody here
        self.role = role
        self.requires_grad_(True)
        base = shared.base
        self.noise_schedule, self.image_shape = base.noise_schedule, base.image_shape
        self.num_classes, self.tap_shapes, self.middle = base.num_classes, base.tap_shapes, base.middle

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """(<layer path>.lora_A.weight / .lora_B.weight, parameter), as diffusers and peft name them."""
        parts: dict[str, Any] = {}
        for name, layer in self.shared.layers.items():
            parts[f"{name}.lora_A"], parts[f"{name}.lora_B"] = layer.lora_A[self.role], layer.lora_B[self.role]
        for name in sorted(parts, key=_older_name):  # optimisers of earlier runs number their parameters so
            yield f"{prefix}{'.' if prefix else ''}{name}.weight", parts[name].weight

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """`adapter_state`."""
        return self.adapter_state()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """`load_adapter_state`; the names that earlier checkpoints have are read too."""
        self.load_adapter_state(self.renamed(state_dict))

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under the names of today, where it has those of earlier checkpoints."""
        older = {_OLDER_PREFIX + _older_name(name.removesuffix(".weight")): name for name in self.adapter_state()}
        return {older.get(name, name): value for name, value in state.items()}

    @property
    def shared(self) -> SharedBase:
        """The base and its other roles."""
        return self._shared[0]

    @property
    def base_network(self) -> Denoiser:
        return self.shared.base

    def own_weights(self) -> dict[str, Tensor]:
        return self.adapter_state()

    def load_own_weights(self, weights: dict[str, Tensor]) -> None:
        self.load_adapter_state(weights)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        """Precision inside the network: the base's."""
        return self.shared.base.compute_dtype

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        with self.shared.bound(self.role):
            return self.shared.base(noisy, level, condition, want)

    @property
    def chosen_taps(self) -> tuple[int, ...]:  # type: ignore[override]
        """The base's, in every role."""
        return self.shared.base.chosen_taps

    def denoising_weight(self, level: Tensor) -> Tensor:
        return self.shared.base.denoising_weight(level)

    def blocks(self) -> list[nn.Module]:
        """The base's."""
        return self.shared.base.blocks()

    def checkpoint_activations(self, checkpoint: Checkpoint | None = None) -> None:
        """In every role of the base."""
        assert checkpoint is None, "roles on one base share its checkpoint, which binds their adapter"
        self.shared.checkpoint_activations()

    def compile_network(self) -> None:
        """The base's blocks, for every role."""
        self.shared.compile_network()

    def describe(self) -> dict[str, Any]:
        """The base's description with the adapter's shape."""
        lora = self.shared.lora
        shape = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(self.shared.targets)}
        return {**self.shared.base.describe(), "lora": shape}

    def adapter_state(self) -> dict[str, Tensor]:
        """{<layer path>.lora_A.weight / .lora_B.weight: tensor}, as diffusers and peft name them."""
        return {name: part.detach() for name, part in self.named_parameters()}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `adapter_state`.

        Raises:
            UserError: the tensors are another adapter's; names some.
        """
        if fault := state_difference(state, self.adapter_state()):
            raise UserError(f"the LoRA does not fit this base, rank and targets: {fault}")
        with torch.no_grad():
            for name, part in self.named_parameters():
                part.copy_(state[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterRole":
        """What `to` and its kin do to a module: here to the adapter's layers in the base."""
        for layer in self.shared.layers.values():
            for part in (layer.lora_A[self.role], layer.lora_B[self.role]):
                part._apply(fn)
        return self


def choose_targets(base: Denoiser, lora: LoraShape) -> tuple[str, ...]:
    """Given targets, each of which must match a layer; or those of the family's published ones that do."""
    names = [name for name, _ in base.named_modules()]
    wanted = lora.targets or base.lora_targets
    if not wanted:
        raise UserError("memory.lora_targets is empty and this model family has no published targets: name the layers")
    missing = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing and (lora.targets or len(missing) == len(wanted)):
        raise UserError(f"memory.lora_targets {missing} match no layer of the teacher")
    return tuple(target for target in wanted if target not in missing)


_OLDER_PREFIX = "adapter."  # of an adapter's tensors in the checkpoints of earlier versions


def _older_name(name: str) -> str:
    """The name that earlier versions gave a layer's factor."""
    return name.replace(".", "/")
