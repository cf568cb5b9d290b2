"""Options of the optimisers that know no adapters, as torch and transformers call them. Learning rate and weight decay are not among
them: `TrainSection` has these."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from peftc import rules
from peftc.config.base import ConfigModel
from peftc.config.problems import Problem, as_validation_error

#: How much of something is kept in a step.
Kept = Annotated[float, Field(ge=0, lt=1)]


class AdamOptions(ConfigModel):
    """Options of AdamW."""

    betas: Annotated[tuple[Kept, Kept], Field(strict=False)] = (0.9, 0.999)
    """How much of the means of gradients, and of their squares, is kept in a step; each from 0 to below 1."""
    eps: float = Field(default=1e-8, gt=0)
    """What is added to the divisor."""


class LionOptions(ConfigModel):
    """Options of Lion."""

    betas: Annotated[tuple[Kept, Kept], Field(strict=False)] = (0.9, 0.999)
    """How much of the mean of gradients counts in a step, and how much of it is kept; each from 0 to below 1. Left out, those that
    transformers gives it, which are Adam's."""


class SgdOptions(ConfigModel):
    """Options of stochastic gradient descent."""

    momentum: float = Field(default=0.0, ge=0)
    """How much of the last step is in the next."""
    dampening: float = 0.0
    """How much less of a gradient goes into the momentum."""
    nesterov: bool = False
    """Look ahead along the momentum, which has to be there, without dampening."""

    @model_validator(mode="after")
    def _looks_ahead(self) -> Self:
        if self.nesterov and (not self.momentum or self.dampening):
            what = "`nesterov` needs `momentum`, and no `dampening`"
            told = rules.CONTRADICTION(what, fix="Set `momentum: 0.9`, or remove `nesterov`.", where="nesterov")
            raise as_validation_error([Problem(("nesterov",), told)])
        return self


class AdafactorOptions(ConfigModel):
    """Adafactor has none: its step is the section's learning rate."""


class AdagradOptions(ConfigModel):
    """Options of Adagrad."""

    lr_decay: float = Field(default=0.0, ge=0)
    """How fast the learning rate falls by itself."""
    eps: float = Field(default=1e-10, ge=0)
    """What is added to the divisor."""


class RmspropOptions(ConfigModel):
    """Options of RMSprop."""

    momentum: float = Field(default=0.0, ge=0)
    """How much of the last step is in the next."""
    alpha: float = Field(default=0.99, ge=0)
    """How much of the mean of squared gradients is kept in a step."""
    eps: float = Field(default=1e-8, ge=0)
    """What is added to the divisor."""
    centered: bool = False
    """Divide by the deviation of gradients in place of their size."""
