"""palm-rlhf quickstart"""

from palm_rlhf_pytorch.quickstart.run import QuickstartOptions, quickstart

OPTIONS = (QuickstartOptions,)
run = quickstart
