"""The command `edgekws`, and `python -m edgekws`."""

import os
import sys
from importlib.util import find_spec


def main() -> int:
    """Exit code of the command line."""
    # hashlib prefers OpenSSL's digests: 3.6 MB of library in a listener that has no other use for it. Most Pythons have their own.
    if find_spec("_sha2") or find_spec("_sha256"):
        sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]
    # NumPy's threads wait for each other by spinning: beside another process a pass over the negatives took 9.4 s of CPU time, alone 0.4.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from edgekws.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
