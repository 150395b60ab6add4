// See parts.h.
#include "parts.h"

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

// The function of the runtime, by its name in libgomp's interface.
void ldmq_use_openmp(void *gomp_parallel) { memcpy(&parallel, &gomp_parallel, sizeof parallel); }

typedef struct {
  void (*work)(const void *task, int64_t part, int64_t parts);
  const void *task;
  int64_t parts, next;
} Parts;

// Each thread takes the next part: one that is slower, for what else its core does, takes fewer.
static void next_parts(void *given) {
  Parts *all = given;
  for (;;) {
    const int64_t part = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
    if (part >= all->parts) return;
    all->work(all->task, part, all->parts);
  }
}

void ldmq_in_parts(void (*work)(const void *task, int64_t part, int64_t parts), const void *task, int64_t parts,
                   int64_t threads) {
  Parts all = {work, task, parts, 0};
  if (threads > 1 && parts > 1 && parallel) {
    parallel(next_parts, &all, (unsigned)(threads < parts ? threads : parts), 0);
  } else {
    for (int64_t part = 0; part < parts; ++part) work(task, part, parts);
  }
}
