"""The memory a dry run predicts against the memory a real step takes: three sizes in each of the three modes.

Measured is the peak of live tensor bytes on the CPU: every allocation and free of torch's own allocator, as
torch.profiler reports them, from before the networks are built until two real steps of a real `Distillation` are
done. It sees what kernels allocate for their work, and not what the process holds besides tensors; see
`memory_cases.measured_peak`.
"""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from fewstep.diffusion.schedules import FlowSchedule, StepSchedule
from fewstep.distillation.roles import build_shared_base_roles
from fewstep.errors import UserError
from fewstep.estimate.machine import MetaMachine, meta_machine
from fewstep.estimate.memory import (
    AVERAGE,
    FAKE_SCORE_TURN,
    FROZEN,
    GENERATOR_TURN,
    GRADIENTS,
    PICTURES,
    STATES,
    TRAINED,
    Estimate,
    estimate_run,
)  # fmt: skip
from fewstep.estimate.meter import ACTIVATIONS
from fewstep.families.registry import build_on_meta, build_released, family_named, released_shapes
from fewstep.networks.adapters import AdapterRole, LoraShape
from fewstep.networks.frozen_layers import BaseStorage, host_tensors
from fewstep.settings import LossSettings, TrainSettings, parse_settings
from fewstep.training.build import check_network
from tests.estimate.memory_cases import case_settings, description, measured_peak

STORAGE: dict[str, dict[str, Any]] = {  # each size in another storage, so that nine cases cover what matters
    "small": {"precision": "bf16"},  # the smallest: slow on processors without instructions for it
    "middle": {},
    "large": {"checkpoint_activations": True},
}


@cache
def predicted(mode: str, size: str, batch_size: int = 2, pictures: bool = False, **memory: Any) -> Estimate:
    network = build_on_meta(description(size))
    return estimate_run(case_settings(mode, batch_size, **memory), network, gpu=False, pictures=pictures)


LONG = pytest.mark.long
PAIRS = [  # in the default run, a small base stands for all (below)
    *(pytest.param(*pair, marks=LONG) for pair in [
        ("shared_base", "middle"),
        ("full", "large"), ("full", "small"), ("full", "middle"), ("lora_generator", "small"), ("lora_generator", "middle"),
        ("lora_generator", "large"), ("shared_base", "small"), ("shared_base", "large"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "size"), PAIRS)
def test_predicted_peak_is_the_measured_one(mode: str, size: str) -> None:
    memory = dict(STORAGE[size])
    if memory.get("precision") == "bf16" and mode != "full":
        memory["base"] = "bf16"
    measured = measured_peak(case_settings(mode, 2, **memory), size)
    assert predicted(mode, size, **memory).step == pytest.approx(measured, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["full", "lora_generator", "shared_base"])
@pytest.mark.parametrize("memory", [{}, {"checkpoint_activations": True}])
def test_predicted_peak_of_a_flow_transformer(mode: str, memory: dict[str, Any]) -> None:
    measured = measured_peak(case_settings(mode, 2, **memory), "z-image")
    assert predicted(mode, "z-image", **memory).step == pytest.approx(measured, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "size"), [("full", "middle"), ("shared_base", "z-image"), ("lora_generator", "large")]
)
def test_predicted_peak_of_several_taps(mode: str, size: str) -> None:
    """Light heads, and passes that go on to the last block."""
    memory = STORAGE.get(size, {}) | {"gan_taps": (0.5, 1.0)}
    measured = measured_peak(case_settings(mode, 2, **memory), size)
    estimate = predicted(mode, size, **memory)
    assert estimate.step == pytest.approx(measured, rel=0.1)
    assert (
        estimate.parameters["discriminator"]
        != predicted(mode, size, **STORAGE.get(size, {})).parameters["discriminator"]
    )


def test_a_flow_models_steps_can_be_rehearsed() -> None:
    """Their noise levels travel as numbers; a tensor's were all 0 where there is no memory, and no dry run ended."""
    with meta_machine(gpu=True):
        steps = StepSchedule.on(FlowSchedule(6.0), (999, 749, 499, 249))
    assert steps.sigmas == tuple(FlowSchedule(6.0).grid[[999, 749, 499, 249]].tolist())
    assert predicted("shared_base", "z-image", 1, checkpoint_activations=True).step > 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "on_host"),
    [("nf4", True), *(pytest.param(*case, marks=LONG) for case in [("nf4", False), ("int8", False), ("int8", True)])],
)
def test_predicted_peak_of_a_small_base(base: str, on_host: bool) -> None:
    """With the CPU as the GPU, what a base keeps in host memory is measured too."""
    settings = stored(base, on_host)
    estimate = estimate_run(settings, build_on_meta(description("small")), gpu=False, pictures=False)
    measured = measured_peak(settings, "small")
    assert estimate.step + estimate.on_host == pytest.approx(measured, rel=0.1)
    assert (estimate.on_host > 0) == on_host


