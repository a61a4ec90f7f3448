#pragma once

// The library hides its symbols; these are what csrc/python uses from a library of its own.
#define TORCH_MOE_EP_API __attribute__((visibility("default")))
