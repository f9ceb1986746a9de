"""The command `edgekws`, and `python -m edgekws`."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Exit code of the command line."""
    # hashlib prefers OpenSSL's digests: 3.6 MB of library in a listener that has no other use for it. Most Pythons have their own.
    if find_spec("_sha2") or find_spec("_sha256"):
        sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]
    from edgekws.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
