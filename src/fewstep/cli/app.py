"""`fewstep app`: the web page."""

from typing import Annotated

import typer

from fewstep.cli.options import AnyPrecision, Device, starting


def web_app(
    model: Annotated[str, typer.Argument(help="generator or teacher: model folder, run folder, .pkl or bundled:NAME")],
    *,
    teacher: Annotated[str, typer.Option(help="shown beside the generator, from the same noise: as `sample` takes one")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; the default is reachable from this machine only")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one from 7860 on")] = 7860,
    root_path: Annotated[str, typer.Option("--root-path", help="behind a proxy: /PATH or https://HOST/PATH that leads here")] = "",
    max_images: Annotated[int, typer.Option(help="most pictures a request")] = 8,
    max_queue: Annotated[int, typer.Option(help="most requests waiting; further ones are turned away")] = 16,
    max_prompt: Annotated[int, typer.Option(help="most characters of a prompt")] = 1000,
    history: Annotated[int, typer.Option(help="pictures in the history strip; 0: no strip")] = 24,
    teacher_steps: Annotated[int | None, typer.Option(help="for teachers: steps of the model's own many-step sampler; its usual number unless set")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="for teachers: 1 is off; the model's usual scale unless set")] = None,
    tiny_vae: Annotated[str, typer.Option("--tiny-vae", help="text-to-image: offer a TAESD beside the VAE; diffusers folder or hub id")] = "",
    safety_checker: Annotated[bool, typer.Option("--safety-checker/--no-safety-checker", help="text-to-image: withhold what the checker in the model's folder flags, where it has one")] = True,
    device: Device = "auto",
    precision: AnyPrecision = "auto",
) -> None:  # fmt: skip
    """A web page on this machine: prompt or class in, pictures out, the teacher's beside them."""
    with starting():
        from fewstep.app.serve import launch_app
        from fewstep.app.settings import AppSettings
    launch_app(AppSettings(
        model, teacher=teacher, host=host, port=port, max_images=max_images, max_queue=max_queue, max_prompt=max_prompt,
        history=history, teacher_steps=teacher_steps, guidance_scale=guidance_scale, tiny_vae=tiny_vae,
        safety_checker=safety_checker, device=device, precision=precision, root_path=root_path,
    ))  # fmt: skip
