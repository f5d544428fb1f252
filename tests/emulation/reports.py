"""Reports of ThreadSanitizer in this process."""

import ctypes
import os
import tempfile

_MOST = 1 << 24


class Reports:
    """A file for the reports, which takes the place of the error output."""

    def __init__(self) -> None:
        self._file, path = tempfile.mkstemp()
        os.unlink(path)
        self._taken = 0
        ctypes.CDLL(None)["__sanitizer_set_report_fd"](ctypes.c_void_p(self._file))

    def take(self) -> str:
        """Return what was reported since the last call."""
        report = os.pread(self._file, _MOST, self._taken)
        self._taken += len(report)
        return report.decode()
