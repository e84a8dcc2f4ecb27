// A libnvidia-ml.so.1 with one quiet GPU: steady clocks, no throttling, and of processes its caller's.
// With STAND_IN_MIG set the GPU has the two MIG instances of device.h.
#include "device.h"
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, MISSING = 6, SMALL = 7 };
typedef const void *device;
struct rates { unsigned gpu, memory; };
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };
struct attributes { unsigned sms, engines[5], slices[2]; unsigned long long memory_mib; };
static const int the_gpu;
static const struct instance instances[] = MIG_INSTANCES;

static const struct instance *instance_of(device d) { return d == &the_gpu ? NULL : d; }

int nvmlInitWithFlags(unsigned flags) { return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return "the stand-in refuses"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *d) {
  *d = &the_gpu;
  return index ? INVALID : OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *d) {
  *d = &the_gpu;
  return strncmp(uuid, "GPU-07070707", 12) ? INVALID : OK;
}
int nvmlDeviceGetName(device d, char *name, unsigned size) {
  strncpy(name, instance_of(d) ? "NVIDIA Fake MIG" : "NVIDIA Fake", size);
  return OK;
}
int nvmlDeviceGetUUID(device d, char *uuid, unsigned size) {
  strncpy(uuid, instance_of(d) ? instance_of(d)->uuid : "GPU-07070707-0707-0707-0707-070707070707",
          size);
  return OK;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
  strncpy(version, "580.00", size);
  return OK;
}
int nvmlDeviceGetClockInfo(device d, unsigned kind, unsigned *mhz) { *mhz = 1980; return OK; }
int nvmlDeviceGetMaxClockInfo(device d, unsigned kind, unsigned *mhz) { *mhz = 1980; return OK; }
int nvmlDeviceGetPerformanceState(device d, unsigned *state) { *state = 0; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(device d, unsigned long long *bits) {
  *bits = 0;
  return OK;
}
int nvmlDeviceGetPowerUsage(device d, unsigned *mw) { *mw = 300000; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(device d, unsigned *mw) { *mw = 700000; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(device d, unsigned long long *mj) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  *mj = 300ull * (t.tv_sec * 1000 + t.tv_nsec / 1000000);  // 300 W
  return OK;
}
int nvmlDeviceGetTemperature(device d, unsigned sensor, unsigned *celsius) { *celsius = 50; return OK; }
int nvmlDeviceGetUtilizationRates(device d, struct rates *rates) {
  *rates = (struct rates){50, 10};
  return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *count, struct process *found) {
  unsigned room = *count;
  *count = 1;
  if (!room) return SMALL;
  *found = (struct process){.pid = getpid()};
  return OK;
}
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device d, unsigned *count, struct process *found) {
  *count = 0;
  return OK;
}
int nvmlDeviceGetMigMode(device d, unsigned *now, unsigned *next) {
  const char *wanted = getenv("STAND_IN_MIG");
  *now = *next = wanted && *wanted;
  return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(device d, unsigned *count) { *count = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device d, unsigned slot, device *found) {
  if (slot >= sizeof instances / sizeof *instances) return MISSING;
  *found = &instances[slot];
  return OK;
}
int nvmlDeviceGetAttributes_v2(device d, struct attributes *found) {
  *found = (struct attributes){.sms = instance_of(d)->sms, .memory_mib = 71680};
  return OK;
}
