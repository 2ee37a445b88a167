"""Third-party programs at work: memory is shared with them, and they are not disturbed."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.child import NOBODY
from support.targets import (
    Client,
    ProgramResources,
    Stopping,
    Target,
    build,
    build_from,
    check_unchanged,
    exercise,
    lacking,
    need_program,
    until,
    until_at_rest,
    until_blocked,
)

import iobmd
from iobmd import IOReturn, IOReturnError

pytestmark = pytest.mark.usefixtures("may_trace")
needs_compiler = pytest.mark.needs("compiler")
needs_root = pytest.mark.needs("root")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Create a directory that all users can access, with a short path, because that of a Unix socket is limited."""
    path = Path(tempfile.mkdtemp(prefix="programs-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def run_under_stops(command: Sequence[str | Path], expected: tuple[int, str], stops: int, pause: float = 0) -> None:
    """Run a program until it was stopped more than `stops` times, on a busy machine in several runs."""
    count = 0
    for _ in range(10):
        with Target(command) as target, Stopping(target.pid, pause) as stopping:
            assert target.end() == expected
        count += stopping.count
        if count > stops:
            break
    print(f"{count} stops")
    assert count > stops


# --- interpreters that compute


def test_busybox() -> None:
    script = (
        "echo ready; i=0; s=0; while [ $i -lt 150000 ]; do i=$((i+1)); s=$(((s*31+i)%1000003)); done; echo $s; exit 9"
    )
    expected = 0
    for i in range(1, 150001):
        expected = (expected * 31 + i) % 1000003
    run_under_stops([need_program("busybox"), "sh", "-c", script], (9, f"{expected}\n"), 4, 0.005)


def test_busybox_that_waits() -> None:
    with Target([need_program("busybox"), "sh", "-c", "echo ready; read line; echo got $line; exit 4"]) as target:
        until_blocked(target.pid)
        exercise(target.pid)
        target.tell("it")
        assert target.end() == (4, "got it\n")


def test_perl() -> None:
    script = r"""
        $| = 1; print "ready\n";
        my %seen; my $sum = 0;
        for my $i (1 .. 400_000) { $seen{$i % 1000} .= "x"; $sum = ($sum * 33 + length $seen{$i % 1000}) % 1000003 }
        for (1 .. 20) { my $left = select undef, undef, undef, 0.01; die "select: $!" if $left }
        print "$sum $!\n"; exit 3;
    """
    command = [need_program("perl"), "-e", script]
    with Target(command) as alone:
        code, said = alone.end()
    assert code == 3
    run_under_stops(command, (3, said), 20, 0.002)


def test_node() -> None:
    # Compiled code that is thrown away and compiled again, threads, timers, and messages between them
    script = r"""
        const {Worker, isMainThread, parentPort} = require('node:worker_threads');
        const work = seed => { let sum = seed; for (let i = 0; i < 3e6; i++) sum = (Math.imul(sum, 31) + i) >>> 0;
                               return sum; };
        if (!isMainThread) { parentPort.on('message', seed => parentPort.postMessage(work(seed)));
        } else {
            const workers = [0, 1, 2].map(() => new Worker(__filename));
            let ending = false, left = 3, begun = 0, sum = 0, ticks = 0;
            process.stdin.once('data', () => { ending = true; process.stdin.destroy(); });
            const timer = setInterval(() => ticks++, 5);
            const own = setInterval(() => { sum = (sum + new Function('return ' + work(7))()) % 1000003; }, 50);
            workers.forEach((worker, number) => {
                worker.on('message', value => {
                    if (value !== answer) process.exit(1);
                    if (++begun === 30) console.log('ready');
                    if (!ending) return worker.postMessage(5);
                    if (--left > 0) return;
                    clearInterval(timer); clearInterval(own);
                    workers.forEach(one => one.terminate());
                    console.log(ticks > 0 ? 'done' : 'no ticks');
                    process.exitCode = 11;
                });
                worker.postMessage(5);
            });
            const answer = work(5);
        }
    """
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "program.js"
        program.write_text(script)
        with Target([need_program("node"), program]) as target:
            stopped = exercise(target.pid, 10, exact=False)
            target.tell()
            code, said = target.end(60)
    print(f"stopped for {max(stopped) / 1e3:.0f} µs at most")
    assert (code, said) == (11, "done\n")


# --- CPython, blocked

_PYTHON = """
import os, select, subprocess, sys, threading, time
began = time.monotonic()
print("ready", flush=True)
%s
print(repr(result), flush=True)
assert time.monotonic() - began >= %s
if %s:  # it waits by itself: on a busy machine it must not end before it was exercised
    os.read(0, 10)
sys.exit(21)
"""
_BLOCKED = {
    # kind of wait: program, result, minimum duration; a line on its standard input ends most waits
    "sleep": ("result = time.sleep(1)", "None", 1),
    "read": ("result = os.read(0, 10)", r"b'\n'", 0),
    "select": ("result = [len(some) for some in select.select([0], [], [])]", "[1, 0, 0]", 0),
    "select_timeout": ("result = select.select([], [], [], 1)", "([], [], [])", 1),
    "poll": ("poll = select.poll(); poll.register(0, select.POLLIN); result = poll.poll()", "[(0, 1)]", 0),
    "epoll": ("poll = select.epoll(); poll.register(0, select.EPOLLIN); result = poll.poll()", "[(0, 1)]", 0),
    "epoll_timeout": ("poll = select.epoll(); result = poll.poll(1)", "[]", 1),
    "lock": (
        "lock = threading.Lock(); lock.acquire()\n"
        "threading.Thread(target=lambda: (os.read(0, 10), lock.release())).start()\n"
        "result = lock.acquire()",
        "True",
        0,
    ),
    "lock_timeout": ("lock = threading.Lock(); lock.acquire(); result = lock.acquire(timeout=1)", "False", 1),
    "wait": ("result = subprocess.run(['sh', '-c', 'read line; exit 13']).returncode", "13", 0),
    "communicate": (
        "result = subprocess.run(['sh', '-c', 'read line; echo $line'], capture_output=True).stdout",
        r"b'\n'",
        0,
    ),
}


@pytest.mark.parametrize("how", _BLOCKED)
def test_python_blocked_in(how: str) -> None:
    body, result, least = _BLOCKED[how]
    with Target([sys.executable, "-I", "-S", "-c", _PYTHON % (body, least, least)]) as target:
        until_at_rest(target.pid)
        exercise(target.pid, 3)
        target.tell()
        assert target.end() == (21, f"{result}\n")


# --- compiled programs


def test_rust() -> None:
    text = """
        use std::{sync::mpsc, thread, time::Duration};
        fn main() {
            println!("ready");
            let (send, receive) = mpsc::channel::<u64>();
            for seed in 0..4u64 {
                let send = send.clone();
                thread::spawn(move || for round in 0..200u64 {
                    let bytes: Vec<u64> = (0..20000).map(|i| i * round ^ seed).collect();
                    thread::sleep(Duration::from_millis(1));
                    send.send(bytes.iter().fold(0, |sum, one| sum ^ one.wrapping_mul(31))).unwrap();
                });
            }
            drop(send);
            let (count, sum) = receive.iter().fold((0, 0u64), |(count, sum), one| (count + 1, sum.wrapping_add(one)));
            println!("{count} {sum}");
            std::process::exit(17);
        }
    """
    _check_compiled(need_program("rustc"), text, ".rs", "-O")


def test_go() -> None:
    # Its runtime sends signals to its own threads, and puts them on small stacks.
    text = """
        package main
        import ("fmt"; "os"; "sync"; "time")
        func main() {
            fmt.Println("ready")
            var all sync.WaitGroup
            sums := make(chan uint64, 10000)
            for seed := uint64(0); seed < 4; seed++ {
                all.Add(1)
                go func(seed uint64) {
                    defer all.Done()
                    for round := uint64(0); round < 200; round++ {
                        sum := uint64(0)
                        for _, one := range make([]uint64, 20000) { sum = sum*31 + one + round ^ seed }
                        time.Sleep(time.Millisecond)
                        sums <- sum
                    }
                }(seed)
            }
            all.Wait()
            close(sums)
            count, total := 0, uint64(0)
            for sum := range sums { count++; total += sum }
            fmt.Println(count, total)
            os.Exit(17)
        }
    """
    _check_compiled(need_program("go"), text, ".go", "build")


def _check_compiled(compiler: str, text: str, suffix: str, *options: str) -> None:
    program = build_from(compiler, text, suffix, *options)
    with Target([program]) as alone:
        code, said = alone.end()
    assert code == 17
    run_under_stops([program], (17, said), 10, 0.002)


# --- servers under load


def _check_load(client: Client, server: Target, what: str) -> None:
    before = ProgramResources.of(server.pid)
    stopped = exercise(server.pid, 20, exact=False)
    check_unchanged(server.pid, before, exact=False)
    load = client.finish()
    print(f"{what}: {load}; stopped for {max(stopped) / 1e3:.0f} µs at most")
    assert load.failed == 0
    assert load.requests > 100


def _wait_for_socket(path: Path, server: Target) -> None:
    assert until(path.is_socket), server.state()


def test_nginx_under_load(folder: Path) -> None:
    (folder / "page").write_text("0123456789abcdef" * 256)
    (folder / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {folder}/pid; error_log stderr;
        events {{ }}
        http {{
            access_log {folder}/log; keepalive_requests 10000000; sendfile on; open_file_cache max=9;
            client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
            uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
            server {{ listen unix:{folder}/socket; root {folder}; }}
        }}
    """)
    command = [need_program("nginx"), "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"]
    with Target(command, ready="") as server:
        _wait_for_socket(folder / "socket", server)
        with Client("http", str(folder / "socket")) as client:
            _check_load(client, server, "nginx")
        server.process.send_signal(signal.SIGQUIT)  # it completes the current request, and then exits
        assert server.end()[0] == 0
    assert " 200 " in (folder / "log").read_text()


def test_redis_under_load(folder: Path) -> None:
    command = [need_program("redis-server"), "--port", "0", "--unixsocket", folder / "socket", "--dir", folder]
    with Target([*command, "--save", "", "--daemonize", "no"], ready="") as server:
        _wait_for_socket(folder / "socket", server)
        with Client("redis", str(folder / "socket")) as client:
            _check_load(client, server, "redis")
        server.process.send_signal(signal.SIGTERM)
        code, said = server.end()
    assert code == 0
    assert "bye bye" in said


# --- confined programs


def _check_waiting(target: Target, pid: int | None = None, times: int = 5) -> None:
    until_blocked(pid or target.pid)
    exercise(pid or target.pid, times)
    target.tell()
    assert target.end() == (5, "woken\n")


@needs_root
@needs_compiler
def test_seccomp_filter_that_kills() -> None:
    with Target([build("busy"), "filter", "60"]) as target:
        assert until(lambda: "Seccomp:\t2" in Path(f"/proc/{target.pid}/status").read_text())
        exercise(target.pid, 10, pause=0.01)
        target.tell()
        assert target.end() == (6, "slept 60 errors 0\n")


@needs_root
@needs_compiler
def test_strict_seccomp() -> None:
    with Target([build("busy"), "strict"]) as target:
        assert until(lambda: "Seccomp:\t1" in Path(f"/proc/{target.pid}/status").read_text())
        until_blocked(target.pid)
        exercise(target.pid)
        target.tell()
        assert target.end() == (8, "strict\n")


@needs_compiler
def test_stopped_by_a_signal() -> None:
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        os.kill(target.pid, signal.SIGSTOP)
        reported = os.waitid(os.P_PID, target.pid, os.WSTOPPED)
        assert reported is not None
        assert reported.si_code == os.CLD_STOPPED
        exercise(target.pid, 5)
        stopped = lambda: target.state().startswith("state T")  # noqa: E731
        assert until(stopped), "released by a tracer, it must run until it stops again"
        time.sleep(0.05)
        assert stopped(), target.state()
        # Its parent receives no new report either.
        assert os.waitid(os.P_PID, target.pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG) is None
        target.tell()
        time.sleep(0.05)
        assert stopped(), target.state()
        os.kill(target.pid, signal.SIGCONT)
        assert target.end() == (5, "woken\n")


@needs_compiler
def test_stopped_and_continued_meanwhile() -> None:
    with Target([build("busy"), "timerfd"]) as target:
        with Stopping(target.pid) as stopping:
            for _ in range(60):
                os.kill(target.pid, signal.SIGSTOP)
                time.sleep(0.003)
                os.kill(target.pid, signal.SIGCONT)
                time.sleep(0.003)
            assert until(lambda: stopping.count > 50)
        target.tell()
        code, said = target.end()
    fields = dict(zip(said.split()[::2], map(int, said.split()[1::2]), strict=True))
    assert (code, fields["lost"], fields["errors"]) == (0, 0, 0)


_STOP_AND_CONTINUE = """
import os, random, signal, sys, time
target = int(sys.argv[1])
for _ in range(4000):
    os.kill(target, signal.SIGSTOP)
    soon = time.perf_counter() + random.random() * 0.0001
    while time.perf_counter() < soon:
        pass
    os.kill(target, signal.SIGCONT)
    time.sleep(0.0002)
"""


@needs_compiler
def test_continued_right_after_it_was_stopped() -> None:
    # Whatever effect a stop has on SIGSTOP, the SIGCONT after it must take effect. Another process sends both,
    # because a stop would prevent a thread of this process from sending.
    with Target([build("busy"), "wait"]) as target:
        with Stopping(target.pid) as stopping:
            subprocess.run([sys.executable, "-I", "-S", "-c", _STOP_AND_CONTINUE, str(target.pid)], check=True)
        print(f"{stopping.count} stops")
        assert stopping.count > 50
        assert until(lambda: target.state().startswith("state S")), target.state()
        target.tell()
        assert target.end(10) == (5, "woken\n")


@needs_compiler
def test_without_its_first_thread() -> None:
    # The kernel shows no memory map under the id of a main thread that has exited.
    with Target([build("busy"), "leaderless"]) as target:
        assert until(lambda: ") Z " in Path(f"/proc/{target.pid}/stat").read_text())
        try:
            iobmd.allocate(1 << 16, task=target.pid).free()
        except IOReturnError as error:
            assert error.code in (IOReturn.kIOReturnNotFound, IOReturn.kIOReturnUnsupported)
        target.tell()
        assert target.end() == (5, "woken\n")


def test_runs_one_program_after_the_other(folder: Path) -> None:
    script = folder / "script"
    script.write_text('[ $1 -lt 600 ] || echo ready; [ $1 -gt 0 ] || exit 19; exec sh "$0" $(($1 - 1))')
    run_under_stops(["sh", script, "600"], (19, ""), 6)


@needs_root
@needs_compiler
def test_in_namespaces_of_its_own() -> None:
    unshare = [
        need_program("unshare"),
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--user",
        "--map-root-user",
    ]
    with Target([*unshare, "--net", build("busy"), "wait"]) as target:
        children = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text().split()
        (child,) = map(int, children)
        assert Path(f"/proc/{child}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
        _check_waiting(target, child)


@needs_root
@needs_compiler
def test_chrooted() -> None:
    try:
        program = build("busy", "-static")
    except subprocess.CalledProcessError:
        lacking("needs a static C library")
    empty = Path(tempfile.mkdtemp())
    try:
        shutil.copy(program, empty / "program")
        with Target(["/program", "wait"], before=lambda: (os.chroot(empty), os.chdir("/"))) as target:
            (empty / "program").unlink()
            _check_waiting(target)
    finally:
        shutil.rmtree(empty)


@needs_root
@needs_compiler
def test_of_another_user() -> None:
    with Target([build("busy"), "wait"], user=NOBODY) as target:
        assert Path(f"/proc/{target.pid}").stat().st_uid == NOBODY
        _check_waiting(target)


@needs_compiler
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_without_a_descriptor_of_its_own(limit: int) -> None:
    """The task's open descriptors do not count, because the guest has its own table."""
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        before = ProgramResources.of(target.pid)
        soft, hard = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (3, hard))
        iobmd.allocate(1 << 16, task=target.pid).free()
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (limit, hard))
        for _ in range(3):
            with pytest.raises(IOReturnError) as caught:
                iobmd.allocate(1 << 16, task=target.pid)
            assert caught.value.code == IOReturn.kIOReturnNoResources
            check_unchanged(target.pid, before)
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (soft, hard))
        _check_waiting(target)


