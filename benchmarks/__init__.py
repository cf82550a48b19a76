"""Timings of this package beside what a user could write by hand; not part of the wheel.

XLA takes its number of threads from ``NPROC`` when it starts, so it is set here, before any module
imports jax. The flags often named for this, ``--xla_cpu_multi_thread_eigen=false
intra_op_parallelism_threads=1``, are without effect on jax 0.12, which kept 1.8 cores busy.
"""

import os

os.environ["NPROC"] = "1"
