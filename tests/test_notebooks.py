"""The notebooks, executed from the first cell to the last, at tiny settings."""

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT, write_tfds

NOTEBOOKS = {
    "quickstart_colab": {"EPOCHS": 1, "TEST_IMAGES": 4, "N": 100},
    "tpu_cifar10_colab": {
        "MODEL": "resnet20", "EPOCHS": 1, "BATCH_SIZE": 32, "DTYPE": "bfloat16", "TEST_IMAGES": 2, "N": 20,
    },
}  # fmt: skip


def with_parameters(notebook, values):
    """Sets the constants of the cell that is tagged for it; each must be there already."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    lines = cell.source.splitlines()
    for name, value in values.items():
        (place,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[place] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("default")  # what Jupyter's own packages warn of is theirs
def test_a_notebook_runs_from_start_to_end(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")  # one device: eight compile for minutes
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    values = {**NOTEBOOKS[name], "WORKDIR": str(tmp_path / "run")}
    if "cifar10" in name:
        rng = np.random.default_rng(0)
        images = {
            split: rng.integers(0, 256, size=(number, 32, 32, 3), dtype=np.uint8)
            for split, number in (("train", 64), ("test", 10))
        }
        write_tfds(
            tmp_path,
            "cifar10",
            "3.0.2",
            {split: (array, np.arange(len(array)) % 10) for split, array in images.items()},
        )
        values["DATA_DIR"] = str(tmp_path)
    with_parameters(notebook, values)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "ACR" in text and (tmp_path / "run").is_dir()
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output.output_type == "error" for output in outputs)


def test_notebooks_are_kept_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), path.name
