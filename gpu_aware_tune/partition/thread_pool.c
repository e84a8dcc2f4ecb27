// A pool of threads for the parallel loops of kernels, in place of TVM's (see thread_pool.py).
//
// Each caller has a pool of its own. The caller does task 0 of a launch itself, then every task that
// no other thread has begun: a thread whose core is busy with another process costs the launch
// nothing but its help. Threads spin for a while without giving their core away, then sleep.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LINE 128  // bytes: two cache lines, which prefetchers fetch together

// As in TVM's c_backend_api.h.
typedef struct { void *sync_handle; int32_t num_task; } Group;
typedef int (*Lambda)(int task, Group *group, void *data);
typedef int (*Launch)(Lambda lambda, void *data, int tasks);

// Of a thread's place. The caller: IDLE or DONE -> GIVEN, GIVEN -> IDLE (does it itself),
// TAKEN -> AWAITED (sleeps), at the end -> ENDED. The thread: GIVEN -> TAKEN, TAKEN or AWAITED -> DONE.
enum { IDLE, GIVEN, TAKEN, AWAITED, DONE, ENDED };

typedef struct Pool Pool;

typedef struct {
  _Alignas(LINE) atomic_int state;
  atomic_int sleeping;
  Pool *pool;
  int task, result;
  pthread_t thread;
  atomic_int native_id;
} Place;

struct Pool {
  Lambda lambda;
  void *data;
  Group group;
  int active;  // threads that a launch uses, the caller included
  int made;    // places whose thread runs, the caller's (the first, unused) included
  atomic_int ending;
  Place *places[CPU_SETSIZE];
};

static __thread Pool *mine;
static __thread int inside;  // a task: parallel loops in it are run by its thread alone
static pthread_key_t at_exit;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static Launch fallback;
static _Atomic long idle_ns = 200000, wait_ns = 200000;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

