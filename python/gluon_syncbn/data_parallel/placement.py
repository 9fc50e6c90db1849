"""A network's parameters, put on all the devices that are to run it.

``net.initialize()`` and ``load_parameters`` without contexts leave them on one device, as programs
for a single device do.
"""

from ..mxnet_private import (
    contexts_of,
    has_stepped,
    move_trainer,
    storage_type,
    trainer_contexts,
    trainer_of,
)
from ..networks import blocks_of


class Placement:
    """Keeps the parameters of a network on all of some devices.

    Parameters
    ----------
    net : Block
    contexts : list of Context
    """

    def __init__(self, net, contexts):
        self._net, self._contexts = net, contexts
        self._seen = {}  # Parameter -> its list of contexts, which has all of ours

    def restore(self):
        """Copy the parameters that are missing on one of the devices to all of them.

        Those that are not to be initialized stay as they are.  A Trainer that was made before
        follows if it has made no step.

        Raises
        ------
        ValueError
            If a parameter that must be copied is sparse, or its Trainer has made steps.
        """
        lacking = []
        for block in blocks_of(self._net):
            for parameter in block.params.values():
                contexts = contexts_of(parameter)
                # The same list means the same devices, and costs far less than comparing them.
                if contexts is None or self._seen.get(parameter) is contexts:
                    continue
                if all(context in contexts for context in self._contexts):
                    self._seen[parameter] = contexts
                elif parameter not in lacking:
                    lacking.append(parameter)
        if lacking:
            self._move(lacking)

    def _move(self, parameters):
        trainers = [trainer_of(p) for p in parameters]
        for parameter in parameters:
            self._check(parameter)
        for parameter in parameters:
            parameter.reset_ctx(self._contexts)
        for trainer in {id(t): t for t in trainers if t}.values():
            move_trainer(trainer, self._contexts)

    def _check(self, parameter):
        where = _names(contexts_of(parameter))
        if storage_type(parameter) != "default":
            kind = storage_type(parameter)
            raise ValueError(
                f"{parameter.name} is {kind} and lies on {where}, but ctx_list is "
                f"{_names(self._contexts)}; initialize it there: net.initialize(ctx=ctx_list)"
            )
        trainer = trainer_of(parameter)
        if trainer and has_stepped(trainer):
            its = _names(trainer_contexts(trainer))
            raise ValueError(
                f"{parameter.name} lies on {where}, but ctx_list is {_names(self._contexts)}, and "
                f"its Trainer has made steps with {its}: it would leave the "
                "other devices behind. Call net.collect_params().reset_ctx(ctx_list) and make a "
                "new Trainer"
            )


def _names(contexts):
    return f"[{', '.join(map(str, contexts))}]"
