"""Attach the memory that `server.py` shares, and write an answer to it: `python client.py PATH`."""

import os
import socket
import sys

import iobmd

QUESTION, ANSWER = slice(0, 64), slice(64, 128)


def main(path: str) -> None:
    """Answer the server's question."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        with iobmd.attach(connection) as buffer:
            question = buffer[QUESTION].rstrip(b"\0").decode()
            print(f"{buffer.getLength() >> 10} KiB, {buffer.wiring.value}: {question}")
            buffer[ANSWER] = f"process {os.getpid()}".encode().ljust(64, b"\0")
            connection.sendall(b"\1")  # after the answer: a message orders the accesses of both processes


if __name__ == "__main__":
    main(sys.argv[1])
