"""Launching the training scripts: torchrun, Slurm, SageMaker. README.md says which and how."""
