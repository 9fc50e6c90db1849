"""Which of MXNet's tests are run, from tests/python of its checkout."""

from typing import NamedTuple, Optional


class Selected(NamedTuple):
    """Tests of a file.

    ``match`` is a regular expression for the names of the test functions.  ``counted``: what must
    not be 0 of `counting.counts`, since the tests run batch normalization or have it in symbols.
    None for tests without it: they show that importing the package, which changes how MXNet traces
    networks and runs executors, changes nothing else.
    """

    path: str
    match: str = ""
    counted: Optional[str] = None


# Without the thirty tests of other layers on reshaped and sliced inputs.
LAYERS = "^(?!test_(reshape|slice)_(?!batchnorm))"

SELECTED = (
    # batch normalization, and symbols in which it stands
    Selected("unittest/test_operator.py", "batchnorm", "ours"),
    Selected("unittest/test_numpy_op.py", "batch_norm", "ours"),
    Selected("unittest/test_sparse_operator.py", "batchnorm", "ours"),
    Selected("unittest/test_init.py", "", "symbols"),
    Selected("unittest/test_symbol.py", "", "symbols"),
    Selected("unittest/test_infer_shape.py"),
    Selected("unittest/test_subgraph.py", "", "ours"),
    Selected("unittest/test_subgraph_op.py", "", "ours"),
    Selected("mkl/test_mkldnn.py", "batchnorm", "ours"),
    # Gluon
    Selected("unittest/test_gluon.py", LAYERS, "ours"),
    Selected("unittest/test_gluon_contrib.py"),
    Selected("unittest/test_gluon_rnn.py", "", "ours"),
    Selected("unittest/test_gluon_model_zoo.py", "", "ours"),
    Selected("unittest/test_gluon_estimator.py", "", "ours"),
    Selected("unittest/test_gluon_batch_processor.py"),
    Selected("unittest/test_gluon_save.py"),
    Selected("unittest/test_gluon_trainer.py"),
    Selected("unittest/test_numpy_gluon.py"),
    Selected("unittest/test_autograd.py"),
    # Module and executors
    Selected("unittest/test_module.py"),
    Selected("unittest/test_executor.py"),
    Selected("unittest/test_multi_device_exec.py", "", "symbols"),
    # AMP
    Selected("mkl/test_contrib_amp.py", "", "ours"),
    Selected("mkl/test_bf16_operator.py", "", "symbols"),
    Selected("gpu/test_contrib_amp.py", "", "symbols"),
    # visualization
    Selected("unittest/test_viz.py", "", "symbols"),
)
