"""Everything that importing this package does to the process, in order.

Importing a module of the package has no effects by itself; those it needs are in a function that is
called here, once.
"""

from .data_parallel import device_threads, random_state
from .distributed import connection
from .hooks import (
    executors,
    gluon,
    initial_states,
    key_barrier_sum,
    mixed_precision,
    module_keys,
)
from .key_barrier import check_variables, close_at_exit
from .library import LIBRARY


def start() -> None:
    """Load the library and take part in MXNet's work from now on."""
    check_variables()
    LIBRARY.load()  # registers the operators with MXNet
    close_at_exit()
    connection.refuse_after_fork()
    random_state.watch_seeds()
    device_threads.prepare_for_forks()
    key_barrier_sum.install()
    gluon.install()
    executors.install()
    module_keys.install()
    initial_states.install()
    mixed_precision.list_operators()
