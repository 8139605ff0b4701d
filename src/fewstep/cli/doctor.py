"""`fewstep doctor`: what this machine is good for."""

from functools import partial

from fewstep.cli.options import num_processes, starting


def doctor() -> None:
    """Versions, device, fast precision, disk, how long the quick starts take here and what would fail; half a minute at most.

    Under torchrun: whether its processes reach each other, and where they differ.
    """
    if num_processes() > 1:
        with starting():
            from fewstep.demos.doctor_many import examine_together
        examine_together(partial(print, flush=True))
        return
    with starting():
        from fewstep.demos.doctor import examine
    for line in examine():
        print(line, flush=True)
