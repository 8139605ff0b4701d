"""`fewstep doctor`: what this machine is good for."""

from fewstep.cli.options import starting


def doctor() -> None:
    """Versions, device, fast precision, disk, how long the quick starts take here and what would fail; half a minute at most."""
    with starting():
        from fewstep.demos.doctor import examine
    for line in examine():
        print(line, flush=True)
