"""Share memory with processes of this user that connect to a Unix socket: `python server.py PATH`.

Each client writes an answer to the memory, and then a byte to the socket.
"""

import os
import signal
import socket
import struct
import sys
from pathlib import Path

import iobmd

SIZE = 1 << 20
QUESTION, ANSWER = slice(0, 64), slice(64, 128)
CREDENTIALS = struct.Struct("=iII")  # struct ucred of unix(7): pid, uid, gid


def main(path: str) -> None:
    """Share one buffer with all clients, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with socket.socket(socket.AF_UNIX) as listening:
        os.umask(0o177)  # connect(2) requires permission to write to the socket
        listening.bind(path)
        listening.listen()
        try:
            with iobmd.allocate(SIZE, shared=True, wired="try") as buffer:
                buffer[QUESTION] = b"your PID?".ljust(64, b"\0")
                print(f"{SIZE >> 10} KiB, {buffer.wiring.value}", flush=True)
                with iobmd.share(buffer) as handle:
                    while True:
                        connection, _address = listening.accept()
                        with connection:
                            serve(connection, handle, buffer)
        except KeyboardInterrupt:
            pass
        finally:
            Path(path).unlink()


def serve(connection: socket.socket, handle: iobmd.Handle, buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    """Share the memory with one client, and print its answer."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _gid = CREDENTIALS.unpack(peer)  # of the process that called connect(2)
    if uid != os.geteuid():
        print(f"user {uid}, process {pid}: refused", flush=True)
        return
    connection.settimeout(10)  # for a client that does not answer
    buffer[ANSWER] = bytes(64)
    try:
        handle.send(connection)
        ended = not connection.recv(1)
    except OSError as error:  # TimeoutError, BrokenPipeError
        print(f"user {uid}, process {pid}: {error}", flush=True)
        return
    answer = buffer[ANSWER].rstrip(b"\0")  # a copy: the client may still write to the memory
    print(f"user {uid}, process {pid}: {'no answer' if ended else answer.decode(errors='replace')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
