"""Run a notebook in Jupyter and keep its outputs: python execute_notebook.py NOTEBOOK

Only `make notebook` runs this, in an environment that has Jupyter.  The tests run the code of the
notebook without it.
"""

import os
import sys

import nbformat
from nbclient import NotebookClient


def main(path):
    notebook = nbformat.read(path, as_version=4)
    # Neither times nor versions, so that a new run changes only what is different in the outputs.
    folder = {"metadata": {"path": os.path.dirname(os.path.abspath(path))}}
    NotebookClient(notebook, record_timing=False, resources=folder).execute()
    notebook.metadata.language_info = {"name": "python"}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1])
