"""The version of the code in a record."""

from rs_consistency.common import version
from tests.helpers import ROOT


def test_the_code_version_is_that_of_the_sources(tmp_path):
    package = tmp_path / "package"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "sub" / "a.py").write_text("")
    digest = version.source_digest(package)
    (package / "notes.txt").write_text("not code")
    assert version.source_digest(package) == digest
    (package / "sub" / "a.py").rename(package / "sub" / "b.py")
    renamed = version.source_digest(package)
    (package / "sub" / "b.py").write_text("y = 2\n")
    assert len({digest, renamed, version.source_digest(package)}) == 3
    assert version.git_commit(package) is None  # in no checkout


def test_the_commit_is_that_of_a_checkout_and_of_no_other_folder_in_it(tmp_path, monkeypatch):
    package, other = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, other):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("x = 1\n")
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "package"], [*name, "commit", "-q", "-m", "first"]):
        assert version._git(tmp_path, *arguments) is not None
    commit = version.git_commit(package)
    assert len(commit) == 40
    assert version.git_commit(other) is None
    monkeypatch.setenv("GIT_DIR", str(ROOT / "nowhere"))  # as in a hook
    assert version.git_commit(package) == commit
    (package / "__init__.py").write_text("x = 2\n")
    assert version.git_commit(package) == f"{commit} (dirty)"
    (package / "__init__.py").write_text("x = 1\n")
    (package / "new.py").write_text("")
    assert version.git_commit(package) == f"{commit} (dirty)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version.git_commit(package) is None
    assert version.code_version()["code_digest"] == version.source_digest(version.PACKAGE)
