"""Checkpoints of a run: sharded over its ranks, written beside the training, found again whole.

`CheckpointStore.save` copies what is to be saved and returns; a thread writes. All ranks write
into one partial folder on a file system that they share, each its own file; when every file is on
the disk, rank 0 writes the manifest and renames. So a rank that is killed at any moment leaves the
checkpoints before as they were. Nothing is unpickled from a file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdistill.engine.folder import (
    DamagedFolderError,
    check_files,
    dump_document,
    partial_name,
    read_manifest,
    remove_folders,
    remove_link,
    remove_partial,
    replace_folder,
    replace_link,
    restore_folders,
    write_file,
    write_manifest,
)
from fastdistill.engine.shards import HostCopy, Piece, Tensors, own_pieces, write_shard
from fastdistill.parallel import Ranks

_FORMAT = 2
_Result = TypeVar("_Result")


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    stage: str
    step: int


class CheckpointStore:
    """The checkpoints of a run, ``<stage>-<step>``, of which the newest few are kept.

    ``latest`` is a link to the one that was saved last. All ranks make the store and call its
    methods together.

    Args:
        folder: where they lie; the same for all ranks.
        stages: names of the run's stages in their order.
        keep: how many to keep of each stage.
        say: called on rank 0 with one line for each checkpoint that is refused.
        ranks: the processes of the run; one alone by default.
    """

    def __init__(
        self,
        folder: Path,
        stages: tuple[str, ...],
        keep: int,
        say: Callable[[str], None] = print,
        ranks: Ranks | None = None,
    ) -> None:
        self.folder, self.stages, self.keep, self.say = folder, stages, keep, say
        self.ranks = Ranks() if ranks is None else ranks
        self._writers = self.ranks.for_thread()
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        stage: str,
        step: int,
        tensors: Tensors,
        documents: Mapping[str, Any],
        wait: bool = False,
    ) -> Path:
        """Copy the tensors as they are now, then commit a checkpoint beside what comes next.

        The checkpoint before is waited for. After the commit the stage's oldest beyond ``keep``
        are dropped.

        Args:
            stage: one of the store's stages.
            step: number of the step in it.
            tensors: DTensors, each rank writing its shards, or plain tensors, the same on all
                ranks, each written once.
            documents: JSON documents by name; rank 0's are written.
            wait: return after the commit.

        Returns:
            Where the checkpoint will be.

        Raises:
            OSError: if the checkpoint before, or this one if waited for, could not be written on
                any rank; nothing of it is left, and the others are untouched.
            RankLostError: if a rank was lost meanwhile.
        """
        self.wait()
        path = self.folder / f"{stage}-{step:09d}"
        pieces = self._host.take(own_pieces(tensors, self.ranks))
        texts = {f"{name}.json": dump_document(value) for name, value in documents.items()}
        self._pending = self._thread.submit(self._commit, path, pieces, texts)
        if wait:
            self.wait()
        return path

    def wait(self) -> None:
        """Wait until what was saved is committed on all ranks; raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, the same on all ranks; damaged ones are named once.

        Every rank verifies a share of the files.
        """
        self.wait()
        listed = None
        if self.ranks.is_first:
            restore_folders(self.folder)
            listed = self._listed()
        for checkpoint in reversed(self.ranks.broadcast_object(listed)):
            found = self.ranks.gather_objects(self._problem(checkpoint.path))
            problem = next(filter(None, found), None)
            if problem is None:
                return checkpoint
            if self.ranks.is_first:
                self.say(f"refusing checkpoint {checkpoint.path.name}: {problem}")
        return None

    def _commit(self, path: Path, pieces: Mapping[str, Piece], texts: Mapping[str, str]) -> None:
        """Everything that the thread does, over a control group of its own."""
        writers, partial = self._writers, partial_name(path)
        try:
            _together(writers, lambda: self._begin(partial))
            entries = _together(writers, lambda: write_shard(partial, pieces, writers))
            _together(writers, lambda: self._finish(path, dict(entries), texts))
        except BaseException:
            if writers.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _begin(self, partial: Path) -> None:
        if self.ranks.is_first:
            restore_folders(self.folder)
            remove_partial(self.folder)
            partial.mkdir(parents=True)

    def _finish(
        self, path: Path, entries: dict[str, dict[str, Any]], texts: Mapping[str, str]
    ) -> None:
        if not self.ranks.is_first:
            return
        partial, latest = partial_name(path), self.folder / "latest"
        entries |= {name: write_file(partial / name, text) for name, text in texts.items()}
        write_manifest(partial, entries, _FORMAT)
        if path.exists():
            remove_link(latest)  # rather than pointing to what is being replaced
        replace_folder(partial, path)
        replace_link(latest, path.name)
        remove_folders(self._outdated(path))

    def _outdated(self, saved: Path) -> list[Path]:
        """What the stage has beyond ``keep`` up to the one just saved.

        Later ones are of a run that was resumed from before them; they are replaced in time.
        """
        listed = self._listed()
        last = next(entry for entry in listed if entry.path == saved)
        own = [entry for entry in listed if entry.stage == last.stage and entry.step <= last.step]
        return [entry.path for entry in own[: -self.keep]]

    def _problem(self, path: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint's files."""
        try:
            entries = sorted(read_manifest(path, _FORMAT).items())
            check_files(path, dict(entries[self.ranks.rank :: self.ranks.size]))
        except (DamagedFolderError, OSError) as error:
            return str(error)
        return None

    def _listed(self) -> list[Checkpoint]:
        """All committed checkpoints from the oldest to the newest."""
        found = []
        for path in self.folder.glob("*-*") if self.folder.is_dir() else ():
            match = re.fullmatch(r"(\w+)-(\d{9,})", path.name)
            if match and match[1] in self.stages and path.is_dir():
                found.append(Checkpoint(path, match[1], int(match[2])))
        return sorted(found, key=lambda entry: (self.stages.index(entry.stage), entry.step))


def _together(ranks: Ranks, action: Callable[[], _Result]) -> list[_Result]:
    """Act on every rank and gather the results; what fails on one rank fails on all."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    answers = ranks.gather_objects((result, failure and _reported(failure, ranks.rank)))
    if failure is not None:
        raise failure
    for _, reported in answers:
        if reported is not None:
            raise reported
    return [result for result, _ in answers]


def _reported(error: Exception, rank: int) -> Exception:
    """An error as the other ranks see it; a full disk stays one."""
    if isinstance(error, OSError):
        return OSError(error.errno, f"rank {rank}: {error.strerror}", error.filename)
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
