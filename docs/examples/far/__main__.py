"""`python3 -m far --device DEVICE PID ADDRESS SIZE -- AGENT… > file` writes memory of a task of another machine."""

import argparse
import sys

from . import withCopy


def main() -> int:
    """Run the command and return 0; errors are exceptions."""
    parser = argparse.ArgumentParser(prog="far", description=__doc__)
    parser.add_argument("--device", required=True, help="the RDMA device of this machine (`ibv_devices`)")
    parser.add_argument("pid", type=int)
    parser.add_argument("address", type=lambda text: int(text, 0))
    parser.add_argument("size", type=lambda text: int(text, 0))
    parser.add_argument("agent", nargs="+", help="such as: ssh HOST python3 -m far.agent DEVICE")
    wanted = parser.parse_args()
    with withCopy(wanted.agent, wanted.pid, wanted.address, wanted.size, device=wanted.device) as buffer:
        sys.stdout.buffer.write(memoryview(buffer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
