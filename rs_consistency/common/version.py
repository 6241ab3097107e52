"""The version of the running code, for records."""

import hashlib
import os
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_version() -> dict[str, str | None]:
    """Return the identity of the running code: `package_version`, `source_digest` and `git_commit`."""
    return {
        "code_version": package_version("rs-consistency"),
        "code_digest": source_digest(PACKAGE),
        "git_commit": git_commit(PACKAGE),
    }


def package_version(name: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # this project, run from a checkout that is not installed
        return "not installed"


def source_digest(folder: Path) -> str:
    """Return the SHA-256 of the .py files in a folder: relative paths, in order, and contents.

    A checkout and an installation from it have the same digest.
    """
    total = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        content = (folder / name).read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def git_commit(folder: Path) -> str | None:
    """Return the commit of a package's folder, with " (dirty)" if a .py file in it differs.

    Return None if the folder is in no checkout, or if git is absent, refuses or takes too long. An installed package is
    in no checkout, even if its environment is inside one.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", "*.py")
    if commit is None or changes is None:
        return None
    return commit + (" (dirty)" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if it fails. Variables of a hook must not point git at another folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            # Read-only, whatever the user's configuration says.
            ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()
