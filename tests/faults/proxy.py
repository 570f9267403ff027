"""A wire that breaks where a test wants it to: TCP in front of Postgres, Valkey or S3, which listens on TCP or a socket
file."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

Upstream = tuple[str, int] | str
CHUNK = 2**16
FOREVER = 2**62


@dataclass
class _Loss:
    """After bytes that hold `after` went up a connection, the next that hold `to` go up too, but no answer comes."""

    after: bytes
    to: bytes
    count: int


@dataclass(eq=False)
class _Line:
    """One connection through the proxy."""

    down: asyncio.StreamWriter
    up: asyncio.StreamWriter
    seen: bool = False
    lost: bool = False
    room: int = FOREVER
    pumps: list[asyncio.Task[None]] = field(default_factory=list)


class TcpProxy:
    """Forwards to `upstream` from a port of its own, the same for its whole life. Faults last until `heal`."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._lines: set[_Line] = set()
        self._losses: list[_Loss] = []
        self._open = asyncio.Event()
        self._open.set()
        self._latency = 0.0
        self._cuts: list[int] = []
        self._server: asyncio.Server | None = None
        self.port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._do(self._listen)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def refuse(self) -> None:
        """Nobody listens any more, and what was connected is reset."""
        self._do(self._close_server)
        self.reset()

    def blackhole(self) -> None:
        """Connections are accepted and kept, and nothing comes through, in either direction."""
        self._do(self._set_open, False)

    def delay(self, seconds: float) -> None:
        """Every chunk takes so much longer."""
        self._latency = seconds

    def reset(self) -> None:
        """Whatever is connected now is reset."""
        self._do(self._reset_all)

    def cut_answers(self, *sizes: int) -> None:
        """The next new connections are reset once so many bytes of answers have passed."""
        self._cuts = list(sizes)

    def lose_reply(self, *, to: bytes, after: bytes = b"", count: int = 1) -> None:
        """What is asked with `to`, on a connection that had sent `after`, is done, and its answer lost: reset."""
        self._losses.append(_Loss(after, to, count))

    @property
    def losses_left(self) -> int:
        return sum(loss.count for loss in self._losses)

    def heal(self) -> None:
        self._latency, self._cuts, self._losses = 0.0, [], []
        self._do(self._set_open, True)
        self._do(self._listen)

    def close(self) -> None:
        self._do(self._close_server)
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ── in the loop ──────────────────────────────────────────────────────────────────────────────

    def _do(self, work: Callable[..., object], *args: object) -> None:
        async def run() -> None:
            result = work(*args)
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=128)
            self.port = self._server.sockets[0].getsockname()[1]

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _set_open(self, is_open: bool) -> None:
        (self._open.set if is_open else self._open.clear)()

    def _reset_all(self) -> None:
        for line in list(self._lines):
            self._reset(line)

    def _reset(self, line: _Line) -> None:
        """RST to the client, an end to the server, and no more pumping."""
        self._lines.discard(line)
        raw = line.down.get_extra_info("socket")
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.down.transport.abort()
        line.up.transport.abort()
        for pump in line.pumps:
            if pump is not asyncio.current_task():
                pump.cancel()

    async def _accept(self, client: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            if isinstance(self._upstream, str):
                server, up = await asyncio.open_unix_connection(self._upstream)
            else:
                server, up = await asyncio.open_connection(*self._upstream)
        except OSError:
            down.transport.abort()
            return
        line = _Line(down, up, room=self._cuts.pop(0) if self._cuts else FOREVER)
        self._lines.add(line)
        line.pumps = [
            asyncio.create_task(self._pump(line, client, up, self._sent)),
            asyncio.create_task(self._pump(line, server, down, self._answered)),
        ]
        with suppress(asyncio.CancelledError):
            await asyncio.wait(line.pumps)
        self._lines.discard(line)
        down.close()
        up.close()

    async def _pump(
        self,
        line: _Line,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        look: Callable[[_Line, bytes], bytes | None],
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                if self._latency:
                    await asyncio.sleep(self._latency)
                await self._open.wait()
                passed = look(line, data)
                if passed is None:
                    self._reset(line)
                    return
                target.write(passed)
                await target.drain()
        target.close()

    def _sent(self, line: _Line, data: bytes) -> bytes:
        for loss in self._losses:
            line.seen |= loss.after in data
            if loss.count and line.seen and loss.to in data:
                loss.count -= 1
                line.lost = True
                break
        return data

    def _answered(self, line: _Line, data: bytes) -> bytes | None:
        """What passes of an answer; None to reset."""
        if line.lost or len(data) > line.room:
            return None
        line.room -= len(data)
        return data
