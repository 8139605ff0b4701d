"""The GPU benchmark on the CPU with tiny networks: every part runs, keeps what it finds, and fails alone.

In float32; bf16 and fp16, which many processors are slow in, in the long run.
"""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_correctness
import gpu_levers
import gpu_parts
import gpu_runs
import gpu_training
import plain

from fewstep.diffusion.draws import Draws
from fewstep.training.step import two_time_scale_step


def run(folder: Path, *parts: str, minutes: float = 3.0) -> gpu.Bench:
    return gpu.main(["--tiny", "--device", "cpu", "--minutes", str(minutes), "--out", str(folder), "--parts", *parts])


@pytest.mark.parametrize("precisions", [1, pytest.param(4, marks=pytest.mark.long)])
def test_golden_steps_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precisions: int) -> None:
    some = dict(list(gpu_correctness.PRECISIONS.items())[:precisions])
    monkeypatch.setattr(gpu_correctness, "PRECISIONS", some)
    bench = run(tmp_path, "machine", "correctness")
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["correctness"]
    assert [row["precision"] for row in rows] == list(some) * 3
    for row in rows:
        assert row["within golden tolerances"] == row["precision"].startswith("fp32")
        assert row["generated"] < 0.05
    assert "integers that differ 0, normals that differ 0" in bench.notes[0]
    assert "| edm | fp32 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.long
def test_a_network_in_every_column(tmp_path: Path) -> None:
    bench = run(tmp_path, "machine", "edm")
    rows = bench.rows["edm"]
    assert [(row["step"], row["precision"]) for row in rows] == [
        ("fewstep", "bf16"), ("plain", "bf16"), ("fewstep", "fp32"), ("plain", "fp32"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["TFLOP a step"] > 0 and row["of matrix rate"] > 0 for row in rows)
    assert rows[1]["ours is faster by"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"])


@pytest.mark.long
def test_a_small_base_and_one_in_host_memory(tmp_path: Path) -> None:
    """Their rows say so; the CPU stands in for the GPU."""
    bench = gpu.Bench("cpu", True, tmp_path, time.monotonic() + 60, part="one")
    case = gpu_runs.Case("sd15", 1, "shared_base", checkpoint=True, precision="fp32", base="nf4", offload=True)
    gpu_parts.compare(bench, case, plain=False, flops=1.0, seconds=0.1)
    assert [row["mode"] for row in bench.rows["one"]] == ["shared_base, recomputed, nf4, blocks offloaded"]


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("full", marks=pytest.mark.long),
        pytest.param("lora_generator", marks=pytest.mark.long),
        pytest.param("shared_base", marks=pytest.mark.long),
    ],
)
def test_text_networks_in_every_memory_mode(tmp_path: Path, mode: str) -> None:
    bench = gpu.Bench("cpu", True, tmp_path, time.monotonic() + 60, part="one")
    counted = gpu_parts.compare(bench, gpu_runs.Case("sdxl", 2, mode, precision="fp32", guidance=8.0, steps=(999, 499)))
    assert counted > 0
    assert [row["step"] for row in bench.rows["one"]] == ["fewstep", "plain"]


