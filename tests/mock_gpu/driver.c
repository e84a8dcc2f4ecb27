// A libcuda.so.1 without a GPU: enough for this package and for TVM to work as on a machine with one.
// It checks what the driver would check of the arguments, and leaves the work to device.c. Kernels that
// the mock's NVRTC compiled (nvrtc.cpp) run on the CPU; of others the probe writes SM numbers, the
// loads of tests/gpu/lab.py take their time or fault, and the rest does nothing.
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned char context[64];

// What is alive and how often each function was called, for tests in one process with the driver.
enum { PRIMARY_CONTEXT, GREEN_CONTEXT, STREAM, MODULE, MEMORY, EVENT_OBJECT, GRAPH, EXECUTABLE_GRAPH,
       KINDS };
int mock_gpu_alive[KINDS];
struct calls { char name[64]; int count; struct calls *next; };
static struct calls *called;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

static CUresult made(int kind) { __sync_fetch_and_add(&mock_gpu_alive[kind], 1); return 0; }
static CUresult gone(int kind) { __sync_fetch_and_sub(&mock_gpu_alive[kind], 1); return 0; }

int mock_gpu_calls(const char *name) {
  for (struct calls *each = called; each; each = each->next)
    if (!strcmp(each->name, name)) return each->count;
  return 0;
}
void mock_gpu_reset(void) {
  memset(mock_gpu_alive, 0, sizeof mock_gpu_alive);
  first_launch_next();
  for (struct calls *each = called; each; each = each->next) each->count = 0;
}
// Counts a call; returns the code that MOCK_GPU_FAIL ("cuInit=807,cuMemAlloc=2") has for the function.
static CUresult enter(struct calls *own, const char *function) {
  pthread_mutex_lock(&counting);
  if (!*own->name) {
    strcpy(own->name, function);
    char *version = strstr(own->name, "_v");
    if (version) *version = 0;
    own->next = called;
    called = own;
  }
  own->count++;
  pthread_mutex_unlock(&counting);
  const char *list = setting("MOCK_GPU_FAIL");
  size_t length = strlen(own->name);
  for (; list && *list; list += strcspn(list, ","), list += *list == ',')
    if (!strncmp(list, own->name, length) && list[length] == '=') return atoi(list + length + 1);
  return 0;
}
#define CALL                                                    \
  do {                                                          \
    static struct calls own;                                    \
    CUresult refused = enter(&own, __func__);                   \
    if (refused) return refused;                                \
  } while (0)

CUresult cuInit(unsigned flags) {
  CALL;
  if (!setting("MOCK_GPU")) return CUDA_ERROR_NO_DEVICE;
  return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *v) { CALL; *v = number("MOCK_GPU_DRIVER", 13000); return 0; }
