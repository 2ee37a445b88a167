"""Shell completions and man pages, installed or in `share` of a checkout: current, and valid."""

import importlib
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import iobmd.tools  # registers its commands
import pytest
from support.targets import need_program

from iobmd.cli import COMMANDS

PATH = "/usr/local/bin:/usr/bin:/bin"
BASH, ZSH, FISH = (
    "bash-completion/completions/iobmd",
    "zsh/site-functions/_iobmd",
    "fish/vendor_completions.d/iobmd.fish",
)


def shared(path: str) -> Path:
    """Return a file of the installed package below share/, or of the checkout in which it is installed in place."""
    checkout = Path(iobmd.tools.__file__).parent / "share"
    return (checkout if checkout.exists() else Path(sysconfig.get_path("data"), "share")) / path


def options(command: str) -> set[str]:
    parser = importlib.import_module(COMMANDS[command][0]).make_parser()
    return {option for action in parser._actions for option in action.option_strings}


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": PATH, **variables})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_every_file(command: str) -> None:
    page = shared(f"man/man1/iobmd-{command}.1").read_text().replace("\\-", "-")
    assert not {option for option in options(command) if f"\\fB{option}\\fR" not in page} - {"-h", "--help"}
    for path in (BASH, ZSH):
        assert not {option for option in options(command) if option not in shared(path).read_text()}
    of_fish = re.findall(rf"^complete -c iobmd -n '_shtab_iobmd_using {command}'(.*)", shared(FISH).read_text(), re.M)
    assert {f"--{name}" for line in of_fish for name in re.findall(r" -l (\S+)", line)} == {
        option for option in options(command) if option.startswith("--")
    }


def completed_by_bash(line: str) -> set[str]:
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_iobmd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    return set(run("bash", "--norc", "-ec", f"source '{shared(BASH)}'; {program}").split())


def test_bash_completes() -> None:
    assert completed_by_bash("iobmd pa") == {"pagemap"}
    assert completed_by_bash("iobmd copy --fr") == {"--freeze"}
    assert completed_by_bash("iobmd bench ca") == {"cachemode"}
    assert {str(os.getpid()), "self"} <= completed_by_bash("iobmd pagemap ")


def test_bash_completes_files() -> None:
    assert "/proc/version" in completed_by_bash("iobmd copy -o /proc/vers")


def test_zsh_accepts_it() -> None:
    run(need_program("zsh"), "-f", "-n", shared(ZSH))
    assert shared(ZSH).read_text().startswith("#compdef iobmd\n")


def test_fish_completes(tmp_path: Path) -> None:
    program = f"source '{shared(FISH)}'; complete -C 'iobmd pa'; complete -C 'iobmd copy --fr'"
    found = run(need_program("fish"), "--no-config", "-c", program, HOME=str(tmp_path))
    assert [line.split("\t")[0] for line in found.splitlines()] == ["pagemap", "--freeze"]


@pytest.mark.parametrize("name", ["iobmd", *(f"iobmd-{command}" for command in COMMANDS)])
def test_man_renders_pages_without_warnings(name: str) -> None:
    page = shared(f"man/man1/{name}.1")
    lines = run(need_program("man"), "--warnings", "--local-file", page, MANWIDTH="80", LC_ALL="C.UTF-8").splitlines()
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"} <= {*lines}
    assert lines[lines.index("NAME") + 1].split()[:2] == [name, "-"]
    assert max(map(len, lines)) <= 80