def test_a_part_that_fails_is_a_note_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(bench: gpu.Bench) -> None:
        bench.add(kept=1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def slow(bench: gpu.Bench) -> None:
        time.sleep(5)

    parts = [("first", 9.0, out_of_memory), ("second", 0.2, slow), ("third", 9.0, lambda bench: bench.add(also=2))]
    monkeypatch.setattr(gpu, "PARTS", parts)
    bench = run(tmp_path, "first", "second", "third")
    assert bench.rows == {"first": [{"kept": 1}], "third": [{"also": 2}]}
    assert [note.split(":")[0] for note in bench.notes] == ["first", "second"]
    assert "stopped after its 0 s" in bench.notes[1]


def test_out_of_time_leaves_parts_out(tmp_path: Path) -> None:
    bench = run(tmp_path, "machine", "edm", minutes=0.0)
    assert not bench.rows
    assert bench.notes == ["machine: left out, the time was up", "edm: left out, the time was up"]


def weights(case: gpu_runs.Case, step_function: str) -> torch.Tensor:
    """All trained weights after one cycle of a step."""
    built = gpu_runs.build_run(case, "cpu")
    if step_function == "plain":
        step = plain.PlainStep(built, case.guidance)
    else:
        step = lambda *arguments: two_time_scale_step(built, *arguments)  # noqa: E731
    gpu_runs.run_cycle(step, gpu_runs.real_batch(built, case.batch, "cpu"), case.batch, "cpu")
    roles = built.roles
    trained = [*roles.generator.parameters(), *roles.fake_score_parameters().values()]
    return torch.cat([parameter.detach().flatten() for parameter in trained])


@pytest.mark.parametrize("network", ["edm", "sd15"])
def test_the_plain_step_trains_what_the_librarys_trains(network: str) -> None:
    """Otherwise the comparison would be of two different things. Adam divides by the gradient: SGD compares gradients."""
    case = gpu_runs.Case(network, 2, precision="fp32", guidance=2.0, tiny=True)
    ours, theirs, start = weights(case, "ours"), weights(case, "plain"), gpu_runs.build_run(case, "cpu")
    roles = start.roles
    trained = [*roles.generator.parameters(), *roles.fake_score_parameters().values()]
    before = torch.cat([parameter.detach().flatten() for parameter in trained])
    moved = torch.nn.functional.cosine_similarity(ours - before, theirs - before, dim=0)
    assert moved > 0.99


@pytest.mark.long
def test_counted_operations_follow_the_simulated_steps() -> None:
    """The count over a cycle of a four-step generator equals the sum over its steps, each counted by itself."""
    case = gpu_runs.Case("sdxl", 1, "shared_base", steps=(999, 499), tiny=True)
    built = gpu_runs.build_run(case, "cpu")
    real, total = gpu_runs.real_batch(built, 1, "cpu"), 0.0
    for step in range(gpu_runs.EVERY):
        with gpu_runs.FlopCounterMode(display=False) as counter:
            two_time_scale_step(built, step, real, Draws.of_batch(0, step, 1))
        total += counter.get_total_flops()
    assert gpu_runs.count_flops(built, case, "cpu") == pytest.approx(total / gpu_runs.EVERY, rel=1e-6)


def test_levers_leave_the_run_as_it_was() -> None:
    built = gpu_runs.build_run(gpu_runs.Case("edm", 2, tiny=True), "cpu")
    before = {name: value.clone() for name, value in built.roles.teacher.state_dict().items()}
    for context in (gpu_levers.channels_last(built), gpu_levers.tf32(built), gpu_levers.unfused_optimizers(built)):
        with context:
            gpu_runs.run_cycle(gpu_runs.our_step(built), gpu_runs.real_batch(built, 2, "cpu"), 2, "cpu")
    assert built.roles.teacher.compute_dtype == torch.bfloat16
    assert not torch.backends.cuda.matmul.allow_tf32
    assert built.generator_update.optimizer.param_groups[0]["fused"]
    assert all(torch.equal(value, before[name]) for name, value in built.roles.teacher.state_dict().items())


@pytest.mark.slow
def test_runs_of_two_precisions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, each measured; one that fails is said and leaves the others."""
    runs = [gpu_training.RUNS[0], ("broken", [gpu_training.ONE_STEP, "training.nonsense=1"], 2, "emoji")]
    monkeypatch.setattr(gpu_training, "RUNS", runs)
    bench = run(tmp_path, "precisions")
    (row,) = bench.rows["precisions"]
    assert (row["run"], row["steps"], row["updates"]) == ("classes, two steps, bf16", 2, 3)
    assert row["Frechet distance"] > 0
    assert any(note.startswith("broken: failed (2)") for note in bench.notes)
    assert "training.nonsense" in (tmp_path / "precisions_1.log").read_text()


def test_one_card_has_every_storage(tmp_path: Path) -> None:
    rows = run(tmp_path, "one_card").rows["one_card"]
    assert [(row["network"], row["mode"].rsplit(", ", 1)[1]) for row in rows] == [
        ("sdxl", "int8"), ("sdxl", "nf4"), ("sdxl", "blocks offloaded"), ("z-image", "nf4"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in rows)
