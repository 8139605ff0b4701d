"""The loaded models behind the page, and what makes a request into pictures: no web framework in here."""

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from fewstep.app.safety import SafetyChecker, load_safety_checker
from fewstep.app.settings import MAX_SEED, AppSettings
from fewstep.devices import precision_of
from fewstep.errors import UserError
from fewstep.formats.pixels import make_grid
from fewstep.formats.source import Source
from fewstep.models.decoder import Decoder
from fewstep.models.load import load_model, load_teacher
from fewstep.models.model import Model
from fewstep.models.picture_list import Picture, list_pictures, wishes_of
from fewstep.progress import Stderr, busy, say

ALL_CLASSES = -1
NUM_EXAMPLES = 5
Role: TypeAlias = Literal["model", "teacher"]


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, as the page hands it over: nothing in it is trusted.

    Attributes:
        prompt: for text-to-image models.
        label: for class-conditional models; ALL_CLASSES: they take turns.
        seed: as typed.
        num_images: pictures 0..num_images - 1 of the seed.
        num_steps: of a teacher that is the model itself; None for generators, whose steps travel with them.
        tiny_vae: decode with the TAESD.
    """

    prompt: str = ""
    label: int = ALL_CLASSES
    seed: str = "0"
    num_images: int = 1
    num_steps: int | None = None
    tiny_vae: bool = False


@dataclass(frozen=True)
class Result:
    """Pictures of one model.

    Attributes:
        pictures: RGB, the pixels of `fewstep sample`; grey where the safety checker withholds one.
        captions: one a picture: its class, or its number.
        origins: one a picture: what it takes to make it again.
        withheld: how many the safety checker withheld.
        evaluations: of the network, a picture.
        seconds: of all pictures: encoding the prompt, the network, decoding; not the safety checker.
        first_run: whether the time includes the model's warm-up.
        notes: what the visitor should know, one sentence each.
    """

    pictures: list[Image.Image]
    captions: list[str]
    origins: list[str]
    withheld: int
    evaluations: int
    seconds: float
    first_run: bool
    notes: tuple[str, ...] = ()


class Studio:
    """One model, perhaps its teacher, TAESD and safety checker; makes one request at a time.

    Raises:
        UserError: a teacher or TAESD that does not fit the model.
    """

    def __init__(
        self, settings: AppSettings, model: Model, teacher: Model | None = None, checker: SafetyChecker | None = None
    ) -> None:
        self.settings, self.checker = settings, checker
        self.models: dict[Role, Model] = {"model": model}
        self.takes_prompts = model.conditioner.takes == "prompts"
        self.is_generator = model.is_generator
        if teacher is not None:
            self._check_teacher(model, teacher)
            self.models["teacher"] = teacher
        self._check_sampling()
        self._full: dict[Role, Decoder] = {}
        self._tiny: Decoder | None = None
        self._prepare_decoders()
        self._warm: set[tuple[Role, bool, int]] = set()
        self._lock = threading.Lock()

    @property
    def has_tiny_vae(self) -> bool:
        """Whether a TAESD can be chosen."""
        return self._tiny is not None

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Names and numbers to choose from; empty without classes."""
        model = self.models["model"]
        count = model.denoiser.num_classes
        names = model.card.class_names or tuple(f"class {number}" for number in range(count))
        return [("all classes in turn", ALL_CLASSES), *zip(names, range(count), strict=False)] if count > 1 else []

    @property
    def examples(self) -> list[str]:
        """Prompts to begin with: of the run's own sample pictures, else of what the model knows; empty without prompts."""
        if not self.takes_prompts:
            return []
        return example_prompts(self.settings.model)

    @property
    def step_choices(self) -> list[int]:
        """Numbers of steps the model may be run in: a generator's one schedule, or what a teacher is good at."""
        if self.is_generator:
            return [len(self.models["model"].card.step_indices)]
        usual, model = self.models["model"].family.default_num_steps, self.models["model"]
        numbers = {max(1, round(usual * part / 5)) for part in (2, 5, 10)} | {self.default_steps}
        return sorted(number for number in numbers if number <= model.max_num_steps)

    @property
    def default_steps(self) -> int:
        """Steps unless chosen otherwise."""
        if self.is_generator:
            return len(self.models["model"].card.step_indices)
        return self.settings.teacher_steps or self.models["model"].family.default_num_steps

    def make(self, request: Request, role: Role = "model") -> Result:
        """The pictures that `fewstep sample` makes of the same seed with the same options.

        Raises:
            UserError: a request the page should not have sent, in words for the visitor.
        """
        wanted = self._wanted(request)
        model = self.models[role]
        how, evaluations = self._how(request, role)
        key = (role, request.tiny_vae, len(wanted))
        with self._lock:
            notes = self._notes(request)
            started = time.perf_counter()
            images = self._sample(model, role, wanted, how, request.tiny_vae)
            seconds = time.perf_counter() - started
            first_run = key not in self._warm
            self._warm.add(key)
            if not torch.isfinite(images).all():
                raise UserError("The pictures came out as NaN: start the page with --precision fp32 or bf16.")
            pictures = [make_grid(image[None], columns=1) for image in images]
            flags = self.checker.flagged(pictures) if self.checker else [False] * len(pictures)
        shown = [_grey(picture) if flag else picture for picture, flag in zip(pictures, flags, strict=True)]
        names = [self._name(picture) for picture in wanted]
        captions = ["withheld" if flag else name for name, flag in zip(names, flags, strict=True)]
        origins = [_origin(picture, name) for picture, name in zip(wanted, names, strict=True)]
        return Result(shown, captions, origins, sum(flags), evaluations, seconds, first_run, notes)

    def _wanted(self, request: Request) -> tuple[Picture, ...]:
        """The pictures of a request, checked against the limits."""
        settings = self.settings
        seed = request.seed.strip()
        if not (seed.isascii() and seed.isdigit() and len(seed) <= 20 and int(seed) <= MAX_SEED):
            raise UserError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
        count = request.num_images
        if type(count) is not int or not 1 <= count <= settings.max_images:
            raise UserError(f"This page makes 1 to {settings.max_images} pictures a request.")
        if request.tiny_vae and not self.has_tiny_vae:
            raise UserError("This page was started without a tiny VAE.")
        prompts, labels = self._prompts(request), self._labels(request)
        num_classes = self.models["model"].denoiser.num_classes
        return list_pictures(
            labels=labels, prompts=prompts, num_classes=num_classes, num_images=count, seed=int(seed), seeds=[], first=0
        ).pictures

    def _prompts(self, request: Request) -> list[str]:
        if not self.takes_prompts:
            return []
        prompt, most = request.prompt, self.settings.max_prompt
        if not prompt.strip():
            raise UserError("Type a prompt first: a few words on what the picture shows.")
        if not _is_whole(prompt):
            raise UserError("The prompt holds half a character: type it again.")
        if len(prompt) > most:
            raise UserError(f"The prompt has {len(prompt)} characters; this page takes {most}.")
        return [prompt]

    def _labels(self, request: Request) -> list[int]:
        classes = self.classes
        if not classes or request.label == ALL_CLASSES:
            return []
        if request.label not in [number for _, number in classes]:
            raise UserError(f"The model has no class {request.label}.")
        return [request.label]

    def _how(self, request: Request, role: Role) -> tuple[dict[str, Any], int]:
        """Options of `sample` and the evaluations they cost; what is not set is the sampler's own default."""
        model = self.models[role]
        how: dict[str, Any] = {}
        if model.is_generator:
            if request.num_steps not in (None, len(model.card.step_indices)):
                raise UserError("A generator runs in the steps it was trained for, and no others.")
            return {}, model.evaluations()
        num_steps = self.default_steps if role == "model" else self.settings.teacher_steps
        if role == "model" and request.num_steps is not None:
            if request.num_steps not in self.step_choices:
                raise UserError(f"Choose one of {self.step_choices} steps.")
            num_steps = request.num_steps
        if num_steps:
            how["num_inference_steps"] = num_steps
        how["guidance_scale"] = self.settings.guidance_scale
        return how, model.evaluations(num_steps)

    def _sample(
        self, model: Model, role: Role, wanted: tuple[Picture, ...], how: dict[str, Any], tiny_vae: bool
    ) -> Tensor:
        place: dict[str, Any] = {"seed": wanted[0].seed, "first": wanted[0].number, "num_images": len(wanted)}
        model.decoder = self._tiny if tiny_vae and self._tiny is not None else self._full[role]
        try:
            return model.sample(wishes_of(wanted), output="tensor", progress=False, **place, **how)
        except torch.OutOfMemoryError:
            raise UserError("The GPU's memory is full: ask for fewer pictures, or try again later.") from None

    def _notes(self, request: Request) -> tuple[str, ...]:
        if not self.takes_prompts:
            return ()
        encoders = self.models["model"].conditioner.encoders
        count = encoders.count_tokens(request.prompt)
        if count <= encoders.max_tokens:
            return ()
        return (f"The prompt has {count} tokens; the model reads the first {encoders.max_tokens}.",)

    def _name(self, picture: Picture) -> str:
        names = {number: name for name, number in self.classes}
        return f"picture {picture.number}" if picture.label is None else names.get(picture.label, "")

    def _prepare_decoders(self) -> None:
        """Read encoders and VAE now, so that nothing is missing later; the TAESD beside it."""
        first = self.models["model"]
        for role, model in self.models.items():
            if model is not first and model.folder == first.folder:  # a generator beside the teacher it came from
                model.conditioner, model.decoder = first.conditioner, first.decoder
            model.read_components()
            self._full[role] = model.decoder
        if self.settings.tiny_vae:
            try:
                self._tiny = first.tiny_decoder(self.settings.tiny_vae)
            except UserError as error:
                raise UserError(f"--tiny-vae: {error}") from error

    def _check_teacher(self, model: Model, teacher: Model) -> None:
        name = self.settings.teacher
        if not self.is_generator:
            raise UserError("--teacher is shown beside a generator; the model is a teacher itself, leave it out")
        if teacher.is_generator:
            raise UserError(f"--teacher {name} is a generator; give the model it was distilled from")
        if teacher.conditioner.takes != model.conditioner.takes:
            raise UserError(f"--teacher {name}: one of the two is a text-to-image model, the other has classes")
        if model.denoiser.image_shape != teacher.denoiser.image_shape:
            raise UserError(f"--teacher {name} makes pictures of another size than the generator")
        if model.denoiser.num_classes != teacher.denoiser.num_classes:
            raise UserError(f"--teacher {name} has other classes than the generator")

    def _check_sampling(self) -> None:
        """Steps and guidance of whichever is a teacher."""
        teachers = [model for model in self.models.values() if not model.is_generator]
        scale, num_steps = self.settings.guidance_scale, self.settings.teacher_steps
        if not teachers:
            if num_steps is not None:
                raise UserError("--teacher-steps is for a teacher; give one with --teacher")
            if scale is not None:
                raise UserError(f"--guidance-scale {scale}: a generator has its guidance built in; leave it out")
            return
        most = teachers[0].max_num_steps
        if num_steps is not None and num_steps > most:
            raise UserError(f"--teacher-steps {num_steps}: the model has {most} noise levels, so at most as many")
        if scale is not None:
            teachers[0].check_guidance(scale)


