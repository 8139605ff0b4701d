"""Prompts embedded earlier, as the conditions of a teacher whose text encoders are needed no longer."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewstep.data.latents import StoredEmbeddings, check_embeddings_fit
from fewstep.diffusion.condition import ConditionTable
from fewstep.formats.fingerprints import text_fingerprint
from fewstep.models.model import Model
from fewstep.networks.text_encoders import TextEmbeddings


@dataclass(frozen=True)
class EmbeddingsOnDisk:
    """Stored embeddings as an embedding source."""

    stored: StoredEmbeddings

    def __len__(self) -> int:
        return len(self.stored)

    def rows(self, index: Tensor) -> TextEmbeddings:
        return TextEmbeddings(*self.stored.rows(index))

    def texts(self, index: Tensor) -> list[str]:
        return self.stored.prompts(index)

    @property
    def empty(self) -> TextEmbeddings:
        """The unconditional branch."""
        return TextEmbeddings(*self.stored.empty)


def stored_prompts(teacher: Model, folder: Path) -> ConditionTable:
    """Prompts embedded earlier, checked to be of this teacher's text encoders, which are freed.

    Raises:
        UserError: no stored embeddings, or another encoder's.
    """
    stored = StoredEmbeddings(folder)
    check_embeddings_fit(stored, text_fingerprint=text_fingerprint(teacher.components))
    source = EmbeddingsOnDisk(stored)
    teacher.conditioner.release()
    return teacher.conditioner.table(source, teacher.size, source.empty)
