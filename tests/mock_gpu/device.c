// The GPU itself, on the CPU: streams with work that is done when somebody waits for it, memory that
// the host cannot reach, kernels that may fault.
//
// Nothing is done before it must be, so a result that is read, or a clock that is stopped, without
// waiting for the right stream is seen to be wrong. Memory on the device can be read and written while
// a kernel or a copy is at work and at no other time: host code that takes a device's pointer for one
// of its own dies here, too. A kernel that reads or writes elsewhere leaves its process with an error
// for every later call.
//
// A process that reaches an MPS daemon (mps_control.py) has the SMs of its limit, and the fault of one
// client is that of all that were there.
//
// Time is the GPU's: as if all of its SMs together were as fast as four of these cores, and a part of
// them so much slower. What does nothing takes 5 microseconds.
#define _GNU_SOURCE
#include "device.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CORES 4
#define NOTHING_S 5e-6

struct block { char *start; size_t size; struct block *next; };
static struct block *blocks;
static size_t used;
static CUresult left_behind;  // by a kernel's fault
static __thread sigjmp_buf *in_kernel;
static struct stream default_stream;
static struct stream *streams = &default_stream;
// Held while anything is at work: memory is open then, and kernels keep shared memory in statics.
static pthread_mutex_t device = PTHREAD_MUTEX_INITIALIZER;

static struct timespec begun;  // this MPS client

// A path in the MPS daemon's folder, or "" where none is named.
static const char *mps_path(const char *name, char *path, size_t size) {
  const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
  *path = 0;
  if (folder) snprintf(path, size, "%s/%s", folder, name);
  return path;
}

// A process is one from its start or not at all. One that names another daemon counts as a new one, so
// that a test can play several clients.
int is_mps_client(void) {
  static char asked[sizeof((struct sockaddr_un *)0)->sun_path];
  static int found;
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  mps_path("control", address.sun_path, sizeof address.sun_path);
  if (strcmp(asked, address.sun_path)) {
    int client = socket(AF_UNIX, SOCK_STREAM, 0);
    found = *address.sun_path && !connect(client, (struct sockaddr *)&address, sizeof address);
    close(client);
    clock_gettime(CLOCK_REALTIME_COARSE, &begun);  // as files are stamped
    strcpy(asked, address.sun_path);
  }
  return found;
}

int visible_instance(void) {
  const char *shown = setting("CUDA_VISIBLE_DEVICES");
  if (!shown || strncmp(shown, MIG_UUID, strlen(MIG_UUID))) return -1;
  int place = atoi(shown + strlen(MIG_UUID)) - 1;
  return listed("MOCK_GPU_MIG", place) < 0 ? -1 : place;
}

unsigned all_sms(void) { return number("MOCK_GPU_SMS", 132); }

unsigned visible_sms(void) {
  unsigned sms = all_sms();
  long percent = is_mps_client() ? number("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", 100) : 100;
  if (visible_instance() >= 0) sms = listed("MOCK_GPU_MIG", visible_instance());
  else if (percent < 100) sms = percent * sms / 200 < 4 ? 8 : 2 * (percent * sms / 200);
  return sms - number("MOCK_GPU_LOST", 0);
}

CUresult fault(void) {
  char path[200];
  struct stat file;
  if (!left_behind && is_mps_client() && !stat(mps_path("fault", path, sizeof path), &file) &&
      (file.st_mtim.tv_sec > begun.tv_sec ||
       (file.st_mtim.tv_sec == begun.tv_sec && file.st_mtim.tv_nsec >= begun.tv_nsec)))
    left_behind = CUDA_ERROR_ILLEGAL_ADDRESS;
  return left_behind;
}

static void protect(int how) {
  for (struct block *block = blocks; block; block = block->next)
    mprotect(block->start, block->size, how);
}

struct stream *stream_of(CUstream s) {
  if (!default_stream.sms) default_stream.sms = visible_sms();
  return s ? (struct stream *)s : &default_stream;
}

struct stream *new_stream(struct green *green) {
  struct stream *made = calloc(1, sizeof *made);
  made->green = green;
  made->first = green ? green->first : 0;
  made->sms = green ? green->sms : visible_sms();
  pthread_mutex_lock(&device);
  if (green) green->streams++;
  made->next = streams;
  streams = made;
  pthread_mutex_unlock(&device);
  return made;
}

void end_stream(struct stream *stream) {
  wait_for_stream(stream);
  pthread_mutex_lock(&device);
  for (struct stream **at = &streams; *at; at = &(*at)->next)
    if (*at == stream) {
      *at = stream->next;
      if (stream->green) stream->green->streams--;
      free(stream);
      break;
    }
  pthread_mutex_unlock(&device);
}

void put(struct queue *queue, const struct op *op) {
  struct op *own = malloc(sizeof *own);
  *own = *op;
  own->next = NULL;
  *(queue->last ? &queue->last->next : &queue->first) = own;
  queue->last = own;
}

void do_later(struct stream *stream, const struct op *op) {
  pthread_mutex_lock(&device);
  put(&stream->waiting, op);
  pthread_mutex_unlock(&device);
}

void do_again(struct stream *stream, const struct queue *queue) {
  pthread_mutex_lock(&device);
  for (const struct op *op = queue->first; op; op = op->next) put(&stream->waiting, op);
  pthread_mutex_unlock(&device);
}

void forget(struct queue *queue) {
  for (struct op *op = queue->first, *next; op; op = next) {
    next = op->next;
    free(op);
  }
  *queue = (struct queue){0};
}

