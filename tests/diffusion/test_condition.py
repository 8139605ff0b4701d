import dataclasses
from typing import Any

import pytest
import torch

from fewstep.diffusion.condition import ClassTable, Condition, Empty


def test_labels_become_one_hot_rows() -> None:
    condition = Condition.from_labels(torch.tensor([2, 0, 2]), 3)
    assert condition["class_labels"].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert condition["class_labels"].dtype == torch.float32
    assert len(condition) == condition.batch_size == 3


def test_floating_labels_are_accepted() -> None:
    assert Condition.from_labels(torch.tensor([1.0, 0.0]), 2)["class_labels"].tolist() == [[0, 1], [1, 0]]


def test_models_without_classes_get_the_empty_condition() -> None:
    condition = Condition.from_labels(torch.tensor([0, 0, 0, 0]), 0)
    assert condition == Condition(4)
    assert "class_labels" not in condition
    assert condition.get("class_labels") is None
    assert condition.unconditional() == condition


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    with pytest.raises(RuntimeError, match="Class values must be"):
        Condition.from_labels(torch.tensor([0, label]), 3)


def test_unconditional_twin_is_zeros_and_leaves_the_original() -> None:
    condition = Condition.from_labels(torch.tensor([1, 0]), 2)
    twin = condition.unconditional()
    assert twin["class_labels"].tolist() == [[0, 0], [0, 0]]
    assert len(twin) == 2
    assert twin["class_labels"].dtype == condition["class_labels"].dtype
    assert condition["class_labels"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("rows", [slice(2), slice(1, 4), slice(-2, None), slice(3, 3), slice(1, 99), slice(0, 5, 2)])
def test_slices_keep_size_and_labels_together(rows: slice) -> None:
    labels = torch.tensor([0, 1, 2, 3, 1])
    part = Condition.from_labels(labels, 4)[rows]
    assert len(part) == len(part["class_labels"]) == len(labels[rows])
    assert part["class_labels"].argmax(1).tolist() == labels[rows].tolist()
    assert Condition(5)[rows] == Condition(len(labels[rows]))


def test_concatenation_keeps_the_order() -> None:
    parts = [Condition.from_labels(torch.tensor(labels), 4) for labels in ([3, 1], [0], [2, 2, 1])]
    whole = Condition.cat(parts)
    assert len(whole) == 6
    assert whole["class_labels"].argmax(1).tolist() == [3, 1, 0, 2, 2, 1]


def test_concatenation_of_empty_conditions_adds_sizes() -> None:
    assert Condition.cat([Condition(2), Condition(0), Condition(3)]) == Condition(5)
    labelled = Condition.from_labels(torch.tensor([1]), 2)
    assert Condition.cat([Condition(0), labelled])["class_labels"].tolist() == [[0, 1]]


def test_moves_between_devices() -> None:
    moved = Condition.from_labels(torch.tensor([1]), 2).to("meta")
    assert moved["class_labels"].device.type == "meta"
    assert Condition(3).to("meta") == Condition(3)


def test_is_immutable() -> None:
    condition = Condition(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition.batch_size = 3  # type: ignore[misc]


# --- Text


def text_condition(size: int, first: int = 0, *, without: tuple[str, ...] = (), unguided: str = "") -> Condition:
    """SDXL's parts but some; row i of every part is filled with first + i, the empty rows with -1."""
    rows = torch.arange(first, first + size).float()
    parts = {
        "text": rows[:, None, None].expand(size, 3, 2), "pooled": rows[:, None].expand(size, 4),
        "time_ids": rows[:, None].expand(size, 6),
    }  # fmt: skip
    empty: dict[str, Empty] = {
        "text": torch.full((1, 3, 2), -1.0), "pooled": torch.full((1, 4), -1.0), "time_ids": "same",
    }  # fmt: skip
    return Condition(
        size, {name: part for name, part in parts.items() if name not in without},
        {name: row for name, row in empty.items() if name not in (*without, unguided)},
    )  # fmt: skip


def numbers(part: torch.Tensor | None) -> list[float]:
    """The one value every row is filled with."""
    assert part is not None
    flat = part.flatten(1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].tolist()


def test_unconditional_text_is_the_empty_rows_with_the_same_time_ids() -> None:
    condition = text_condition(3)
    twin = condition.unconditional()
    assert len(twin) == 3
    assert twin["text"].shape == condition["text"].shape
    assert twin["pooled"].shape == condition["pooled"].shape
    assert numbers(twin["text"]) == numbers(twin["pooled"]) == [-1, -1, -1]
    assert numbers(twin["time_ids"]) == [0, 1, 2]
    assert numbers(condition["text"]) == [0, 1, 2]
    assert numbers(twin.unconditional()["text"]) == [-1, -1, -1]


def test_text_alone_has_a_twin_without_pooled() -> None:
    condition = text_condition(2, without=("pooled", "time_ids"))
    twin = condition.unconditional()
    assert numbers(twin["text"]) == [-1, -1]
    assert "pooled" not in twin
    with pytest.raises(KeyError, match="this model needs 'time_ids'; the condition has text"):
        twin["time_ids"]


def test_text_without_an_empty_branch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no unconditional branch: the row of text is missing"):
        text_condition(2, unguided="text").unconditional()


@pytest.mark.parametrize("rows", [slice(2), slice(1, 4), slice(-2, None), slice(3, 3), slice(0, 5, 2)])
def test_slices_keep_text_parts_together(rows: slice) -> None:
    part = text_condition(5)[rows]
    expected = list(range(5))[rows]
    assert len(part) == len(expected)
    assert numbers(part["text"]) == numbers(part["pooled"]) == numbers(part["time_ids"]) == expected
    assert part.empty["text"].shape == (1, 3, 2)
    assert part.empty["pooled"].shape == (1, 4)
    assert numbers(part.unconditional()["text"]) == [-1] * len(expected)


def test_concatenated_text_keeps_order_and_one_empty_row() -> None:
    whole = Condition.cat([text_condition(2), text_condition(1, 7), text_condition(2, 4)])
    assert len(whole) == 5
    assert numbers(whole["text"]) == numbers(whole["pooled"]) == numbers(whole["time_ids"]) == [0, 1, 7, 4, 5]
    assert whole.empty["text"].shape == (1, 3, 2)
    assert numbers(whole.unconditional()["pooled"]) == [-1] * 5


def test_both_branches_of_guidance_in_one_batch() -> None:
    condition = text_condition(2, 3)
    both = Condition.cat([condition.unconditional(), condition])
    assert numbers(both["text"]) == numbers(both["pooled"]) == [-1, -1, 3, 4]
    assert numbers(both["time_ids"]) == [3, 4, 3, 4]


def test_a_part_without_samples_is_skipped() -> None:
    assert numbers(Condition.cat([Condition(0), text_condition(2)])["text"]) == [0, 1]
    assert numbers(Condition.cat([text_condition(2), Condition(0)])["text"]) == [0, 1]
    assert len(Condition.cat([Condition(0), Condition(0)])) == 0


@pytest.mark.parametrize(
    "other", [Condition(2), Condition.from_labels(torch.tensor([0, 1]), 2), text_condition(2, without=("pooled",))]
)
def test_conditions_on_different_things_do_not_mix(other: Condition) -> None:
    with pytest.raises(ValueError, match="conditions on different things cannot be concatenated"):
        Condition.cat([text_condition(2), other])


def test_a_pooled_part_without_its_empty_row_is_noticed_when_guided() -> None:
    condition = text_condition(2, unguided="pooled")
    with pytest.raises(ValueError, match="no unconditional branch: the row of pooled is missing"):
        condition.unconditional()


def test_every_text_part_moves() -> None:
    moved = text_condition(2).to("meta")
    for name in ("text", "pooled", "time_ids"):
        assert moved[name].device.type == "meta", name
        assert moved.unconditional()[name].device.type == "meta", name
    assert len(moved) == 2


def test_class_table_row_i_is_class_i() -> None:
    table = ClassTable(3)
    assert table.num_rows == 3
    assert table.rows(torch.tensor([2, 0]))["class_labels"].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_class_table_without_classes_has_one_row() -> None:
    assert ClassTable(0).num_rows == 1
    assert ClassTable(0).rows(torch.tensor([0, 0])) == Condition(2)


def test_a_mask_is_a_part_with_the_mask_of_the_empty_prompt() -> None:
    """Prompts of several lengths: each row reads its own tokens, the unconditional branch the empty prompt's."""
    mask, empty = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 0, 0]])
    condition = Condition(2, {"text_mask": mask}, {"text_mask": empty})
    both = Condition.cat([condition.unconditional(), condition])
    assert both["text_mask"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_texts_of_different_lengths_are_padded_where_they_meet() -> None:
    """Both branches of guidance, and real beside generated captions: shorter rows end in zeros, each keeps its length."""
    long, short = torch.ones(2, 5, 3), torch.ones(1, 2, 3)
    empty: dict[str, Any] = {"text": 2 * torch.ones(1, 1, 3), "text_length": torch.tensor([1])}
    first = Condition(2, {"text": long, "text_length": torch.tensor([5, 4])}, empty)
    second = Condition(1, {"text": short, "text_length": torch.tensor([2])}, empty)
    both = Condition.cat([second, first, first.unconditional()])
    assert both["text"].shape == (5, 5, 3)
    assert both["text_length"].tolist() == [2, 5, 4, 1, 1]
    for row, (value, kept) in enumerate([(1, 2), (1, 5), (1, 5), (2, 1), (2, 1)]):
        assert torch.equal(both["text"][row, :kept], torch.full((kept, 3), float(value)))
        assert not both["text"][row, kept:].any()
    assert both.unconditional()["text"].shape == (5, 1, 3)
