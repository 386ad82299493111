"""NVML as a script: the part of the `pynvml` module that we ask, over devices that a test sets."""

from types import SimpleNamespace


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({3: "Not Supported", 9: "Driver Not Loaded", 15: "GPU is lost"}.get(value))
        self.value = value


class FakeNvml:
    """Args: devices: values by question; an int under "error" is raised for every question."""

    NVML_SUCCESS = 0
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL = 52
    NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL = 59
    NVML_FI_DEV_REMAPPED_PENDING = 144
    NVML_FI_DEV_REMAPPED_FAILURE = 145
    NVML_FI_DEV_TEMPERATURE_SHUTDOWN_TLIMIT = 193
    NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT = 194
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    def __init__(self, *devices, driver=True):
        self.devices = list(devices)
        self.xids = []
        self._driver = driver

    def _of(self, handle, question):
        device = self.devices[handle]
        if "error" in device:
            raise NVMLError(device["error"])
        if question not in device:
            raise NVMLError(3)
        return device[question]

    def nvmlInit(self):
        if not self._driver:
            raise NVMLError(9)

    def nvmlDeviceGetCount(self):
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetIndex(self, handle):
        return handle

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=self._of(handle, "bus"))

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._of(handle, "temperature")

    def nvmlDeviceGetTemperatureThreshold(self, handle, which):
        return self._of(handle, "slowdown" if which else "shutdown")

    def nvmlDeviceGetMarginTemperature(self, handle):
        return self._of(handle, "margin")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._of(handle, "reasons")

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, counter):
        return self._of(handle, "uncorrected" if kind else "corrected")

    def nvmlDeviceGetRemappedRows(self, handle):
        return self._of(handle, "remapped")

    def nvmlDeviceGetPcieReplayCounter(self, handle):
        return self._of(handle, "replays")

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._of(handle, "use"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._of(handle, "energy")

    def nvmlDeviceGetFieldValues(self, handle, ids):
        fields = self._of(handle, "fields")
        return [
            SimpleNamespace(
                nvmlReturn=0 if each in fields else 3,
                valueType={230: 1, 193: 5, 194: 5}.get(each, 3),
                value=SimpleNamespace(
                    **dict.fromkeys(("uiVal", "ullVal", "siVal"), fields.get(each))
                ),
            )
            for each in ids
        ]

    def nvmlEventSetCreate(self):
        return object()

    def nvmlDeviceRegisterEvents(self, handle, types, events):
        self._of(handle, "temperature")

    def nvmlEventSetWait_v2(self, events, timeout_ms):
        if not self.xids:
            raise NVMLError(10)
        handle, xid = self.xids.pop(0)
        return SimpleNamespace(device=handle, eventType=8, eventData=xid)


def healthy(**changes):
    """Return a device as an H100 answers on a good day."""
    return {
        "bus": b"00000000:3B:00.0",
        "temperature": 55,
        "slowdown": 87,
        "shutdown": 92,
        "reasons": 0,
        "uncorrected": 0,
        "corrected": 3,
        "remapped": (0, 0, 0, 0),
        "replays": 1,
        "use": 97,
        "energy": 90_000_000,
        "fields": {52: 4, 59: 1, 230: 0},
        **changes,
    }
