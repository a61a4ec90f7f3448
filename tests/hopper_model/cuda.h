#pragma once

// Of a tensor map: which operand it loads, and how many rows of 128 bytes a box has.
struct CUtensorMap {
  char operand;
  int box_rows;
};
