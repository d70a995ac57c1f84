"""From a plan to running ranks: on this node (`node.py`), on Slurm (`slurm.py`). Imports no torch."""
