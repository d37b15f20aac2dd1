"""Stop signals: noted, and answered at once."""

import os
import signal

import pytest

from saferclip_fast.runtime.stop import stop_signals


@pytest.mark.parametrize("say", [True, False])
def test_a_signal_is_answered_before_the_step_ends(capfd, say):
    with stop_signals(say) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        said = capfd.readouterr().err
    assert stop == [signal.SIGTERM]
    assert ("SIGTERM: stops and saves after this step" in said) == say
