# SPDX-License-Identifier: Apache-2.0
"""One of several processes of a compression; the tests start it, and so it imports no pytest."""

import json
import os
import sys

from qmoe_jax import main
from qmoe_jax.calibration import exchange
from qmoe_jax.runs import groups

if __name__ == "__main__":
    exchange.ROUND_BYTES = 1 << 14  # many rounds, of the little that there is
    stop_at, *arguments = sys.argv[1:]
    if stop_at != "-":  # the process and the number of groups after which it dies
        index, number = json.loads(stop_at)
        solve, solved = groups.solve, []

        def dying(*of):
            solved.append(of)
            if len(solved) > number:
                os._exit(9)
            return solve(*of)

        if f"--process_index={index}" in arguments:
            groups.solve = dying
    sys.argv = ["qmoe-jax", "--run_mode=compress", "--multiprocess_gpu", *arguments]
    main.run()
