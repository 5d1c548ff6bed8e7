# SPDX-License-Identifier: Apache-2.0
"""The notebook, run from top to bottom as it stands."""

import shutil

import nbclient
import nbformat


def test_the_notebook_runs(request, tmp_path, monkeypatch):
    examples = request.config.rootpath / "examples"
    shutil.copytree(examples / "demo", tmp_path / "demo")
    notebook = nbformat.read(examples / "qmoe_colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "the same answers" in printed
    assert "packed:   Return the [" in printed
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    widgets = [
        o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
    ]
    assert widgets  # the progress bar
    assert (tmp_path / "packed" / "manifest.json").exists()
