"""A stand-in for ``nvidia-ml-py`` (module ``pynvml``): the same names and numbers, readings from STANDIN_NVML.

That is JSON: ``{"init": "NVML_ERROR_..."}`` for a driver that does not start, else ``{"driver", "cuda", "gpus"}``. What
a card in it lacks is not supported by it, as NVML says of real ones. STANDIN_CARDS is shorter: ``name:major.minor``
with semicolons between the cards. Without either there is no driver.
"""

import json
import os
from types import SimpleNamespace

NVML_FEATURE_ENABLED = 1
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_VOLATILE_ECC = 0
NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

_state = {}


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def __str__(self):
        return f"NVML error {self.value}"


def nvmlInit():
    machine = _machine()
    if "init" in machine:
        raise NVMLError(globals()[machine["init"]])
    _state.update(machine)


def _machine():
    if "STANDIN_NVML" in os.environ:
        return json.loads(os.environ["STANDIN_NVML"])
    if "STANDIN_CARDS" not in os.environ:
        return {"init": "NVML_ERROR_LIBRARY_NOT_FOUND"}
    cards = [card.split(":") for card in os.environ["STANDIN_CARDS"].split(";") if card]
    gpus = [
        {"name": name, "sm": [int(part) for part in sm.split(".")], "total": 81559 << 20, "used": 1 << 30}
        for name, sm in cards
    ]
    return {"driver": "590.44.01", "cuda": 13010, "gpus": gpus}


def nvmlShutdown():
    _state.clear()


def _read(key):
    if not _state:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    return _state[key]


def _field(gpu, name):
    _read("gpus")
    if name not in gpu:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return gpu[name]


def nvmlSystemGetDriverVersion():
    return _read("driver")


def nvmlSystemGetCudaDriverVersion():
    return _read("cuda")


def nvmlSystemGetProcessName(pid):
    for gpu in _read("gpus"):
        for process in gpu.get("processes", ()):
            if process["pid"] == pid and "name" in process:
                return process["name"]
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def nvmlDeviceGetCount():
    return len(_read("gpus"))


def nvmlDeviceGetHandleByIndex(index):
    if _read("gpus")[index].get("lost"):
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    return _read("gpus")[index]


def nvmlDeviceGetName(handle):
    return _field(handle, "name")


def nvmlDeviceGetUUID(handle):
    return f"GPU-{next(i for i, gpu in enumerate(_read('gpus')) if gpu is handle):08x}-0000"


def nvmlDeviceGetMemoryInfo(handle):
    total, used = _field(handle, "total"), _field(handle, "used")
    return SimpleNamespace(total=total, used=used, free=total - used)


def nvmlDeviceGetCudaComputeCapability(handle):
    return tuple(_field(handle, "sm"))


def nvmlDeviceGetEccMode(handle):
    return [int(_field(handle, "ecc"))] * 2


def nvmlDeviceGetTotalEccErrors(handle, errorType, counterType):
    assert (errorType, counterType) == (NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)
    return _field(handle, "ecc_errors")


def nvmlDeviceGetMigMode(device):
    return [int(_field(device, "mig"))] * 2


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return _field(handle, "power_mw")


def nvmlDeviceGetPowerManagementDefaultLimit(handle):
    return _field(handle, "default_power_mw")


def nvmlDeviceGetComputeRunningProcesses(handle):
    return [
        SimpleNamespace(pid=process["pid"], usedGpuMemory=process.get("used"))
        for process in _field(handle, "processes")
    ]
