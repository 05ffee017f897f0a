"""A language model of `transformers`, with its sites."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from gemscope.corpus import Document, TokenBatch, contexts, pack
from gemscope.errors import InputError
from gemscope.hub import model_source
from gemscope.sae import SAE
from gemscope.sites import Family, Site, Stream, family_of

from ._edit import Edit
from ._hooks import Finished, Taps


@dataclass(frozen=True, slots=True)
class Run:
    """One forward pass: `run[site]` is `[batch, seq, d]`, before any edit of that site."""

    tokens: TokenBatch
    values: dict[Site, Tensor]
    all_logits: Float[Tensor, "batch seq vocab"] | None

    def __getitem__(self, site: Site) -> Float[Tensor, "batch seq d"]:
        if site not in self.values:
            raise InputError(f"{site} was not read in this run; pass read=[...] with it")
        return self.values[site]

    @property
    def logits(self) -> Float[Tensor, "batch seq vocab"]:
        """The logits, in a run that was asked for them."""
        if self.all_logits is None:
            raise InputError("this run has no logits; pass logits=True with it")
        return self.all_logits


class LanguageModel:
    """A causal language model and its tokenizer.

    The model is the one `transformers` made, untouched: `hf`. Without edits a run is bit-equal to
    calling it.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, name: str | None = None):
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.config = hf.config.get_text_config()
        self.family: Family = family_of(self.config.model_type)
        self.stack: nn.Module = _stack(hf, self.family)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.hf.parameters()).dtype

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def max_context(self) -> int:
        """Longest context the model was made for, BOS included."""
        return self.config.max_position_embeddings

    def width(self, site: Site) -> int:
        """Size of the activations at `site`; refuses a layer the model does not have."""
        if site.layer >= self.n_layers or (site.stream is Stream.EMBED and site.layer):
            raise InputError(
                f"{site} is not in {self.name or 'the model'}: its layers are 0 to "
                f"{self.n_layers - 1}, and embed is in layer 0"
            )
        match site.stream:
            case Stream.ATTN_HEADS:
                return self.config.num_attention_heads * self.config.head_dim
            case Stream.MLP_HIDDEN:
                return self.config.intermediate_size
            case _:
                return self.config.hidden_size

    def check(self, sae: SAE) -> None:
        """Refuse a dictionary of another model or of other widths."""
        of = sae.origin.model
        if of is not None and self.name is not None and of != self.name:
            raise InputError(
                f"{sae.origin.address or 'the dictionary'} belongs to {of}, not to {self.name}; "
                f"load {of}, or attach it on purpose with --other-model"
            )
        self.check_widths(sae)

    def check_widths(self, sae: SAE) -> None:
        """Refuse a dictionary whose sites do not exist or are of another width."""
        for verb, site, given in (
            ("reads", sae.reads, sae.d_in),
            ("writes", sae.writes, sae.d_out),
        ):
            if given != (wanted := self.width(site)):
                raise InputError(
                    f"{sae.origin.address or 'the dictionary'} {verb} {given} numbers at {site}, "
                    f"where {self.name or 'the model'} has {wanted}: it belongs to another model"
                )

    def tokens(self, text: str | Sequence[str]) -> TokenBatch:
        """Each text as one context of its own: BOS, then its tokens."""
        texts = [text] if isinstance(text, str) else list(text)
        documents = [Document(str(i), t) for i, t in enumerate(texts)]
        rows = list(contexts(documents, self.tokenizer, length=self.max_context))
        if len({row.document for row in rows}) != len(texts):
            raise InputError("an empty text was given; give at least one token")
        if len(rows) != len(texts):
            raise InputError(
                f"a text is longer than the {self.max_context} tokens of one context; "
                "cut it, or evaluate it as a file, which is cut for you"
            )
        (batch,) = pack(rows, self.tokenizer, batch=len(rows))
        if not batch.n_counted:
            raise InputError("the text holds only special tokens; give at least one ordinary token")
        return batch

    def run(
        self,
        text: str | Sequence[str] | TokenBatch,
        *,
        read: Iterable[Site] = (),
        edits: Iterable[Edit] = (),
        logits: bool = False,
    ) -> Run:
        """One forward pass: activations at `read`, after `edits` elsewhere, and logits if asked.

        A site is read as the model computed it, before an edit of that same site. Without
        `logits`, the pass ends after the last site read. Gradients flow if they are enabled.
        """
        batch = text if isinstance(text, TokenBatch) else self.tokens(text)
        read, edits = list(read), list(edits)
        for site in [*read, *(s for e in edits for s in (e.reads, e.writes))]:
            self.width(site)
        taps = Taps(self.stack, self.family)
        ids, counts = batch.ids.to(self.device), batch.counts.to(self.device)
        out = None
        with taps.attached(read, edits, counts, stop=not logits):
            try:
                if logits:
                    out = self.hf(input_ids=ids, use_cache=False).logits
                elif read:
                    self.stack(input_ids=ids, use_cache=False)
            except Finished:
                pass
        return Run(batch, {site: taps.values[site] for site in read}, out)

    def direct_logits(
        self, directions: Float[Tensor, "n d_out"], site: Site
    ) -> Float[Tensor, "n vocab"] | None:
        """What directions written at `site` add to the logits if nothing later reads them.

        The final norm's gain is folded in, its denominator and any soft-cap left out: orders are
        right, sizes are relative. None where a direction does not lie in the residual stream's
        space or a linear map from it.
        """
        d = directions.float()
        if site.stream is Stream.ATTN_HEADS:
            d = d @ self._weight(self.family.attn_projection, site.layer).T
            if self.family.attn_post_norm is not None:
                d = d * self._gain(self.family.attn_post_norm, site.layer)
        elif site.stream in (Stream.MLP_IN, Stream.MLP_IN_UNSCALED, Stream.MLP_HIDDEN):
            return None
        gain = self._gain(self.family.final_norm, 0)
        return (d * gain) @ self.hf.get_output_embeddings().weight.float().T

    def _weight(self, path: str, layer: int) -> Tensor:
        return self.stack.get_submodule(path.format(layer=layer)).get_parameter("weight").float()

    def _gain(self, path: str, layer: int) -> Tensor:
        return self.family.gain_offset + self._weight(path, layer)


