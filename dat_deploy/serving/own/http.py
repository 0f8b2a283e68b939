"""Uvicorn's HTTP/1.1, with two things it leaves to a proxy: headers that never end, and errors as JSON."""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dat_deploy.serving.own.protocol import error_body

__all__ = ["CONNECTION_LIMIT", "HEADER_LIMIT_BYTES", "protocol_class"]

CONNECTION_LIMIT = 1000  # one more is closed at once
HEADER_LIMIT_BYTES = 65536


def protocol_class(header_timeout_s: float) -> type[H11Protocol]:
    """Of connections that are closed if a request's header is not whole after `header_timeout_s`."""

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > CONNECTION_LIMIT:
                self.transport.abort()
            else:
                self._watch_if_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except Exception:  # of a header that h11 lets through and the address in it cannot be read
                self.logger.exception("a header that could not be read")
                self.transport.close()
            self._watch_if_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
                self._watch_if_waiting()

        def shutdown(self) -> None:
            """What is on its way to an idle connection is still answered, for half a second."""
            if self.cycle is None or self.cycle.response_complete:
                self.loop.call_later(0.5, super().shutdown)
            else:
                super().shutdown()

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            self.send_400_response("this server has no websockets.")

        def send_400_response(self, msg: str) -> None:
            body = error_body(f"the request is not HTTP as it should be: {msg}")
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way already
                length = [(b"content-length", str(len(body)).encode())]
                for part in (
                    h11.Response(status_code=400, headers=headers + length, reason=b"Bad Request"),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(part) or b"")
            self.transport.close()

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():  # an answer that is not read
                self.transport.abort()
            else:
                super().timeout_keep_alive_handler()

        def _watch_if_waiting(self) -> None:
            """For the rest of a header, or of a body that is answered already."""
            theirs, answered = self.conn.their_state, self.conn.our_state is h11.DONE
            if not (theirs is h11.IDLE or (theirs is h11.SEND_BODY and answered)):
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self._expire)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _expire(self) -> None:
            self._timer = None
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self.send_400_response(f"its header is not whole after {header_timeout_s:g} s.")
            else:
                self.transport.close()

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return Connection
