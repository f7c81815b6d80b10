"""HTTP: sockets, workers, routes, the hot path."""
