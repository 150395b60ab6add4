"""python -m ldmq_kernels.cli is the same as ldmq."""

from ldmq_kernels.cli import main

main()
