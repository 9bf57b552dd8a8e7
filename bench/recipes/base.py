"""What a training recipe says: which data, which model, which loss, how to optimise; the loop is `bench.training`'s."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from explainer_bench import parse_spec

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Augment(_Fields):
    """How training images are varied, each on its own; nothing by default.

    Parameters
    ----------
    flip : bool
        Mirror left and right with probability one half.
    rotate : float
        Turn by up to so many degrees, either way.
    quarter_turns : bool
        Turn by 0, 90, 180 or 270 degrees.
    zoom : float
        Scale by a factor in [1 - zoom, 1 + zoom].
    shift : float or (float, float)
        Move by up to this share of the width and of the height, either way.
    crop : (float, float), optional
        Take a part of the image with a share of its area in this range and an aspect ratio in [3/4, 4/3].
    outside : {"reflect", "black"}
        What fills the place where the image has been moved away.
    contrast : float
        Multiply by a factor in [1 - contrast, 1 + contrast].
    brightness : float
        Add up to so many of 255 grey values, either way.
    channels : bool
        Exchange the colour channels: every order is equally likely.
    """

    flip: bool = False
    rotate: Rate = 0
    quarter_turns: bool = False
    zoom: Share = 0
    shift: Share | tuple[Share, Share] = 0
    crop: tuple[Share, Share] | None = None
    outside: Literal["reflect", "black"] = "black"
    contrast: Share = 0
    brightness: Rate = 0
    channels: bool = False

    @property
    def moves(self) -> bool:
        """Whether pixels change their place."""
        return bool(self.flip or self.rotate or self.quarter_turns or self.zoom or self.crop or self.shift)


class Recipe(_Fields):
    """A recipe, as its YAML file states it.

    Parameters
    ----------
    name : str
        The file's own, without its suffix.
    description, source, notes : str
        What it is, where it was published, and what had to be decided because the source does not say.
    dataset : str
        ``name`` or ``name[param=value,...]``.
    size, val_size, test_size : int, optional
        Images per split, for data sets that are made to measure.
    model_name : str
        Name of the checkpoint; may contain ``{architecture}`` and ``{dataset}``. The recipe's by default.
    architecture : str
        As for `bench.models.create`, which also takes `kwargs` and `preprocessing`.
    init : str or mapping of architecture to str
        What ``--weights`` must hold; nothing: the training starts from random weights.
    pooling : {"cls"}, optional
        How to take over the weights of a fine-tuned MAE, as for `bench.models.load_backbone`.
    freeze_backbone : bool
        Train the classifier alone, on the features of the backbone in eval mode.
    dropout : float
        Probability of every dropout layer of the architecture while training.
    loss : {"cross_entropy", "bce", "huber"}
        Of the label; of every class's presence (the label's and those with a ROI); of the data set's `values`.
    class_weights : "balanced", optional
        Weigh classes by their inverse frequency in the training split; of cross_entropy.
    reduction : {"mean", "sum"}
        Over a training batch. The validation loss is always the mean.
    optimizer : {"adamw", "adam", "sgd"}
        As in `torch.optim`.
    lr : float
        The highest learning rate.
    momentum : float
        SGD's momentum, or Adam's first beta.
    weight_decay : float
        Coefficient.
    decay_vectors : bool
        Whether biases and the parameters of normalisations are decayed, too.
    clip : float, optional
        Largest norm of the gradient.
    schedule : {"constant", "cosine", "cyclic"}
        Step by step: none; to zero; `cycles` triangles from lr/`lr_divisor` to lr and back, each half as high as
        the one before (triangular2 of Smith, 2017).
    warmup : float
        Share of all steps during which the rate rises linearly from zero.
    epochs : int
        At most; early stopping may end before. The weights of the epoch of least validation loss are kept.
    batch_size : int
        Images per step.
    patience : int, optional
        Epochs without a better validation loss after which training stops; never by default.
    augment : Augment
        How training images are varied.
    precision : {"fp32", "bf16"}
        Of the forward pass in training (autocast); weights, validation and test are always float32.
    half : bool
        Store the checkpoint in half precision; its figures are those of the stored weights.
    contrasts : list of (str, str)
        Pairs of classes whose AUROC against each other is reported.
    evidence : str
        The data set's region that the model is meant to read, for the checkpoint's header.
    published_epoch : int, optional
        The epoch that the source kept.
    """

    name: str
    description: str
    source: str = ""
    notes: str = ""
    dataset: str
    size: Count | None = None
    val_size: Count | None = None
    test_size: Count | None = None
    model_name: str = ""
    architecture: str
    kwargs: dict[str, Any] = {}
    preprocessing: str | None = None
    init: str | dict[str, str] = ""
    pooling: Literal["cls"] | None = None
    freeze_backbone: bool = False
    dropout: Share = 0
    loss: Literal["cross_entropy", "bce", "huber"] = "cross_entropy"
    class_weights: Literal["balanced"] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0
    decay_vectors: bool = True
    clip: Rate | None = None
    schedule: Literal["constant", "cosine", "cyclic"] = "constant"
    cycles: Count = 1
    lr_divisor: Annotated[float, Field(ge=1)] = 1
    warmup: Share = 0
    epochs: Count
    batch_size: Count
    patience: Count | None = None
    augment: Augment = Augment()
    precision: Literal["fp32", "bf16"] = "fp32"
    half: bool = False
    contrasts: list[tuple[str, str]] = []
    evidence: str = ""
    published_epoch: Count | None = None

    @pydantic.field_validator("model_name")
    @classmethod
    def _has_known_places(cls, name: str) -> str:
        try:
            name.format(architecture="", dataset="")
        except (KeyError, IndexError) as error:
            raise ValueError(f"{{{error.args[0]}}} is neither {{architecture}} nor {{dataset}}") from error
        return name

    @pydantic.model_validator(mode="after")
    def _fits_its_loss(self) -> Recipe:
        for name in ("class_weights", "contrasts"):
            if getattr(self, name) and self.loss != "cross_entropy":
                raise ValueError(f"{name} belongs to loss=cross_entropy, not to {self.loss}")
        return self

    @property
    def checkpoint_name(self) -> str:
        """Name of the trained model."""
        dataset = parse_spec(self.dataset)[0]
        return (self.model_name or self.name).format(architecture=self.architecture, dataset=dataset)

    @property
    def starts_from(self) -> str:
        """What ``--weights`` must hold, "" where there must be none."""
        return self.init if isinstance(self.init, str) else self.init.get(self.architecture, "")
