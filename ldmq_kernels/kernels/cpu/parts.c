// See parts.h.
#include "parts.h"

#include <string.h>

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);
static int (*thread_count)(void);

// The functions of the runtime, by their names in libgomp's interface.
void ldmq_use_openmp(void *gomp_parallel, void *omp_get_thread_num, void *omp_get_num_threads) {
  memcpy(&parallel, &gomp_parallel, sizeof parallel);
  memcpy(&thread_number, &omp_get_thread_num, sizeof thread_number);
  memcpy(&thread_count, &omp_get_num_threads, sizeof thread_count);
}

typedef struct {
  void (*work)(const void *task, int64_t part, int64_t parts);
  const void *task;
  int64_t parts;
} Parts;

static void own_parts(void *given) {
  const Parts *all = given;
  for (int64_t part = thread_number(); part < all->parts; part += thread_count()) {
    all->work(all->task, part, all->parts);
  }
}

void ldmq_in_parts(void (*work)(const void *task, int64_t part, int64_t parts), const void *task, int64_t parts,
                   int64_t threads) {
  Parts all = {work, task, parts};
  if (threads > 1 && parts > 1 && parallel) {
    parallel(own_parts, &all, (unsigned)(threads < parts ? threads : parts), 0);
  } else {
    for (int64_t part = 0; part < parts; ++part) work(task, part, parts);
  }
}
