"""`gemscope serve`."""

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from gemscope.errors import InputError

_SHORTEST = 16
"""Characters of a token that is not guessed."""


def serve_command(
    stores: Annotated[list[Path] | None, typer.Argument(metavar="[STORE|GRAPH]...", help="Catalog stores, and graphs that `gemscope trace` wrote; default: a store of the miniature, made on first use.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that texts are run on; default: that of the first dictionary.")] = None,
    reports: Annotated[Path | None, typer.Option(help="Folder with reports of `gemscope eval`, for the scope page.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8421,
    token: Annotated[str | None, typer.Option(help="Readers must know this; at least 16 characters.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the first page in a browser.")] = False,
) -> None:  # fmt: skip
    """Look at models, dictionaries and catalog stores in a browser."""
    from gemscope import explorer

    own = host in ("127.0.0.1", "localhost", "::1")
    if not own and token is None:
        raise InputError(
            f"others can reach {host}: give --token with {_SHORTEST} characters or more that "
            "readers must know, or leave out --host"
        )
    if token is not None and len(token) < _SHORTEST:
        raise InputError(f"a token of {len(token)} characters can be guessed; give {_SHORTEST} "
                         "or more")  # fmt: skip
    # What is loaded takes seconds: meanwhile readers wait at the socket.
    listening = explorer.listen(host, port)
    try:
        bench = explorer.open_workbench(stores or [], model=model, reports=reports)
        at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
        at += f"?token={token}" if token else ""
        print(f"gemscope explorer: {at}  (Ctrl-C ends it)", flush=True)
        if open_:
            threading.Timer(0.5, webbrowser.open, [at]).start()
        hosts = explorer.Access().hosts if own else ()
        explorer.run(bench, explorer.Access(hosts=hosts, token=token), listening)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        listening.close()
