"""The notebooks, executed from the first cell to the last, at tiny settings; and cell by cell, what Colab needs."""

import ast
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT, write_tfds

NOTEBOOKS = {
    "quickstart_colab": {"PLATFORM": "cpu", "EPOCHS": 1, "TEST_IMAGES": 4, "N": 100},
    "tpu_cifar10_colab": {
        "PLATFORM": "cpu",
        "MODEL": "resnet20",
        "EPOCHS": 1,
        "BATCH_SIZE": 32,
        "DTYPE": "bfloat16",
        "TEST_IMAGES": 2,
        "N": 20,
    },
}


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
    assert "ACR" in text and len(re.findall(r"devices: \d x cpu \(cpu\)", text)) >= 2 and (tmp_path / "run").is_dir()
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output.output_type == "error" for output in outputs)


def code_cells(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_kernel_leaves_the_devices_to_the_programs(name):
    def imported(source):
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        return found

    cells = code_cells(name)
    runs = [number for number, source in enumerate(cells) if re.search(r"^ *run\(", source, re.MULTILINE)]
    jax_from = [
        number for number, source in enumerate(cells) if imported(source) & {"jax", "flax", "optax", "rs_consistency"}
    ]
    assert len(runs) >= 3 and all(number > max(runs) for number in jax_from)
    assert bool(jax_from) == (name == "quickstart_colab")


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A runtime without a checkout: a repository to clone, and a pip that only writes down what it is asked for."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], cwd=source, check=True)
    stub = tmp_path / "stub"
    (stub / "pip").mkdir(parents=True)
    (stub / "pip" / "__init__.py").write_text("")
    (stub / "pip" / "__main__.py").write_text(
        f"import sys\nopen({str(tmp_path / 'asked')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    )
    (stub / "jax.py").write_text("__version__ = '0'\ndefault_backend = lambda: 'tpu'\ndevices = lambda: ['TPU']\n")
    monkeypatch.setenv("PYTHONPATH", str(stub))
    (tmp_path / "content").mkdir()
    return tmp_path


def install(colab, **values):
    """Runs the installation cell in a process of its own, as a fresh kernel does."""
    parameters, cell = (
        "\n".join(f"{name} = {value!r}" for name, value in values.items()),
        code_cells(next(iter(NOTEBOOKS)))[1],
    )
    return subprocess.run(
        [sys.executable, "-c", f"{parameters}\n{cell}\nprint(os.getcwd())"],
        cwd=colab / "content",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_installation_clones_once_and_takes_the_plugin_of_the_runtime(colab):
    for _ in range(2):  # the second time after a restart
        done = install(colab, SOURCE=f"file://{colab / 'source'}", PLATFORM="tpu")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(colab / "content" / "rs-consistency")
    assert (colab / "asked").read_text() == 2 * "install -q -e ./rs-consistency jax[tpu]\n"
    done = install(colab, SOURCE="", PLATFORM="gpu")
    assert done.returncode == 1 and "JAX computes on tpu, not on the gpu of this runtime" in done.stderr
    assert "jax[cuda12]" in (colab / "asked").read_text()


def test_installation_asks_for_the_address_of_the_repository(colab):
    done = install(colab, SOURCE="", PLATFORM="cpu")
    assert done.returncode == 1 and "Set SOURCE above" in done.stderr and not (colab / "asked").exists()


def test_both_notebooks_install_and_run_alike():
    one, other = map(code_cells, NOTEBOOKS)
    assert one[1:3] == other[1:3]


def test_a_program_is_shown_as_it_runs_and_stopped_on_other_devices(tmp_path):
    shown = []

    def show(*words, **_):
        shown.append(" ".join(words))
        if words[0].startswith("devices"):
            (tmp_path / "seen").touch()

    namespace = {"subprocess": subprocess, "sys": sys, "PLATFORM": "tpu", "print": show}
    exec(code_cells("quickstart_colab")[2], namespace)
    (tmp_path / "program.py").write_text(
        "import sys, time, pathlib\nprint(f'devices: 1 x {sys.argv[1]}', flush=True)\n"
        f"seen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
        "for _ in range(600):\n    seen.exists() or time.sleep(0.1)\n"
        "print('\\r50%|##', file=sys.stderr)\nprint('done')\nsys.exit(0 if seen.exists() else 1)\n"
    )
    namespace["run"](str(tmp_path / "program.py"), "TPU v2 (tpu)")
    assert [line.strip() for line in shown[1:]] == ["devices: 1 x TPU v2 (tpu)", "done"]
    with pytest.raises(SystemExit, match="does not compute on tpu"):
        namespace["run"](str(tmp_path / "program.py"), "cpu (cpu)")
    with pytest.raises(SystemExit, match="failed"):
        namespace["run"](str(tmp_path / "nowhere.py"))


def test_notebooks_are_kept_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), path.name
