"""Generation by `transformers`, with edits in the prompt's pass and in every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.errors import InputError

from ._edit import Edit
from ._frame import Frame
from ._hooks import Taps

if TYPE_CHECKING:
    from ._model import LanguageModel

Heard = Callable[[list[int | None]], None]


@dataclass(frozen=True, slots=True)
class Generated:
    """A continuation of a prompt."""

    prompt: str
    prompt_ids: tuple[int, ...]
    """BOS and the tokens that were given."""
    ids: tuple[int, ...]
    """What was generated, without an end of text."""
    text: str
    """The same as text."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"{self.max_new_tokens} new tokens are none; generate 1 or more")
        if not 0 <= self.temperature < 1e3:
            raise InputError(
                f"a temperature of {self.temperature}: take 0, which chooses the likeliest token, "
                "or more"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"a top-p of {self.top_p}: take a share of more than 0, up to 1")

    def options(self) -> dict[str, Any]:
        """What `generate` is told."""
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return chosen | {"top_k": None if not self.temperature else 0, "num_beams": 1,
                         "max_new_tokens": self.max_new_tokens}  # fmt: skip


def repeated(batch: TokenBatch, samples: int) -> TokenBatch:
    """Each row `samples` times; its document is the number of its prompt."""
    if samples < 1:
        raise InputError(f"{samples} samples are none; take 1 or more")
    rows = torch.arange(len(batch.ids)).repeat_interleave(samples)
    return TokenBatch(batch.ids[rows], batch.counts[rows], rows, batch.starts[rows])


def generated(
    model: "LanguageModel",
    prompts: Sequence[str],
    batch: TokenBatch,
    steps: Sequence[Edit],
    sampling: Sampling,
    heard: Heard | None,
) -> list[Generated]:
    """What `generate` makes of rows of tokens."""
    lengths = model.lengths(batch)
    if int(lengths.max()) + sampling.max_new_tokens > model.max_context:
        raise InputError(
            f"a prompt of {int(lengths.max())} tokens and {sampling.max_new_tokens} new ones are "
            f"more than the {model.max_context} that {model.name or 'the model'} was made for; "
            "ask for fewer"
        )
    ids, counts, pads = _on_the_left(model, batch, lengths)
    frame = Frame(
        counts, pads=pads, ends=torch.full_like(pads, ids.shape[1]),
        prompt_lengths=lengths.to(pads.device), specials=model.specials.to(pads.device),
    )  # fmt: skip
    mask = (torch.arange(ids.shape[1], device=ids.device) >= pads[:, None]).long()
    ends = _ends_of_text(model)
    options = sampling.options() | {"pad_token_id": _pad(model)}
    if heard is not None:
        options["streamer"] = _Listener(heard, ends)
    devices = [model.device] if model.device.type == "cuda" else []
    taps = Taps(model.stack, model.family)

    def begin(_module: Any, args: tuple, kwargs: dict) -> None:
        if steps:
            frame.begin(kwargs["input_ids"] if not args else args[0])

    hook = model.hf.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with torch.random.fork_rng(devices), taps.attached((), steps, frame, stop=False):
            torch.manual_seed(sampling.seed)
            out = model.hf.generate(input_ids=ids, attention_mask=mask, **options)
    finally:
        hook.remove()
    made = []
    for row, new in enumerate(out[:, ids.shape[1] :].tolist()):
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        text = model.tokenizer.decode(new[:end], skip_special_tokens=True)
        given = tuple(batch.ids[row, : int(lengths[row])].tolist())
        made.append(Generated(prompts[int(batch.documents[row])], given, tuple(new[:end]), text))
    return made


class _Listener:
    """A streamer of `transformers` by its two methods: tells what each step made, row by row."""

    def __init__(self, heard: Heard, ends: frozenset[int]):
        self._heard, self._ends = heard, ends
        self._ended: list[bool] | None = None

    def put(self, value: Tensor) -> None:
        """The prompts first, then the token of each row."""
        if self._ended is None:
            self._ended = [False] * len(value)
            return
        tokens = value.reshape(-1).tolist()
        self._ended = [e or t in self._ends for e, t in zip(self._ended, tokens, strict=True)]
        self._heard([None if e else t for e, t in zip(self._ended, tokens, strict=True)])

    def end(self) -> None:
        """Nothing is held back."""


def turn(model: "LanguageModel", prompt: str) -> str:
    """A user's turn in the model's chat template, and the beginning of the answer."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise InputError(
            f"{model.name or 'the model'} has no chat template; leave out --chat, or take an "
            "instruction-tuned model"
        )
    turns = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _on_the_left(
    model: "LanguageModel", batch: TokenBatch, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, counted tokens and padding of rows that end together, as generation wants them."""
    width = int(lengths.max())
    ids = torch.full((len(lengths), width), _pad(model))
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        ids[row, width - length :] = batch.ids[row, :length]
        counts[row, width - length :] = batch.counts[row, :length]
    return ids.to(model.device), counts.to(model.device), (width - lengths).to(model.device)


def _pad(model: "LanguageModel") -> int:
    return model.tokenizer.pad_token_id or 0


def _ends_of_text(model: "LanguageModel") -> frozenset[int]:
    """Tokens at which `generate` stops, and the one it fills ended rows with."""
    said = model.hf.generation_config.eos_token_id
    ends = [] if said is None else [said] if isinstance(said, int) else list(said)
    return frozenset(ends)
