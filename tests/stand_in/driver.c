// A libcuda.so.1 without a GPU: enough for this package and for TVM to work as on a machine with one.
// It checks what the driver would check of the arguments, and leaves the work to device.c. Kernels that
// the stand-in NVRTC compiled (nvrtc.cpp) run on the CPU; of others the probe writes SM numbers, and
// the rest does nothing.
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned char context[64];

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = n; return n ? CUDA_ERROR_INVALID_DEVICE : 0; }
CUresult cuDeviceGetName(char *name, int n, CUdevice d) {
  strncpy(name, mig_instance() ? "NVIDIA Fake MIG 3g.71gb" : "NVIDIA Fake", n);
  return 0;
}
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) { memset(u, 7, sizeof *u); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
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
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)context; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) {
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
  if (t != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
  sms(r, 0, SMS);
  return 0;
}
CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned *n, const CUdevResource *whole,
                                     CUdevResource *rest, unsigned flags, unsigned least) {
  if (flags || whole->sm.smCount != SMS) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  unsigned size = (least + 7) / 8 * 8, most = SMS / size;
  if (*n > most) *n = most;
  for (unsigned i = 0; result && i < *n; ++i) sms(&result[i], i * size, size);
  if (rest) sms(rest, *n * size, SMS - *n * size);
  return 0;
}
CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *d, CUdevResource *r, unsigned n) {
  uintptr_t count = 0, first = *first_of(r);
  for (unsigned i = 0; i < n; ++i) {
    if (*first_of(&r[i]) != first + count) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    count += r[i].sm.smCount;
  }
  *d = (CUdevResourceDesc)(first << 16 | count);
  return 0;
}
CUresult cuGreenCtxCreate(CUgreenCtx *c, CUdevResourceDesc d, CUdevice dev, unsigned flags) {
  if (flags != CU_GREEN_CTX_DEFAULT_STREAM) return CUDA_ERROR_INVALID_VALUE;
  *c = (CUgreenCtx)d;
  return 0;
}
CUresult cuGreenCtxGetDevResource(CUgreenCtx c, CUdevResource *r, CUdevResourceType t) {
  sms(r, (unsigned)((uintptr_t)c >> 16), (uintptr_t)c & 0xffff);
  return 0;
}
static CUresult make_stream(CUstream *s, uintptr_t green, unsigned flags) {
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *s = (CUstream)new_stream(green, green >> 16, green ? green & 0xffff : visible_sms());
  return 0;
}
CUresult cuGreenCtxStreamCreate(CUstream *s, CUgreenCtx c, unsigned flags, int priority) {
  return make_stream(s, (uintptr_t)c, flags);
}
CUresult cuStreamCreate(CUstream *s, unsigned flags) { return make_stream(s, 0, flags); }
CUresult cuStreamGetGreenCtx(CUstream s, CUgreenCtx *c) {
  *c = (CUgreenCtx)stream_of(s)->green;
  return 0;
}
CUresult cuStreamDestroy_v2(CUstream s) { end_stream(stream_of(s)); return 0; }
CUresult cuStreamSynchronize(CUstream s) { return wait_for_stream(stream_of(s)); }
CUresult cuCtxSynchronize(void) { return wait_for_all(); }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) { return take_memory((void **)p, n); }
CUresult cuMemFree_v2(CUdeviceptr p) { give_memory((void *)p); return fault(); }
CUresult cuMemGetInfo_v2(size_t *rest, size_t *all) {
  *rest = free_memory();
  *all = MEMORY;
  return fault();
}
static CUresult set(CUdeviceptr p, unsigned v, size_t count, int bytes, CUstream s) {
  struct op op = {SET, .to = (void *)p, .value = v, .bytes = bytes, .values = {count}};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  return set(p, v, n, 4, s);
}
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) {
  return set(p, v, n, 1, s);
}
// The host's own memory may change once a copy from it was asked for, and is there when one to it
// returns.
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  struct op op = {COPY, .to = (void *)to, .from = (void *)from, .bytes = n};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, CUstream s) {
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
  cuMemcpyAsync((CUdeviceptr)to, from, n, s);
  return wait_for_stream(stream_of(s));
}
CUresult cuMemcpyDtoH_v2(void *h, CUdeviceptr p, size_t n) {
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
  const unsigned char *bytes = image;
  if (strncmp(image, ".version", 8) && strncmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *m = (CUmodule)context;
  if (*bytes == '.' || bytes[0x12] != 62) return 0;  // PTX, or a cubin for a real GPU
  char path[] = "/tmp/stand-in-XXXXXX";  // a name of its own: dlopen takes one name for one library
  int file = mkstemp(path);
  size_t size = elf_size(bytes);
  if (file < 0 || write(file, image, size) != (ssize_t)size) return CUDA_ERROR_OUT_OF_MEMORY;
  close(file);
  *m = (CUmodule)dlopen(path, RTLD_NOW | RTLD_LOCAL);
  unlink(path);
  return *m ? 0 : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleUnload(CUmodule m) {
  if (m != (CUmodule)context) dlclose(m);
  return 0;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
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
    f->arguments = 1;
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
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (!s || e) return CUDA_ERROR_INVALID_VALUE;  // this package never launches elsewhere
  return launch((struct function *)f, grid, block, s, p);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) {
  const unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  const unsigned block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return launch((struct function *)f, grid, block, c->hStream, p);
}
CUresult cuEventCreate(CUevent *e, unsigned flags) {
  *e = calloc(1, sizeof(struct event));
  return 0;
}
CUresult cuEventDestroy_v2(CUevent e) {
  wait_for_event((struct event *)e);
  free(e);
  return 0;
}
CUresult cuEventRecord(CUevent e, CUstream s) {
  struct event *event = (struct event *)e;
  struct op op = {EVENT, .event = event};
  event->stream = stream_of(s);
  event->pending = 1;
  do_later(event->stream, &op);
  return fault();
}
CUresult cuEventSynchronize(CUevent e) { return wait_for_event((struct event *)e); }
CUresult cuEventElapsedTime_v2(float *ms, CUevent a, CUevent b) {
  struct event *from = (struct event *)a, *to = (struct event *)b;
  if (from->pending || to->pending) return fault() ? fault() : CUDA_ERROR_NOT_READY;
  *ms = to->seconds > from->seconds ? 1e3 * (to->seconds - from->seconds) : 0.005;
  return 0;
}
CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) {
  struct op op = {WAIT, .event = (struct event *)e};
  do_later(stream_of(s), &op);
  return fault();
}
CUresult cuStreamBeginCapture_v2(CUstream s, CUstreamCaptureMode mode) {
  if (!s || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  stream_of(s)->capturing = calloc(1, sizeof(struct queue));
  return 0;
}
CUresult cuStreamEndCapture(CUstream s, CUgraph *g) {
  struct stream *stream = stream_of(s);
  if (!stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
  *g = (CUgraph)stream->capturing;
  stream->capturing = NULL;
  return 0;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *x, CUgraph g, unsigned long long flags) {
  *x = (CUgraphExec)g;
  return g ? 0 : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphLaunch(CUgraphExec x, CUstream s) {
  do_again(stream_of(s), (struct queue *)x);
  return fault();
}
CUresult cuGraphDestroy(CUgraph g) {
  forget((struct queue *)g);
  free(g);
  return 0;
}
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