def load_model(
    name: str, *, device: str | None = None, dtype: str | torch.dtype | None = None
) -> LanguageModel:
    """The model called `name`: `miniature`, a name on the hub, or a local folder.

    On the first GPU if there is one. Parameters are float32 on a processor and bfloat16 on a GPU
    unless `dtype` says otherwise; float16 is refused where it overflows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    dtype = _dtype(dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    source = model_source(name)
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        family = family_of(config.get_text_config().model_type)
        if dtype is torch.float16 and not family.float16:
            raise InputError(
                f"activations of {family.name} overflow float16; use bfloat16 or float32"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        hf: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        hf.to(device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name!r} cannot be loaded: {first}") from None
    hf.requires_grad_(False)
    return LanguageModel(hf, tokenizer, name=_identity(name))


def _identity(name: str) -> str | None:
    from gemscope import miniature

    if model_source(name) == str(miniature.MODEL):
        return miniature.MODEL_NAME
    # A folder's name proves nothing about what is in it.
    return None if Path(name).is_dir() else name


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no device {device!r} here: {first}; cpu is always there") from None


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"no such dtype: {dtype!r}; use float32, bfloat16, float16 or float64")
    return found


def _stack(hf: nn.Module, family: Family) -> nn.Module:
    for path in family.stacks:
        try:
            return hf.get_submodule(path)
        except AttributeError:
            continue
    raise InputError(f"{type(hf).__name__} has no decoder stack at {', '.join(family.stacks)}")