def stored(base: str, on_host: bool) -> TrainSettings:
    """A run with a quantised base; settings refuse host memory on the CPU, so that it is put in by hand."""
    settings = case_settings("shared_base", 2, base=base, checkpoint_activations=True)
    return settings.model_copy(
        update={"memory": settings.memory.model_copy(update={"teacher": "offloaded_blocks" if on_host else "sharded"})}
    )


@pytest.mark.slow
def test_bytes_of_a_small_base() -> None:
    """Its codes, scales and what is not in layers are there; in host memory the former do not count, and every pass moves them."""
    settings = stored("nf4", on_host=True).model_copy(update={"losses": LossSettings()})
    found = estimate_run(settings, build_on_meta(description("small")), gpu=False, pictures=False)
    network = BaseStorage("nf4", on_host=True).store(build_on_meta(description("small")))
    assert found.on_host == sum(part.nbytes for part in host_tensors(network))
    assert 4.25 / 8 < found.on_host / found.parameters["teacher"] < 8.25 / 8  # linear layers and convolutions
    assert found.kinds[FAKE_SCORE_TURN][FROZEN] == 4 * sum(parameter.numel() for parameter in network.parameters())
    # forward and again, the teacher's, the fake score's
    assert found.moved[GENERATOR_TURN] == pytest.approx(4 * found.on_host, rel=0.1)
    assert found.moved[FAKE_SCORE_TURN] == pytest.approx(2 * found.on_host, rel=0.1)


def test_what_lies_between_steps_is_counted_exactly() -> None:
    """full: three networks and a head, two moments (and a step number) for each trained weight, an average."""
    settings = case_settings("full", 1)
    settings = settings.model_copy(
        update={"generator": settings.generator.model_copy(update={"ema_half_life_images": 10.0})}
    )
    network = build_on_meta(description("small"))
    estimate = estimate_run(settings, network, gpu=False)
    weights = sum(parameter.numel() for parameter in network.parameters())
    head, tensors = estimate.parameters["discriminator"], 2 * len(list(network.parameters())) + 10
    assert estimate.parameters["generator"] == estimate.parameters["teacher"] == weights
    assert estimate.parameters["fake_score"] == weights + head
    for phase in (GENERATOR_TURN, FAKE_SCORE_TURN, PICTURES):
        kinds = estimate.kinds[phase]
        assert (kinds[FROZEN], kinds[TRAINED], kinds[AVERAGE]) == (4 * weights, 4 * (2 * weights + head), 4 * weights)
        assert 0 <= kinds[STATES] - 8 * (2 * weights + head) <= 4 * tensors
    assert sum(estimate.kinds[estimate.phase].values()) == estimate.step
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_modes_and_recomputing_save_what_they_promise() -> None:
    peaks = [predicted(mode, "one level").step for mode in ("full", "lora_generator", "shared_base")]
    assert peaks == sorted(peaks, reverse=True)
    saved = predicted("shared_base", "one level", checkpoint_activations=True).step
    assert saved < 0.8 * peaks[2]


def test_adapters_of_a_rehearsal_are_the_layers_own() -> None:
    """On a bf16 base, too: the float32 weights that the optimiser trains are those that the layers run."""
    network = build_on_meta(description("small"))
    with meta_machine(gpu=True):
        roles = build_shared_base_roles(network, LoraShape(rank=4), False, BaseStorage("bf16"), False)
        for name in ("generator", "fake_score"):
            role = getattr(roles, name)
            assert isinstance(role, AdapterRole)
            for layer, module in role.shared.layers.items():
                for part in ("lora_A", "lora_B"):
                    weight = getattr(module, part)[name].weight
                    assert weight is dict(role.named_parameters())[f"{layer}.{part}.weight"]
                    assert weight.dtype == torch.float32
        assert roles.teacher.network.conv_in.weight.dtype == torch.bfloat16  # type: ignore[union-attr,operator]


