"""HTTP as uvicorn speaks it, with a sentence for requests that cannot be read."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LONGEST = 2**19
"""Bytes of a request's line and headers that are read at all; what is taken of them is less, and
said by `Guard`.
"""
_HEARD_OUT = 2.0
"""Seconds for which the rest of a refused request is read."""


class Telling(H11Protocol):
    """Says what is wrong and hears the rest out: with bytes unread, closing a connection makes the
    system throw away what was answered.
    """

    _refused = False

    def data_received(self, data: bytes) -> None:
        """What comes from the reader."""
        if not self._refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, or too long to be one."""
        self._refused = True
        status, said = 400, "this is no HTTP request"
        if len(self.conn.trailing_data[0]) > LONGEST:
            status, said = 431, f"a request line and headers of more than {LONGEST:,} bytes"
            said += " are refused"
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Connection", "close")]
        told: list[h11.Event] = [
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=f"{said}\n".encode()), h11.EndOfMessage(),
        ]  # fmt: skip
        for event in told:
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_HEARD_OUT, self.transport.close)
