"""The public API is annotated in full, so that type checkers of users see more than Any."""

import inspect

import pytest

import gluon_syncbn
from gluon_syncbn import estimator, symbol


def public_functions():
    """The functions, and the methods that the classes define themselves, by name."""
    names = {f"gluon_syncbn.{name}": getattr(gluon_syncbn, name) for name in gluon_syncbn.__all__}
    names.update({f"gluon_syncbn.symbol.{name}": getattr(symbol, name) for name in symbol.__all__})
    found = estimator.DataParallelBatchProcessor
    names["gluon_syncbn.estimator.DataParallelBatchProcessor"] = found
    for name, thing in names.items():
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            for method, function in vars(thing).items():
                public = method in ("__init__", "__call__") or not method.startswith(
                    ("_", "hybrid_forward")
                )
                if public and inspect.isfunction(function):
                    yield f"{name}.{method}", function


@pytest.mark.parametrize("name, function", public_functions())
def test_annotated_in_full(name, function):
    signature = inspect.signature(function)
    bare = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty and parameter.name != "self"
    ]
    if signature.return_annotation is signature.empty and not name.endswith("__init__"):
        bare.append("the result")
    assert not bare, f"{name} has no annotation for {', '.join(bare)}"
