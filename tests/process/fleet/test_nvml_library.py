"""NVIDIA's bindings over a library of ours with NVML's interface: the way of real devices.

The unit tests replace the `pynvml` module. Here it is the real one, with its structures, versions
of functions and errors; only the library below it is ours, with values as an H100 gives them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "nvml_library.c"
COMPILER = shutil.which("cc")
H100 = {
    "temperature": 36, "margin": 50, "field193": -8, "field194": -2, "reasons": 0,
    "uncorrected": 0, "corrected": 3, "pending": 0, "failed": 0, "replays": 1, "use": 97,
    "field52": 4, "field59": 1, "field230": 0, "energy": 5_000_000, "power": 700_000,
}  # fmt: skip

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that builds the library, and returns its folder."""

    def run(*flags):
        folder = tmp_path_factory.mktemp("library")
        made = folder / "libnvidia-ml.so.1"
        subprocess.run([COMPILER, "-shared", "-fPIC", *flags, SOURCE, "-o", made], check=True)
        return folder

    return run


@pytest.fixture(scope="module")
def folder(build):
    return build()


class Machine:
    """A machine with such devices, whose values can be changed."""

    def __init__(self, folder, tmp_path):
        self.values = tmp_path / "values"
        self.env = {
            **os.environ, "LD_LIBRARY_PATH": str(folder), "NVML_VALUES": str(self.values),
            "TRAINONCE_HOME": str(tmp_path / "home"),
        }  # fmt: skip

    def show(self, *devices):
        lines = [f"devices {len(devices)}"] if devices else []
        for index, device in enumerate(devices):
            lines += [f"{index}.{name} {value}" for name, value in device.items()]
        new = self.values.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.values)

    def python(self, *arguments):
        return subprocess.run(
            [sys.executable, *arguments], env=self.env, capture_output=True, text=True
        )

    def health(self):
        done = self.python(
            "-m", "trainonce.cli.main", "fleet", "health", "--sources", "nvml", "--json"
        )
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def machine(folder, tmp_path):
    pytest.importorskip("pynvml")
    return Machine(folder, tmp_path)


def test_real_bindings_read_every_value(machine):
    machine.show(H100, {**H100, "slowdown": 87, "shutdown": 92})
    code, told = machine.health()
    assert (code, told["missing"]) == (0, {})
    first, second = (device["readings"][0] for device in told["devices"])
    for name in ("mono_s", "host"):
        first.pop(name)
    assert first == {
        "device": "gpu0", "temperature_c": 36, "slowdown_c": 88, "shutdown_c": 94,
        "throttled_thermal_s": 0.0, "throttled_brake_s": 0.0, "utilisation": 0.97,
        "recovery_action": 0, "lost": 0, "row_remap_failed": 0, "row_remap_pending": 0,
        "ecc_uncorrected_total": 0, "ecc_corrected_total": 3, "nvlink_errors_total": 5,
        "pcie_replays_total": 1, "energy_j": 5000.0,
    }  # fmt: skip
    assert (second["slowdown_c"], second["shutdown_c"]) == (87, 92)


def test_function_that_an_old_driver_lacks_hides_nothing_else(build, tmp_path):
    pytest.importorskip("pynvml")
    machine = Machine(build("-DOLD_DRIVER"), tmp_path)
    machine.show(H100)
    (reading,) = machine.health()[1]["devices"][0]["readings"]
    assert (reading["temperature_c"], reading["nvlink_errors_total"]) == (36, 5)
    assert "slowdown_c" not in reading


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"field230": 1}, "the driver advises to reset the GPU"),
        ({"failed": 1}, "1 memory rows could not be remapped"),
        ({"xid": 79}, "XID 79: the GPU needs a reset"),
        ({"lost": 1}, "the driver has lost the device"),
    ],
)
def test_what_real_bindings_tell_of_a_failing_device_moves_its_rank(machine, change, reason):
    machine.show(H100, {**H100, **change})
    code, told = machine.health()
    assert code == 1
    assert [device["action"] for device in told["devices"]] == ["none", "migrate"]
    assert told["devices"][1]["reasons"][0] == reason


def test_library_without_a_driver_is_missing_and_says_why(machine):
    machine.show()
    code, told = machine.health()
    assert (code, told["devices"]) == (0, [])
    assert "Driver Not Loaded" in told["missing"]["nvml"]


def test_energy_is_the_difference_of_the_devices_counters(machine):
    machine.show(H100, H100)
    program = (
        "import pathlib, sys; from trainonce.ledger.energy import open_meter, rated_power_w\n"
        "meter = open_meter(); before = meter.read_j(); path = pathlib.Path(sys.argv[1])\n"
        "path.write_text(path.read_text().replace('energy 5000000', 'energy 5007500'))\n"
        "print(meter.source, meter.read_j() - before, rated_power_w(gpus=2))"
    )
    assert machine.python("-c", program, str(machine.values)).stdout.split() == [
        "nvml", "15.0", "1400.0",
    ]  # fmt: skip
