"""Says on standard output what kind of process it is."""

from __future__ import annotations

import json
import os
import resource
import sys

if __name__ == "__main__":
    told = {
        "telemetry": os.environ.get("ORT_DISABLE_TELEMETRY"),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "session": os.getsid(0),
        "pid": os.getpid(),
        "path": sys.path,
    }
    print(json.dumps(told))
