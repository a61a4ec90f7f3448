"""Launching the training scripts: torchrun, Slurm, SageMaker. docs/launch.md says which and how."""
