"""What each of many processes would need and how long a step would take: one process's share of the batch, rehearsed, its networks
in parts, and what the processes tell each other.

Memory is the rehearsal's, where what `fully_shard` spreads counts by the part that the first process has, and the blocks that are
gathered to be run come on top. Time is arithmetic at a share of the card's rate, beside the bytes that travel at the rates of its
links: a step takes the larger of both where they overlap, their sum where they do not. tests/distributed/test_memory.py holds the
memory against measured processes; nothing here was compared with several GPUs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fewstep.devices import DTYPES
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.estimate.fits import FREE_SHARE
from fewstep.estimate.memory import (
    AVERAGE,
    FAKE_SCORE_TURN,
    FROZEN,
    GENERATOR_TURN,
    GRADIENTS,
    STATES,
    TRAINED,
    Estimate,
    settled_precision,
)
from fewstep.settings import TrainSettings
from fewstep.training.warmup import is_warmup

_GIB = 2**30
ARITHMETIC_SHARE = 0.2  # of the card's matrix rate; what docs/gpu.md measured lies around it
PER_MACHINE = 8  # processes


@dataclass(frozen=True)
class Gpu:
    """A card, by its vendor's data sheet.

    Attributes:
        gib: memory.
        rate: dense bf16 matrix products, operations a second.
        inside, between: bytes a second that one card sends within a machine, and to other machines.
    """

    gib: float
    rate: float
    inside: float
    between: float


GPUS = {  # inside: NVLink one way, or PCIe; between: a 400, 200 or 100 Gb/s port a card, or 25 Gb/s a machine
    "rtx4090": Gpu(24, 165e12, 25e9, 25e9 / 64),
    "l40s": Gpu(48, 362e12, 25e9, 12.5e9),
    "a100": Gpu(80, 312e12, 300e9, 25e9),
    "h100": Gpu(80, 989e12, 450e9, 50e9),
    "h200": Gpu(141, 989e12, 450e9, 50e9),
}


def share_of(parameters: Iterable[Tensor], processes: int) -> float:
    """The first process's share of sharded parameters: `fully_shard` splits along the first axis, rounded up."""
    whole = own = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.dim() else 1
        whole += parameter.numel()
        own += -(-rows // processes) * (parameter.numel() // max(rows, 1))
    return own / whole


def parts_gathered(network: Denoiser) -> list[int]:
    """Parameters of each part that is gathered at once, without those of parts inside of it; the last are the network's own."""
    sizes, seen = [], set[int]()
    for part in [*network.sharded_parts(), network]:
        own = [weight for weight in part.parameters() if id(weight) not in seen]
        seen |= {id(weight) for weight in own}
        sizes.append(sum(weight.numel() for weight in own))
    return sizes


def own_settings(settings: TrainSettings, processes: int) -> TrainSettings:
    """The settings with one process's share of the batch.

    Raises:
        UserError: the batch does not divide, or the copies do not; a base that cannot lie in parts.
    """
    batch, over = settings.training.batch_size, settings.memory.shard_over
    if batch % processes:
        raise UserError(f"training.batch_size={batch} does not divide by {processes} processes")
    if over and processes % over:
        raise UserError(f"memory.shard_over={over} does not divide {processes} processes; 0 shards over all of them")
    settings.memory.refuse_parts(processes)
    own = batch // processes
    at_once = min(settings.training.microbatch_size, own)
    training = settings.training.model_copy(update={"batch_size": own, "microbatch_size": at_once})
    return settings.model_copy(update={"training": training})


@dataclass(frozen=True)
class Layout:
    """How a run's networks lie in its processes.

    Attributes:
        settings: with one process's share of the batch, as `own_settings` makes them.
        network: the teacher, on the meta device.
        processes: of the run.
        estimate: of one process with its share of the batch and whole networks.
        reads_parts: whether the teacher's files can be read part by part.
    """

    settings: TrainSettings
    network: Denoiser
    processes: int
    estimate: Estimate
    reads_parts: bool = True

    @property
    def sharing(self) -> int:
        """Processes that have one copy between them."""
        return self.settings.memory.shard_over or self.processes

    @property
    def share(self) -> float:
        """The first process's part of a sharded network."""
        return share_of(self.network.parameters(), self.sharing)

    @property
    def compute_bytes(self) -> int:
        """Of a gathered weight."""
        return DTYPES[settled_precision(self.settings.compute, self.settings.compute.device != "cpu")].itemsize

    def is_sharded(self, role: str) -> bool:
        """Whether a role ("teacher", "generator", "fake_score") lies in parts."""
        mode, place = self.settings.memory.mode, self.settings.memory.teacher
        if role == "teacher":
            return place in ("sharded", "offloaded")
        return mode == "full" or (mode == "lora_generator" and role == "fake_score")

    @property
    def slices(self) -> int:
        """Bytes of host memory that a process reads the teacher through where it reads its own parts alone: its rows of one tensor in
        float32, and where LoRAs are merged what they add to it, whole."""
        largest, shared = max(self.network.parameters(), key=lambda part: part.numel()), self.settings.teacher.loras
        return round(4 * largest.numel() * (share_of([largest], self.sharing) + 2 * bool(shared)))

    @property
    def while_read(self) -> tuple[int, int]:
        """Bytes of host memory, and of its device, that a process has the teacher in while it is read: its parts as they stay (0 more of
        the device) where it reads no others; else whole, in float32, on the device as `memory.base` says where adapters alone are
        trained (in 8 or 4 bits it stays so: 0 more)."""
        count, memory = self.estimate.parameters["teacher"], self.settings.memory
        if self.is_sharded("teacher") and self.reads_parts:
            return self.slices, 0
        if memory.mode != "shared_base":
            return 4 * count, 4 * count
        return 4 * count, 0 if memory.is_quantised or memory.offload_blocks else count * DTYPES[memory.base].itemsize

    def memory(self) -> dict[str, float]:
        """Bytes of the first process in the phase that needs most: "between steps", "gathered blocks", "step"."""
        found = [self._memory(phase) for phase in self.estimate.kinds if phase in (GENERATOR_TURN, FAKE_SCORE_TURN)]
        return max(found, key=lambda parts: sum(parts.values()))

    def _memory(self, phase: str) -> dict[str, float]:
        kinds, count = self.estimate.kinds[phase], self.estimate.parameters
        base = "fp32" if self.settings.memory.base == "fp32" else "bf16"  # quantised ones do not lie in parts
        teacher = count["teacher"] * DTYPES[base].itemsize
        stays = {"sharded": self.share, "replicated": 1.0, "offloaded": 0.0, "offloaded_blocks": 1.0}[
            self.settings.memory.teacher
        ]
        trained = {role: count.get(role, 0) for role in ("generator", "fake_score")}
        own = {role: self.share if self.is_sharded(role) else 1.0 for role in trained}
        whole = sum(trained.values())
        part = sum(trained[role] * own[role] for role in trained) / max(whole, 1)
        role = "generator" if phase == GENERATOR_TURN else "fake_score"
        between = kinds[FROZEN] - teacher * (1 - stays)
        between += part * (kinds[TRAINED] + kinds[STATES]) + own["generator"] * kinds[AVERAGE]
        others = sum(kinds.values()) - sum(kinds[kind] for kind in (FROZEN, TRAINED, STATES, AVERAGE, GRADIENTS))
        return {
            "between steps": between,
            "gathered blocks": self._gathered(role),
            "step": others + own[role] * kinds[GRADIENTS],
        }

    def _gathered(self, role: str) -> float:
        """The block that runs and the next one, and of a trained network one block's gradients, in bytes."""
        sizes = sorted(parts_gathered(self.network))
        running = sum(sizes[-2:]) * self.compute_bytes
        if self.is_sharded(role):
            return running + sizes[-1] * (self.compute_bytes + 4)
        return running if self.is_sharded("teacher") else 0.0

    def exchanged(self) -> tuple[float, float]:
        """Bytes that a process sends in an average step: among those that share a copy, and among copies."""
        settings, losses = self.settings, self.settings.losses  # of one process
        every = 1 if is_warmup(settings) else settings.training.generator_every
        training, steps = settings.training, len(settings.generator.step_indices)
        parts = -(-training.batch_size // (training.microbatch_size or training.batch_size))
        gan, warmup = losses.gan_generator_weight > 0, is_warmup(settings)
        gathers = {  # whole copies that are gathered, each forward and each backward pass one
            "generator": (steps + 1) / 2 + 1 / every, "teacher": 0 if warmup else 1 / every,
            "fake_score": 0 if warmup else 2 + 2 * gan + (1 + 2 * gan) / every,
        }  # fmt: skip
        size, away = self.estimate.parameters["teacher"], 1 - 1 / self.sharing
        base = {"generator": "generator", "teacher": "teacher", "fake_score": "fake_score"}
        if settings.memory.mode != "full":
            base["generator"] = "teacher"  # which the LoRA sits on
        if settings.memory.mode == "shared_base":
            base["fake_score"] = "teacher"
        inside = sum(
            gathers[role] * parts * size * self.compute_bytes * away for role in gathers if self.is_sharded(base[role])
        )
        between = 0.0
        for role, often in (("generator", 1 / every), ("fake_score", 1.0)):
            gradients = 4 * self.estimate.parameters.get(role, 0) * often
            if not self.is_sharded(role):  # an average over all, there and back
                between += 2 * gradients
                continue
            inside += gradients * away
            copies = self.processes // self.sharing
            between += 2 * gradients / self.sharing * (1 - 1 / copies)
        return inside, between


def describe_processes(layout: Layout, kind: str, flops: float) -> Iterator[str]:
    """Lines on what each process needs, and on time.

    Args:
        kind: of the cards, a name of `GPUS`.
        flops: of an average step with the whole batch.
    """
    gpu, number, training = GPUS[kind], layout.processes, layout.settings.training
    own, needed = training.batch_size, layout.memory()
    total = sum(needed.values()) / _GIB
    words = "fits" if total <= gpu.gib * (1 - FREE_SHARE) else "does NOT fit"
    yield (
        f"each of {number} processes: {own} samples, {total:.1f} GiB ("
        + ", ".join(f"{name} {size / _GIB:.1f}" for name, size in needed.items())
        + f"): {words} in {kind}, {gpu.gib:g} GiB, with a tenth of it left free"
    )
    yield _describe_reading(layout, kind)
    inside, between = layout.exchanged()
    local = layout.sharing <= PER_MACHINE
    links = [
        (inside, gpu.inside if local else gpu.between),
        (between, gpu.inside if number <= PER_MACHINE else gpu.between),
    ]
    arithmetic, exchange = flops / number / (ARITHMETIC_SHARE * gpu.rate), sum(size / rate for size, rate in links)
    low, high = max(arithmetic, exchange), arithmetic + exchange
    yield (
        f"time of a step: {low:.2g} to {high:.2g} s ({arithmetic:.2g} s of arithmetic at {ARITHMETIC_SHARE * gpu.rate / 1e12:.0f} TFLOP/s, a "
        f"fifth of the card's; {exchange:.2g} s for {inside / 1e9:.3g} GB at {links[0][1] / 1e9:.3g} GB/s and {between / 1e9:.3g} GB at "
        f"{links[1][1] / 1e9:.3g} GB/s); {training.num_steps:,} steps take {low * training.num_steps / 3600:,.1f} to "
        f"{high * training.num_steps / 3600:,.1f} hours, not measured on several GPUs"
    )


def _describe_reading(layout: Layout, kind: str) -> str:
    """A line on the memory that a process has the teacher in while it is read."""
    host, card = (size / _GIB for size in layout.while_read)
    if layout.is_sharded("teacher") and layout.reads_parts:
        lie = "in host memory" if layout.settings.memory.teacher == "offloaded" else "on its card"
        return f"while it is read, each has its own part of the teacher, {lie}, and {host:.2f} GiB of host memory beside it"
    fault = "" if card <= GPUS[kind].gib * (1 - FREE_SHARE) else f", which does NOT fit in {kind}"
    return f"while it is read, each has the teacher whole: {host:.1f} GiB of host memory, then {card:.1f} GiB of its card{fault}"


def find_gpu(name: str) -> str:
    """The name of a known card, however it is written.

    Raises:
        UserError: nobody knows it.
    """
    found = "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("nvidia")
    if found not in GPUS:
        raise UserError(f"--gpu {name}: its rates are not known here; choose one of {', '.join(GPUS)}")
    return found
