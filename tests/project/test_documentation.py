"""The API reference has every public name.  (`make docs` builds it, and fails on a broken link.)"""

import re

import gluon_syncbn
from gluon_syncbn import distributed, estimator, symbol, waiting
from paths import ROOT


def documented():
    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return set(re.findall(r"^\.\. (?:auto|py:)\w+:: (gluon_syncbn\.\S+)$", text, re.M))


def test_every_public_name_is_in_the_api_reference():
    modules = {"symbol": symbol, "distributed": distributed}
    public = {f"gluon_syncbn.{name}" for name in gluon_syncbn.__all__ if name not in modules}
    for module, contents in modules.items():
        public |= {f"gluon_syncbn.{module}.{name}" for name in contents.__all__}
    public |= {f"gluon_syncbn.waiting.{name}" for name in waiting.RESULTS}
    public.add(f"gluon_syncbn.estimator.{estimator.DataParallelBatchProcessor.__name__}")
    assert documented() == public
