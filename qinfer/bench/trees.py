"""The same benchmark in two source trees, in turns: this one, and a revision's that git checks out beside it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import qinfer
from qinfer.bench.rows import ResultError, Row, read
from qinfer.errors import UnsupportedError

# Independent of the folder it runs in, so that relative paths among the options mean the same in both trees.
_PROGRAM = "import sys; sys.path.insert(0, {tree!r}); from qinfer.bench.__main__ import main; sys.exit(main())"


def here() -> Path:
    """Return the folder that this qinfer was imported from."""
    return Path(qinfer.__file__).parents[1]


@contextmanager
def base_tree(revision: str | None, folder: str | None) -> Iterator[Path]:
    """Yield the tree to compare with: a folder, or a revision, checked out for as long as it is needed.

    Raises:
        UnsupportedError: there is no such folder, no git, or no such revision.
    """
    if folder is not None:
        if not (Path(folder) / "qinfer" / "bench").is_dir():
            raise UnsupportedError(f"--base-path {folder}: there is no qinfer/bench in it")
        yield Path(folder).resolve()
        return
    if not (here() / ".git").exists():
        raise UnsupportedError(f"--base needs a git checkout, and {here()} is none; --base-path DIR takes a copy")
    with tempfile.TemporaryDirectory(prefix="qinfer-base-") as parent:
        tree = Path(parent) / "tree"
        _git("worktree", "add", "--detach", str(tree), str(revision))
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    try:
        subprocess.run(["git", *arguments], cwd=here(), capture_output=True, text=True, check=True)
    except FileNotFoundError as problem:
        raise UnsupportedError("--base needs git; --base-path DIR takes a copy of the other tree") from problem
    except subprocess.CalledProcessError as problem:
        raise UnsupportedError(f"git {' '.join(arguments)}: {problem.stderr.strip()}") from problem


def run_in_turns(trees: Sequence[Path], arguments: Sequence[str], *, rounds: int) -> list[list[Row]]:
    """Run a benchmark in every tree, then again, one process at a time, so that a drifting clock drifts for all.

    Args:
        trees: folders with a `qinfer`.
        arguments: of `python -m qinfer.bench`.
        rounds: how often each tree runs.

    Returns:
        The rows of each tree, of all rounds.

    Raises:
        ResultError: the benchmark fails in a tree.
    """
    rows: list[list[Row]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory(prefix="qinfer-turns-") as folder:
        for number in range(rounds):
            for place, tree in enumerate(trees):
                file = Path(folder) / f"{number}.{place}.json"
                print(f"round {number + 1} of {rounds}: {tree}", flush=True)
                command = [sys.executable, "-c", _PROGRAM.format(tree=str(tree)), *arguments, "--json", str(file)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    told = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
                    raise ResultError(f"{' '.join(arguments)} in {tree} ended with status {done.returncode}: {told}")
                rows[place] += read(file)
    return rows
