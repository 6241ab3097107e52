"""Which code is running: for the record of what it made."""

import hashlib
import os
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_SECONDS_FOR_GIT = 5
# Git must look at the package's folder, whatever a hook or the user set; and only look.
_GIT = ("git", "-c", "core.fsmonitor=false", "--no-optional-locks")


def code_version() -> dict[str, str | None]:
    """The running code, as records name it.

    Returns:
      `code_version`, that of the installed package, or "not installed"; `code_digest`, see `source_digest`;
      `git_commit`, see there.
    """
    return {
        "code_version": package_version("rs-consistency"),
        "code_digest": source_digest(PACKAGE),
        "git_commit": git_commit(PACKAGE),
    }


def package_version(name: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # the project itself, run from a checkout that is not installed
        return "not installed"


def source_digest(folder: Path) -> str:
    """SHA-256 of the .py files in a folder: of their relative paths, in order, and contents.

    The same for a checkout and for what was installed from it.
    """
    total = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        content = (folder / name).read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def git_commit(folder: Path) -> str | None:
    """The commit that a package's folder is checked out from, with " (dirty)" when a .py file in it differs.

    None when it is in no checkout (an installed package is not, even in an environment inside one), or when git is
    absent, refuses or takes too long.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", "*.py")
    if commit is None or changes is None:
        return None
    return commit + (" (dirty)" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*_GIT, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS_FOR_GIT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()
