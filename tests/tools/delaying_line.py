"""A TCP relay over a distance: `python -m tests.tools.delaying_line HOST PORT SECONDS ADDRESS PORT`.

What comes is passed on so many seconds later, each way; as much as comes is on its way. Prints where it begins.
"""

from __future__ import annotations

import asyncio
import sys


async def main(host: str, port: int, delay: float, address: str, at: int) -> None:
    """Relay until terminated."""
    loop = asyncio.get_running_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            loop.call_later(delay, writer.write, data)
        loop.call_later(delay, writer.close)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay)  # for the handshake
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    server = await asyncio.start_server(relay, address, at)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    )
