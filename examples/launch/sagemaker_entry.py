"""What runs on every rank of a SageMaker job: the platform's variables become arguments.

The platform's launcher calls this file under torchrun with the hyperparameters as arguments. What
it says by environment variables alone is added: SM_HP_<NAME>, unless the argument is there, and
SM_CHANNEL_TRAIN, whose parent folder holds all channels as `examples.packing` wants them.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from examples.launch.node_folders import newest_whole
from examples.smp_style import train
from examples.smp_style.arguments import make_parser


def complete_arguments(argv: list[str], environment: Mapping[str, str]) -> list[str]:
    """The script's arguments: those given, then what only the environment knows.

    Args:
        argv: of this rank.
        environment: of this rank; CHECKPOINT_DIR (of `sagemaker_job`) is the folder that the
            platform copies to S3, and back when the job starts again.
    """
    parser = make_parser()
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    added = list(argv)

    def add(option: str, value: str | None) -> None:
        if value and option not in given:
            given.add(option)
            added.extend([option, value])

    for option in parser._option_string_actions:
        if option.startswith("--"):
            add(option, environment.get(f"SM_HP_{option[2:].upper()}"))
    channel = environment.get("SM_CHANNEL_TRAIN")
    add("--training_dir", str(Path(channel).parent) if channel else None)
    checkpoints = environment.get("CHECKPOINT_DIR")
    if checkpoints and "--checkpoint_dir" not in given:
        add("--checkpoint_dir", checkpoints)
        add("--checkpoints_per_node", "1")
        newest = newest_whole(Path(checkpoints))
        add("--resume_from_checkpoint", str(newest) if newest else None)
    output = environment.get("SM_OUTPUT_DATA_DIR")
    add("--tensorboard_dir", f"{output}/tensorboard" if output else None)
    return added


if __name__ == "__main__":
    sys.exit(train.main(complete_arguments(sys.argv[1:], os.environ)))
