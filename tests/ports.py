"""Ports that a process started later will listen on."""

import random
import socket

# Below what Linux hands out to whoever asks for any port, clients included: nobody gets one of these by chance.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """One that nobody listens on. Between this and its use no other process is given it."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