CUresult cuDeviceGetCount(int *n) { CALL; *n = 1; return 0; }
CUresult cuDeviceGet(CUdevice *d, int n) { CALL; *d = n; return n ? CUDA_ERROR_INVALID_DEVICE : 0; }
CUresult cuDeviceGetName(char *name, int n, CUdevice d) {
  CALL;
  strncpy(name, visible_instance() < 0 ? "NVIDIA Fake" : "NVIDIA Fake MIG 3g.71gb", n);
  return 0;
}
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) { CALL; memset(u, 7, sizeof *u); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  CALL;
  switch ((int)a) {
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = visible_sms(); break;
  case CU_DEVICE_ATTRIBUTE_MPS_ENABLED: *v = is_mps_client(); break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *v = 49152; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
  case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *v = 1 << 20; break;
  default: *v = 0;
  }
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  CALL;
  *c = (CUcontext)context;
  return made(PRIMARY_CONTEXT);
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) { CALL; return gone(PRIMARY_CONTEXT); }
CUresult cuCtxSetCurrent(CUcontext c) {
  CALL;
  return c == (CUcontext)context ? 0 : CUDA_ERROR_INVALID_CONTEXT;
}
// A resource is `count` SMs from `first` on, which lies where the driver keeps what is its own.
static unsigned *first_of(const CUdevResource *r) { return (unsigned *)r->_internal_padding; }
static void sms(CUdevResource *r, unsigned first, unsigned count) {
  memset(r, 0, sizeof *r);
  r->type = CU_DEV_RESOURCE_TYPE_SM;
  r->sm.smCount = count;
  r->sm.minSmPartitionSize = r->sm.smCoscheduledAlignment = 8;
  *first_of(r) = first;
}
CUresult cuDeviceGetDevResource(CUdevice d, CUdevResource *r, CUdevResourceType t) {
  CALL;
  if (t != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
  sms(r, 0, all_sms());
  return 0;
}
CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned *n, const CUdevResource *whole,
                                     CUdevResource *rest, unsigned flags, unsigned least) {
  CALL;
  if (flags || whole->sm.smCount != all_sms()) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  unsigned size = (least + 7) / 8 * 8, most = all_sms() / size;
  if (*n > most) *n = most;
  for (unsigned i = 0; result && i < *n; ++i) sms(&result[i], i * size, size);
  if (rest) sms(rest, *n * size, all_sms() - *n * size);
  return 0;
}
CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *d, CUdevResource *r, unsigned n) {
  CALL;
  uintptr_t count = 0, first = *first_of(r);
  for (unsigned i = 0; i < n; ++i) {
    if (*first_of(&r[i]) != first + count) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    count += r[i].sm.smCount;
  }
  *d = (CUdevResourceDesc)(first << 16 | count);
  return 0;
}
CUresult cuGreenCtxCreate(CUgreenCtx *c, CUdevResourceDesc d, CUdevice dev, unsigned flags) {
  CALL;
  if (flags != CU_GREEN_CTX_DEFAULT_STREAM) return CUDA_ERROR_INVALID_VALUE;
  struct green *green = calloc(1, sizeof *green);
  green->first = (uintptr_t)d >> 16;
  green->sms = (uintptr_t)d & 0xffff;
  *c = (CUgreenCtx)green;
  return made(GREEN_CONTEXT);
}
CUresult cuGreenCtxDestroy(CUgreenCtx c) {
  CALL;
  if (((struct green *)c)->streams) return CUDA_ERROR_INVALID_CONTEXT;  // these first
  free(c);
  return gone(GREEN_CONTEXT);
}
CUresult cuGreenCtxGetDevResource(CUgreenCtx c, CUdevResource *r, CUdevResourceType t) {
  CALL;
  sms(r, ((struct green *)c)->first, ((struct green *)c)->sms - number("MOCK_GPU_LOST", 0));
  return 0;
}
static CUresult make_stream(CUstream *s, struct green *green, unsigned flags) {
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *s = (CUstream)new_stream(green);
  return made(STREAM);
}
CUresult cuGreenCtxStreamCreate(CUstream *s, CUgreenCtx c, unsigned flags, int priority) {
  CALL;
  return make_stream(s, (struct green *)c, flags);
}
CUresult cuStreamCreate(CUstream *s, unsigned flags) { CALL; return make_stream(s, NULL, flags); }
CUresult cuStreamGetGreenCtx(CUstream s, CUgreenCtx *c) {
  CALL;
  *c = setting("MOCK_GPU_STRAY") ? NULL : (CUgreenCtx)stream_of(s)->green;
  return 0;
}
CUresult cuStreamDestroy_v2(CUstream s) {
  CALL;
  end_stream(stream_of(s));
  return gone(STREAM);
}
CUresult cuStreamSynchronize(CUstream s) {
  CALL;
  if (stream_of(s)->capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return wait_for_stream(stream_of(s));
}
CUresult cuCtxSynchronize(void) { CALL; return wait_for_all(); }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  CALL;
  CUresult code = take_memory((void **)p, n);
  return code ? code : made(MEMORY);
}
CUresult cuMemFree_v2(CUdeviceptr p) {
  CALL;
  give_memory((void *)p);
  gone(MEMORY);
  return fault();
}
CUresult cuMemGetInfo_v2(size_t *rest, size_t *all) {
  CALL;
  *rest = free_memory();
  *all = MEMORY_BYTES;
  return fault();
}
static CUresult set(CUdeviceptr p, unsigned v, size_t count, int bytes, CUstream s) {
  struct op op = {SET, .to = (void *)p, .value = v, .bytes = bytes, .values = {count}};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  CALL;
  return set(p, v, n, 4, s);
}
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) {
  CALL;
  return set(p, v, n, 1, s);
}
// The host's own memory may change once a copy from it was asked for, and is there when one to it
// returns.
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  CALL;
  struct op op = {COPY, .to = (void *)to, .from = (void *)from, .bytes = n};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, CUstream s) {
  CALL;
  if (n > 1 << 20) {  // not kept twice
    cuMemcpyAsync(to, (CUdeviceptr)from, n, s);
    return wait_for_stream(stream_of(s));
  }
  struct op op = {COPY, .to = (void *)to, .from = malloc(n), .bytes = n, .value = 1};
  memcpy((void *)op.from, from, n);
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, CUstream s) {
  CALL;
  cuMemcpyAsync((CUdeviceptr)to, from, n, s);
  return wait_for_stream(stream_of(s));
}
CUresult cuMemcpyDtoH_v2(void *h, CUdeviceptr p, size_t n) {
  CALL;
  return cuMemcpyDtoHAsync_v2(h, p, n, NULL);
}
// The size of an ELF file: its section headers come last.
static size_t elf_size(const unsigned char *image) {
  uint64_t table;
  uint16_t size, count;
  memcpy(&table, image + 0x28, 8);
  memcpy(&size, image + 0x3a, 2);
  memcpy(&count, image + 0x3c, 2);
  return table + (size_t)size * count;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  CALL;
  const unsigned char *bytes = image;
  if (strncmp(image, ".version", 8) && strncmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *m = (CUmodule)context;
  if (*bytes == '.' || bytes[0x12] != 62) return made(MODULE);  // PTX, or a cubin for a real GPU
  char path[] = "/tmp/mock-gpu-XXXXXX";  // a name of its own: dlopen takes one name for one library
  int file = mkstemp(path);
  size_t size = elf_size(bytes);
  if (file < 0 || write(file, image, size) != (ssize_t)size) return CUDA_ERROR_OUT_OF_MEMORY;
  close(file);
  *m = (CUmodule)dlopen(path, RTLD_NOW | RTLD_LOCAL);
  unlink(path);
  return *m ? made(MODULE) : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleUnload(CUmodule m) {
  CALL;
  if (m != (CUmodule)context) dlclose(m);
  return gone(MODULE);
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  CALL;
  struct function *made = calloc(1, sizeof *made);
  char symbol[300];
  snprintf(made->name, sizeof made->name, "%s", name);
  if (m != (CUmodule)context) {
    snprintf(symbol, sizeof symbol, "launch_%s", name);
    made->launch = (launcher)dlsym(m, symbol);
    snprintf(symbol, sizeof symbol, "arguments_%s", name);
    const int *arguments = dlsym(m, symbol);
    if (!made->launch || !arguments || *arguments > MOST_ARGUMENTS) return CUDA_ERROR_NOT_FOUND;
    made->arguments = *arguments;
  }
  *f = (CUfunction)made;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
static CUresult launch(struct function *f, const unsigned *grid, const unsigned *block, CUstream s,
                       void **p) {
  struct stream *stream = stream_of(s);
  struct op op = {KERNEL, .function = f};
  if (fault()) return fault();
  if (!(grid[0] * grid[1] * grid[2]) || block[0] * block[1] * block[2] > 1024)
    return CUDA_ERROR_INVALID_VALUE;
  if (!f->launch) {
    f->arguments = !strcmp(f->name, "compute") ? 2 : !strcmp(f->name, "sweep") ? 3 : 1;
    if (!strcmp(f->name, "sm_probe") && (!s || *(unsigned *)p[1] != 40000))
      return CUDA_ERROR_INVALID_VALUE;
    if (!strcmp(f->name, "sentinel") &&
        (*(unsigned *)p[1] != (1u << 21) - 1 || *(unsigned *)p[2] != 400))
      return CUDA_ERROR_INVALID_VALUE;
    if (!*(void **)p[0]) return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  memcpy(op.grid, grid, sizeof op.grid);
  memcpy(op.block, block, sizeof op.block);
  for (int i = 0; i < f->arguments; ++i) memcpy(&op.values[i], p[i], 8);
  if (stream->capturing) put(stream->capturing, &op);
  else do_later(stream, &op);
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream s, void **p, void **e) {
  CALL;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (!s || e) return CUDA_ERROR_INVALID_VALUE;  // this package never launches elsewhere
  return launch((struct function *)f, grid, block, s, p);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) {
  CALL;
  const unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  const unsigned block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return launch((struct function *)f, grid, block, c->hStream, p);
}
CUresult cuEventCreate(CUevent *e, unsigned flags) {
  CALL;
  *e = calloc(1, sizeof(struct event));
  return made(EVENT_OBJECT);
}
CUresult cuEventDestroy_v2(CUevent e) {
  CALL;
  wait_for_event((struct event *)e);
  free(e);
  return gone(EVENT_OBJECT);
}
CUresult cuEventRecord(CUevent e, CUstream s) {
  CALL;
  struct event *event = (struct event *)e;
  struct op op = {EVENT, .event = event};
  event->stream = stream_of(s);
  event->pending = 1;
  do_later(event->stream, &op);
  return fault();
}
CUresult cuEventSynchronize(CUevent e) { CALL; return wait_for_event((struct event *)e); }
CUresult cuEventElapsedTime_v2(float *ms, CUevent a, CUevent b) {
  CALL;
  struct event *from = (struct event *)a, *to = (struct event *)b;
  if (from->pending || to->pending) return fault() ? fault() : CUDA_ERROR_NOT_READY;
  *ms = to->seconds > from->seconds ? 1e3 * (to->seconds - from->seconds) : 0.005;
  return 0;
}
CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) {
  CALL;
  struct op op = {WAIT, .event = (struct event *)e};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuStreamBeginCapture_v2(CUstream s, CUstreamCaptureMode mode) {
  CALL;
  if (!s || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  stream_of(s)->capturing = calloc(1, sizeof(struct queue));
  return 0;
}
CUresult cuStreamEndCapture(CUstream s, CUgraph *g) {
  CALL;
  struct stream *stream = stream_of(s);
  if (!stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
  *g = (CUgraph)stream->capturing;
  stream->capturing = NULL;
  return made(GRAPH);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *x, CUgraph g, unsigned long long flags) {
  CALL;
  *x = (CUgraphExec)g;
  return g ? made(EXECUTABLE_GRAPH) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphLaunch(CUgraphExec x, CUstream s) {
  CALL;
  do_again(stream_of(s), (struct queue *)x);
  return fault();
}
CUresult cuGraphDestroy(CUgraph g) {
  CALL;
  forget((struct queue *)g);
  free(g);
  return gone(GRAPH);
}
CUresult cuGraphExecDestroy(CUgraphExec x) { CALL; return gone(EXECUTABLE_GRAPH); }
CUresult cuGetErrorName(CUresult code, const char **name) {
  *name = code == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
        : code == CUDA_ERROR_OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
                                             : "CUDA_ERROR_UNKNOWN";
  return 0;
}
CUresult cuGetErrorString(CUresult code, const char **text) { return cuGetErrorName(code, text); }
CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t r, void *p,
                                const cuuint64_t *d, const cuuint64_t *s, const cuuint32_t *b,
                                const cuuint32_t *e, CUtensorMapInterleave i, CUtensorMapSwizzle w,
                                CUtensorMapL2promotion l, CUtensorMapFloatOOBfill f) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
static CUresult done(void) { return 0; }  // synchronising, destroying

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
  // Of this library, which need not be among those that the whole process sees.
  void *own = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  char versioned[128];
  strcpy(versioned, name);
  *found = dlsym(own, strcat(versioned, "_v2"));
  if (!*found) *found = dlsym(own, name);
  if (!*found && !strcmp(name, "cuGraphInstantiate")) *found = (void *)cuGraphInstantiateWithFlags;
  if (!*found) *found = (void *)done;
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return 0;
}