def load_studio(settings: AppSettings) -> Studio:
    """Load what the settings name.

    Raises:
        UserError: a model, TAESD or safety checker that is not there, is damaged or does not fit.
    """
    console = Stderr()
    precision = precision_of(settings.precision, settings.device, partial(say, console))
    place: dict[str, Any] = {"device": settings.device, "precision": precision}
    with busy(console, f"Loading {settings.model}"):
        model = load_model(settings.model, **place)
    teacher = None
    if settings.teacher:
        with busy(console, f"Loading the teacher {settings.teacher}"):
            teacher = load_teacher(settings.teacher, **place)
    checker = None
    if settings.safety_checker and model.folder is not None:
        checker = load_safety_checker(model.family.safety_checker, model.folder, model.device)
    return Studio(settings, model, teacher, checker)


def _is_whole(prompt: str) -> bool:
    """Whether tokenizers can read it; JSON can have half of a surrogate pair."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _grey(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size, (128, 128, 128))


def _origin(picture: Picture, name: str) -> str:
    parts = [f"seed {picture.seed}", f"picture {picture.number}"]
    return " · ".join(
        [picture.prompt.strip(), *parts] if picture.prompt else [name, *parts] if picture.label is not None else parts
    )


def example_prompts(model: str) -> list[str]:
    """The first prompts that lie with a model: those of a run's sample pictures, or of the set a bundled one was trained on."""
    path = Source.parse(model).path
    places = (
        []
        if path is None
        else [path / "samples/prompts.txt", path.parent / "samples/prompts.txt", path.parent / "prompts_train.txt"]
    )
    for place in places:
        if place.is_file():
            lines = dict.fromkeys(
                line.strip() for line in place.read_text(encoding="utf-8", errors="replace").splitlines()
            )
            return [line for line in lines if 0 < len(line) <= 80][:NUM_EXAMPLES]
    return []
