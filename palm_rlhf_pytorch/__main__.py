import sys

from palm_rlhf_pytorch.cli import main

sys.exit(main())
