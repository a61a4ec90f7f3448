"""Programs to run and to copy from: `pretrain` (a whole run) and `patch_your_model` (one line)."""
