"""One process of those that start runs: how their networks come to lie in parts, by slices of the teacher's files or from it whole.

    python -m tests.distributed.starting WORK

`WORK/questions.json` has settings of runs by name. Each process writes `WORK/started-RANK.json`: by name the peaks of live tensor bytes
while the teacher was read and while the other networks were built, the bytes of its parts and of the largest tensor, and how what came of
it differs from the networks that are made of a teacher that is read whole; the same figures of that way stand under "whole". Or why it was
refused.
"""

import json
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fewstep.devices import choose_precision
from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import Roles
from fewstep.distillation.sharding import as_placed, is_sharded, local, spread_of, spread_teacher
from fewstep.errors import UserError
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.parallel import joined, rank
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training import build
from fewstep.training.build import build_chosen_roles, open_teacher, start_roles
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from tests.networks.test_merged_loras import x0_of

Started = tuple[Model, Roles]
T = TypeVar("T")


def start(settings: TrainSettings) -> tuple[Started, dict[str, int]]:
    """Networks of a run, and what making them took: the teacher's reading until it lies in parts, and all of it."""
    mapped = files_of(settings.teacher.path)

    def read() -> Model:
        teacher = open_teacher(settings)
        spread_teacher(teacher.denoiser, spread_of(teacher.denoiser, settings.memory.teacher, 0))
        return teacher

    torch.manual_seed(0)
    teacher, reading = measured(read, mapped)
    own = sizes([*teacher.denoiser.parameters(), *teacher.denoiser.buffers()])
    roles, building = measured(lambda: build_chosen_roles(settings, teacher.denoiser), mapped)
    every = sizes(parts(roles).values())
    going_on = 0
    if earlier := settings.generator.start_from:
        going_on = measured(lambda: start_roles(roles, Path(earlier)), mapped | files_of(earlier))[1]
    figures = {
        "reading": reading, "teacher": sum(own), "building": sum(own) + building, "roles": sum(every), "going on": going_on,
    }  # fmt: skip
    return (teacher, roles), {**figures, "largest": 4 * max(part.numel() for part in parts(roles).values())}


def files_of(folder: str) -> set[int]:
    """Sizes of the files of tensors in a folder."""
    return {path.stat().st_size for path in Path(folder).rglob("*.safetensors")}


def sizes(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [local(part).nbytes for part in tensors]


def measured(make: Callable[[], T], mapped: set[int]) -> tuple[T, int]:
    """What it makes, and the most bytes of tensors that were alive at once.

    Args:
        mapped: sizes of files whose pages count as tensors when they are opened, though they take no memory of the process's own.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        made = make()
    events = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return made, max(accumulate(size for size in events if abs(size) not in mapped), default=0)


def networks(roles: Roles) -> dict[str, nn.Module]:
    return {"teacher": roles.teacher, "generator": roles.generator, "fake score": roles.fake_score}


def parts(roles: Roles) -> dict[str, Any]:
    """Every tensor of the networks by name, once: adapters share the teacher's."""
    found, seen = {}, set[int]()
    for role, network in networks(roles).items():
        for name, part in [*network.named_parameters(), *network.named_buffers()]:
            if id(part) not in seen:
                seen.add(id(part))
                found[f"{role}.{name}"] = part
    return found


def differences(made: Started, whole: Started) -> list[str]:
    """What the networks of two starts do not have, or compute, alike to the last bit."""
    one, other = parts(made[1]), parts(whole[1])
    found = list(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if (mine.dtype, mine.shape, is_sharded(mine)) != (theirs.dtype, theirs.shape, is_sharded(theirs)):
            found.append(f"{name} is of another kind")
        elif local(mine).is_meta or not torch.equal(local(mine), local(theirs)):
            found.append(name)
    return found + [
        f"what the {name} computes"
        for name, network in networks(made[1]).items()
        if not torch.equal(x0(network), x0(networks(whole[1])[name]))
    ]


def x0(network: Any) -> torch.Tensor:
    return x0_of(network).detach()


def answer(settings: TrainSettings) -> dict[str, Any]:
    made, figures = start(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_open_in_parts", lambda settings: None)
        whole, before = start(settings)
    found: dict[str, Any] = {**figures, "whole": before, "differs": differences(made, whole)}
    alone: Denoiser = load_teacher(settings.teacher.path, device="cpu", loras=settings.teacher.loras).denoiser
    if settings.memory.base == "fp32" and not torch.equal(x0(alone), x0(made[0].denoiser)):
        found["differs"].append("what a teacher alone computes")
    if earlier := settings.generator.start_from:
        tensors, _ = read_checkpoint(list_checkpoints(Path(earlier) / "checkpoints")[-1])
        for role, network in (("generator", made[1].generator), ("fake_score", made[1].fake_score)):
            weights = as_placed(
                {name: tensors[f"{role}.{name}"] for name in network.state_dict()}, network.state_dict()
            )
            if not all(torch.equal(local(value), local(weights[name])) for name, value in network.state_dict().items()):
                found["differs"].append(f"the earlier run's {role}")
    if made[0].card != whole[0].card or (made[0].folder is None and made[0].fingerprint != whole[0].fingerprint):
        found["differs"].append("what is known of the teacher")
    return found


def answered(settings: TrainSettings) -> dict[str, Any]:
    try:
        return answer(settings)
    except UserError as error:
        return {"refused": str(error)}


def main(work: Path) -> None:
    torch.set_num_threads(1)
    questions = json.loads((work / "questions.json").read_text(encoding="utf-8"))
    choose_precision("bf16", torch.device("cpu"))  # measures once
    with joined("cpu"):
        found = {name: answered(parse_settings(TrainSettings, values, name)) for name, values in questions.items()}
        (work / f"started-{rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
