"""One place where activations are read or written."""

import re
from dataclasses import dataclass
from enum import StrEnum

from gemscope.errors import InputError, did_you_mean


class Stream(StrEnum):
    """What is read in a layer of a transformer; shapes are per token."""

    RESID_PRE = "resid_pre"
    """Residual stream before the block `[d_model]`."""
    RESID_MID = "resid_mid"
    """Residual stream between attention and MLP `[d_model]`."""
    RESID_POST = "resid_post"
    """Residual stream after the block `[d_model]`."""
    ATTN_HEADS = "attn_heads"
    """Input of the attention's output projection, heads concatenated `[heads * d_head]`. Gemma
    Scope calls it attention output."""
    ATTN_OUT = "attn_out"
    """What attention adds to the residual stream, after its post-norm `[d_model]`."""
    MLP_IN = "mlp_in"
    """Normed input of the MLP, gain included `[d_model]`."""
    MLP_IN_UNSCALED = "mlp_in_unscaled"
    """Normed input of the MLP, gain removed `[d_model]`: Gemma Scope 1 transcoders read it."""
    MLP_HIDDEN = "mlp_hidden"
    """Input of the MLP's last projection `[d_mlp]`."""
    MLP_OUT = "mlp_out"
    """What the MLP adds to the residual stream, after its post-norm `[d_model]`."""
    EMBED = "embed"
    """Scaled token embedding `[d_model]`; its layer is 0."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A stream of one layer, written `12.resid_post`; layers count from 0."""

    layer: int
    stream: Stream

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `str` writes as `text`."""
        match = re.fullmatch(r"(\d{1,4})\.(\w+)", text)
        if match is None:
            raise InputError(
                f"no such site: {text!r}; write LAYER.STREAM, such as 3.resid_post, "
                f"with STREAM one of {', '.join(Stream)}"
            )
        if match[2] not in list(Stream):
            raise InputError(f"no stream named {match[2]!r}; {did_you_mean(match[2], Stream)}")
        return cls(int(match[1]), Stream(match[2]))

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"