static double cpu_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void on_fault(int signal, siginfo_t *info, void *where) {
  if (in_kernel) siglongjmp(*in_kernel, 1);
  struct sigaction plain = {.sa_handler = SIG_DFL};  // the host's own: it dies of it
  sigaction(signal, &plain, NULL);
}

// Writes the numbers of the SMs of a stream, as the probe kernel would.
static void probe(unsigned *ids, unsigned blocks, const struct stream *stream) {
  unsigned first = stream->first, sms = stream->sms;
  if (setting("MOCK_GPU_PROBE")) sscanf(setting("MOCK_GPU_PROBE"), "%u:%u", &first, &sms);
  for (unsigned i = 0; sms && i < blocks; ++i) ids[i] = first + i % sms;
}

static int launches;

void first_launch_next(void) { launches = 0; }

// What the next kernel that does nothing takes.
static double nothing_s(void) {
  if (!setting("MOCK_GPU_LAUNCH_US")) return NOTHING_S;
  if (launches && listed("MOCK_GPU_LAUNCH_US", launches) < 0) --launches;
  return 1e-6 * listed("MOCK_GPU_LAUNCH_US", launches++);
}

static void leave_fault(void) {
  char path[200];
  left_behind = CUDA_ERROR_ILLEGAL_ADDRESS;
  if (is_mps_client()) fclose(fopen(mps_path("fault", path, sizeof path), "w"));
}

// What a kernel takes whose code is a real GPU's; see lab.py for the last three.
static double idle(const struct op *op, const struct stream *stream) {
  const char *name = op->function->name;
  if (!strcmp(name, "sm_probe")) probe((unsigned *)op->values[0], op->grid[0], stream);
  else if (!strcmp(name, "compute"))
    return (unsigned)op->values[1] * 32e-9 * op->grid[0] * op->block[0] / 256 / stream->sms;
  else if (!strcmp(name, "sweep"))
    return 16e-12 * (unsigned)op->values[1] * (unsigned)op->values[2];
  else if (!strcmp(name, "illegal")) leave_fault();
  else return nothing_s();
  return NOTHING_S;
}

// Runs a kernel and gives the seconds that it took.
static double run(struct op *op, const struct stream *stream) {
  struct sigaction handler = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, former;
  sigjmp_buf before;
  void *arguments[MOST_ARGUMENTS];
  double start = cpu_s();
  for (int i = 0; i < op->function->arguments; ++i) arguments[i] = &op->values[i];
  if (!op->function->launch) return idle(op, stream);
  sigaction(SIGSEGV, &handler, &former);
  if (!sigsetjmp(before, 1)) {
    in_kernel = &before;
    op->function->launch(op->grid, op->block, arguments);
  } else {
    leave_fault();
  }
  in_kernel = NULL;
  sigaction(SIGSEGV, &former, NULL);
  return (cpu_s() - start) * all_sms() / stream->sms / CORES;
}

static void finish(struct stream *stream);

static void work_off(struct op *op, struct stream *stream) {
  switch (op->kind) {
  case KERNEL: stream->seconds += run(op, stream); break;
  case COPY: memcpy(op->to, op->from, op->bytes); break;
  case SET:
    if (op->bytes == 1) memset(op->to, op->value, op->values[0]);
    else for (size_t i = 0; i < op->values[0]; ++i) ((uint32_t *)op->to)[i] = op->value;
    break;
  case EVENT:
    op->event->seconds = stream->seconds;
    op->event->pending = 0;
    break;
  case WAIT:
    if (op->event->pending) finish(op->event->stream);
    break;
  }
}

// Does what a stream has to do; the device is held and its memory open.
static void finish(struct stream *stream) {
  while (stream->waiting.first && !left_behind) {
    struct op *op = stream->waiting.first;
    stream->waiting.first = op->next;
    if (!op->next) stream->waiting.last = NULL;
    work_off(op, stream);
    if (op->kind == COPY && op->value) free((void *)op->from);  // it was kept for this copy
    free(op);
  }
}

static CUresult finish_held(struct stream *stream) {
  pthread_mutex_lock(&device);
  protect(PROT_READ | PROT_WRITE);
  if (stream) finish(stream);
  else
    for (stream = streams; stream; stream = stream->next) finish(stream);
  protect(PROT_NONE);
  pthread_mutex_unlock(&device);
  return fault();
}

CUresult wait_for_stream(struct stream *stream) { return finish_held(stream); }
CUresult wait_for_event(struct event *event) {
  return event->pending ? finish_held(event->stream) : fault();
}
CUresult wait_for_all(void) { return finish_held(NULL); }

CUresult take_memory(void **p, size_t bytes) {
  struct block *block = malloc(sizeof *block);
  block->size = (bytes + 4095) / 4096 * 4096 + !bytes * 4096;
  if (fault()) return fault();
  if (used + block->size > MEMORY_BYTES) return CUDA_ERROR_OUT_OF_MEMORY;
  block->start = mmap(NULL, block->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (block->start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&device);
  used += block->size;
  block->next = blocks;
  blocks = block;
  pthread_mutex_unlock(&device);
  *p = block->start;
  return 0;
}

void give_memory(void *p) {
  wait_for_all();
  pthread_mutex_lock(&device);
  for (struct block **at = &blocks; *at; at = &(*at)->next)
    if ((*at)->start == (char *)p) {
      struct block *found = *at;
      *at = found->next;
      munmap(found->start, found->size);
      used -= found->size;
      free(found);
      break;
    }
  pthread_mutex_unlock(&device);
}

size_t free_memory(void) { return MEMORY_BYTES - used; }
