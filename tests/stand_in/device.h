// What the stand-in GPU is made of; see device.c.
#pragma once
#include <cuda.h>
#include <stdint.h>
#include <stddef.h>

#define SMS 132
#define MEMORY (6ul << 30)  // of each process
#define MOST_ARGUMENTS 64
#define MIG_INSTANCES \
  {{"MIG-07070707-0707-0707-0707-000000000001", 32}, {"MIG-07070707-0707-0707-0707-000000000002", 60}}

typedef void (*launcher)(const unsigned *grid, const unsigned *block, void **arguments);
struct instance { const char *uuid; unsigned sms; };
// A kernel that the stand-in NVRTC compiled, or without `launch` one that does nothing.
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
struct stream {
  uintptr_t green;
  unsigned first, sms;  // its SMs
  struct queue waiting;
  struct queue *capturing;
  double seconds;  // of its work so far
  struct stream *next;
};

struct stream *stream_of(CUstream s);  // the default one for NULL
struct stream *new_stream(uintptr_t green, unsigned first, unsigned sms);
void end_stream(struct stream *stream);
void put(struct queue *queue, const struct op *op);  // a copy of it
void do_later(struct stream *stream, const struct op *op);
void do_again(struct stream *stream, const struct queue *queue);  // all of it, later
void forget(struct queue *queue);
CUresult wait_for_stream(struct stream *stream);
CUresult wait_for_event(struct event *event);
CUresult wait_for_all(void);
CUresult fault(void);
int is_mps_client(void);
const struct instance *mig_instance(void);  // that this process was started in, or NULL
unsigned visible_sms(void);  // all, or those of the instance or of an MPS client's limit
CUresult take_memory(void **p, size_t bytes);
void give_memory(void *p);
size_t free_memory(void);
