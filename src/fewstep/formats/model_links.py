"""Files of a model that are links: copied only where they lead to the model's own files, for a copy may be published."""

import re
from pathlib import Path

from fewstep.errors import UserError

# the hub's cache links snapshots to its blobs
_SNAPSHOT = re.compile(r"(.*[/\\]models--[^/\\]+)[/\\]snapshots([/\\].*)?")


def refuse_foreign_links(path: Path, model: Path) -> None:
    """Refuse a file or folder of a model that leads out of it.

    Args:
        path: below `model`, as it is named there.
        model: the model's folder. In the hub's cache, the whole repository counts as the model.

    Raises:
        UserError: a link on the way to `path` leaves the model; names both ends.
    """
    root, real = model.resolve(), path.resolve()
    found = _SNAPSHOT.fullmatch(str(root))
    roots = [root] + ([Path(found[1])] if found else [])
    if not any(real.is_relative_to(place) for place in roots):
        raise UserError(
            f"{path} is a link to {real}, outside of the model {model}: a file from elsewhere would be copied, and perhaps "
            "published; put the file itself there"
        )
