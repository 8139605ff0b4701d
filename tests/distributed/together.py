"""One process of several that a test starts once for many questions; what is found is written into a folder.

    python -m tests.distributed.together WORK

`WORK/questions.json` has `equality` (cases of tests.distributed.equality), `runs` (pairs of settings, and of the run that it goes
on with from the last checkpoint but one, or ""), `refused` (settings that no process may train) and whether checkpoints of odd tensors are asked for (`saving`);
`pairs` is the teacher of noise-image pairs, beside which latents and embeddings are made of the sources of tests.distributed.preparing,
and what is measured as tests.distributed.evaluating has it.
"""

import json
import shutil
import sys
import threading
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fewstep
from fewstep.demos.doctor_many import examine_together
from fewstep.distillation.loss_scale import LossScale
from fewstep.distillation.sharding import local, whole, written_by_the_first
from fewstep.errors import UserError
from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.edm.family import EDMFamily
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.parallel import is_first, joined, rank, world_size
from fewstep.preparation import pairs
from fewstep.preparation.pairs import prepare_pairs
from fewstep.settings import OptimizerSettings
from fewstep.shared_work import by_the_first
from fewstep.training import saving
from fewstep.training.checkpoint import list_checkpoints
from fewstep.training.saving import Saver
from fewstep.training.update import build_update
from tests.distributed import equality, evaluating, preparing


def odd_tensors() -> dict[str, Tensor]:
    """Sharded tensors with even, uneven and empty parts, and whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size(),))
    shapes: dict[str, tuple[int, ...]] = {"even": (8, 3), "uneven": (5, 2), "one row": (1, 7), "vector": (3,)}
    found: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        found[name] = distribute_tensor(numbers, mesh, [Shard(0)])
    found["whole"] = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(9)).to(
        memory_format=torch.channels_last
    )
    found["steps"] = torch.tensor(3.0)
    found["half"] = torch.ones(5, dtype=torch.bfloat16)
    return found


class Copied:
    """Stands for the copy of a run folder at a URL: notes which checkpoints were complete when it was asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def push(self) -> None:
        names = [path.name for path in list_checkpoints(self.work / "odd")]
        (self.work / f"copied-{rank()}.txt").write_text(" ".join(names), encoding="utf-8")


def save_while_training(work: Path) -> None:
    """Change every tensor while the checkpoint of it waits to be written."""
    tensors, changed, write = odd_tensors(), threading.Event(), saving.write_parts
    before = {name: whole(tensor).clone().contiguous() for name, tensor in tensors.items()}
    if is_first():
        save_file(before, work / "odd.safetensors")

    def late(*arguments: Any) -> None:
        changed.wait()
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_parts", late)
        saver = Saver(work / "odd", keep=1, remote=Copied(work))  # type: ignore[arg-type]
        saver.start(7, tensors, {"phase": "test"})
        for tensor in tensors.values():
            tensor.add_(1)
        changed.set()
        saver.finish()
    write_what_lies_in_parts(work)
    fail_in_one(work, saver, tensors)


def write_what_lies_in_parts(work: Path) -> None:
    """As an export does; notes how many bytes each process had at most beside its parts. Then the first one's disk is full."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, rows = init_device_mesh("cpu", (world_size(),)), {f"layer {number}": 256 for number in range(8)}
    sharded = odd_tensors()
    for name, count in {**rows, "uneven layer": 255}.items():
        sharded[name] = distribute_tensor(torch.full((count, 256), float(count)), mesh, [Shard(0)])
    path = work / "put-together.safetensors"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        written_by_the_first(lambda ask: write_tensor_file(path, sharded, whole=ask), sharded.values())
    live = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    (work / f"beside-{rank()}.txt").write_text(str(max(accumulate(live))), encoding="utf-8")
    together = {name: whole(tensor).clone().contiguous() for name, tensor in sharded.items()}
    if is_first():
        save_file(together, work / "at-once.safetensors")

    def full(ask: Any) -> None:
        ask(sharded["even"])
        raise OSError(28, "No space left on device")

    try:
        written_by_the_first(full, sharded.values())
    except UserError as error:
        (work / f"no-export-{rank()}.txt").write_text(str(error), encoding="utf-8")


def fail_in_one(work: Path, saver: Saver, tensors: dict[str, Tensor]) -> None:
    """The second process's disk is full; notes what each says."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        saver.start(8, tensors, {"phase": "test"})
        try:
            saver.finish()
        except UserError as error:
            (work / f"full-{rank()}.txt").write_text(str(error), encoding="utf-8")


