"""A TCP relay that breaks connections: `python -m tests.tools.cutting_line HOST PORT BYTES`.

Prints its port; each cut is a line on standard error.
"""

from __future__ import annotations

import asyncio
import sys


async def main(host: str, port: int, every: int) -> None:
    """Relay until terminated."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bound: int) -> None:
        passed = 0
        while data := await reader.read(1 << 16):
            passed += len(data)
            if passed > bound:
                print("cut", file=sys.stderr, flush=True)
                break
            writer.write(data)
            await writer.drain()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        pumps = [
            asyncio.create_task(pump(reader, back, 1 << 60)),
            asyncio.create_task(pump(there, writer, every)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        writer.transport.abort()
        back.transport.abort()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
