"""Files that are whole or absent."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lcm.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(target: Path, writer: object = "") -> Iterator[BinaryIO]:
    """Writes beside the target, syncs, renames: a kill at any moment leaves what was there before.

    writer: names this process where several may write one target at a time. Raises UserError where the disk is full.
    """
    partial = target.with_name(f"{target.stem}{writer}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"{target} cannot be written whole ({error.strerror}): make room on its disk or write elsewhere, then run the "
                "same command again"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name, too, survives a power cut
    os.close(folder)