static long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void sleep_while(atomic_int *word, int value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(atomic_int *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }

// Returns whether the value changed within a time.
static int spin_while(atomic_int *word, int value, long limit_ns) {
  long end = 0;
  for (;;) {
    for (int turn = 0; turn < 32; ++turn) {
      if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
      pause_briefly();
    }
    long now = now_ns();
    if (!end) end = now + limit_ns;
    if (now >= end) return 0;
  }
}

static void rest(Place *place, int state) {
  if (spin_while(&place->state, state, idle_ns)) return;
  atomic_store(&place->sleeping, 1);  // before the state is read again, as `give` writes it before
  if (atomic_load(&place->state) == state && !atomic_load(&place->pool->ending))
    sleep_while(&place->state, state);
  atomic_store(&place->sleeping, 0);
}

static void *serve(void *argument) {
  Place *place = argument;
  Pool *pool = place->pool;
  inside = 1;
  pthread_setname_np(pthread_self(), "tune-pool");
  atomic_store(&place->native_id, (int)syscall(SYS_gettid));
  while (!atomic_load(&pool->ending)) {
    int state = atomic_load_explicit(&place->state, memory_order_acquire);
    if (state != GIVEN) {
      rest(place, state);
    } else if (atomic_compare_exchange_strong(&place->state, &state, TAKEN)) {
      place->result = pool->lambda(place->task, &pool->group, pool->data);
      if (atomic_exchange(&place->state, DONE) == AWAITED) wake(&place->state);
    }
  }
  return NULL;
}

static void give(Place *place) {
  atomic_store(&place->state, GIVEN);
  if (atomic_load(&place->sleeping)) wake(&place->state);
}

// Does a task that its thread has not begun, or waits until that has done it.
static int collect(Place *place) {
  Pool *pool = place->pool;
  int state = GIVEN;
  if (atomic_compare_exchange_strong(&place->state, &state, IDLE))
    return pool->lambda(place->task, &pool->group, pool->data);
  if (!spin_while(&place->state, TAKEN, wait_ns)) {
    state = TAKEN;
    if (atomic_compare_exchange_strong(&place->state, &state, AWAITED))
      while (atomic_load(&place->state) == AWAITED) sleep_while(&place->state, AWAITED);
  }
  return place->result;
}

static int run_alone(Lambda lambda, void *data, int tasks) {
  Group group = {NULL, tasks > 1 ? tasks : 1};
  int failed = 0;
  for (int task = 0; task < group.num_task; ++task) failed |= lambda(task, &group, data);
  return failed ? -1 : 0;
}

// What kernels call for a parallel loop, as TVMBackendParallelLaunch; 0 tasks: one for each thread.
EXPORT int tune_pool_launch(Lambda lambda, void *data, int tasks) {
  Pool *pool = mine;
  if (inside) return run_alone(lambda, data, tasks);
  if (!pool) return fallback ? fallback(lambda, data, tasks) : run_alone(lambda, data, tasks);
  if (pool->active == 1) return run_alone(lambda, data, tasks);
  if (!tasks) tasks = pool->active;
  int shared = tasks < pool->active ? tasks : pool->active;
  pool->lambda = lambda;
  pool->data = data;
  pool->group = (Group){NULL, tasks};
  inside = 1;
  for (int task = 1; task < shared; ++task) give(pool->places[task]);
  int failed = lambda(0, &pool->group, data);
  for (int task = shared; task < tasks; ++task) failed |= lambda(task, &pool->group, data);
  for (int task = 1; task < shared; ++task) failed |= collect(pool->places[task]);
  inside = 0;
  return failed ? -1 : 0;
}

static void end_pool(void *argument) {
  Pool *pool = argument;
  atomic_store(&pool->ending, 1);
  for (int index = 1; index < pool->made; ++index) {
    Place *place = pool->places[index];
    atomic_store(&place->state, ENDED);  // no state that a thread sleeps on
    wake(&place->state);
    pthread_join(place->thread, NULL);
    free(place);
  }
  free(pool);
}

// A forked child has none of the threads; what it holds of the pool is lost.
static void forget(void) {
  mine = NULL;
  inside = 0;
  pthread_setspecific(at_exit, NULL);
}

static void prepare(void) {
  pthread_key_create(&at_exit, end_pool);
  pthread_atfork(NULL, NULL, forget);
}

static int native_id(Place *place) {
  while (!atomic_load(&place->native_id)) sched_yield();  // it has just been made
  return atomic_load(&place->native_id);
}

static int bind(pthread_t thread, int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  return pthread_setaffinity_np(thread, sizeof cores, &cores);
}

static int add_thread(Pool *pool) {
  Place *place = aligned_alloc(LINE, (sizeof(Place) + LINE - 1) / LINE * LINE);
  if (!place) return ENOMEM;
  atomic_init(&place->state, IDLE);
  atomic_init(&place->sleeping, 0);
  atomic_init(&place->native_id, 0);
  place->pool = pool;
  place->task = pool->made;
  int error = pthread_create(&place->thread, NULL, serve, place);
  if (error) {
    free(place);
    return error;
  }
  pool->places[pool->made++] = place;
  return 0;
}

// Ends the calling thread's pool.
EXPORT void tune_pool_close(void) {
  if (!mine) return;
  Pool *pool = mine;
  mine = NULL;
  pthread_setspecific(at_exit, NULL);
  end_pool(pool);
}

// Lets what this thread launches run on so many cores, a thread each, itself on the first.
// Returns 0 or an errno; then the pool is as before but for what threads are bound to.
EXPORT int tune_pool_use(int count, const int *cores) {
  if (count < 1 || count > CPU_SETSIZE) return EINVAL;
  pthread_once(&once, prepare);
  if (!mine) {
    Pool *pool = calloc(1, sizeof(Pool));
    if (!pool) return ENOMEM;
    pool->made = pool->active = 1;
    mine = pool;
    pthread_setspecific(at_exit, pool);
  }
  int error = 0;
  while (mine->made < count && !error) error = add_thread(mine);
  for (int index = 0; index < count && !error; ++index)
    error = bind(index ? mine->places[index]->thread : pthread_self(), cores[index]);
  if (!error) mine->active = count;
  return error;
}

// The native ids of the threads that a launch uses, the caller's first; returns how many, 0 without
// a pool.
EXPORT int tune_pool_threads(int *ids, int most) {
  if (!mine) return 0;
  for (int index = 0; index < mine->active && index < most; ++index)
    ids[index] = index ? native_id(mine->places[index]) : (int)syscall(SYS_gettid);
  return mine->active;
}

// Lets the kernels of a shared object that is loaded launch here; returns whether it has such.
// Threads without a pool launch as before, with TVM's.
EXPORT int tune_pool_adopt(const char *path) {
  void *object = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!object) return 0;
  void **launch = dlsym(object, "__TVMBackendParallelLaunch");
  if (launch && *launch && *launch != (void *)tune_pool_launch) {
    fallback = (Launch)*launch;
    *launch = (void *)tune_pool_launch;
  }
  dlclose(object);
  return launch != NULL;
}

// How long an idle thread spins before it sleeps.
EXPORT void tune_pool_spin(long nanoseconds) { idle_ns = nanoseconds; }
