// What the mock GPU is made of; see device.c. The environment says what is wrong with it:
//
//   MOCK_GPU=1                 there is a GPU; without it the libraries find none
//   MOCK_GPU_SMS=132           how many SMs it has
//   MOCK_GPU_DRIVER=13000      the driver's version
//   MOCK_GPU_MIG=32,60         SMs of its MIG instances
//   MOCK_GPU_LOST=2            so many SMs fewer than promised, of the device and of green contexts
//   MOCK_GPU_PROBE=16:32       the probe kernel runs on 32 SMs from number 16 on; on 0 it does not run
//   MOCK_GPU_STRAY=1           streams belong to no green context
//   MOCK_GPU_LAUNCH_US=50,60   what the next kernels that do nothing take; the last one stays
//   MOCK_GPU_FAIL=cuInit=807   functions of the driver that fail, with their codes
//   MOCK_GPU_NVML_MISSING=a,b  functions of NVML that are not supported
//   MOCK_GPU_THROTTLE=4        bits of why clocks are down
//   MOCK_GPU_PIDS=10,11        processes on the GPU; by default the caller
//   MOCK_GPU_ENERGY_MJ=3000    what each look at the energy counter adds; by default 300 W
//   MOCK_GPU_MPS_BROKEN=1      the MPS daemon does not start (mps_control.py)
//
// All of them are read when they matter, so that a test may set them in its own process.
#pragma once
#include <cuda.h>
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MEMORY_BYTES (6ul << 30)  // of each process
#define MOST_ARGUMENTS 64
#define MIG_UUID "MIG-07070707-0707-0707-0707-"

// A variable of the environment, NULL where it is empty.
static inline const char *setting(const char *name) {
  const char *value = getenv(name);
  return value && *value ? value : NULL;
}
static inline long number(const char *name, long otherwise) {
  return setting(name) ? strtol(setting(name), NULL, 0) : otherwise;
}
// The number at a place of a list such as "32,60"; -1 beyond its end.
static inline long listed(const char *name, int place) {
  const char *list = setting(name);
  for (; list && place; --place) list = (list = strchr(list, ',')) ? list + 1 : NULL;
  return list ? strtol(list, NULL, 0) : -1;
}

typedef void (*launcher)(const unsigned *grid, const unsigned *block, void **arguments);
// A kernel that the mock's NVRTC compiled, or without `launch` one that does nothing.
struct function { char name[256]; launcher launch; int arguments; };

struct stream;
struct event { struct stream *stream; double seconds; int pending; };
enum kind { KERNEL, COPY, SET, EVENT, WAIT };
struct op {  // something that a stream is to do
  enum kind kind;
  struct function *function;
  unsigned grid[3], block[3];
  uint64_t values[MOST_ARGUMENTS];
  void *to;
  const void *from;
  size_t bytes;
  uint32_t value;
  struct event *event;
  struct op *next;
};
struct queue { struct op *first, *last; };
struct green { unsigned first, sms, streams; };
struct stream {
  struct green *green;
  unsigned first, sms;  // its SMs
  struct queue waiting;
  struct queue *capturing;
  double seconds;  // of its work so far
  struct stream *next;
};

struct stream *stream_of(CUstream s);  // the default one for NULL
struct stream *new_stream(struct green *green);  // NULL: on all SMs that are visible
void end_stream(struct stream *stream);
void put(struct queue *queue, const struct op *op);  // a copy of it
void do_later(struct stream *stream, const struct op *op);
void do_again(struct stream *stream, const struct queue *queue);  // all of it, later
void forget(struct queue *queue);
CUresult wait_for_stream(struct stream *stream);
CUresult wait_for_event(struct event *event);
CUresult wait_for_all(void);
CUresult fault(void);
void first_launch_next(void);  // of MOCK_GPU_LAUNCH_US
int is_mps_client(void);
int visible_instance(void);  // the place of the MIG instance this process was started in, or -1
unsigned all_sms(void);
unsigned visible_sms(void);  // all, or those of the instance or of an MPS client's limit
CUresult take_memory(void **p, size_t bytes);
void give_memory(void *p);
size_t free_memory(void);
