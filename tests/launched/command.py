"""A command of coconut_ds on ranks whose memory can be counted: python -m tests.launched.command NAME ..."""

import sys

from coconut_ds.__main__ import main
from tests.launched.gloo import wait_for_gloo

if __name__ == "__main__":
    wait_for_gloo()
    sys.exit(main())
