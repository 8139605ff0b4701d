"""What processes hold at most, measured, beside what a dry run says of them."""

from pathlib import Path

import pytest

from fewstep.estimate.many import Layout, own_settings
from fewstep.estimate.memory import estimate_run
from fewstep.families.registry import build_on_meta
from tests.distributed.processes import run_processes
from tests.estimate.memory_cases import case_settings, description

BATCH = 4


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mode", ["full", "lora_generator", "shared_base"])
def test_the_largest_process_is_near_the_estimate(mode: str, processes: int, tmp_path: Path) -> None:
    """Within 12%."""
    words = ("-m", "tests.distributed.memory", str(tmp_path), mode, "large", str(BATCH // processes))
    ended = run_processes(processes, *words, timeout=900)
    assert [code for code, _ in ended] == [0] * processes, "\n".join(said for _, said in ended)
    measured = max(int(path.read_text(encoding="utf-8")) for path in tmp_path.glob("peak-*"))
    settings, network = own_settings(case_settings(mode, BATCH), processes), build_on_meta(description("large"))
    estimate = estimate_run(settings, network, gpu=False, pictures=False)
    said = Layout(settings, network, processes, estimate).memory()
    assert sum(said.values()) == pytest.approx(measured, rel=0.12)
