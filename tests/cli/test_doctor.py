"""`iobmd doctor`: its text and JSON output, and its exit code."""

import ctypes
import io
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from support.child import NOBODY, in_child

from iobmd import host
from iobmd.cli import main


def as_nobody(*arguments, memlock=None):
    """Run `iobmd doctor` in a forked child without privileges; return exit code, stdout, stderr and the facts."""

    # Once before the privileges are dropped: an ordinary user may not be able to read the interpreter's files.
    with redirect_stdout(io.StringIO()):
        main(["doctor"])

    def doctor():
        # A change of user makes a process undumpable, so that its files in /proc belong to root, unlike after a
        # login.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(["doctor", *arguments])
        return code, out.getvalue(), err.getvalue(), host.facts()

    return in_child(doctor, uid=NOBODY, memlock=memlock)


def split_report(text):
    table, _, rest = text.partition("\nTo enable")
    return table, rest, text.rstrip("\n").splitlines()[-1]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_table_fits_and_names_every_fact(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    table, _, verdict = split_report(out)
    assert err == ""
    assert max(map(len, table.splitlines())) <= int(columns)
    assert "purpose" in table
    assert "…" not in out
    for fact in host.facts():
        (row,) = (line for line in table.splitlines() if line.startswith(f"{fact.name} "))
        assert (fact.status.value in row.split()) == (fact.status is not host.Status.INFO)
        # Folded cells still contain every word.
        assert set("".join(fact.purpose.split())) <= set("".join(table.split()))
    assert verdict.startswith("The main job, copying another process's memory into a wired buffer, can run here")


@pytest.mark.parametrize("columns", ["40", "80"])
def test_remedies_are_whole_lines(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _, found = as_nobody()
    lines = [line.strip() for line in split_report(out)[1].splitlines()]
    remedies = {fact.remedy for fact in found if fact.remedy}
    assert remedies
    for remedy in remedies:
        first, *others = remedy.splitlines()
        assert lines.count(first) == 1
        at = lines.index(first)
        assert lines[at + 1 : at + 1 + len(others)] == others
    # Numbered names precede their remedy: each occurs once, and only facts with a remedy are listed.
    named = [name for line in lines if re.match(r"\d+\. ", line) for name in line.split(". ", 1)[1].split(", ")]
    assert sorted(named) == sorted(fact.name for fact in found if fact.remedy)


def test_output_in_ascii_without_colour_when_piped():
    run = subprocess.run(
        [sys.executable, "-m", "iobmd", "doctor"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "\033" not in run.stdout
    assert max(map(len, split_report(run.stdout)[0].splitlines())) <= 80


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["main_job"]) == (1, True)
    assert document["physical_memory"].startswith("Wired memory is ")
    assert [fact["name"] for fact in document["facts"]] == [fact.name for fact in host.facts()]
    for fact in document["facts"]:
        assert list(fact) == ["name", "status", "value", "summary", "purpose", "remedy"]
        assert fact["status"] in ("yes", "limited", "no", "info")
    memlock = next(fact["value"] for fact in document["facts"] if fact["name"] == "RLIMIT_MEMLOCK")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert memlock["soft"] == (None if soft == resource.RLIM_INFINITY else soft)


def test_json_from_a_shell_needs_no_rich():
    script = (
        "import sys; from iobmd.cli import main; code = main(['doctor', '--json']); "
        "sys.exit(3 if 'rich' in sys.modules else code)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["main_job"] is True


@pytest.mark.needs("root", "frames")
def test_says_what_pinning_and_contiguity_the_host_gives(capsys, setting):
    main(["doctor"])
    assert "Wired memory is pinned. Contiguous memory: from collected huge pages; addresses are visible." in (
        capsys.readouterr().out
    )
    setting("/proc/sys/kernel/io_uring_disabled", 2)
    main(["doctor"])
    assert "Wired memory is resident, and can move. Contiguous memory: from a hugetlb pool only." in (
        capsys.readouterr().out
    )


def test_nobody_with_a_limit_can_run_the_main_job():
    code, out, err, found = as_nobody(memlock=64 << 10)
    assert (code, err) == (0, "")
    assert "Contiguous memory: up to 2 MiB, in one huge page; addresses are hidden." in out
    assert {fact.name: fact.value for fact in found}["PFN"] is False
    assert re.search(r"^PFN +no +hidden", out, re.MULTILINE)
    assert "setcap cap_ipc_lock,cap_sys_ptrace,cap_sys_admin+ep" in out


def test_no_lockable_memory_is_said_and_ends_with_1():
    code, out, err, _ = as_nobody(memlock=0)
    assert (code, err) == (1, "")
    table, remedies, verdict = split_report(out)
    assert "mlock" in table
    assert "RLIMIT_MEMLOCK" in remedies
    assert "LimitMEMLOCK=infinity" in remedies
    assert "cannot run here: mlock: RLIMIT_MEMLOCK (0 B)" in verdict

    code, out, _, _ = as_nobody("--json", memlock=0)
    assert (code, json.loads(out)["main_job"]) == (1, False)


def test_help_and_wrong_usage(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "usage: iobmd doctor" in capsys.readouterr().out
    assert main(["doctor", "--colour"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "unrecognized arguments: --colour" in err
