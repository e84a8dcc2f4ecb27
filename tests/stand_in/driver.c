// A libcuda.so.1 without a GPU: enough for cuda.bindings to be called as on a machine with one.
// It checks what the driver would check of the arguments; a launch of sm_probe writes SM numbers.
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct stream { uintptr_t green; unsigned first, sms; int capturing; };
static unsigned char context[64];

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = n; return n ? CUDA_ERROR_INVALID_DEVICE : 0; }
CUresult cuDeviceGetName(char *name, int n, CUdevice d) { strncpy(name, "NVIDIA Fake", n); return 0; }
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) { memset(u, 7, sizeof *u); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  switch ((int)a) {
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
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
  sms(r, 0, 132);
  return 0;
}
CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned *n, const CUdevResource *whole,
                                     CUdevResource *rest, unsigned flags, unsigned least) {
  if (flags || whole->sm.smCount != 132) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  unsigned size = (least + 7) / 8 * 8, most = 132 / size;
  if (*n > most) *n = most;
  for (unsigned i = 0; result && i < *n; ++i) sms(&result[i], i * size, size);
  if (rest) sms(rest, *n * size, 132 - *n * size);
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
static CUresult new_stream(CUstream *s, uintptr_t green, unsigned flags) {
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  struct stream *made = calloc(1, sizeof *made);
  made->green = green;
  made->first = green >> 16;
  made->sms = green ? green & 0xffff : 132;
  *s = (CUstream)made;
  return 0;
}
CUresult cuGreenCtxStreamCreate(CUstream *s, CUgreenCtx c, unsigned flags, int priority) {
  return new_stream(s, (uintptr_t)c, flags);
}
CUresult cuStreamCreate(CUstream *s, unsigned flags) { return new_stream(s, 0, flags); }
CUresult cuStreamGetGreenCtx(CUstream s, CUgreenCtx *c) {
  *c = (CUgreenCtx)((struct stream *)s)->green;
  return 0;
}
CUresult cuStreamDestroy_v2(CUstream s) { free(s); return 0; }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) { *p = (CUdeviceptr)malloc(n); return 0; }
CUresult cuMemFree_v2(CUdeviceptr p) { free((void *)p); return 0; }
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  for (size_t i = 0; i < n; ++i) ((unsigned *)p)[i] = v;
  return 0;
}
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) {
  memset((void *)p, v, n);
  return 0;
}
CUresult cuMemcpyDtoH_v2(void *h, CUdeviceptr p, size_t n) { memcpy(h, (void *)p, n); return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  if (strncmp(image, ".version", 8) && strncmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *m = (CUmodule)context;
  return 0;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)strdup(name);
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream s, void **p, void **e) {
  struct stream *stream = (struct stream *)s;
  if (!stream || e || gx * gy * gz == 0 || bx * by * bz > 1024) return CUDA_ERROR_INVALID_VALUE;
  if (!strcmp((char *)f, "sm_probe")) {
    if (*(unsigned *)p[1] != 40000) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < gx; ++i)
      (*(unsigned **)p[0])[i] = stream->first + i % stream->sms;
  } else if (!strcmp((char *)f, "sentinel")) {
    if (*(unsigned *)p[1] != (1u << 21) - 1 || *(unsigned *)p[2] != 400) return CUDA_ERROR_INVALID_VALUE;
  } else if (!*(void **)p[0]) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  return 0;
}
CUresult cuEventCreate(CUevent *e, unsigned flags) { *e = (CUevent)context; return 0; }
CUresult cuEventElapsedTime_v2(float *ms, CUevent a, CUevent b) { *ms = 0.005f; return 0; }
CUresult cuStreamBeginCapture_v2(CUstream s, CUstreamCaptureMode mode) {
  ((struct stream *)s)->capturing = 1;
  return mode == CU_STREAM_CAPTURE_MODE_RELAXED ? 0 : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamEndCapture(CUstream s, CUgraph *g) {
  if (!((struct stream *)s)->capturing) return CUDA_ERROR_ILLEGAL_STATE;
  *g = (CUgraph)context;
  return 0;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *x, CUgraph g, unsigned long long flags) {
  *x = (CUgraphExec)context;
  return g == (CUgraph)context ? 0 : CUDA_ERROR_INVALID_VALUE;
}
static CUresult done(void) { return 0; }  // synchronising, recording, destroying

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
  char versioned[128];
  strcpy(versioned, name);
  *found = dlsym(RTLD_DEFAULT, strcat(versioned, "_v2"));
  if (!*found) *found = dlsym(RTLD_DEFAULT, name);
  if (!*found && !strcmp(name, "cuGraphInstantiate")) *found = (void *)cuGraphInstantiateWithFlags;
  if (!*found) *found = (void *)done;
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return 0;
}
