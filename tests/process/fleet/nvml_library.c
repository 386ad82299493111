// A library with the interface of NVIDIA's management library, for machines without a device. Types
// and numbers are those of nvml.h. What it answers is read anew at each question from the file in
// NVML_VALUES: "devices 2", "0.temperature 55". A question without a value is not supported.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15 };
enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3, SIGNED_INT = 5 };

typedef struct { int index; } Device;
typedef union {
  double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; int si;
} Value;
typedef struct {
  unsigned field, scope; long long timestamp, latency_us; int type, result; Value value;
} FieldValue;
typedef struct { Device *device; unsigned long long type, data; unsigned gpu, compute; } EventData;
typedef struct {
  char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32];
} PciInfo;
typedef struct { unsigned version; int degrees; } Margin;

static Device devices[64];

static int look(const char *key, long long *value) {
  char name[64]; long long found; int hit = 0;
  FILE *file = fopen(getenv("NVML_VALUES"), "r");
  while (file && fscanf(file, "%63s %lld", name, &found) == 2)
    if (!strcmp(name, key)) { *value = found; hit = 1; }
  if (file) fclose(file);
  return hit;
}

static int ask(Device *device, const char *what, long long *value) {
  char key[64]; long long lost;
  snprintf(key, sizeof key, "%d.lost", device->index);
  if (look(key, &lost)) return GPU_IS_LOST;
  snprintf(key, sizeof key, "%d.%s", device->index, what);
  return look(key, value) ? SUCCESS : NOT_SUPPORTED;
}

static int ask_unsigned(Device *device, const char *what, unsigned *value) {
  long long found = 0; int result = ask(device, what, &found);
  *value = (unsigned)found;
  return result;
}

const char *nvmlErrorString(int result) { return result == 9 ? "Driver Not Loaded" : "Error"; }
int nvmlInitWithFlags(unsigned flags) { long long n; return look("devices", &n) ? 0 : 9; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  long long found = 0; look("devices", &found); *count = (unsigned)found;
  return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
  devices[index].index = (int)index; *device = &devices[index];
  return SUCCESS;
}
int nvmlDeviceGetIndex(Device *device, unsigned *index) {
  *index = (unsigned)device->index;
  return SUCCESS;
}
int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) {
  memset(info, 0, sizeof *info);
  info->bus = 0x3b + (unsigned)device->index;
  snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus);
  return SUCCESS;
}
int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *value) {
  return ask_unsigned(device, "temperature", value);
}
int nvmlDeviceGetTemperatureThreshold(Device *device, int which, unsigned *value) {
  return ask_unsigned(device, which == 0 ? "shutdown" : "slowdown", value);
}
#ifndef OLD_DRIVER
int nvmlDeviceGetMarginTemperature(Device *device, Margin *margin) {
  long long found = 0; int result = ask(device, "margin", &found);
  if (margin->version != (sizeof *margin | 1 << 24)) return 25;
  margin->degrees = (int)found;
  return result;
}
#endif
int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
  long long found = 0; int result = ask(device, "reasons", &found);
  *reasons = (unsigned long long)found;
  return result;
}
int nvmlDeviceGetTotalEccErrors(Device *device, int kind, int counter, unsigned long long *n) {
  long long found = 0; int result = ask(device, kind ? "uncorrected" : "corrected", &found);
  *n = (unsigned long long)found;
  return result;
}
int nvmlDeviceGetRemappedRows(Device *device, unsigned *corrected, unsigned *uncorrected,
                              unsigned *pending, unsigned *failed) {
  *corrected = *uncorrected = 0;
  ask_unsigned(device, "pending", pending);
  return ask_unsigned(device, "failed", failed);
}
int nvmlDeviceGetPcieReplayCounter(Device *device, unsigned *n) {
  return ask_unsigned(device, "replays", n);
}
int nvmlDeviceGetUtilizationRates(Device *device, unsigned use[2]) {
  use[1] = 0;
  return ask_unsigned(device, "use", &use[0]);
}
int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *milliwatts) {
  return ask_unsigned(device, "power", milliwatts);
}
int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *millijoules) {
  long long found = 0; int result = ask(device, "energy", &found);
  *millijoules = (unsigned long long)found;
  return result;
}
int nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) {
  for (int i = 0; i < count; i++) {
    char what[32]; long long found = 0;
    snprintf(what, sizeof what, "field%u", values[i].field);
    // What lies beside the value in the union is whatever was there before.
    memset(&values[i].value, 0xee, sizeof values[i].value);
    values[i].result = ask(device, what, &found);
    if (values[i].result == GPU_IS_LOST) return GPU_IS_LOST;
    if (values[i].field == 230) { values[i].type = UNSIGNED_INT; values[i].value.ui = found; }
    else if (found < 0) { values[i].type = SIGNED_INT; values[i].value.si = (int)found; }
    else { values[i].type = UNSIGNED_LONG_LONG; values[i].value.ull = found; }
  }
  return SUCCESS;
}
int nvmlEventSetCreate(void **set) { *set = devices; return SUCCESS; }
int nvmlEventSetFree(void *set) { return SUCCESS; }
int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, void *set) {
  return types == 8 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlEventSetWait_v2(void *set, EventData *data, unsigned timeout_ms) {
  static long long seen[64];  // XIDs that were handed over
  long long count = 0; nvmlDeviceGetCount_v2((unsigned *)&count);
  for (int i = 0; i < count; i++) {
    char key[32]; long long xid;
    snprintf(key, sizeof key, "%d.xid", i);
    if (look(key, &xid) && seen[i] != xid) {
      seen[i] = xid;
      *data = (EventData){&devices[i], 8, (unsigned long long)xid, ~0u, ~0u};
      return SUCCESS;
    }
  }
  return TIMEOUT;
}