def test_nothing_stays_behind_after_a_step() -> None:
    """Beside the pictures lie weights and states, and a batch; no gradients and no copies of anything."""
    settings = case_settings("shared_base", 1, precision="bf16", base="bf16", checkpoint_activations=True)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"samples": (1000, 1)})})
    found = estimate_run(settings, build_on_meta(description("small")), gpu=True)
    kinds, trained = found.kinds[PICTURES], found.kinds[PICTURES][TRAINED]
    assert kinds[GRADIENTS] == 0
    assert kinds[STATES] == pytest.approx(2 * trained, rel=0.01)
    one_forward = found.peaks[PICTURES] - kinds[FROZEN] - 3 * trained
    assert 0 < one_forward < 0.5 * trained


def test_large_sample_pictures_are_decoded_one_by_one() -> None:
    """Eight at 1024x1024 need what one needs: the decoder's 3 GiB, which eight at once would need each."""
    network = build_on_meta(description("small") | {"latent_size": 128})
    peaks = []
    for count in (1, 8):
        settings = case_settings("shared_base", 1)
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"samples": (1000, count)})})
        peaks.append(
            estimate_run(settings, network, autoencoder=dict(family_named("sd").autoencoder_config)).peaks[PICTURES]
            / 2**30
        )
    assert 3 < peaks[0] < 4
    assert peaks[1] - peaks[0] < 0.05  # eight latents


@pytest.mark.long
@pytest.mark.parametrize("mode", ["full", "shared_base"])
def test_a_step_grows_linearly_and_its_peak_not_less(mode: str) -> None:
    """What lies in memory at one kind of moment is affine in the batch; the peak, the largest of many, is convex."""
    ones, peaks = [predicted(mode, "small", batch_size=size) for size in (1, 2, 4, 8)], []
    for found in ones:
        peaks.append(found.step)
        assert found.kinds[FAKE_SCORE_TURN][STATES] == ones[0].kinds[FAKE_SCORE_TURN][STATES]
    slopes = [(peaks[1] - peaks[0]) / 1, (peaks[2] - peaks[1]) / 2, (peaks[3] - peaks[2]) / 4]
    assert slopes[0] <= slopes[1] * 1.001 <= slopes[2] * 1.002
    assert slopes[2] == pytest.approx(slopes[1], rel=0.05)  # another moment may take over, of nearly the same growth
    assert ones[3].flops[FAKE_SCORE_TURN] == pytest.approx(8 * ones[0].flops[FAKE_SCORE_TURN], rel=0.01)


def test_micro_batches_take_less_and_their_gradients_wait() -> None:
    """Many are rehearsed as one that meets the others' gradients; the arithmetic is that of all."""
    whole = predicted("full", "one level", batch_size=8)
    settings = case_settings("full", 8)
    training = settings.training.model_copy(update={"microbatch_size": 1})
    parts = estimate_run(
        settings.model_copy(update={"training": training}),
        build_on_meta(description("one level")),
        gpu=False,
        pictures=False,
    )
    one = predicted("full", "one level", batch_size=1)
    assert one.step < parts.step < whole.step
    assert parts.kinds[parts.phase][GRADIENTS] > 0
    assert parts.flops[FAKE_SCORE_TURN] == pytest.approx(whole.flops[FAKE_SCORE_TURN], rel=0.02)


