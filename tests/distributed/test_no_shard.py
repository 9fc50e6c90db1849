"""Where there is no other process; the rest is in cases.py."""

import pytest

from gluon_syncbn import SyncBatchNorm
from gluon_syncbn.distributed import no_shard


def test_a_network_that_is_not_attached():
    with pytest.raises(RuntimeError, match="not attached.*leave the step out"):
        with no_shard(SyncBatchNorm()):
            pass
