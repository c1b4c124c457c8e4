"""`python -m diffalign`, and what `accelerate launch -m diffalign ...` starts."""

import sys

from diffalign.cli import main

sys.exit(main())
