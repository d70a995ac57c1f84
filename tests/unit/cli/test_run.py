"""`nexa run` before a person or a scheduler that signals it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from nexa_train.cli.run import _obeying_signals
from nexa_train.rundir import RunDir


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_the_first_though_the_ranks_heard_of_it_before(tmp_path: Path, number: int) -> None:
    rundir = RunDir(tmp_path)
    rundir.ask_to_stop("stop-ranks")  # as a rank does that is signalled, too
    with _obeying_signals(rundir):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            pytest.fail("taken for the second")
        assert rundir.launcher_stop_asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
