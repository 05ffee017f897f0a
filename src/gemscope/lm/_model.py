"""A language model of `transformers`, with its sites."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from gemscope.corpus import Document, Prefix, TokenBatch, contexts, pack
from gemscope.errors import InputError
from gemscope.hub import IMPORTING, fetch_model, load_tokenizer, model_shape, model_source
from gemscope.sae import Dictionary
from gemscope.sites import Family, Site, Sites, Stream, each, family_of

from ._attention import patterns
from ._edit import Edit, Edits
from ._frame import Frame, row_lengths
from ._generate import Generated, Sampling, generated, repeated, turn
from ._hooks import Finished, Taps
from ._weights import Weights

_LOADING = Lock()
"""While it loads, `transformers` changes what torch makes: two threads would get each other's."""


@dataclass(frozen=True, slots=True)
class Run:
    """One forward pass: `run[site]` is `[batch, seq, d]`, before any edit of that site.

    Of several sites, such as a multi-layer model reads, it is `[batch, seq, n_sites, d]`.
    """

    tokens: TokenBatch
    values: dict[Site, Tensor]
    all_logits: Float[Tensor, "batch seq vocab"] | None
    patterns: tuple[Float[Tensor, "batch heads seq seq"], ...] = ()
    """Of each layer, how much each head attends from a position to each: in a run asked for it."""

    def __getitem__(self, site: Site | Sites) -> Float[Tensor, "batch seq ..."]:
        if isinstance(site, Sites):
            return torch.stack([self[one] for one in site], dim=-2)
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
        self.prefix: Prefix | None = _prefix(tokenizer, self.family)
        """Tokens that begin a user's turn in a chat, if the tokenizer knows such."""

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
        """Size of the activations at `site`; refuses a layer or stream the model does not have."""
        self.family.tap(site)
        if site.layer >= self.n_layers or (site.stream is Stream.EMBED and site.layer):
            raise InputError(
                f"{site} is not in {self.name or 'the model'}: its layers are 0 to "
                f"{self.n_layers - 1}, and embed is in layer 0"
            )
        match site.stream:
            case Stream.ATTN_HEADS:
                heads = self.config.num_attention_heads
                # Where a configuration says nothing, heads share the width of the model.
                return heads * (self._option("head_dim") or self.config.hidden_size // heads)
            case Stream.MLP_HIDDEN:
                inner = self._option("intermediate_size") or self._option("n_inner")
                return inner or 4 * self.config.hidden_size
            case _:
                return self.config.hidden_size

    def _option(self, name: str) -> int | None:
        return getattr(self.config, name, None)

    def check(self, sae: Dictionary) -> None:
        """Refuse a dictionary of another model or of other widths."""
        of = sae.origin.model
        if of is not None and self.name is not None and of != self.name:
            raise InputError(
                f"{sae.origin.address or 'the dictionary'} belongs to {of}, not to {self.name}; "
                f"load {of}, or attach it on purpose with --other-model"
            )
        known = None if of is None else model_shape(of)
        if known is not None and known != (self.n_layers, self.config.hidden_size):
            raise InputError(
                f"{sae.origin.address or 'the dictionary'} belongs to {of}, which has {known[0]} "
                f"layers of width {known[1]}; this model has {self.n_layers} of "
                f"{self.config.hidden_size}: load {of}, or attach it on purpose with --other-model"
            )
        self.check_widths(sae)

    def check_widths(self, sae: Dictionary) -> None:
        """Refuse a dictionary whose sites do not exist or are of another width."""
        for verb, sites, given in (
            ("reads", sae.reads, sae.d_in),
            ("writes", sae.writes, sae.d_out),
        ):
            for site in each(sites):
                if given != (wanted := self.width(site)):
                    raise InputError(
                        f"{sae.origin.address or 'the dictionary'} {verb} {given} numbers at "
                        f"{site}, where {self.name or 'the model'} has {wanted}: it belongs to "
                        "another model"
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
        (batch,) = pack(rows, self.tokenizer, batch=len(rows), prefix=self.prefix)
        if not batch.n_counted:
            raise InputError("the text holds only special tokens; give at least one ordinary token")
        return batch

    def run(
        self,
        text: str | Sequence[str] | TokenBatch,
        *,
        read: Iterable[Site | Sites] = (),
        edits: Iterable[Edits] = (),
        logits: bool = False,
        attention: bool = False,
        prompt: int | Sequence[int] | None = None,
    ) -> Run:
        """One forward pass: activations at `read`, after `edits` elsewhere, and logits if asked.

        A site is read as the model computed it, before an edit of that same site. Without
        `logits`, the pass ends after the last site read. Gradients flow if they are enabled. With
        `attention` its patterns are kept, computed by the library's plain implementation.
        `prompt` says how many tokens of each row, BOS included, edits are to take for a prompt,
        the others for generated; all of them by default.
        """
        batch = text if isinstance(text, TokenBatch) else self.tokens(text)
        sites = list(dict.fromkeys(site for some in read for site in each(some)))
        for site in sites:
            self.width(site)
        steps = self._steps(edits)
        taps = Taps(self.stack, self.family)
        ids, frame = batch.ids.to(self.device), self._frame(batch, prompt)
        frame.begin(ids)
        out = None
        stop = not (logits or attention)
        with patterns(self, attention) as seen, taps.attached(sites, steps, frame, stop=stop):
            try:
                if logits:
                    out = self.hf(input_ids=ids, use_cache=False).logits
                elif sites or attention:
                    self.stack(input_ids=ids, use_cache=False)
            except Finished:
                pass
        return Run(batch, {site: taps.values[site] for site in sites}, out, tuple(seen))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        edits: Iterable[Edits] = (),
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        chat: bool = False,
        heard: Callable[[list[int | None]], None] | None = None,
    ) -> list[Generated]:
        """Continuations of `prompts` by `transformers`' own `generate`, with `edits` in every call.

        `samples` of each prompt, prompt by prompt. A temperature of 0 takes the likeliest token;
        otherwise the same `seed` and number of rows give the same draws. With `chat`, a prompt is
        a user's turn in the model's chat template. `heard` is told the token of each row as soon
        as it is there, and None of rows that have ended.
        """
        asked = Sampling(max_new_tokens, temperature, top_p, seed)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        batch = repeated(self.prompts(texts, chat=chat), samples)
        return generated(self, texts, batch, self._steps(edits), asked, heard)

    def prompts(self, prompts: str | Sequence[str], *, chat: bool = False) -> TokenBatch:
        """The tokens of prompts, or with `chat` of the same as a user's turns."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise InputError("no prompt was given; give at least one")
        return self.tokens([turn(self, text) for text in texts] if chat else texts)

    def lengths(self, batch: TokenBatch) -> Int[Tensor, " batch"]:
        """Tokens of each row, BOS included and padding left out."""
        return row_lengths(batch, self.tokenizer.pad_token_id or 0)

    def _steps(self, edits: Iterable[Edits]) -> list[Edit]:
        """The edits of a pass, at sites that the model has."""
        steps = [step for edit in edits for step in edit.steps()]
        for step in steps:
            reads = (step.reads,) if isinstance(step.reads, Site) else step.reads
            for site in (*reads, step.writes):
                self.width(site)
        return steps

    def _frame(self, batch: TokenBatch, prompt: int | Sequence[int] | None) -> Frame:
        ends = self.lengths(batch)
        lengths = ends if prompt is None else torch.as_tensor(prompt).expand(len(ends))
        if bool((lengths < 1).any()) or bool((lengths > ends).any()):
            raise InputError(
                f"a prompt of {prompt} tokens in a row of {int(ends.min())}: give 1 to that many"
            )
        return Frame(
            batch.counts.to(self.device), pads=torch.zeros_like(ends).to(self.device),
            ends=ends.to(self.device), prompt_lengths=lengths.to(self.device),
            specials=self.specials.to(self.device),
        )  # fmt: skip

    @property
    def specials(self) -> Int[Tensor, " n_specials"]:
        """Ids of the tokens that stand for no text."""
        return torch.tensor(sorted(self.tokenizer.all_special_ids))

    @property
    def weights(self) -> Weights:
        """Its matrices and gains, as what is linear in it needs them."""
        return Weights(self.hf, self.stack, self.family)

    def direct_logits(
        self, directions: Float[Tensor, "n d_out"], site: Site
    ) -> Float[Tensor, "n vocab"] | None:
        """What directions written at `site` add to the logits if nothing later reads them.

        The gain of the final norm is folded in, and of a norm after attention's projection; where
        the final norm centres, a direction's mean is taken out first. Denominators and any
        soft-cap are left out: orders are right, sizes are relative. None where a direction does
        not lie in the residual stream's space or a linear map from it.
        """
        return self.weights.direct_logits(directions, site)


def load_model(
    name: str, *, device: str | None = None, dtype: str | torch.dtype | None = None
) -> LanguageModel:
    """The model called `name`: `miniature`, a name on the hub, or a local folder.

    On the first GPU if there is one. Parameters are float32 on a processor and bfloat16 on a GPU
    unless `dtype` says otherwise; float16 is refused where it overflows.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    dtype = _dtype(dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    source = model_source(name)
    if not Path(source).is_dir():
        source = str(fetch_model(source))
    try:
        config, make = _architecture(source)
        family = family_of(config.model_type)
        if dtype is torch.float16 and not family.float16:
            raise InputError(
                f"activations of {family.name} overflow float16; use bfloat16 or float32"
            )
        tokenizer = load_tokenizer(source)
        # transformers 4 would choose an attention for Gemma 2 that leaves its soft-cap out.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        options = {"attn_implementation": "eager"} if capped else {}
        with _LOADING:
            hf: Any = make(source, dtype=dtype, **options)
        hf.to(device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name!r} cannot be loaded: {first}") from None
    hf.requires_grad_(False)
    return LanguageModel(hf, tokenizer, name=_identity(name))


def _architecture(source: str) -> tuple[Any, Callable[..., Any]]:
    """A model's configuration, and what loads its weights."""
    with IMPORTING:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(source)
        # Its code; weights take longer, and others need not wait for those.
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        return config.get_text_config(), AutoModelForCausalLM.from_pretrained


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


def _prefix(tokenizer: Any, family: Family) -> Prefix | None:
    if family.user_prefix is None:
        return None
    first = family.user_prefix.partition(">")[0] + ">"
    if tokenizer.convert_tokens_to_ids(first) in (None, tokenizer.unk_token_id):
        return None
    ids = tokenizer(family.user_prefix, add_special_tokens=False)["input_ids"]
    return Prefix(tuple(ids), family.every_turn)
