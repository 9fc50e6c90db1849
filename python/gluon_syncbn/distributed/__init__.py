"""Synchronization beyond one process, over MPI.

::

    from gluon_syncbn import distributed

    net = convert_sync_batchnorm(net)
    distributed.attach(net)              # on every rank
"""

from .attachment import attach, detach
from .no_shard import no_shard

__all__ = ["attach", "detach", "no_shard"]
