"""The end of what ranks wrote."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from nexa_train.launch import tail
from nexa_train.launch.tail import KEPT_BYTES, Tail


def written(script: str, into: io.BytesIO | None = None) -> Tail:
    """What a process wrote, once it has ended."""
    with Tail(into or io.BytesIO()) as found:
        subprocess.run([sys.executable, "-c", script], stdout=found.sink, stderr=subprocess.STDOUT, check=False)
    return found


def test_everything_is_passed_on_and_the_last_lines_are_kept_whole() -> None:
    into = io.BytesIO()
    found = written("for number in range(5000): print('line', number)", into)
    assert into.getvalue() == b"".join(b"line %d\n" % number for number in range(5000))
    lines = found.text().splitlines()
    assert lines == [f"line {number}" for number in range(5000 - len(lines), 5000)]
    assert KEPT_BYTES - 10 <= len(found.text()) <= KEPT_BYTES


def test_a_short_log_is_kept_from_its_first_line() -> None:
    assert written("import sys; print('out', flush=True); print('err', file=sys.stderr)").text() == "out\nerr\n"


def test_of_a_line_that_is_too_long_the_end_is_kept() -> None:
    assert written("print('x' * 10_000 + 'end', end='')").text() == ("x" * KEPT_BYTES + "end")[-KEPT_BYTES:]


def test_bytes_that_are_no_text_are_kept_readable() -> None:
    assert written(r"import sys; sys.stdout.buffer.write(b'a\xff')").text() == "a�"


def test_what_a_killed_process_wrote_last_is_there() -> None:
    script = "import os, signal; print('CUDA error', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    assert written(script).text() == "CUDA error\n"


def test_nobody_who_holds_the_output_open_holds_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_DRAIN_SECONDS", 0.2)
    with Tail(io.BytesIO()) as found:
        holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=found.sink)
    holder.communicate(b"\n")
    assert holder.returncode == 0


def test_ranks_go_on_where_nobody_reads_the_output() -> None:
    class Closed(io.BytesIO):
        def write(self, *_: object) -> int:
            raise BrokenPipeError

    assert written("print('x' * 200_000); print('done')", Closed()).text().endswith("done\n")
