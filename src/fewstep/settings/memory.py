"""How the roles of a distillation share memory."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from fewstep.errors import UserError
from fewstep.settings.common import ComputeSettings
from fewstep.settings.earlier import Earlier, Put, entry
from fewstep.settings.tree import Above0, Positive, Tree

NO_GPU = "moves blocks between host memory and a CUDA GPU, and this run is on none: leave it out"


def _offloaded(teacher: Any, blocks: Any) -> Any:
    """`offload_blocks` was a setting of its own."""
    kept = "sharded" if teacher == "offloaded_blocks" else teacher
    return kept if blocks is False else "offloaded_blocks"


_NO_DROPOUT = 0.0


def _with_dropout(value: Any) -> Any:
    """Rank and alpha alone as those without dropout."""
    entries = tuple(value) if isinstance(value, list) else value
    return (*entries, _NO_DROPOUT) if isinstance(entries, tuple) and len(entries) == 2 else entries


def _without_none(value: tuple[int, float, float]) -> list[Any]:
    """As recipes have it: dropout only where there is some."""
    return list(value if value[2] != _NO_DROPOUT else value[:2])


def _of_lora(place: int) -> Put:
    """An earlier key that is rank, alpha or dropout."""

    def put(value: Any, earlier: Any) -> Any:
        entries = entry(place, 3)(_with_dropout(value), earlier)
        return entries[:2] if entries[2:] == [_NO_DROPOUT] else entries

    return put


LoraEntries = Annotated[
    tuple[Positive, Above0, Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(_with_dropout),
    PlainSerializer(_without_none),
]


class MemorySettings(Tree):
    """How the three roles share memory."""

    mode: Literal["full", "lora_generator", "shared_base"] = Field(
        "full", description="full: three networks; lora_generator: generator is a LoRA on the frozen teacher; "
        "shared_base: generator and fake score are two LoRAs on one frozen teacher"
    )  # fmt: skip
    lora: LoraEntries = Field(
        (64, 8.0, _NO_DROPOUT),
        description="rank and alpha of each LoRA, whose update is scaled by alpha / rank, and its dropout: the share of its inputs that a "
        "training step leaves out (0, or left out: none)",
    )
    lora_targets: tuple[str, ...] = Field((), description="layers with a LoRA; empty: the published ones of the family")
    base: Literal["fp32", "bf16", "int8", "nf4"] = Field(
        "fp32",
        description="storage of weights that are never trained: the teacher's, which LoRAs sit on; int8 and nf4 with LoRAs alone, for its "
        "blocks' layers (nf4: linear ones); trained weights are fp32",
    )
    teacher: Literal["sharded", "replicated", "offloaded", "offloaded_blocks"] = Field(
        "sharded",
        description="where the teacher (which LoRAs sit on) lies: in parts over the processes of torchrun, whole in each, in parts in host memory, "
        "or (under LoRAs, for one GPU too) its blocks in each process's host memory, from which each goes to the GPU where it is used; trained "
        "networks are always in parts",
    )
    shard_over: int = Field(
        0,
        ge=0,
        description="under torchrun: processes (of one node) that share one copy of the networks; 0: all of them",
    )
    checkpoint_activations: bool = Field(False, description="recompute activations in the backward pass")

    earlier: ClassVar[dict[str, Earlier]] = {
        "frozen_precision": Earlier("base"),
        "lora_rank": Earlier("lora", _of_lora(0)),
        "lora_alpha": Earlier("lora", _of_lora(1)),
        "lora_dropout": Earlier("lora", _of_lora(2), silent=_NO_DROPOUT, together=True),
        "offload_blocks": Earlier("teacher", _offloaded, silent=False, together=True),
    }

    @property
    def lora_rank(self) -> int:
        """Of each LoRA."""
        return self.lora[0]

    @property
    def lora_alpha(self) -> float:
        """Of each LoRA, whose update is scaled by alpha / rank."""
        return self.lora[1]

    @property
    def lora_dropout(self) -> float:
        """Share of each LoRA's inputs that a training step leaves out."""
        return self.lora[2]

    @property
    def offload_blocks(self) -> bool:
        """Whether the frozen base's blocks lie in host memory and go to the GPU one by one."""
        return self.teacher == "offloaded_blocks"

    def refuse_parts(self, processes: int) -> None:
        """Raise UserError where a base would lie in parts over several processes that cannot."""
        if processes == 1 or self.teacher in ("replicated", "offloaded_blocks"):
            return
        if self.is_quantised:
            raise UserError(
                f"memory.base={self.base!r} lies whole in each of {processes} processes: set memory.teacher='replicated', or memory.base to "
                "bf16 or fp32, which can lie in parts"
            )

    @property
    def is_quantised(self) -> bool:
        """Whether the base is stored in 8 or 4 bits."""
        return self.base in ("int8", "nf4")


def impossible_memory(memory: MemorySettings, compute: ComputeSettings) -> str:
    """What does not go together, or nothing."""
    if memory.base == "bf16" and compute.precision in ("fp32", "fp16"):
        return "memory.base='bf16' needs compute.precision='bf16': frozen weights are computed with as stored"
    if memory.offload_blocks and (reason := _impossible_offload(memory, compute)):
        return f"memory.teacher='offloaded_blocks' {reason}"
    if memory.is_quantised and memory.mode == "full":
        return (
            f"memory.base={memory.base!r} is for a frozen base under LoRAs, and memory.mode='full' trains whole networks: set memory.mode to "
            "shared_base or lora_generator, or memory.base to fp32 or bf16"
        )
    return ""


def _impossible_offload(memory: MemorySettings, compute: ComputeSettings) -> str:
    if compute.device == "cpu":
        return NO_GPU
    if memory.mode == "full":
        return "is for a frozen base under LoRAs: set memory.mode to shared_base or lora_generator"
    if not memory.checkpoint_activations:
        return (
            "needs memory.checkpoint_activations=true: without it the copies of all blocks stay on the GPU from the forward to the "
            "backward pass"
        )
    return ""
