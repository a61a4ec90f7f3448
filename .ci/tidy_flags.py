"""Prints the flags with which clang-tidy reads host files: the build's without its warnings."""

import logging
import sysconfig

logging.disable(logging.WARNING)  # torch warns about machines with a toolkit and without a GPU

from torch.utils import cpp_extension  # noqa: E402

has_cuda = cpp_extension.CUDA_HOME is not None
paths = cpp_extension.include_paths("cuda" if has_cuda else "cpu")
paths.append(sysconfig.get_path("include"))  # csrc/python
flags = ["-std=c++20", "-Icsrc"]
flags += [flag for path in paths for flag in ("-isystem", path)]
print(" ".join(flags))
