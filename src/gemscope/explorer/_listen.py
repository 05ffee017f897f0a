"""A socket to answer at, before anything that takes time to load."""

import socket

from gemscope.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections at `host` and `port`; they wait until they are answered."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family)
    except OSError as error:
        raise _cannot(host, port, error) from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise _cannot(host, port, error) from None
    return made


def _cannot(host: str, port: int, error: OSError) -> InputError:
    return InputError(
        f"cannot listen at {host} port {port}: {error.strerror}; give another --port, or 0 for a "
        "free one"
    )
