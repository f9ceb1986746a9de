"""A real jtop.service over a fake tree, for tests: run by an interpreter that has jetson-stats, as root. Ends with its standard input.

jetson-stats reads /fake_sys when JTOP_TESTING is set. The folder is filled by the test; what is replaced here is the group "jtop", which
this machine need not have, and the board's description, which asks for DMI or a device tree.
"""

import os
import sys
from types import SimpleNamespace

os.environ["JTOP_TESTING"] = "1"

from jtop import service

service.getgrnam = lambda name: SimpleNamespace(gr_gid=os.getgid())
service.get_hardware = lambda: {"Model": "a fake tree", "Jetpack": "6.2"}

if __name__ == "__main__":
    server = service.JtopServer(force=False)
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.close()
