"""Putting a network's parameters on all the devices that are to run it.

``net.initialize()`` and ``load_parameters`` without contexts leave them on one device, which is how
programs for a single device begin.
"""

from mxnet import optimizer

from .exchanges import blocks_of


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
        """Move the parameters that lack one of the devices, with their values, to all of them.

        What is not initialized at all stays so.  A Trainer made before follows, if it has made no
        step.

        Raises
        ------
        ValueError
            If a parameter that must move is sparse, or a Trainer has made steps with it.
        """
        lacking = []
        for block in blocks_of(self._net):
            for parameter in block.params.values():
                contexts = _contexts_of(parameter)
                # Gluon makes a new list whenever it moves a parameter; comparing takes far longer.
                if contexts is None or self._seen.get(parameter) is contexts:
                    continue
                if all(context in contexts for context in self._contexts):
                    self._seen[parameter] = contexts
                elif parameter not in lacking:
                    lacking.append(parameter)
        if lacking:
            self._move(lacking)

    def _move(self, parameters):
        trainers = {id(p._trainer): p._trainer for p in parameters if p._trainer}.values()
        for parameter in parameters:
            self._check(parameter)
        for parameter in parameters:
            parameter.reset_ctx(self._contexts)
        for trainer in trainers:
            trainer._contexts = list(self._contexts)
            trainer._updaters = [optimizer.get_updater(trainer._optimizer) for _ in self._contexts]

    def _check(self, parameter):
        where = _names(_contexts_of(parameter))
        if parameter._stype != "default":
            raise ValueError(
                f"{parameter.name} is {parameter._stype} and lies on {where}, but ctx_list is "
                f"{_names(self._contexts)}; initialize it there: net.initialize(ctx=ctx_list)"
            )
        trainer = parameter._trainer
        if trainer and trainer._kv_initialized:
            raise ValueError(
                f"{parameter.name} lies on {where}, but ctx_list is {_names(self._contexts)}, and "
                f"its Trainer has made steps with {_names(trainer._contexts)}: it would leave the "
                "other devices behind. Call net.collect_params().reset_ctx(ctx_list) and make a "
                "new Trainer"
            )


def _contexts_of(parameter):
    """Where a parameter lies or is going to lie; None if it is not initialized."""
    if parameter._data is not None:
        return parameter._ctx_list
    return parameter._deferred_init[1] if parameter._deferred_init else None


def _names(contexts):
    return f"[{', '.join(map(str, contexts))}]"
