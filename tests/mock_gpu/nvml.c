// A libnvidia-ml.so.1 with one GPU, quiet unless the environment says otherwise (see device.h).
#include "device.h"
#include <stdint.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, MISSING = 6, SMALL = 7, NO_DRIVER = 9 };
enum { SLOTS = 7 };
typedef const char *device;
struct rates { unsigned gpu, memory; };
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };
struct attributes { unsigned sms, engines[5], slices[2]; unsigned long long memory_mib; };
static const char the_gpu, instances[SLOTS];
int mock_gpu_nvml_users;  // that have not shut it down again

static int slot_of(device d) { return d == &the_gpu ? -1 : (int)(d - instances); }

static int missing(const char *function) {
  const char *list = setting("MOCK_GPU_NVML_MISSING");
  size_t length = strlen(function);
  for (; list && *list; list += strcspn(list, ","), list += *list == ',')
    if (!strncmp(list, function, strcspn(list, ",")) && strcspn(list, ",") <= length) return 1;
  return 0;
}
#define CALL \
  if (missing(__func__)) return UNSUPPORTED

int nvmlInitWithFlags(unsigned flags) {
  CALL;
  if (!setting("MOCK_GPU")) return NO_DRIVER;
  ++mock_gpu_nvml_users;
  return OK;
}
int nvmlShutdown(void) { --mock_gpu_nvml_users; return OK; }
const char *nvmlErrorString(int code) {
  return code == UNSUPPORTED ? "Not Supported" : "the mock GPU refuses";
}
int nvmlDeviceGetCount_v2(unsigned *count) { CALL; *count = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *d) {
  CALL;
  *d = &the_gpu;
  return index ? INVALID : OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *d) {
  CALL;
  *d = &the_gpu;
  return strncmp(uuid, "GPU-07070707", 12) ? INVALID : OK;
}
int nvmlDeviceGetName(device d, char *name, unsigned size) {
  CALL;
  strncpy(name, slot_of(d) < 0 ? "NVIDIA Fake" : "NVIDIA Fake MIG", size);
  return OK;
}
int nvmlDeviceGetUUID(device d, char *uuid, unsigned size) {
  CALL;
  if (slot_of(d) < 0) strncpy(uuid, "GPU-07070707-0707-0707-0707-070707070707", size);
  else snprintf(uuid, size, MIG_UUID "%012d", slot_of(d) + 1);
  return OK;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
  CALL;
  strncpy(version, "580.00", size);
  return OK;
}
int nvmlDeviceGetClockInfo(device d, unsigned kind, unsigned *mhz) { CALL; *mhz = 1980; return OK; }
int nvmlDeviceGetMaxClockInfo(device d, unsigned kind, unsigned *mhz) { CALL; *mhz = 1980; return OK; }
int nvmlDeviceGetPerformanceState(device d, unsigned *state) { CALL; *state = 0; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(device d, unsigned long long *bits) {
  CALL;
  *bits = number("MOCK_GPU_THROTTLE", 0);
  return OK;
}
int nvmlDeviceGetPowerUsage(device d, unsigned *mw) { CALL; *mw = 300000; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(device d, unsigned *mw) { CALL; *mw = 700000; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(device d, unsigned long long *mj) {
  CALL;
  static unsigned long long looked;
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  looked += number("MOCK_GPU_ENERGY_MJ", 0);
  *mj = looked ? looked : 300ull * (t.tv_sec * 1000 + t.tv_nsec / 1000000);  // 300 W
  return OK;
}
int nvmlDeviceGetTemperature(device d, unsigned sensor, unsigned *celsius) { CALL; *celsius = 50; return OK; }
int nvmlDeviceGetUtilizationRates(device d, struct rates *rates) {
  CALL;
  *rates = (struct rates){50, 10};
  return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *count, struct process *found) {
  CALL;
  unsigned room = *count, listed_ones = 0;
  while (listed("MOCK_GPU_PIDS", listed_ones) >= 0) ++listed_ones;
  *count = listed_ones ? listed_ones : 1;
  if (room < *count) return SMALL;
  found[0] = (struct process){.pid = getpid()};
  for (unsigned i = 0; i < listed_ones; ++i)
    found[i] = (struct process){.pid = listed("MOCK_GPU_PIDS", i)};
  return OK;
}
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device d, unsigned *count, struct process *found) {
  CALL;
  *count = 0;
  return OK;
}
int nvmlDeviceGetMigMode(device d, unsigned *now, unsigned *next) {
  CALL;
  *now = *next = setting("MOCK_GPU_MIG") != NULL;
  return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(device d, unsigned *count) { CALL; *count = SLOTS; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device d, unsigned slot, device *found) {
  CALL;
  if (slot >= SLOTS || listed("MOCK_GPU_MIG", slot) < 0) return MISSING;
  *found = &instances[slot];
  return OK;
}
int nvmlDeviceGetAttributes_v2(device d, struct attributes *found) {
  CALL;
  *found = (struct attributes){.sms = listed("MOCK_GPU_MIG", slot_of(d)), .memory_mib = 71680};
  return OK;
}
