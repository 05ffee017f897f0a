"""What of a model is linear, or would be if its norms divided by constants."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gemscope.errors import InputError
from gemscope.sites import Family, Site, Stream

from ._hooks import epsilon


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """A layer's matrices, applied from the right, and its norms' gains; float32 or wider.

    `resid_mid = resid_pre + norm(heads @ output + output_bias) * after`, with the last norm only
    where `after` is there; head `h` reads values of the key-value head `h // (heads / kv_heads)`.
    """

    before: Float[Tensor, " d_model"]
    """Gain of the norm before attention."""
    value: Float[Tensor, "d_model kv_width"]
    value_bias: Float[Tensor, " kv_width"] | None
    output: Float[Tensor, "heads_width d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    after: Float[Tensor, " d_model"] | None
    """Gain of the norm after attention."""
    mlp: Float[Tensor, " d_model"]
    """Gain of the norm before the MLP."""
    eps: tuple[float, float, float]
    """What the norms before and after attention and before the MLP add to the mean square; the
    second is 0 where there is no such norm."""


class Weights:
    """The matrices and gains of a model of `family`; each is made when it is asked for."""

    def __init__(self, hf: Any, stack: nn.Module, family: Family):
        self._hf, self._stack, self._family = hf, stack, family

    def block(self, layer: int) -> Block:
        """The matrices of one layer; refuses a family that fuses or centres what they stand for."""
        family = self._family
        if (
            family.attn_norm is None or family.attn_value is None or family.mlp_norm is None
            or family.centred or family.transposed
        ):  # fmt: skip
            raise InputError(
                f"models of the {family.name} family are built otherwise than circuits are traced "
                "in; Gemma, Llama and Qwen models can be traced"
            )
        value = self._stack.get_submodule(family.attn_value.format(layer=layer))
        output = self._stack.get_submodule(family.attn_projection.format(layer=layer))
        after = family.attn_post_norm
        return Block(
            before=self.gain(family.attn_norm, layer),
            value=wide(value.get_parameter("weight")).T,
            value_bias=_bias(value),
            output=wide(output.get_parameter("weight")).T,
            output_bias=_bias(output),
            after=None if after is None else self.gain(after, layer),
            mlp=self.gain(family.mlp_norm, layer),
            eps=(
                self._epsilon(family.attn_norm, layer),
                0.0 if after is None else self._epsilon(after, layer),
                self._epsilon(family.mlp_norm, layer),
            ),
        )

    def final(self) -> tuple[Float[Tensor, " d_model"], float]:
        """Gain of the final norm, and what it adds to the mean square."""
        return self.gain(self._family.final_norm, 0), self._epsilon(self._family.final_norm, 0)

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The matrix that gives logits, as it is stored."""
        return self._hf.get_output_embeddings().weight

    def direct_logits(
        self, directions: Float[Tensor, "n d_out"], site: Site
    ) -> Float[Tensor, "n vocab"] | None:
        """See `LanguageModel.direct_logits`."""
        d, family = directions.float(), self._family
        if site.stream is Stream.ATTN_HEADS:
            weight = self._weight(family.attn_projection, site.layer).float()
            d = d @ (weight if family.transposed else weight.T)
            if family.attn_post_norm is not None:
                d = d * self.gain(family.attn_post_norm, site.layer).float()
        elif site.stream in (Stream.MLP_IN, Stream.MLP_IN_UNSCALED, Stream.MLP_HIDDEN):
            return None
        if family.centred:
            d = d - d.mean(-1, keepdim=True)
        return (d * self.gain(family.final_norm, 0).float()) @ self.unembedding.float().T

    def gain(self, path: str, layer: int) -> Float[Tensor, " d_model"]:
        """The gain of a norm: Gemma stores it less one."""
        return self._family.gain_offset + wide(self._weight(path, layer))

    def _weight(self, path: str, layer: int) -> Tensor:
        return self._stack.get_submodule(path.format(layer=layer)).get_parameter("weight")

    def _epsilon(self, path: str, layer: int) -> float:
        return epsilon(self._stack.get_submodule(path.format(layer=layer)))


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` in float32, or in float64 if it is that."""
    return x if x.itemsize >= 4 else x.float()


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else wide(bias)
