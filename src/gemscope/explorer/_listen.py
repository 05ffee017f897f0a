"""A socket to answer at, before anything that takes time to load."""

import socket

from gemscope.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections at `host` and `port`; they wait until they are answered."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named, or asyncio does not know that what it accepts here is TCP, and lets
        # the second half of each answer wait 40 ms for the first to be acknowledged.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
