"""`gemscope harvest`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._show import console, number, print_json, token_progress

if TYPE_CHECKING:
    from gemscope.activations import Manifest
    from gemscope.corpus import Document
    from gemscope.sites import Site


def harvest_command(
    model: Annotated[str, typer.Option(help="Model to read: miniature, a name on the hub, or a local folder.")],
    sites: Annotated[str, typer.Option(metavar="SITES", help="Sites to store, such as 0-5.resid_post,3.mlp_in.")],
    tokens: Annotated[int, typer.Option(help="Tokens to store, at most.")],
    to: Annotated[str, typer.Option(metavar="FOLDER_OR_URL", help="The store: a folder, or a URL of fsspec's, such as s3://bucket/store.")],
    text: Annotated[str | None, typer.Option(help="A text file, folder or glob pattern; default: the bundled held-out text.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set of the hub, OWNER/NAME[:SPLIT[:COLUMN]].")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a context, BOS included.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of what is stored: bfloat16, float32 or int8.")] = "bfloat16",
    shard_mb: Annotated[int, typer.Option("--shard-mb", help="Size of a file.")] = 256,
    memory_mb: Annotated[int, typer.Option("--memory-mb", help="Memory to shuffle in, beside the model's.")] = 2_048,
    scratch: Annotated[Path | None, typer.Option(help="Folder for as much again while it runs; default: beside the store, or the system's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    model_dtype: Annotated[str | None, typer.Option("--model-dtype", help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest and nothing else.")] = False,
) -> None:  # fmt: skip
    """Store shuffled activations of many sites; run it again to go on."""
    wanted = _sites(sites)
    documents = _documents(text, dataset)
    from gemscope import activations, corpus
    from gemscope.lm import load_model

    lm = load_model(model, device=device, dtype=model_dtype)
    if context > lm.max_context:
        raise InputError(f"--context is {context}, and {model} reads at most {lm.max_context}")
    rows = list(corpus.contexts(documents, lm.tokenizer, length=context))
    try:
        with activations.stop_signals() as received, token_progress() as report:
            manifest = activations.harvest(
                lm, rows, wanted, to,
                tokens=tokens, context=context, text=dataset or text or corpus.BUNDLED,
                dtype=dtype, seed=seed, shard_mb=shard_mb, memory_mb=memory_mb, scratch=scratch,
                report=report, stopping=lambda: bool(received),
            )  # fmt: skip
    except activations.Stopped as stopped:
        print(f"gemscope: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + received[0]) from None
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    _print(manifest, to, tokens)


def _sites(text: str) -> "Sequence[Site]":
    """Several groups of sites, of which each may have commas among its layers."""
    from gemscope.sites import each, parse_sites

    found: list[Site] = []
    layers = ""
    for part in text.replace(" ", "").split(","):
        layers += part
        if "." in part:
            found += each(parse_sites(layers))
            layers = ""
        else:
            layers += ","
    if layers:
        raise InputError(
            f"--sites {text!r} does not end in a stream; write LAYERS.STREAM, such as "
            "0-5.resid_post,3.mlp_in"
        )
    return tuple(dict.fromkeys(found))


def _documents(text: str | None, dataset: str | None) -> "list[Document]":
    from gemscope import corpus

    if text is not None and dataset is not None:
        raise InputError("both --text and --dataset were given; give one")
    if dataset is not None:
        return corpus.read_dataset(dataset)
    return corpus.read_text(corpus.BUNDLED if text is None else text)


def _print(manifest: "Manifest", to: str, asked: int) -> None:
    contents = manifest.contents
    for site, known in manifest.statistics.items():
        console().print(
            f"{site}: {known.count:,} tokens, mean norm {number(known.mean_norm)}, "
            f"mean squared norm {number(known.mean_square)}"
        )
    if contents.tokens < asked:
        console().print(f"The text has {contents.tokens:,} tokens that count, not {asked:,}.")
    console().print(f"The store: {to}")
