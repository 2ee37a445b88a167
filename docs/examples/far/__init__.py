"""`withCopy` from a task on another machine: its memory arrives by RDMA, in a pinned buffer of this process.

An agent on the other machine (`python3 -m far.agent`) makes a snapshot of the task and registers copies of its
memory. This process reads them by RDMA READ, without further work of the agent. Both sides exchange messages through
the standard input and output of the agent, which a command such as `ssh HOST` starts: that command authenticates the
caller, and no port is opened.

`queue_pair` is the connection by pyverbs. `messages` contains what each side must know about the other to connect.
"""

from .caller import Snapshot, withCopy

__all__ = ["Snapshot", "withCopy"]