def overflow_in_one(work: Path) -> None:
    """Gradients of the second process do not fit fp16, of a network that each has whole and of its part of one; notes what each made of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    told = []
    for in_parts in (False, True):
        layer = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(layer.weight)
        if in_parts:
            fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
        update = build_update({"weight": layer.weight}, 0.1, OptimizerSettings(), LossScale.of(torch.float16, "cpu"))
        for number in (0, 1):
            update.backward(layer(torch.ones(1, 2)).sum())
            if number == 0 and rank() == 1:
                assert layer.weight.grad is not None
                local(layer.weight.grad).fill_(float("inf"))
            metrics = update.step()
            weight = float(whole(layer.weight.detach()).sum())
            told.append([weight, float(metrics["grad_norm"]), float(update.scale.value("cpu"))])
    (work / f"overflow-{rank()}.json").write_text(json.dumps(told), encoding="utf-8")


def make_pairs(work: Path, teacher: str) -> None:
    """Noise-image pairs: begun by all, gone on with after the last shard is gone; then where the second process's disk is full."""
    model = fewstep.load_teacher(teacher, device="cpu", precision="fp32")
    options: dict[str, Any] = {"num_pairs": 7, "shard_size": 2, "batch_size": 2, "num_steps": 1}
    for _ in range(2):
        prepare_pairs(model, "teacher", work / "pairs", **options)
        by_the_first(lambda: (work / "pairs/pairs_00003.safetensors").unlink(missing_ok=True))
    prepare_pairs(model, "teacher", work / "pairs", **options)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(pairs, "write_shard", full)
        try:
            prepare_pairs(model, "teacher", work / "no room", **options)
        except UserError as error:
            (work / f"no-room-{rank()}.txt").write_text(str(error), encoding="utf-8")


def go_back(earlier: Path, folder: Path) -> None:
    """Copy a run as it was at its last checkpoint but one."""
    shutil.copytree(earlier, folder)
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])


def main(work: Path) -> None:
    torch.set_num_threads(1)
    DiffusersFamily.default_num_steps, EDMFamily.default_num_steps = 4, 2  # of the teacher's pictures
    questions = json.loads((work / "questions.json").read_text(encoding="utf-8"))
    with joined("cpu"):
        equality.answer(work / "equality.safetensors", questions.get("equality", []), long=False)
        if questions.get("saving"):
            save_while_training(work)
            overflow_in_one(work)
        if questions.get("pairs"):
            make_pairs(work, questions["pairs"])
            preparing.prepare_twice(work, work / "many")
            lines: list[str] = []
            evaluating.measure_all(work, questions["pairs"], work / "figures of 2")
            evaluating.refuse(work, questions["pairs"], work)
            examine_together(lines.append)
            (work / f"doctor-{rank()}.txt").write_text("\n".join(lines), encoding="utf-8")
        for settings, earlier in questions.get("runs", []):
            if earlier:
                by_the_first(partial(go_back, work / earlier, Path(settings["run"]["folder"])))
            fewstep.train(settings)
        for number, settings in enumerate(questions.get("refused", [])):
            try:
                fewstep.train(settings)
            except UserError as error:
                (work / f"refused-{number}-{rank()}.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
