"""`python run.py STAGE ...`: the one command; see `chatyuan.main`."""

import gc
import sys

# Importing makes no garbage, and looking for it takes a tenth of the time; see `_host.imported`.
gc.disable()

from chatyuan.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
