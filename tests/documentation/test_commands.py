"""Every command that README and documentation show: run by a test, or on a short list with the reason why not."""

import ast
import importlib.util
import re
import shlex

import pytest

from rs_consistency.cli import analyze, certify, train
from rs_consistency.cli.config_file import split
from tests.helpers import ROOT

PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts and path.name != "config.md"  # which is made of configs/default.py
]
# Beginnings of commands that no test runs as they stand, and why. Their arguments are parsed here all the same.
NOT_RUN = {
    r"python (train|certify|analyze)\.py .*\bruns/"
    r"(mnist|sa|teacher|catrs|consistency|gaussian|macer|sun|one_step|NAME)\b": (
        "minutes to days of training, most of it on data that is downloaded; like it, runs of the demo in the tutorial"
    ),
    r"python analyze\.py .*--match_images=": "files that are downloaded; tests/certificates/test_matching.py",
    r"python certify\.py --torch_checkpoint=": "a file that is downloaded; tests/cli/test_torch.py",
    r"(rs-export-torch|python -m rs_consistency\.cli\.export_torch)\b": "PyTorch; tests/cli/test_torch.py",
    r"python -m rs_consistency\.cli\.prepare ": "a download; tests/data/test_data.py",
    r"python benchmarks/": "minutes to hours, and PyTorch",
    r"(python reproduce\.py|rs-reproduce)\b": "hours; tests/reproduction/test_reproduce.py",
    r"python examples/": "tests/documentation/test_examples.py",
}
IS_COMMAND = re.compile(r"(python3? (?:-m )?[\w./]+|rs-[a-z-]+)(?= |$)")
FENCE = re.compile(r"^```(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown(text):
    """The commands of a page, in fences and in running text: pairs (whether its fence is executed, command)."""
    found = []
    for language, block in FENCE.findall(text):
        found += [(language == "bash", line) for line in block.replace("\\\n", " ").splitlines()]
    found += [(False, code) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    commands = []
    for executed, line in found:
        line = re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", " ".join(line.split("  #")[0].split()))
        if IS_COMMAND.match(line):
            commands.append((executed, line))
    return commands


def declared(name):
    """The literal value of a keyword of setup() in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    (value,) = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return value


def entry_points():
    return {entry.split(" = ")[0] for entry in ast.literal_eval(declared("entry_points"))["console_scripts"]}


def check(executed, command):
    """Fails for a command that nobody runs, whose program is not there, or whose arguments it does not know."""
    words = shlex.split(command)
    name = words.pop(0)
    if name.startswith("rs-"):
        assert name in entry_points(), f"setup.py has no {name}"
        if not words:  # only its name
            return
        program = f"{name.removeprefix('rs-')}.py"
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
        program = ""
    else:
        program = words.pop(0)
        assert (ROOT / program).is_file(), f"no file {program}"
    assert executed or any(re.match(start, command) for start in NOT_RUN), (
        f"neither run by a test nor excused: {command}"
    )
    if executed or re.search(r"\bNAME\b|\$|\.\.\.|\[", command):
        return
    if program == "train.py":
        train.parse(words)
    elif program == "certify.py":
        certify._parser().parse_args(split(words)[1])
    elif program == "analyze.py":
        analyze._parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_run_or_excused(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    in_docs = page.parent != ROOT  # test_docs.py runs the `bash` fences of docs/ alone
    for executed, command in shown(page.read_text()):
        check(executed and in_docs, command)


def test_a_command_that_nobody_runs_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "`python analyze.py runs/nowhere`\n```\n$ A=1 python train.py \\\n    --workdir=x   # why\n```\n`rs-train`"
    assert shown(page) == [
        (False, "python train.py --workdir=x"),
        (False, "python analyze.py runs/nowhere"),
        (False, "rs-train"),
    ]
    for command, message in (
        ("python analyze.py runs/nowhere", "neither run by a test nor excused"),
        ("python nowhere.py --all", "no file nowhere.py"),
        ("python -m rs_consistency.nowhere", "no module"),
        ("rs-nowhere --all", "setup.py has no rs-nowhere"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(False, command)
    with pytest.raises(SystemExit):
        check(False, "python certify.py --workdir=runs/mnist --nonsense=1")


def test_what_is_to_be_installed_or_made_is_there():
    extras = {key.value for key in declared("extras_require").keys}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    places = [*PAGES, *(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "benchmarks").glob("*.py")]
    places += [ROOT / "setup.py", *(ROOT / "rs_consistency").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    named = set()
    for path in places:
        text = path.read_text()
        for names in re.findall(r"(?:rs-consistency|['\"]\.)\[([a-z,]+)\]", text):
            named |= set(names.split(","))
            assert set(names.split(",")) <= extras, f"{path.name}: setup.py has no extra {names}"
        if path in PAGES:
            for block in [*(block for _, block in FENCE.findall(text)), *re.findall(r"`(make [^`]+)`", text)]:
                for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
                    assert target in targets, f"{path.name}: the Makefile has no {target}"
    assert named >= {"torch", "prepare", "benchmarks"}
    assert "configs" in ast.unparse(declared("packages"))  # else the commands find none in a wheel
