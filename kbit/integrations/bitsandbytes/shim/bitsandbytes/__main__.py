"""`python -m bitsandbytes`: what serves here, and whether it works."""

import sys

from kbit.integrations.bitsandbytes.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
