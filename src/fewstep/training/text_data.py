"""What a text-to-image run reads: prompts as the generator's conditions, latents as real data."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.images import data_order
from fewstep.data.latents import StoredEmbeddings, StoredLatents, check_latents_fit
from fewstep.data.prompts import load_prompts
from fewstep.data.shard_folder import is_shard_folder
from fewstep.data.waiting import WAITING
from fewstep.diffusion.condition import ConditionTable
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint, vae_fingerprint
from fewstep.formats.remote import data_path
from fewstep.models.model import Model
from fewstep.networks.text_encoders import TextEncoders
from fewstep.parallel import local_batch
from fewstep.preparation.embeddings import check_prompts, prepare_embeddings
from fewstep.preparation.stored_prompts import EmbeddingsOnDisk, stored_prompts
from fewstep.progress import Stderr, busy, tell, working
from fewstep.settings import TrainSettings
from fewstep.training.run_folder import EMBEDDINGS

CUT_WITH = "data.truncate_prompts=true"
MOST_GIGABYTES_UNASKED = 20.0


@dataclass(frozen=True)
class RealLatents:
    """Batches of stored latents with their captions' conditions; the order of each pass follows from the seed."""

    stored: StoredLatents
    captions: ConditionTable
    seed: int
    batch_size: int
    orders: dict[int, Tensor] = field(default_factory=dict)  # the permutation of the passes being read

    def at(self, step: int, device: torch.device) -> RealBatch:
        latents, index = self._read(step)
        return RealBatch(latents.to(device, non_blocking=True), self.captions.rows(index, device))

    @WAITING.around
    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents of a step on the CPU, and which rows they are."""
        first, size = local_batch(self.batch_size)
        positions = step * self.batch_size + torch.arange(first, first + size)
        index = data_order(self.seed, positions, len(self.stored), self.orders)
        return self.stored.drawn(index, Draws(self.seed, step, positions)), index


def open_prompts(settings: TrainSettings, teacher: Model, folder: Path) -> ConditionTable:
    """The run's prompts; by default encoded once into `folder`, after which the text encoders are freed.

    Without a list they are the captions of the real latents, as of the published SDXL runs.

    Raises:
        UserError: no prompts, one that is too long, stored embeddings of another encoder, more than is stored unasked.
    """
    if not settings.data.prompts and settings.data.images:
        stored = _open_stored_latents(settings, teacher)
        tell(f"data.prompts is not set: the prompts are the {len(stored):,} captions of {settings.data.images}")
        return _captions(settings, teacher, stored)
    if not settings.data.prompts:
        raise UserError(
            "data.prompts is not set: a text-to-image run needs prompts (.txt, .parquet, .pkl or a captioned folder), or "
            "data.images, a folder of `fewstep prepare latents`, whose captions then serve"
        )
    path = data_path(settings.data.prompts)
    if is_shard_folder(path):
        return stored_prompts(teacher, path)
    prompts, truncate = load_prompts(path, settings.data.prompt_column), settings.data.truncate_prompts
    if settings.data.text_embeddings == "computed":
        check_prompts(_encoders_that_stay(settings, teacher), prompts, truncate, CUT_WITH)
        return teacher.conditioner.table(prompts, teacher.size)
    console = Stderr()
    with busy(console, "Loading the text encoders"):
        encoders = teacher.conditioner.encoders
    with working(console, f"Embedding {len(prompts):,} prompts") as report:
        prepare_embeddings(
            encoders, prompts, folder / EMBEDDINGS, truncate=truncate, cut_with=CUT_WITH,
            spare_with="set data.text_embeddings='computed', which encodes prompts at each step and stores nothing",
            max_gigabytes=MOST_GIGABYTES_UNASKED, report=report,
        )  # fmt: skip
    return stored_prompts(teacher, folder / EMBEDDINGS)


def open_latents(settings: TrainSettings, teacher: Model) -> RealLatents:
    """Real latents for the GAN.

    Raises:
        UserError: none given, or of another VAE, encoder or resolution than the teacher's.
    """
    if not settings.data.images:
        raise UserError(
            "data.images is not set: the GAN of a text-to-image run reads real latents; make them with "
            "`fewstep prepare latents`, or set losses.gan_weights=[0, 0]"
        )
    stored, training = _open_stored_latents(settings, teacher), settings.training
    return RealLatents(stored, _captions(settings, teacher, stored), training.seed, training.batch_size)


def _open_stored_latents(settings: TrainSettings, teacher: Model) -> StoredLatents:
    folder = data_path(settings.data.images)
    if folder.exists() and not is_shard_folder(folder):
        raise UserError(
            f"data.images={settings.data.images} is no folder of latents, which a text-to-image run reads: make one of these pictures with "
            f"`fewstep prepare latents {settings.teacher.path} FOLDER --images {settings.data.images}`, and name FOLDER"
        )
    stored = StoredLatents(folder)
    check_latents_fit(
        stored, vae_fingerprint=vae_fingerprint(teacher.components), text_fingerprint=text_fingerprint(teacher.components),
        latent_shape=teacher.denoiser.image_shape,
    )  # fmt: skip
    return stored


def _captions(settings: TrainSettings, teacher: Model, stored: StoredLatents) -> ConditionTable:
    """The captions of real latents: their embeddings where those are stored, else encoded at each step."""
    if isinstance(stored.captions, StoredEmbeddings):
        source = EmbeddingsOnDisk(stored.captions)
        if not settings.data.prompts:  # nothing else needs them
            teacher.conditioner.release()
        return teacher.conditioner.table(source, teacher.size, source.empty)
    if settings.data.text_embeddings != "computed":
        raise UserError(
            f"data.images={settings.data.images} holds its captions as text: set data.text_embeddings='computed', which "
            "encodes them at each step, or prepare the latents again with --captions embeddings"
        )
    _encoders_that_stay(settings, teacher)
    return teacher.conditioner.table(stored.captions.prompts(), teacher.size)


def _encoders_that_stay(settings: TrainSettings, teacher: Model) -> TextEncoders:
    """The text encoders of a run that encodes at each step, stored as `memory.base` says."""
    return teacher.conditioner.encoders.store(settings.memory.base)
