"""A version of the package under measurement: the other side of `compare.Version`. Imports nothing before `main`."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """The package of the folder that the command names; the benchmarks of this working tree."""
    folder = sys.argv[1]
    sys.path.insert(0, folder)
    import adakd_kernels

    assert (adakd_kernels.__file__ or "").startswith(folder), f"{adakd_kernels.__file__} is not of {folder}"
    sys.path.remove(folder)

    from instruments.devices import device_of

    from .frame import error, fresh, reason, timed
    from .providers import exact, providers
    from .workloads import Workload, inputs

    for line in sys.stdin:
        task = json.loads(line)
        if "workload" in task:
            answer: dict[str, Any] = {}
            w, device = Workload(**task["workload"]), device_of(task["device"])
            x = inputs(w, device.device)
            run = providers(w, device.device)[task["provider"]].run
            try:
                expected = exact(device.device)(x, w)
                answer["error"] = error(run(fresh(x), w), expected)
                if not answer["error"] < 0.05:
                    answer["failed"] = f"error {answer['error']:.1e} against fp64"
                del expected
            except Exception as failure:  # an earlier version may lack what the benchmark calls
                answer["failed"] = reason(failure)
        else:
            copies = fresh(x)
            wall, of_threads = timed(device, lambda: run(copies, w))  # noqa: B023
            answer = {"ms": of_threads if device.device == "cpu" else wall}
        print(json.dumps(answer), flush=True)
