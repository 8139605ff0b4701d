"""Checkpoints written while training goes on: what is saved is copied at once, the disk is written from another thread."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.parallel import group_apart, is_first, world_size
from fewstep.training.checkpoint import checkpoint_path, drop_older, write_checkpoint
from fewstep.training.remote_run import RemoteRun
from fewstep.training.sharded_checkpoint import write_parts


class Saver:
    """Writes the checkpoints of a run, one after the other; of many processes each has its own and writes its part.

    Args:
        folder: `checkpoints/` of the run.
        keep: newest checkpoints that stay.
        remote: where the run folder is copied after each.

    Attributes:
        seconds: that the last one took, from its copy to the disk.
    """

    def __init__(self, folder: Path, keep: int, remote: RemoteRun | None = None) -> None:
        self.folder, self.keep, self.remote = folder, keep, remote
        self._group = group_apart()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self.seconds = 0.0

    def start(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the tensors of `step` finished steps and begin to write them; the one before is finished first.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        begun = time.monotonic()
        copies = {name: _copied(tensor) for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, dict(state), begun), daemon=True, name="checkpoint"
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint being written could not be; `finish` says why."""
        return self._fault is not None

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: it could not be written; what stood before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, fault, self._fault = None, self._fault, None
        if fault is not None:
            raise fault

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], begun: float) -> None:
        try:
            if world_size() == 1:
                write_checkpoint(self.folder, step, tensors, state, self.keep)
            else:
                write_parts(checkpoint_path(self.folder, step), tensors, {**state, "step": step}, self._group)
                if is_first():
                    drop_older(self.folder, self.keep)
            if self.remote is not None and is_first():
                self.remote.push()
        except BaseException as error:  # raised where training waits for it
            self._fault = error
        finally:
            self.seconds = time.monotonic() - begun


def _copied(tensor: Tensor) -> Tensor:
    """A copy in host memory, of a sharded tensor this process's part; files want it contiguous."""
    tensor = tensor.detach()
    on_host = tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")
    return on_host.contiguous()