@needs_compiler
def test_without_address_space() -> None:
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        before = ProgramResources.of(target.pid)
        unlimited = resource.prlimit(target.pid, resource.RLIMIT_AS)
        for limit in (
            1 << 20,
            (64 << 20),
        ):  # not even for the scratch page; only for the scratch page
            resource.prlimit(target.pid, resource.RLIMIT_AS, (limit, unlimited[1]))
            with pytest.raises(IOReturnError) as caught:
                iobmd.allocate(128 << 20, task=target.pid, wired=False)
            assert caught.value.code == IOReturn.kIOReturnNoMemory
            check_unchanged(target.pid, before)
        resource.prlimit(target.pid, resource.RLIMIT_AS, unlimited)
        _check_waiting(target)


# --- observers


@needs_compiler
def test_parent_that_waits_is_not_told_of_stops() -> None:
    # This process is its parent and its tracer at the same time, and another thread waits for its exit.
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        seen: list[int] = []
        waiting = threading.Thread(target=lambda: seen.append(os.waitpid(target.pid, 0)[1]))
        waiting.start()
        try:
            exercise(target.pid, 5)
            target.tell()
        finally:
            waiting.join()
        target.process.returncode = os.waitstatus_to_exitcode(seen[0]) if os.WIFEXITED(seen[0]) else None
        assert [os.waitstatus_to_exitcode(status) for status in seen] == [5]


@needs_compiler
def test_several_of_us_at_one_target() -> None:
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        before = ProgramResources.of(target.pid)
        with Stopping(target.pid) as one, Stopping(target.pid) as other:
            assert until(lambda: one.count > 100 and other.count > 100)
        check_unchanged(target.pid, before)
        _check_waiting(target)
