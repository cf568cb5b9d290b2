"""LoftQ: the factors make up for what quantising the base weight loses (Li et al., arXiv:2310.08659, algorithm 1).

The base becomes its quantised values, in the dtype that it had; A and B are the principal components of what is lacking. Four
bits are NormalFloat in blocks (Dettmers et al., arXiv:2305.14314), eight are whole numbers by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

from peftc import plugin as p

from .decomposed import shared

if TYPE_CHECKING:
    from peftc import PeftModel

#: The sixteen values of a four-bit NormalFloat (arXiv:2305.14314, appendix E), and how many numbers have one scale.
NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
#: The largest whole number of eight bits.
LARGEST = 127


class LoftQConfig(p.ConfigModel):
    """How the base is quantised (`loftq_config`)."""

    loftq_bits: int = 4
    """Bits of a number: 4 or 8."""
    loftq_iter: p.Count = 1
    """How often quantising and decomposing take turns."""


class Loftq(p.Start):
    """`Q ≈ W - s · B A`, with Q quantised."""

    name: ClassVar[str] = "loftq"
    summary: ClassVar[str] = "The base is quantised, and A and B make up for what that loses."
    paper: ClassVar[str] = "arXiv:2310.08659"
    changes_base: ClassVar[bool] = True
    is_offset: ClassVar[bool] = False
    within_rank: ClassVar[bool] = True
    options: ClassVar[str] = "loftq_config"
    how: ClassVar[type[p.ConfigModel] | None] = LoftQConfig
    needs: ClassVar[Mapping[str, Any]] = {"loftq_config": {"loftq_bits": 4}}

    def factors(self, s: p.StartView) -> p.Begun:
        import torch

        how = _config(s.config)
        A, B = s.weight.new_zeros(s.rank, s.weight.shape[1]), s.weight.new_zeros(s.weight.shape[0], s.rank)
        before = p.Begun(A, B)
        lacking = s.weight
        for _ in range(how.loftq_iter):
            quantised = quantise(s.weight - B @ A, how.loftq_bits)
            before, lacking = p.Begun(A, B), s.weight - quantised
            left, values, rows = torch.linalg.svd(lacking, full_matrices=False)
            found = shared(left[:, : s.rank], values[: s.rank], rows[: s.rank].t())
            assert found.A is not None and found.B is not None
            A, B = found.A, found.B
        assert before.A is not None and before.B is not None
        root = s.scaling**0.5
        return p.Begun(A / root, B / root, {"A": before.A, "B": before.B})

    def changed(self, s: p.StartView, kept: p.Tensors) -> p.Tensor:
        """What the last round quantised: the weight without the factors of the round before."""
        weight = s.weight
        return quantise(weight - kept["B"].to(weight) @ kept["A"].to(weight), _config(s.config).loftq_bits)

    def check(self, c: p.PeftConfig, argument: str) -> p.Problems:
        """Options that say how; without any, or with bits that there are not, nothing is quantised."""
        given = getattr(c, "loftq_config", None)
        if not given:
            what = "`loftq_config` must be specified when `init_lora_weights` is 'loftq'"
            fix = "Set `loftq_config: {loftq_bits: 4}`."
            yield p.rules.CONTRADICTION(what, fix=fix, where="loftq_config")
            return
        try:
            bits = _config(c).loftq_bits
        except p.PeftcError as error:
            for told in error.diagnostics:
                yield p.rules.BAD_VALUE(f"`loftq_config`: {told.what}", fix=told.fix, where="loftq_config")
            return
        if bits not in (4, 8):
            what = f"`loftq_bits` cannot be `{bits}`"
            yield p.rules.BAD_VALUE(what, fix="Use 4 or 8.", where="loftq_config")


def _config(c: p.PeftConfig) -> LoftQConfig:
    given = getattr(c, "loftq_config", None) or {}
    return given if isinstance(given, LoftQConfig) else LoftQConfig(**given)


def quantise(weight: p.Tensor, bits: int) -> p.Tensor:
    """The nearest values that a weight `(out, in)` has in 4 or 8 bits, in its own dtype."""
    if bits == 8:
        scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
        return (weight / scale.clamp(min=_TINY)).round() * scale
    return _normal_floats(weight)


_TINY = 1e-30


def _normal_floats(weight: p.Tensor) -> p.Tensor:
    import torch

    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NORMAL_FLOATS, dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize(blocks / scale.clamp(min=_TINY), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).view(-1)[: flat.numel()].view_as(weight)


# a base that is quantised already ---------------------------------------------------------------------------------------


def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let A and B make up for what bitsandbytes has lost of the base weights in 4 bits: the principal components of `W - Q`, where W
    is read from the safetensors of the model before it was quantised (`model_path`: the folder or the file; left out, where the
    model's config says).

    `callback(peft_model, name)` is called after each layer, and one that it says False of keeps the factors that it had. Raises
    `PeftcError`, with the model as it was: no layer in 4 bits, no such files, another shape.
    """
    files: list[Callable[[str], p.Tensor]] = []  # opened for the first layer that needs them

    def find(layer: p.FactorLayer) -> tuple[p.Tensor, p.Tensor] | None:
        if layer.stored != "4bit":
            return None
        if not files:
            files.append(p.base_weights(peft_model, model_path))
        return lacking(files[0](layer.path), layer.weight, layer.rank, layer.scaling, layer.path)

    if not p.refill_factors(peft_model, adapter_name, find, callback):
        what = f"No bnb LoRA module found on the model: no layer of `{adapter_name}` has a base weight in 4 bits"
        fix = "Load the base with `BitsAndBytesConfig(load_in_4bit=True)` of transformers."
        if find_spec("bitsandbytes") is None:
            what, fix = f"{what}, and bitsandbytes must be installed for that", f"`pip install bitsandbytes`. {fix}"
        raise p.PeftcError(p.rules.START_UNFIT(what, fix=fix))


def lacking(
    weight: p.Tensor, quantised: p.Tensor, rank: int, scaling: float, path: str = ""
) -> tuple[p.Tensor, p.Tensor]:
    """A `(r, in)` and B `(out, r)` for which `s · B A` is nearest to `W - Q` (Li et al., arXiv:2310.08659, equation 9), both weights
    `(out, in)`. Components that the layer does not have are zero."""
    import torch

    if weight.shape != quantised.shape or scaling <= 0:
        what = f"The weight of `{path}` is {tuple(weight.shape)} in the file, and {tuple(quantised.shape)} in the model"
        fix = "Name the files of the model that was quantised."
        if scaling <= 0:
            what, fix = f"The scaling of `{path}` is {scaling:g}, by which is divided", "Give a positive scaling."
        raise p.PeftcError(p.rules.START_UNFIT(what, fix=fix, where=path))
    left, values, rows = torch.linalg.svd(weight.to(quantised) - quantised, full_matrices=False)
    begun = shared(left[:, :rank], values[:rank] / scaling, rows[:rank].t())
    assert begun.A is not None and begun.B is not None
    missing = rank - len(begun.A)
    pad = torch.nn.functional.pad
    return pad(begun.A, (0, 0, 0, missing)), pad(begun.B, (0, missing))


peftc_start = p.starting(Loftq())
