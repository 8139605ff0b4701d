import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import NoiseImagePairs, write_shard
from fewstep.data.shard_folder import write_manifest
from fewstep.diffusion.condition import ClassTable, Condition
from fewstep.diffusion.draws import Draws, Purpose
from fewstep.diffusion.samplers import sample_few_steps
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation import inputs
from fewstep.distillation.inputs import (
    FreshAndPairedInputs,
    FreshInputs,
    NoisedDataInputs,
    PairedInputs,
    RealBatch,
    simulated_input,
    simulated_input_per_sample,
    uniform_condition,
)
from fewstep.families.edm.denoiser import EDMDenoiser
from tests.conftest import tiny_denoiser
from tests.training.test_step import NoBlockingCopy

FOUR = StepSchedule((999, 749, 499, 249))
EIGHT = StepSchedule(tuple(range(999, 0, -125)))
SHAPE = (1, 16, 16)
NO_DATA = RealBatch(torch.empty(0, *SHAPE), Condition(0))


@pytest.fixture(scope="module")
def generator() -> EDMDenoiser:
    return tiny_denoiser()


def labels(size: int) -> Condition:
    return Condition.from_labels(torch.arange(size) % 4, 4)


def draws_at(number: int, size: int = 3, seed: int = 0, steps: StepSchedule = FOUR) -> Draws:
    """Draws of a training step that simulates step `number` of the generator."""
    for step in range(200):
        draws = Draws.of_batch(seed, step, size)
        if draws.shared_integer("simulated_step", len(steps)) == number:
            return draws
    raise AssertionError(f"step {number} is never simulated")


def noises(draws: Draws) -> list[Tensor]:
    return [draws.normal("generator_noise", SHAPE), *(draws.normal("simulation_noise", SHAPE, k) for k in range(1, 8))]


@pytest.mark.slow
def test_every_step_is_simulated_equally_often_and_by_the_whole_batch(generator: EDMDenoiser) -> None:
    steps, counts = StepSchedule((999, 600)), [0, 0]
    sigmas = [generator.noise_schedule.grid[index].item() for index in steps.indices]
    for step in range(60):
        _, level = simulated_input(generator, steps, labels(2), Draws.of_batch(0, step, 2))
        assert len(level.unique()) == 1
        counts[sigmas.index(level[0].item())] += 1
    assert min(counts) > 15


@pytest.mark.slow
def test_processes_simulate_the_same_step_on_different_samples(generator: EDMDenoiser) -> None:
    for step in range(8):
        whole = simulated_input(generator, FOUR, labels(4), Draws.of_batch(2, step, 4))
        ranks = [
            simulated_input(generator, FOUR, labels(4)[first : first + 2], Draws.of_batch(2, step, 2, first=first))
            for first in (0, 2)
        ]
        assert len({float(level) for _, levels in ranks for level in levels}) == 1
        assert not torch.equal(ranks[0][0], ranks[1][0])
        for expected, *parts in zip(whole, *ranks, strict=True):
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [StepSchedule((999,)), FOUR, StepSchedule((700, 30))])
def test_at_the_first_step_the_input_is_pure_noise(generator: EDMDenoiser, steps: StepSchedule) -> None:
    draws = draws_at(0, steps=steps)
    noisy, level = simulated_input(generator, steps, labels(3), draws)
    sigma = generator.noise_schedule.grid[steps.indices[0]]
    assert torch.equal(level, sigma.expand(3))
    torch.testing.assert_close(noisy, sigma * noises(draws)[0])


def test_a_one_step_generator_never_runs_during_simulation() -> None:
    generator = tiny_denoiser()
    calls: list[int] = []
    generator.register_forward_hook(lambda *_: calls.append(1))
    for step in range(5):
        _, level = simulated_input(generator, StepSchedule((999,)), labels(1), Draws.of_batch(0, step, 1))
        assert level.item() == pytest.approx(80)
    assert not calls


@pytest.mark.parametrize(("steps", "number"), [(FOUR, 1), (FOUR, 2), (FOUR, 3), (EIGHT, 4), (EIGHT, 7)])
def test_at_later_steps_the_input_is_what_the_generator_will_meet(
    generator: EDMDenoiser, steps: StepSchedule, number: int
) -> None:
    draws, condition = draws_at(number, steps=steps), labels(3)
    noisy, level = simulated_input(generator, steps, condition, draws)
    sigmas = generator.noise_schedule.grid[list(steps.indices)]
    fresh = noises(draws)
    with torch.no_grad():
        expected = sigmas[0] * fresh[0]
        for k in range(number):
            x0 = generator.denoise(expected, sigmas[k].repeat(3), condition)
            expected = x0 + sigmas[k + 1] * fresh[k + 1]
    assert torch.equal(level, sigmas[number].expand(3))
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)


