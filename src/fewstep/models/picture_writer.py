"""Pictures to files while they are made, each with how it was made in its metadata; and how fast that went."""

from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.pixels import save_grid, save_picture
from fewstep.models.picture_list import Picture, PictureList


class PictureWriter:
    """Writes each batch as it comes; for a grid it keeps the images until the end.

    Args:
        out: folder for one PNG a picture, or None.
        grid: file for all of them, or None.
        wanted: the pictures, in the order they come.
        facts: what all have in common, for the metadata.
        class_names: of the model, empty where unknown.
    """

    def __init__(
        self, out: Path | None, grid: Path | None, wanted: PictureList, facts: dict[str, object],
        class_names: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.out, self.grid, self.wanted = out, grid, wanted
        self.facts, self.class_names = facts, class_names
        self.kept: list[Tensor] = []
        self.count = 0
        self.size = (0, 0)

    def write(self, pictures: tuple[Picture, ...], images: Tensor) -> None:
        """One PNG a picture, NNNNN.png: its number, with --seeds its place in the list."""
        self.size = (images.shape[2], images.shape[3])
        if self.grid is not None:
            self.kept.append(images)
        if self.out is not None:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {self.out}: {error}; choose another --out") from error
            start = self.wanted.pictures[0].number + self.count
            for name, (picture, image) in enumerate(zip(pictures, images, strict=True), start=start):
                save_picture(self.out / f"{name:05d}.png", image, self._facts_of(picture))
        self.count += len(pictures)

    def finish(self) -> None:
        """The grid."""
        if self.grid is not None:
            seeds = ",".join(map(str, self.wanted.seeds))
            facts = {**self.facts, "seed": seeds, "size": "{}x{}".format(*self.size)}
            prompts = dict.fromkeys(picture.prompt for picture in self.wanted.pictures if picture.prompt)
            if prompts:
                facts["prompt"] = "\n".join(prompts)
            elif self.wanted.pictures[0].label is not None:
                facts["label"] = ",".join(str(picture.label) for picture in self.wanted.pictures)
            save_grid(self.grid, torch.cat(self.kept), columns=self.wanted.columns, facts=facts)

    def _facts_of(self, picture: Picture) -> dict[str, object]:
        facts = {**self.facts, "seed": picture.seed, "image": picture.number, "size": "{}x{}".format(*self.size)}
        if picture.prompt is not None:
            return {**facts, "prompt": picture.prompt}
        if picture.label is not None:
            facts["label"] = picture.label
            if self.class_names:
                facts["class"] = self.class_names[picture.label]
        return facts


class Speed:
    """Pictures a second, without the first batch, which warms up, where there are others."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches: list[tuple[int, float]] = []

    def add(self, count: int, seconds: float) -> None:
        """One batch: encoding the prompts, the network, decoding; not the writing."""
        self.batches.append((count, seconds))

    def sentence(self) -> str:
        """The rate of the full batches after the first, or of what there is."""
        later = self.batches[1:]
        counted = [batch for batch in later if batch[0] == self.batch_size] or later or self.batches
        count, seconds = sum(batch[0] for batch in counted), sum(batch[1] for batch in counted)
        rate = f"{count / seconds:.1f} images/s, {seconds / count:.3g} s an image"
        return f"{rate} ({'the first batch, which warms up, not counted' if later else 'warm-up included'})"
