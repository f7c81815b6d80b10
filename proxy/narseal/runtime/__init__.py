"""What any asyncio server needs and no domain knows: threads, tasks, single flight, batching, leadership, sockets."""