@pytest.mark.parametrize(
    "mode", ["full", pytest.param("lora_generator", marks=LONG), pytest.param("shared_base", marks=LONG)]
)
def test_one_micro_batch_that_meets_gradients_is_the_second_of_two(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = case_settings(mode, 2, checkpoint_activations=True)
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"microbatch_size": 1})})
    network = build_on_meta(description("one level"))
    one = estimate_run(settings, network, gpu=False, pictures=False)
    monkeypatch.setattr("fewstep.estimate.memory._num_rehearsed", lambda settings: 2)
    two = estimate_run(settings, network, gpu=False, pictures=False)
    for phase in (GENERATOR_TURN, FAKE_SCORE_TURN):
        samples = two.peaks[phase] - one.peaks[phase]  # of the second one, in the first
        assert 0 <= samples < 50_000
        assert one.kinds[phase][GRADIENTS] == two.kinds[phase][GRADIENTS] > 0
        assert one.flops[phase] == two.flops[phase]


def test_a_gpu_normalises_in_float32() -> None:
    settings = case_settings("full", 2, precision="bf16")
    gpu = estimate_run(settings, build_on_meta(description("one level")), gpu=True, pictures=False)
    assert predicted("full", "one level", precision="bf16").step < gpu.step


def test_a_gpu_takes_root_mean_squares_in_float32_too() -> None:
    """As its autocast does; bf16 with float32 weights made torch warn in dry runs of FLUX.2 klein."""
    with meta_machine(gpu=True), torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.RMSNorm(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_meter_counts_storages_once_and_until_they_are_freed() -> None:
    with meta_machine(gpu=False) as meter:
        first = torch.zeros(100)
        view = first[:50]
        assert meter.total == 400
        double = first * 2
        assert meter.peak == meter.total == 800
        meter.assign("kept", [view])
        del double
        assert (meter.total, meter.peak) == (400, 800)
        assert meter.live["kept"] == 400
        assert meter.live[ACTIVATIONS] == 0
        meter.start_phase()
        assert meter.peak == 400
        assert meter.at_peak == Counter({"kept": 400, ACTIVATIONS: 0})
        del first
        assert meter.total == 400
        del view
        assert meter.total == 0


def test_the_meters_own_looks_at_tensors_are_nobodys_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python calls is met once, and what the meter asks of tensors, the backward pass's included, not at all."""
    met, real = Counter[str](), MetaMachine.__torch_function__

    def count(self: MetaMachine, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met[func.__name__] += 1
        return real(self, func, types, args, kwargs)

    with meta_machine(gpu=True):
        weight = torch.zeros(8, 8, requires_grad=True)
        x = torch.zeros(2, 8)
        monkeypatch.setattr(MetaMachine, "__torch_function__", count)
        for _ in range(3):  # the first time torch works shapes out, in Python
            met.clear()
            torch.nn.functional.linear(x, weight).sum().backward()
        monkeypatch.undo()
    assert met == {"linear": 1, "sum": 1, "backward": 1}


# --- The shapes of released text-to-image models


@pytest.mark.parametrize(
    ("name", "millions", "image_shape"),
    [
        ("sd15", 859.52, (4, 64, 64)),
        ("sdxl", 2567.46, (4, 128, 128)),
        ("sd3-medium", 2028.33, (16, 128, 128)),
        ("sd35-medium", 2243.17, (16, 128, 128)),
        ("z-image", 6154.91, (16, 128, 128)),
    ],
)
def test_released_networks_have_their_published_size(
    name: str, millions: float, image_shape: tuple[int, int, int]
) -> None:
    network = build_released(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert network.image_shape == image_shape
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert network.noise_schedule.num_levels == 1000


def test_resolution_is_the_settings_own() -> None:
    assert build_released("sdxl", 512).image_shape == (4, 64, 64)
    with pytest.raises(ValueError, match=r"teacher\.resolution=100 is not a multiple of the VAE's factor 8"):
        build_released("sd15", 100)


def test_unknown_networks_are_answered_with_all_names() -> None:
    with pytest.raises(
        ValueError, match=r"'sd2' is not a released network; choose one of .*imagenet64-adm.*sd15"
    ) as error:
        build_released("sd2")
    assert all(name in str(error.value) for name in released_shapes())


def test_a_text_teacher_of_another_shape_is_refused() -> None:

    values = {"teacher": {"path": "x", "network": "sd15"}}
    settings = parse_settings(TrainSettings, values, "test")
    right, wrong = build_released("sd15", 256), build_released("sdxl")
    check_network(right, settings)
    with pytest.raises(UserError, match="is no sd15"):
        check_network(wrong, settings)
