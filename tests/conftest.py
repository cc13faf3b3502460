"""What every test leaves behind: no tap that is still looked at, no session that is still open."""

import pytest

from moddiff.hooks import live_handles


@pytest.fixture(autouse=True)
def no_tap_stays_live():
    yield
    left = live_handles()
    assert not left, f"this test left sessions open on {left}"
