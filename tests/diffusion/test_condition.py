import dataclasses

import pytest
import torch

from fewstep.diffusion.condition import Condition


def test_labels_become_one_hot_rows() -> None:
    condition = Condition.from_labels(torch.tensor([2, 0, 2]), 3)
    assert condition.class_labels.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert condition.class_labels.dtype == torch.float32
    assert len(condition) == condition.batch_size == 3


def test_floating_labels_are_accepted() -> None:
    assert Condition.from_labels(torch.tensor([1.0, 0.0]), 2).class_labels.tolist() == [[0, 1], [1, 0]]


def test_models_without_classes_get_the_empty_condition() -> None:
    condition = Condition.from_labels(torch.tensor([0, 0, 0, 0]), 0)
    assert condition == Condition(4)
    assert condition.class_labels is None
    assert condition.unconditional() == condition


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    with pytest.raises(RuntimeError, match="Class values must be"):
        Condition.from_labels(torch.tensor([0, label]), 3)


def test_unconditional_twin_is_zeros_and_leaves_the_original() -> None:
    condition = Condition.from_labels(torch.tensor([1, 0]), 2)
    twin = condition.unconditional()
    assert twin.class_labels.tolist() == [[0, 0], [0, 0]]
    assert len(twin) == 2
    assert twin.class_labels.dtype == condition.class_labels.dtype
    assert condition.class_labels.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("rows", [slice(2), slice(1, 4), slice(-2, None), slice(3, 3), slice(1, 99), slice(0, 5, 2)])
def test_slices_keep_size_and_labels_together(rows: slice) -> None:
    labels = torch.tensor([0, 1, 2, 3, 1])
    part = Condition.from_labels(labels, 4)[rows]
    assert len(part) == len(part.class_labels) == len(labels[rows])
    assert part.class_labels.argmax(1).tolist() == labels[rows].tolist()
    assert Condition(5)[rows] == Condition(len(labels[rows]))


def test_concatenation_keeps_the_order() -> None:
    parts = [Condition.from_labels(torch.tensor(labels), 4) for labels in ([3, 1], [0], [2, 2, 1])]
    whole = Condition.cat(parts)
    assert len(whole) == 6
    assert whole.class_labels.argmax(1).tolist() == [3, 1, 0, 2, 2, 1]


def test_concatenation_of_empty_conditions_adds_sizes() -> None:
    assert Condition.cat([Condition(2), Condition(0), Condition(3)]) == Condition(5)
    labelled = Condition.from_labels(torch.tensor([1]), 2)
    assert Condition.cat([Condition(0), labelled]).class_labels.tolist() == [[0, 1]]


def test_moves_between_devices() -> None:
    moved = Condition.from_labels(torch.tensor([1]), 2).to("meta")
    assert moved.class_labels.device.type == "meta"
    assert Condition(3).to("meta") == Condition(3)


def test_is_immutable() -> None:
    condition = Condition(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition.batch_size = 3  # type: ignore[misc]
