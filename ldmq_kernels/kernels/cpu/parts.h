// Parts of a call on the threads of the OpenMP runtime that torch has loaded, so that both share one pool.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// The operands of a call come from Python as the first members of a struct, of eight bytes each; those from the member
// OWN on are found here.
#define TASK_OF(TYPE, ASKED, OWN) \
  TYPE task = {0};                \
  memcpy(&task, ASKED, offsetof(TYPE, OWN))

// Does work(task, part, parts) for each part, on so many threads; on this one where there is no OpenMP.
void ldmq_in_parts(void (*work)(const void *task, int64_t part, int64_t parts), const void *task, int64_t parts,
                   int64_t threads);

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
