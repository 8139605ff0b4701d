"""What `fewstep export` does once its arguments are read."""

from pathlib import Path

from rich.console import Console

from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.hub import push_export

console = Console(stderr=True)


def export_model(
    source: str, out: Path, kind: str, precision: str, base: str, prompts: list[str], num_samples: int, licence: str,
    push: str, device: str,
) -> None:  # fmt: skip
    """`fewstep export`: write the folder, and upload it where that was asked for."""
    options = ExportOptions(
        kind=kind, precision=precision, base=base, prompts=tuple(prompts), num_samples=num_samples, licence=licence,
        repo=push, device=device,
    )  # fmt: skip
    folder = export_generator(source, out, options)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    console.print(f"{len(files)} files, {sum((folder / name).stat().st_size for name in files) / 2**20:.1f} MiB")
    if push:
        console.print(push_export(folder, push))
    print(folder)
