// A libcudart.so.13 for TVM's CUDA runtime, on the mock's libcuda.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static cudaError_t is(CUresult code) { return (cudaError_t)code; }  // the numbers are the same

cudaError_t cudaGetDeviceCount(int *n) { return is(cuDeviceGetCount(n)); }
cudaError_t cudaGetDevice(int *d) { *d = 0; return 0; }
cudaError_t cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : 0; }
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  return is(cuDeviceGetAttribute(v, (CUdevice_attribute)a, d));
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA Fake");
  p->totalGlobalMem = 1ul << 32;
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *rest, size_t *all) { return is(cuMemGetInfo(rest, all)); }
cudaError_t cudaMalloc(void **p, size_t n) { return is(cuMemAlloc((CUdeviceptr *)p, n)); }
cudaError_t cudaFree(void *p) { return is(cuMemFree((CUdeviceptr)p)); }
cudaError_t cudaMallocHost(void **p, size_t n) { return posix_memalign(p, 256, n + !n) ? 2 : 0; }
cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k,
                            cudaStream_t s) {
  if (k == cudaMemcpyHostToDevice) return is(cuMemcpyHtoDAsync((CUdeviceptr)to, from, n, s));
  if (k == cudaMemcpyDeviceToHost) return is(cuMemcpyDtoHAsync(to, (CUdeviceptr)from, n, s));
  return is(cuMemcpyAsync((CUdeviceptr)to, (CUdeviceptr)from, n, s));
}
cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int e, size_t n, cudaStream_t s) {
  return cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, s);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
  return is(cuStreamCreate((CUstream *)s, flags));
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 1); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return is(cuStreamDestroy((CUstream)s)); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return is(cuStreamSynchronize((CUstream)s)); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  return is(cuStreamWaitEvent((CUstream)s, (CUevent)e, flags));
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  return is(cuStreamBeginCapture((CUstream)s, (CUstreamCaptureMode)m));
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  return is(cuStreamEndCapture((CUstream)s, (CUgraph *)g));
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long flags) {
  return is(cuGraphInstantiate((CUgraphExec *)x, (CUgraph)g, flags));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  return is(cuGraphLaunch((CUgraphExec)x, (CUstream)s));
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return is(cuGraphDestroy((CUgraph)g)); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) { return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return is(cuEventCreate((CUevent *)e, 0)); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return is(cuEventDestroy((CUevent)e)); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return is(cuEventRecord((CUevent)e, (CUstream)s));
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return is(cuEventSynchronize((CUevent)e)); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  return is(cuEventElapsedTime(ms, (CUevent)a, (CUevent)b));
}
cudaError_t cudaGetLastError(void) {
  size_t rest, all;
  return is(cuMemGetInfo(&rest, &all));
}
cudaError_t cudaPeekAtLastError(void) { return cudaGetLastError(); }
const char *cudaGetErrorName(cudaError_t e) {
  const char *name;
  cuGetErrorName((CUresult)e, &name);
  return name;
}
const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(e);
}