def test_denoising_the_last_simulated_input_is_sampling(generator: EDMDenoiser) -> None:
    draws, condition = draws_at(3), labels(3)
    noisy, level = simulated_input(generator, FOUR, condition, draws)
    fresh = noises(draws)
    sampled = sample_few_steps(generator, fresh[0], condition, FOUR, lambda number: fresh[number])
    with torch.no_grad():
        torch.testing.assert_close(generator.denoise(noisy, level, condition), sampled, rtol=1e-4, atol=1e-5)


def test_every_sample_at_a_step_of_its_own(generator: EDMDenoiser) -> None:
    """All steps in equal shares, each sample where its own path of that many steps leads, in whatever batch it is drawn."""
    draws, condition = Draws.of_batch(0, 5, 8), labels(8)
    noisy, level = simulated_input_per_sample(generator, FOUR, condition, draws)
    sigmas, fresh = generator.noise_schedule.grid[list(FOUR.indices)], noises(draws)
    assert [int((level == sigma).sum()) for sigma in sigmas] == [2, 2, 2, 2]
    expected, path = torch.empty_like(noisy), sigmas[0] * fresh[0]
    with torch.no_grad():
        for number, sigma in enumerate(sigmas):
            expected[level == sigma] = path[level == sigma]
            if number < 3:
                x0 = generator.denoise(path, sigma.repeat(8), condition)
                path = x0 + sigmas[number + 1] * fresh[number + 1]
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part, own = simulated_input_per_sample(generator, FOUR, condition[rows], draws.part(rows))
        torch.testing.assert_close(part, noisy[rows], rtol=1e-5, atol=1e-5)
        assert torch.equal(own, level[rows])
    later = simulated_input_per_sample(generator, FOUR, condition, Draws.of_batch(0, 6, 8))[1]
    assert torch.equal(later[:-1], level[1:])


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 4)])
def test_any_part_of_a_batch_takes_as_many_forwards(
    generator: EDMDenoiser, rows: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded processes gather weights at each: one with a sample at its first step runs what one at its last step runs."""
    monkeypatch.setattr(inputs, "world_size", lambda: 2)
    with mock.patch.object(generator, "denoise", wraps=generator.denoise) as denoise:
        simulated_input_per_sample(generator, FOUR, labels(8)[rows], Draws.of_batch(0, 0, 8).part(rows))
    assert denoise.call_count == 3


@pytest.mark.parametrize(("rows", "forwards"), [(slice(0, 1), 0), (slice(1, 3), 2), (slice(3, 4), 3)])
def test_one_process_runs_no_forward_that_nobody_needs(generator: EDMDenoiser, rows: slice, forwards: int) -> None:
    with mock.patch.object(generator, "denoise", wraps=generator.denoise) as denoise:
        simulated_input_per_sample(generator, FOUR, labels(8)[rows], Draws.of_batch(0, 0, 8).part(rows))
    assert denoise.call_count == forwards


def test_noise_is_drawn_for_the_samples_that_go_on(generator: EDMDenoiser) -> None:
    drawn = []
    normal = Draws.normal

    def counted(draws: Draws, purpose: Purpose, shape: tuple[int, ...], number: int = 0) -> Tensor:
        made = normal(draws, purpose, shape, number)
        drawn.append(len(made))
        return made

    with mock.patch.object(Draws, "normal", counted):
        simulated_input_per_sample(generator, FOUR, labels(8), Draws.of_batch(0, 0, 8))
    assert drawn == [8, 6, 4, 2]


def test_nothing_waits_for_the_device_that_steps_of_samples_are_for(generator: EDMDenoiser) -> None:
    """On shapes alone too: which sample is at which step is known to the host, and goes to the device in one copy."""
    there, network = Draws.of_batch(0, 1, 8, "meta"), copy.deepcopy(generator).to("meta")
    with mock.patch.object(inputs, "steps_in_turn", return_value=[0, 1, 2, 3] * 2):
        simulated_input_per_sample(network, FOUR, labels(8).to("meta"), there)  # the grid of levels is copied once
        with NoBlockingCopy() as seen, mock.patch.object(torch, "tensor", wraps=torch.tensor) as made:
            simulated_input_per_sample(network, FOUR, labels(8).to("meta"), there)
    assert not seen.copies
    assert not any("device" in call.kwargs for call in made.call_args_list)  # which waits, and no operation shows it


@pytest.mark.parametrize("number", [0, 3])
def test_simulation_carries_no_gradient_and_repeats_exactly(generator: EDMDenoiser, number: int) -> None:
    draws = draws_at(number)
    noisy, level = simulated_input(generator, FOUR, labels(3), draws)
    assert not noisy.requires_grad
    assert not level.requires_grad
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert torch.equal(simulated_input(generator, FOUR, labels(3), draws)[0], noisy)


def test_labels_are_uniform_and_independent_of_the_noise(generator: EDMDenoiser) -> None:
    condition = uniform_condition(ClassTable(generator.num_classes), Draws.of_batch(0, 0, 4000))
    counts = condition["class_labels"].sum(0)
    assert ((counts - 1000).abs() < 5 * (4000 * 3 / 16) ** 0.5).all()
    assert (condition["class_labels"].sum(1) == 1).all()
    assert uniform_condition(ClassTable(0), Draws.of_batch(0, 0, 3)) == Condition(3)


def test_fresh_inputs_are_simulated_under_their_own_labels(generator: EDMDenoiser) -> None:
    draws = draws_at(2)
    batch = FreshInputs(FOUR, ClassTable(generator.num_classes))(generator, draws, NO_DATA)
    assert torch.equal(batch.condition["class_labels"], uniform_condition(ClassTable(4), draws)["class_labels"])
    noisy, level = simulated_input(generator, FOUR, batch.condition, draws)
    assert torch.equal(batch.noisy, noisy)
    assert torch.equal(batch.level, level)
    assert batch.num_fresh == 3
    assert batch.target is None


def test_paired_inputs_follow_the_fresh_ones(generator: EDMDenoiser, tmp_path: Path) -> None:
    noise = torch.randn(5, *SHAPE).half()
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    shard = write_shard(tmp_path, 0, noise, images, torch.tensor([3, 2, 1, 0, 3]))
    write_manifest(tmp_path, {"shards": [shard], "complete": True})
    pairs, steps = NoiseImagePairs(tmp_path), StepSchedule((999,))
    draws = Draws.of_batch(1, 6, 4)
    batch = FreshAndPairedInputs(FreshInputs(steps, ClassTable(4)), PairedInputs(steps, ClassTable(4), pairs))(
        generator, draws, NO_DATA
    )
    alone = FreshInputs(steps, ClassTable(generator.num_classes))(generator, draws, NO_DATA)
    assert batch.num_fresh == 4
    assert len(batch.noisy) == len(batch.level) == len(batch.condition) == 8
    assert torch.equal(batch.noisy[:4], alone.noisy)
    assert torch.equal(batch.condition["class_labels"][:4], alone.condition["class_labels"])
    rows = draws.integers("pair_order", 0, 5)
    sigma = generator.noise_schedule.grid[999]
    assert torch.equal(batch.level, sigma.expand(8))
    torch.testing.assert_close(batch.noisy[4:], sigma * noise[rows].float())
    torch.testing.assert_close(batch.target, images[rows].float() / 127.5 - 1)
    assert batch.condition["class_labels"][4:].argmax(1).tolist() == [[3, 2, 1, 0, 3][row] for row in rows]


def test_pairs_of_several_steps(generator: EDMDenoiser, tmp_path: Path) -> None:
    """The stored noise at the first step, the pair's image with noise of the step's level at later ones; the image is the target."""
    noise = torch.randn(5, *SHAPE).half()
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    write_manifest(
        tmp_path, {"shards": [write_shard(tmp_path, 0, noise, images, torch.arange(5) % 4)], "complete": True}
    )
    size, draws = 100, Draws.of_batch(0, 3, 100)
    batch = PairedInputs(FOUR, ClassTable(4), NoiseImagePairs(tmp_path))(generator, draws, NO_DATA)
    rows, other = draws.integers("pair_order", 0, 5), noises(draws)[1]
    sigmas = generator.noise_schedule.grid[list(FOUR.indices)]
    assert min(int((batch.level == sigma).sum()) for sigma in sigmas) > 12  # 25 expected of each
    clean = images[rows].float() / 127.5 - 1
    torch.testing.assert_close(batch.target, clean)
    for number in range(size):
        sigma = batch.level[number]
        noised = clean[number] + sigma * other[number]
        expected = sigma * noise[rows[number]].float() if sigma == sigmas[0] else noised
        torch.testing.assert_close(batch.noisy[number], expected)


def test_the_ablation_draws_a_step_for_each_sample(generator: EDMDenoiser) -> None:
    """Real data noised to that sample's step with its own condition; pure noise at the first."""
    size = 200
    real = RealBatch(torch.randn(size, *SHAPE), labels(size))
    draws = Draws.of_batch(0, 3, size)
    batch = NoisedDataInputs(FOUR)(generator, draws, real)
    assert batch.condition is real.condition
    sigmas = generator.noise_schedule.grid[list(FOUR.indices)]
    fresh = noises(draws)
    counts = [int((batch.level == sigma).sum()) for sigma in sigmas]
    assert sum(counts) == size
    assert min(counts) > 30  # 50 expected of each
    for number in range(size):
        sigma = batch.level[number]
        expected = sigma * fresh[0][number] if sigma == sigmas[0] else real.images[number] + sigma * fresh[1][number]
        torch.testing.assert_close(batch.noisy[number], expected)
