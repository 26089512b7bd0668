"""What is kept of a check: one file that is written anew as it goes, so that whoever is cut has what there was."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

EVERY = 15.0  # seconds


class Archive:
    """A `.tar.gz` of a folder."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder, self.file = folder, file
        self._last = time.monotonic()

    def refresh(self) -> None:
        """Write it if the last time is `EVERY` seconds ago."""
        if time.monotonic() > self._last + EVERY:
            self.write()

    def write(self) -> None:
        """Write it, whole or not at all."""
        new = self.file.with_name(f".{self.file.name}.new")
        with tarfile.open(new, "w:gz", compresslevel=1) as archive:
            for path in sorted(self.folder.rglob("*")):
                # A job may take one of its files away meanwhile, or write to one while it is read.
                try:
                    entry = archive.gettarinfo(path, str(path.relative_to(self.folder)))
                    content = path.read_bytes() if path.is_file() else b""
                except FileNotFoundError:
                    continue
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        os.replace(new, self.file)
        self._last = time.monotonic()
