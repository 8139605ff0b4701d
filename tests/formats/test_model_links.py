"""A link in a model's folder may lead to the model's own files, and nowhere else."""

from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.formats.model_links import refuse_foreign_links


def test_links_that_leave_the_model_are_refused(tmp_path: Path) -> None:
    secret, model = tmp_path / "secret.txt", tmp_path / "model"
    secret.write_text("key")
    (model / "tokenizer").mkdir(parents=True)
    (model / "real.txt").write_text("x")
    (model / "tokenizer/inside.txt").symlink_to("../real.txt")
    (model / "tokenizer/vocab.txt").symlink_to(secret)
    (model / "vae").symlink_to(tmp_path)
    refuse_foreign_links(model / "tokenizer/inside.txt", model)
    for path in (model / "tokenizer/vocab.txt", model / "vae", model / "vae/secret.txt"):
        with pytest.raises(UserError, match=r"is a link to .* outside of the model"):
            refuse_foreign_links(path, model)
    (tmp_path / "link").symlink_to(model)  # the model itself may be reached by one
    refuse_foreign_links(tmp_path / "link/tokenizer/inside.txt", tmp_path / "link")


def test_the_hubs_cache_consists_of_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/abc").write_text("x")
    snapshot = repository / "snapshots/revision"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet/config.json").symlink_to("../../../blobs/abc")
    refuse_foreign_links(snapshot / "unet/config.json", snapshot)
    (snapshot / "unet/other.json").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside of the model"):
        refuse_foreign_links(snapshot / "unet/other.json", snapshot)
