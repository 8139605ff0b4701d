"""The page itself: what a visitor sees, and which function answers which button."""

import functools
import html
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from fewstep.app.guard import listening
from fewstep.app.notes import about_model, comparison_of, facts_of, notes_of
from fewstep.app.settings import AppSettings
from fewstep.app.studio import ALL_CLASSES, Request, Result, Role, Studio
from fewstep.errors import UserError

log = logging.getLogger("fewstep.app")
SMALL = 160  # pictures with a shorter side are shown as pixels, not smoothed
THUMBNAIL = 256
LISTENS_WITHIN_SECONDS = 5.0
CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto}
main.app {width: 100%; max-width: none !important}
.small-pictures img {image-rendering: pixelated}
#new-seed {align-self: end; height: 42px; margin-bottom: 13px}
.quiet {opacity: 0.75; font-size: 0.9em}
#about h2 {margin-bottom: 0}
#problem {color: var(--error-text-color, #b91c1c)}
#model .grid-wrap, #teacher .grid-wrap {max-height: none; overflow: visible; min-height: 240px}
.caption-label {font-size: 11px !important; padding: 1px 6px !important}
#history .grid-wrap {max-height: none; min-height: 0; overflow-x: auto; overflow-y: hidden}
#history .grid-container {display: flex}
#history .gallery-item {width: 84px; height: 84px; flex: none}
#history .caption-label {display: none}
"""
Entry = tuple[Image.Image, str]


class PageFunctions:
    """What the buttons call. Every problem becomes one sentence on the page, never a traceback.

    Args:
        studio: the loaded models.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def generate(
        self, prompt: str, label: int | None, seed: str, num_images: float, steps: int | None, tiny_vae: bool,
        compare: bool, history: list[Entry], visitor: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """The model's pictures, then the teacher's where they are to be compared.

        What is wrong with the input is said beside it, and the pictures that were there stay.

        Yields:
            a problem, pictures with captions, facts, the teacher's pictures, its facts, the history strip, the history.
        """
        self._await_listener(visitor)
        with_teacher = compare and "teacher" in self.studio.models
        request = Request(
            prompt or "", ALL_CLASSES if label is None else label, str(seed), _whole(num_images),
            None if self.studio.is_generator else steps, bool(tiny_vae),
        )  # fmt: skip
        try:
            result = self._ask(request, "model")
        except UserError as error:
            yield _problem(str(error)), *[gr.skip()] * 6
            return
        history = [*_thumbnails(result), *(history or [])][: self.studio.settings.history]
        waiting = "The teacher is at work …" if with_teacher else ""
        yield "", _gallery(result), facts_of(result), _gallery(None), waiting, history, history
        if with_teacher:
            try:
                other = self._ask(request, "teacher")
            except UserError as error:
                yield _problem(str(error)), *[gr.skip()] * 3, "", *[gr.skip()] * 2
                return
            yield *[gr.skip()] * 3, _gallery(other), comparison_of(result, other), gr.skip(), gr.skip()

    def pictures(
        self, prompt: str, label: int, seed: str, num_images: float, visitor: gr.Request | None = None
    ) -> list[Entry]:
        """What programs call, by the name /generate: the model's pictures with how each was made.

        Raises:
            gradio.Error: a request that cannot be answered, in words.
        """
        self._await_listener(visitor)
        request = Request(
            prompt or "", ALL_CLASSES if label is None else label, str(seed), _whole(num_images), None if self.studio.is_generator else self.studio.default_steps
        )  # fmt: skip
        try:
            result = self._ask(request, "model")
        except UserError as error:
            raise _message(str(error)) from None
        return list(zip(result.pictures, result.origins, strict=True))

    @staticmethod
    def _await_listener(visitor: gr.Request | None) -> None:
        if visitor is not None and not _is_listening(visitor.session_hash):
            log.info("nobody waits for a request of session %s any more", visitor.session_hash)
            raise _message("Nobody waits for this request any more.")

    def _ask(self, request: Request, role: Role) -> Result:
        try:
            result = self.studio.make(request, role)
        except UserError:
            raise
        except Exception:
            log.exception("a request failed")
            raise _message("Something went wrong on the server. Its log says what.") from None
        if result.withheld:
            gr.Warning(f"The safety checker withheld {result.withheld} of {len(result.pictures)} pictures.")
        for note in result.notes:
            gr.Warning(html.escape(note, quote=False))
        return result


def _is_listening(session: str | None) -> bool:
    """Whether a browser waits for the answer; one that has just asked may begin to within a moment."""
    ends = time.monotonic() + LISTENS_WITHIN_SECONDS
    while session is not None and session not in listening:
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


class Page(gr.Blocks):
    """The page, which says in a sentence what is wrong with a value that a browser would not send."""

    async def preprocess_data(self, *arguments: Any, **options: Any) -> Any:
        """What came with a request as what the functions take.

        Raises:
            gradio.Error: too few values, or one of another kind.
        """
        try:
            return await super().preprocess_data(*arguments, **options)
        except gr.Error as error:
            error.print_exception = False  # a stranger's value is no fault for the log
            raise
        except Exception as error:
            log.info("a request has other values than the page's: %s", error)
            raise _message(
                "This request has too few values, or one of another kind: it takes a prompt, a class, a seed and a number of pictures."
            ) from None


def build_page(studio: Studio) -> gr.Blocks:
    """The page over loaded models, with its queue; nothing listens yet."""
    settings, functions = studio.settings, PageFunctions(studio)
    with Page(title="fewstep", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(about_model(studio), elem_id="about")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                inputs, button = _controls(studio, settings)
                problem = gr.Markdown(elem_id="problem")
                if examples := studio.examples:
                    gr.Examples(
                        [[text] for text in examples], inputs=[inputs[0]], label="For example", cache_examples=False
                    )
            with gr.Column(scale=4, min_width=320):
                outputs = _pictures(studio)
                gr.Markdown("\n".join(f"- {note}" for note in notes_of(studio)), elem_classes="quiet", elem_id="notes")
        history = gr.State([])
        with gr.Column(visible=settings.history > 0):
            gr.Markdown(f"Your last {settings.history} pictures", elem_classes="quiet")
            strip = gr.Gallery(
                show_label=False, columns=12, height=118, object_fit="contain", format="png", interactive=False,
                buttons=[], elem_id="history", elem_classes=_look(studio),
            )  # fmt: skip
        event = functools.partial(
            gr.on, fn=functions.generate, inputs=[*inputs, history], outputs=[problem, *outputs, strip, history],
            api_name="press", api_visibility="private", concurrency_limit=1, concurrency_id="models", show_progress_on=[outputs[0]],
            trigger_mode="always_last",  # a press while pictures are being made is answered after them, not dropped
        )  # fmt: skip
        event(triggers=[button.click, inputs[0].submit])
        # for programs: a button and a gallery that nobody sees
        endpoint = gr.Gallery(visible=False, format="png")
        gr.Button(visible=False).click(
            functions.pictures,
            [*inputs[:4]],
            endpoint,
            api_name="generate",
            concurrency_limit=1,
            concurrency_id="models",
        )
    page.queue(max_size=settings.max_queue, api_open=False)
    return page


def _controls(studio: Studio, settings: AppSettings) -> tuple[list[Any], gr.Button]:
    """Inputs in the order of `PageFunctions.generate`; what the model does not have stays hidden."""
    prompt = gr.Textbox(
        label="Prompt", placeholder="what the picture shows; Enter generates, Shift-Enter breaks the line", lines=1, max_lines=6, visible=studio.takes_prompts,
        max_length=settings.max_prompt, submit_btn=False, autofocus=True, elem_id="prompt",
    )  # fmt: skip
    classes = studio.classes
    label = gr.Dropdown(
        choices=classes or [("", ALL_CLASSES)], value=ALL_CLASSES, label="Class", visible=bool(classes), elem_id="class"
    )  # fmt: skip
    with gr.Row():
        seed = gr.Textbox("0", label="Seed", scale=3, min_width=100, max_length=20, elem_id="seed")
        other = gr.Button("New seed", scale=1, min_width=90, size="sm", elem_id="new-seed")
    num_images = gr.Slider(
        1, settings.max_images, value=min(4, settings.max_images), step=1, label="Pictures", elem_id="count",
        visible=settings.max_images > 1,
    )  # fmt: skip
    one = len(studio.step_choices) == 1
    steps = gr.Dropdown(
        choices=studio.step_choices, value=studio.default_steps, interactive=not one, elem_id="steps",
        label="Steps", info="as trained; they travel with the weights" if studio.is_generator else None,
    )  # fmt: skip
    tiny_vae = gr.Checkbox(
        label="Tiny VAE: decodes faster, in less detail", visible=studio.has_tiny_vae, elem_id="tiny-vae"
    )
    has_teacher = "teacher" in studio.models
    compare = gr.Checkbox(value=has_teacher, label="Compare with the teacher", visible=has_teacher, elem_id="compare")
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    other.click(_new_seed, outputs=seed, api_visibility="private", show_progress="hidden", queue=False)
    return [prompt, label, seed, num_images, steps, tiny_vae, compare], button


def _pictures(studio: Studio) -> list[Any]:
    """Gallery and facts of the model, and of the teacher where there is one."""
    has_teacher = "teacher" in studio.models
    parts: list[Any] = []
    with gr.Row():
        names = {"model": "Generator" if studio.is_generator else "Teacher", "teacher": "Teacher"}
        for role, name in names.items():
            with gr.Column(visible=role == "model" or has_teacher, min_width=240):
                gr.Markdown(f"**{name}**")
                parts.append(gr.Gallery(
                    label=name, show_label=False, columns=2, height="auto", object_fit="contain", format="png",
                    interactive=False, buttons=["download", "fullscreen"], elem_id=role, elem_classes=_look(studio),
                ))  # fmt: skip
                parts.append(gr.Markdown(elem_id=f"{role}-facts", elem_classes="quiet"))
    return parts


def _look(studio: Studio) -> list[str]:
    return ["small-pictures"] if min(studio.models["model"].picture_shape[1:]) < SMALL else []


def _gallery(result: Result | None) -> Any:
    """What a gallery shows of a result: one picture fills it, several stand in two columns."""
    if result is None:
        return gr.update(value=[])
    shown = list(zip(result.pictures, result.captions, strict=True))
    return gr.update(value=shown, columns=min(2, len(shown)), selected_index=None)


def _thumbnails(result: Result) -> list[Entry]:
    """Copies for the history strip, which are kept on the server as long as the session."""
    small = []
    for picture, origin in zip(result.pictures, result.origins, strict=True):
        copy = picture.copy()
        copy.thumbnail((THUMBNAIL, THUMBNAIL))
        small.append((copy, origin))
    return small


def _whole(number: float) -> int:
    """A number of pictures as a request has it; 0, which is refused, for what is no whole number."""
    is_whole = type(number) is int or (isinstance(number, float) and number.is_integer())
    return int(number) if is_whole and abs(number) < 1e6 else 0


def _new_seed() -> str:
    return str(secrets.randbelow(2**32))


def _problem(sentence: str) -> str:
    """What is wrong, beside the field it is about; the visitor's own words in it stay text."""
    return f"**{html.escape(sentence, quote=False)}**"


def _message(sentence: str) -> gr.Error:
    """One sentence on the page; the visitor's own words in it stay text."""
    return gr.Error(html.escape(sentence, quote=False), print_exception=False)
