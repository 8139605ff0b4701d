"""What is read: pictures, and for `fewstep train` prompts, latents and pairs too."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from fewstep.settings.earlier import Earlier
from fewstep.settings.tree import Tree, renamed


class DataSettings(Tree):
    """Pictures to train on or to measure with."""

    images: str = Field(
        "",
        description="folder of pictures, parquet file, published LMDB (folder with data.mdb), URL of one (s3://...), or hub data set id",
    )
    split: str = Field("train", description="split of the data set, where it has several")
    column: str = Field(
        "", description="column of integer class labels, or of prompts, where there are several; empty: label, text"
    )
    fit: Literal["crop", "pad", "exact"] = Field(
        "crop", description="crop: resize the shorter side, centre crop; pad: centre on black; exact: refuse others"
    )
    background: str = Field("white", description="colour under transparent pixels, as CSS names it")
    flip: bool = Field(False, description="mirror half of the pictures, chosen per sample and step")

    @property
    def label_column(self) -> str:
        """Where the class labels are."""
        return self.column or "label"

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """`label_column` and `prompt_column` were two settings."""
        defaults = {"label_column": "label", "prompt_column": "text"}
        return renamed(values, defaults, "data.column")


class TrainDataSettings(DataSettings):
    """What a distillation reads: pictures or latents for the GAN, prompts, noise-image pairs."""

    images: str = Field(
        "",
        description="real data. Of classes: folder of pictures, parquet file, published LMDB (folder with data.mdb), URL of one (s3://...), or hub "
        "data set id; of prompts: folder written by `fewstep prepare latents`",
    )
    pairs: str = Field("", description="folder written by `fewstep prepare pairs`, for the regression loss")
    prompts: str = Field(
        "",
        description="prompts of a text-to-image run: .txt, .parquet, .pkl list, folder with captions or bundled:FILE",
    )
    truncate_prompts: bool = Field(
        False, description="cut prompts at the encoders' length instead of refusing long ones"
    )
    text_embeddings: Literal["stored", "computed"] = Field(
        "stored", description="stored: encode each prompt once, then free the text encoders; computed: at every step"
    )

    earlier: ClassVar[dict[str, Earlier]] = {"latents": Earlier("images", silent="")}

    @property
    def prompt_column(self) -> str:
        """Where the prompts are."""
        return self.column or "text"
