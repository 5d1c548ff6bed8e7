# SPDX-License-Identifier: Apache-2.0
"""Makes the page of a packed checkpoint anew."""

import sys

from qmoe_jax.report_page import page

if __name__ == "__main__":
    sys.exit(page.main(sys.argv[1:]))
