"""The walk: every file of every format and every key of every config, damaged and given to the real command.

Right is: exit code 0, or exit code 2 with one sentence that names the file. A traceback, a hang, more than 2 GiB or more
than 20 seconds of processor time is a failure.

    python -m tests.fuzz.walk --sample 150            some of them, evenly
    python -m tests.fuzz.walk --only sd --workers 2   all of one subject
"""

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests.fuzz.children import CPU_SECONDS, PEAK_BYTES, Outcome, preload, run_child, run_command
from tests.fuzz.mutants import Mutant, mutants, num_keys
from tests.fuzz.world import Subject, build, subjects_of


def fault_of(outcome: Outcome, subject_folder: Path, mutant: Mutant) -> str:
    """What is wrong with how a command ended; empty where nothing is."""
    if outcome.code < 0:
        return f"ended by signal {-outcome.code}"
    if outcome.peak_bytes > PEAK_BYTES:
        return f"{outcome.peak_bytes / 2**30:.1f} GiB"
    if outcome.seconds > CPU_SECONDS:
        return f"{outcome.seconds:.0f} s"
    if outcome.code == 0:
        return ""
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    told = [line for line in outcome.said.splitlines() if line.startswith("fewstep: ")]
    if len(told) != 1:
        return f"{len(told)} sentences"
    names = [str(subject_folder), Path(mutant.file).name, mutant.what.split(":")[0].split(".")[-1]]
    if not any(name in told[0] for name in names):
        return "the sentence names no file"
    return "an endless sentence" if len(told[0]) > 1500 else ""


def try_mutant(subject: Subject, template: Path, mutant: Mutant, scratch: Path) -> tuple[Outcome, str]:
    """Damage a copy, run the command."""
    copy, out = scratch / "copy", scratch / "out"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, copy)
    out.mkdir(parents=True)
    try:
        content = mutant.make()
    except (StopIteration, IndexError, ValueError, struct.error):  # a mutation that this file has no place for
        content = b""
    if content is None:
        (copy / mutant.file).unlink()
    else:
        (copy / mutant.file).write_bytes(content)
    outcome = run_command(subject.command(copy, out), scratch / "log")
    return outcome, fault_of(outcome, copy, mutant)


def all_mutants(subject: Subject, template: Path) -> list[Mutant]:
    """Those of each of its files."""
    found = []
    for file in subject.files(template):
        of_file = list(mutants(template, file))
        if len(of_file) > subject.most:
            of_file = random.Random(0).sample(of_file, subject.most)
        found += of_file
    return found


def walk(world: Path, only: Sequence[str], sample: int, part: tuple[int, int], seed: int) -> dict[str, Any]:
    """Try the mutants, or a sample of them; the counts and every failure."""
    subjects = [subject for subject in subjects_of(world / "static") if not only or subject.name in only]
    began, counts, failures, peak, slowest = time.monotonic(), Counter[str](), [], 0, 0.0
    keys = Counter[str]()
    everything = []
    for subject in subjects:
        template = world / "subjects" / subject.name
        files = subject.files(template)
        counts["files"] += len(files)
        keys[subject.name] = sum(num_keys(template / file) for file in files)
        everything += [(subject, mutant) for mutant in all_mutants(subject, template)]
    counts["keys"], counts["all mutants"] = keys.total(), len(everything)
    chosen = everything
    if sample and sample < len(everything):
        chosen = _spread(everything, sample, seed)
    scratch = Path(tempfile.mkdtemp(dir=world))
    os.environ.update(HF_HOME=str(scratch / "hf"), TMPDIR=str(scratch))
    for number, (subject, mutant) in enumerate(chosen):
        if number % part[1] != part[0]:
            continue
        outcome, fault = try_mutant(subject, world / "subjects" / subject.name, mutant, scratch)
        counts["mutants"] += 1
        counts[f"exit {outcome.code}"] += 1
        peak, slowest = max(peak, outcome.peak_bytes), max(slowest, outcome.seconds)
        if fault:
            failure = {"subject": subject.name, "file": mutant.file, "what": mutant.what, "fault": fault}
            failures.append({**failure, "said": outcome.said[-3000:]})
            last = (outcome.said.strip().splitlines() or [""])[-1][:200]
            print(f"{subject.name}/{mutant.file} [{mutant.what}]: {fault}: {last}", file=sys.stderr, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        **counts, "seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak / 2**30, 2),
        "slowest_seconds": round(slowest, 1), "failures": failures,
    }  # fmt: skip


def _spread(everything: list[tuple[Subject, Mutant]], sample: int, seed: int) -> list[tuple[Subject, Mutant]]:
    """As many of each subject, chosen by a fixed seed; none of what takes seconds each."""
    rng = random.Random(seed)
    by_subject: dict[str, list[tuple[Subject, Mutant]]] = {}
    for subject, mutant in everything:
        if subject.most > 1000:
            by_subject.setdefault(subject.name, []).append((subject, mutant))
    each = max(1, sample // len(by_subject))
    return [pair for pairs in by_subject.values() for pair in rng.sample(pairs, min(each, len(pairs)))]


def sound(world: Path) -> list[str]:
    """Subjects whose undamaged files are not taken: then their mutants would prove nothing."""
    scratch, wrong = Path(tempfile.mkdtemp(dir=world)), []
    for subject in subjects_of(world / "static"):
        template = world / "subjects" / subject.name
        file = subject.files(template)[0]
        same = Mutant(file, "nothing", (template / file).read_bytes)
        outcome, _ = try_mutant(subject, template, same, scratch)
        if outcome.code:
            wrong.append(f"{subject.name}: {outcome.code}: {outcome.said[-1500:]}")
    return wrong


def make_world(folder: Path) -> None:
    """Build it in a child, so that no thread of it lives when the walk forks."""
    outcome = run_child(lambda: build(folder), folder.parent / f"{folder.name}.log")
    assert outcome.code == 0, outcome.said


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--world", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--disks", default="", help="a command that gets a full and a read-only disk in the same world")
    parser.add_argument("--sound", action="store_true", help="only try the undamaged files")
    options = parser.parse_args()
    preload()
    world = options.world or Path(tempfile.mkdtemp()) / "world"
    if not world.exists():
        make_world(world)
    if options.sound:
        print("\n".join(sound(world)) or "sound")
        return
    number, _, count = options.part.partition("/")
    found = walk(world, options.only, options.sample, (int(number), int(count)), options.seed)
    if options.disks:
        from tests.fuzz.disks import try_disks, writing_commands

        scratch = Path(tempfile.mkdtemp(dir=world))
        found["disks"], failures = try_disks(
            options.disks, writing_commands(world / "static")[options.disks], scratch, 1
        )
        found["failures"] += failures
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    print(json.dumps({name: value for name, value in found.items() if name != "failures"}))
    if not options.world:
        shutil.rmtree(world.parent, ignore_errors=True)
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
