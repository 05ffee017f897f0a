"""A language model in this process: any causal model that `transformers` loads."""

import hashlib
import threading
from pathlib import Path
from typing import Any

from gemscope.errors import InputError
from gemscope.hub import fetch_model, model_source

from ._chat import Halted, Reply, Request


class InProcess:
    """Greedy answers of a model of `transformers`, one at a time; nothing leaves the machine."""

    concurrency = 1

    def __init__(self, name: str, *, device: str | None = None, dtype: str | None = None):
        """Load `name`: a model on the hub, a local folder, or `miniature`."""
        import torch

        self.model = name
        folder = Path(model_source(name))
        folder = folder if folder.is_dir() else Path(fetch_model(str(folder)))
        self.at = f"in process, {_identity(folder)}"
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._hf, self._tokenizer = _load(name, folder, device, dtype)
        self._halted = threading.Event()

    def halt(self) -> None:
        """End the answer that is being written at its next token."""
        self._halted.set()

    def answer(self, request: Request) -> Reply:
        """Continue a conversation, always with the likeliest token."""
        import torch

        if self._halted.is_set():
            raise Halted
        ids = self._ids(request)
        room = self._room() - request.max_tokens
        if ids.shape[1] > room:
            raise InputError(
                f"{self.model} reads {self._room():,} tokens, and a prompt has {ids.shape[1]:,} "
                f"with {request.max_tokens} to answer: take another model, or smaller --examples, "
                "--window or --max-tokens"
            )
        with torch.no_grad():
            out = self._hf.generate(
                input_ids=ids.to(self._hf.device),
                attention_mask=torch.ones_like(ids, device=self._hf.device),
                max_new_tokens=request.max_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                stopping_criteria=[lambda ids, *_: torch.full(
                    (len(ids),), self._halted.is_set(), device=ids.device)],
            )  # fmt: skip
        if self._halted.is_set():  # cut off: not an answer to be kept
            raise Halted
        new = out[0, ids.shape[1] :].tolist()
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        finish = "length" if len(new) >= request.max_tokens else "stop"
        return Reply(text, finish, tokens_in=ids.shape[1], tokens_out=len(new))

    def _ids(self, request: Request) -> Any:
        if self._tokenizer.chat_template is None:
            # A base model continues a text; it is given the conversation as one.
            text = "\n\n".join(content for _, content in request.messages) + "\n"
            return self._tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        turns = [{"role": role, "content": content} for role, content in request.messages]
        try:
            text = self._templated(turns)
        except Exception:
            # Templates of some families, Gemma among them, know no system turn.
            first = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            text = self._templated([{"role": "user", "content": first}, *turns[2:]])
        options = {"return_tensors": "pt", "add_special_tokens": False, "verbose": False}
        return self._tokenizer(text, **options)["input_ids"]

    def _templated(self, turns: list[dict[str, str]]) -> str:
        apply = self._tokenizer.apply_chat_template
        return apply(turns, tokenize=False, add_generation_prompt=True)

    def _room(self) -> int:
        config = self._hf.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**20)


def _load(name: str, folder: Path, device: str, dtype: str | None) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in types:
        raise InputError(f"no type of parameters {dtype!r}; use {', '.join(types)}")
    chosen = types[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # Code that comes with a model is not run: the option to allow it is not passed.
        hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, use_safetensors=True)
        return hf.to(device).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name!r} cannot be loaded: {first}") from None


def _identity(folder: Path) -> str:
    """A hash that changes with the weights, without reading them: configuration, names, sizes."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".jinja", ".safetensors", ".model"):
            found.update(f"{file.name} {file.stat().st_size}\n".encode())
            if file.name in ("config.json", "generation_config.json"):
                found.update(file.read_bytes())
    return found.hexdigest()[:16]
