"""Sources of health signals: each against a scripted library, a recording or a real server."""

import importlib.util
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainonce.clock import FakeClock
from trainonce.errors import ConfigError, SourceError
from trainonce.fleet.health import Action
from trainonce.fleet.sources import amd, dcgm, nvml
from trainonce.fleet.sources.choose import check, open_sources
from trainonce.fleet.sources.dcgm import DcgmSource, parse_metrics
from trainonce.fleet.sources.follow import FollowedSource
from trainonce.fleet.sources.host import HostSource
from trainonce.fleet.sources.kernel_log import KernelLogSource, LogParser
from trainonce.fleet.sources.nvml import NvmlSource
from trainonce.fleet.watch import HealthWatch

HERE = Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("fake_nvml", HERE / "fake_nvml.py")
fake_nvml = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake_nvml)
FakeNvml, healthy = fake_nvml.FakeNvml, fake_nvml.healthy


@pytest.fixture
def clock():
    return FakeClock()


def worst(source, clock, looks, change=lambda i: None, every_s=10.0):
    """Let time pass over a source, and return the most urgent verdict by device."""
    watch, found = HealthWatch(), {}
    for i in range(looks):
        change(i)
        for (_, device), verdict in watch.observe(source.read()).items():
            if verdict.action >= found.get(device, verdict).action:
                found[device] = verdict
        clock.advance(every_s)
    return found


# -- NVML


def test_nvml_device_is_read_whole(clock):
    (reading,) = NvmlSource("h", clock, FakeNvml(healthy())).read()
    assert reading.to_record() == {
        "mono_s": 1000.0, "host": "h", "device": "gpu0", "temperature_c": 55, "slowdown_c": 87,
        "shutdown_c": 92, "throttled_thermal_s": 0.0, "throttled_brake_s": 0.0,
        "utilisation": 0.97, "recovery_action": 0, "lost": 0, "row_remap_failed": 0,
        "row_remap_pending": 0, "ecc_uncorrected_total": 0, "ecc_corrected_total": 3,
        "nvlink_errors_total": 5, "pcie_replays_total": 1, "energy_j": 90_000.0,
    }  # fmt: skip


def test_nvml_device_that_knows_little_is_read_as_far_as_it_goes(clock):
    (reading,) = NvmlSource("h", clock, FakeNvml({"temperature": 60})).read()
    assert reading.temperature_c == 60
    known = set(reading.to_record()) - {"mono_s", "host", "device", "temperature_c", "lost"}
    assert known == set()


def test_nvml_device_that_tells_only_how_far_its_limits_are_is_judged_by_them(clock):
    # An H100 as `nvidia-smi -q` shows it: T.Limit 50, slowdown at -2 and shutdown at -8.
    relative = healthy(temperature=36, margin=50, fields={193: -8, 194: -2, 144: 1, 145: 0})
    for name in ("slowdown", "shutdown", "remapped"):
        del relative[name]
    (reading,) = NvmlSource("h", clock, FakeNvml(relative)).read()
    assert (reading.slowdown_c, reading.shutdown_c) == (88, 94)
    assert (reading.row_remap_pending, reading.row_remap_failed) == (1, 0)


@pytest.mark.parametrize(
    ("change", "action", "says"),
    [
        ({"fields": {230: 2}}, Action.MIGRATE, "reboot the node"),
        ({"fields": {230: 6}}, Action.MIGRATE, "reset the bus"),
        ({"remapped": (1, 1, 0, 1)}, Action.MIGRATE, "could not be remapped"),
        ({"remapped": (0, 1, 1, 0)}, Action.SUSPECT, "wait for a reset"),
        ({"error": 15}, Action.MIGRATE, "lost the device"),
        ({"reasons": 0x40}, Action.SUSPECT, "slowed by thermal protection"),
        ({"reasons": 0x80}, Action.SUSPECT, "slowed by the power brake"),
        ({"reasons": 0x04}, Action.NONE, ""),  # the software power cap: every busy device has it
        ({"temperature": 86}, Action.NONE, ""),
    ],
)
def test_nvml_signals_lead_to_their_verdicts(clock, change, action, says):
    library = FakeNvml(healthy(), healthy())

    def turn_bad(i):
        if i == 3:
            library.devices[1] = healthy(**change)

    found = worst(NvmlSource("h", clock, library), clock, 60, turn_bad)
    assert found["gpu0"].action is Action.NONE
    assert found["gpu1"].action is action
    assert says in " ".join(found["gpu1"].reasons)


def test_nvml_events_reach_the_device_they_are_of(clock):
    library = FakeNvml(healthy(), healthy())
    source = NvmlSource("h", clock, library)
    library.xids += [(1, 79), (0, 13), (1, 31)]
    assert [reading.xids for reading in source.read()] == [(13,), (79, 31)]
    assert [reading.xids for reading in source.read()] == [(), ()]


@pytest.mark.parametrize(
    ("library", "says"),
    [(FakeNvml(driver=False), "Driver Not Loaded"), (FakeNvml(), "it sees no device")],
)
def test_absent_nvml_says_so(clock, library, says):
    with pytest.raises(SourceError, match=says):
        NvmlSource("h", clock, library)


def test_nvml_that_is_not_installed_says_how_to(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SourceError, match=r"pip install 'trainonce\[energy\]'"):
        NvmlSource("h", clock)


def test_the_scripted_library_has_the_names_of_the_real_one():
    pynvml = pytest.importorskip("pynvml")
    names = [name for name in vars(FakeNvml) if name.lower().startswith("nvml")]
    assert len(names) > 25
    assert [name for name in names if not hasattr(pynvml, name)] == []
    values = [name for name in names if isinstance(vars(FakeNvml)[name], int)]
    assert {n: vars(FakeNvml)[n] for n in values} == {n: getattr(pynvml, n) for n in values}


# -- AMD


class FakeAmd:
    """amdsmi as a script; "N/A" is what it writes where a device does not tell."""

    AmdSmiTemperatureType = SimpleNamespace(HOTSPOT="hotspot")
    AmdSmiTemperatureMetric = SimpleNamespace(
        CURRENT="current", CRITICAL="critical", EMERGENCY="emergency"
    )

    def __init__(self, **changes):
        self.device = {
            "current": 60, "critical": 100, "emergency": 105,
            "ecc": {"correctable_count": 1, "uncorrectable_count": 0, "deferred_count": 0},
            "pcie": {"pcie_metric": {"pcie_replay_count": 2}},
            "use": {"gfx_activity": 93, "umc_activity": "N/A", "mm_activity": "N/A"},
            "pages": [{"value": 0, "page_address": 1, "page_size": 4096, "status": "RESERVED"}],
            **changes,
        }  # fmt: skip

    def _answer(self, name):
        if isinstance(self.device[name], Exception):
            raise self.device[name]
        return self.device[name]

    def amdsmi_init(self):
        pass

    def amdsmi_get_processor_handles(self):
        return [object()]

    def amdsmi_get_temp_metric(self, handle, sensor, metric):
        return self._answer(metric)

    def amdsmi_get_gpu_total_ecc_count(self, handle):
        return self._answer("ecc")

    def amdsmi_get_pcie_info(self, handle):
        return self._answer("pcie")

    def amdsmi_get_gpu_activity(self, handle):
        return self._answer("use")

    def amdsmi_get_gpu_bad_page_info(self, handle):
        return self._answer("pages")


def test_amd_device_is_read_and_judged(clock):
    (reading,) = amd.AmdSource("h", clock, FakeAmd()).read()
    assert (reading.temperature_c, reading.slowdown_c, reading.shutdown_c) == (60, 100, 105)
    assert (reading.utilisation, reading.pcie_replays_total) == (0.93, 2)
    failing = FakeAmd(pages=[{"status": "AmdSmiMemoryPageStatus.PENDING"}])
    found = worst(amd.AmdSource("h", clock, failing), clock, 3)
    assert found["gpu0"].action is Action.SUSPECT


def test_amd_device_that_tells_nothing_hides_nothing(clock):
    silent = FakeAmd(
        current=RuntimeError("no"), ecc="N/A", pcie={"pcie_metric": {"pcie_replay_count": "N/A"}},
        use=RuntimeError("no"), pages="No bad pages found.",
    )  # fmt: skip
    silent.device["ecc"] = RuntimeError("not supported")
    (reading,) = amd.AmdSource("h", clock, silent).read()
    assert set(reading.to_record()) == {"mono_s", "host", "device", "slowdown_c", "shutdown_c"}


# -- dcgm-exporter

SHOWN = """\
# HELP DCGM_FI_DEV_GPU_TEMP GPU temperature (in C).
# TYPE DCGM_FI_DEV_GPU_TEMP gauge
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H100 80GB"} 61
DCGM_FI_DEV_GPU_TEMP{gpu="1",UUID="GPU-b",modelName="with \\"quotes\\" in it"} 64
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a"} 98
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-a"} 64000000
DCGM_FI_DEV_XID_ERRORS{gpu="0",UUID="GPU-a",err_code="31",err_msg="MMU"} 31
DCGM_FI_DEV_ROW_REMAP_FAILURE{gpu="0",UUID="GPU-a"} 0
DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{gpu="0",UUID="GPU-a"} 0
DCGM_FI_DEV_PCIE_REPLAY_COUNTER{gpu="0",UUID="GPU-a"} 5 1700000000000
DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL{gpu="0",UUID="GPU-a"} 7
go_goroutines 12
DCGM_FI_DEV_GPU_TEMP{gpu="x"} 61
DCGM_FI_DEV_GPU_TEMP{gpu="2"} NaN
DCGM_FI_DEV_GPU_TEMP{gpu="3"} hot
DCGM_FI_DEV_GPU_TEMP{gpu="4" 61
"""


class Exporter:
    """A real HTTP server on loopback that shows what the test says."""

    def __init__(self):
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(exporter.status)
                self.end_headers()
                self.wfile.write(exporter.text.encode())

            def log_message(self, *_):
                pass

        self.text, self.status = SHOWN, 200
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def exporter():
    one = Exporter()
    yield one
    one.close()


def test_exporter_is_read_over_http(clock, exporter):
    zero, one = DcgmSource(exporter.url, "gpu-1", clock).read()
    assert zero.to_record() == {
        "mono_s": 1000.0, "host": "gpu-1", "device": "gpu0", "temperature_c": 61.0,
        "utilisation": 0.98, "row_remap_failed": 0, "ecc_uncorrected_total": 0,
        "nvlink_errors_total": 7, "pcie_replays_total": 5, "energy_j": 64_000.0,
    }  # fmt: skip
    assert (one.device, one.temperature_c) == ("gpu1", 64.0)


def test_xid_that_stood_there_before_is_history_and_a_new_one_is_not(clock, exporter):
    source = DcgmSource(exporter.url, "gpu-1", clock)
    assert source.read()[0].xids == ()
    assert source.read()[0].xids == ()
    exporter.text = SHOWN.replace('err_msg="MMU"} 31', 'err_msg="MMU"} 79')
    assert source.read()[0].xids == (79,)
    assert source.read()[0].xids == ()


def test_throttling_that_the_exporter_shows_adds_up(clock, exporter):
    exporter.text = 'DCGM_FI_DEV_CLOCKS_EVENT_REASONS{gpu="0"} 64\n'
    found = worst(DcgmSource(exporter.url, "h", clock), clock, 61)
    assert found["gpu0"].action is Action.SUSPECT
    assert "slowed by thermal protection" in found["gpu0"].reasons[0]


def test_exporter_that_fails_is_told_and_can_come_back(clock, exporter):
    source = DcgmSource(exporter.url, "h", clock)
    exporter.status = 500
    with pytest.raises(SourceError, match="500"):
        source.read()
    exporter.status = 200
    assert len(source.read()) == 2
    exporter.text = "x" * (dcgm.MAX_BYTES + 1)
    with pytest.raises(SourceError, match="more than 8 MiB"):
        source.read()
    exporter.close()
    with pytest.raises(SourceError, match="is not read"):
        source.read()


@pytest.mark.parametrize("blank", [2147483632, 2147483634, 9223372036854775792, 140737488355328])
def test_value_that_dcgm_does_not_know_is_no_failed_row(blank):
    shown = f'DCGM_FI_DEV_ROW_REMAP_FAILURE{{gpu="0"}} {blank}\nDCGM_FI_DEV_GPU_TEMP{{gpu="0"}} 61'
    assert parse_metrics(shown) == {"gpu0": {"DCGM_FI_DEV_GPU_TEMP": 61.0}}


def test_devices_of_an_exporter_are_bounded():
    lines = "\n".join(f'DCGM_FI_DEV_GPU_TEMP{{gpu="{i}"}} 1' for i in range(3000))
    assert len(parse_metrics(lines)) == 1024


# -- the host


def test_host_is_read(clock, tmp_path):
    for path, text in {
        "sys/class/infiniband/mlx5_0/ports/1/counters/link_downed": "3\n",
        "sys/class/net/eth0/carrier_down_count": "2\n",
        "sys/class/net/lo/carrier_down_count": "9\n",
        "proc/pressure/memory": "some avg10=9.0 avg60=8.00 avg300=1.0 total=5\n"
        "full avg10=3.0 avg60=25.00 avg300=1.0 total=5\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    disk = tmp_path / "not" / "made" / "yet"
    source = HostSource("h", clock, disk, sys=tmp_path / "sys", proc=tmp_path / "proc")
    (reading,) = source.read()
    assert (reading.device, reading.link_downed_total) == ("", 5)
    assert 0 < reading.memory_free_share < 1
    assert 0 < reading.disk_free_share <= 1
    assert reading.memory_stalled_share == 0.25
    found = worst(source, clock, 2)
    assert "all processes waited for memory 25% of a minute" in found[""].reasons


def test_host_without_these_files_is_read_as_far_as_it_goes(clock, tmp_path):
    (reading,) = HostSource("h", clock, tmp_path, sys=tmp_path, proc=tmp_path).read()
    assert reading.link_downed_total is None
    assert reading.memory_stalled_share is None


# -- the kernel log

LINES = [
    # (line, device, what it tells); None: nothing at all
    ("NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
     "pci:0000:3b:00", 79),
    ("NVRM: Xid (PCI:0000:CB:00): 13, pid=2131, name=python3, Graphics SM Warp Exception on (GPC 7",
     "pci:0000:cb:00", 13),
    ("NVRM: Xid (PCI:0000:3b:00): 95, Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No",
     "pci:0000:3b:00", 95),
    ("NVRM: GPU at PCI:0000:3b:00: GPU-5d3f9c", None, None),
    ("NVRM: GPU at 0000:3b:00.0 has fallen off the bus.", "pci:0000:3b:00", "gpu_lost"),
    ("amdgpu 0000:c3:00.0: amdgpu: GPU reset begin!", "pci:0000:c3:00", "gpu_reset"),
    ("amdgpu 0000:c3:00.0: amdgpu: 2 uncorrectable hardware errors detected in umc block",
     "pci:0000:c3:00", "gpu_memory"),
    ("amdgpu 0000:c3:00.0: amdgpu: SMU is initialized successfully!", None, None),
    ("mce: [Hardware Error]: Machine check events logged", "", "machine_check"),
    ("EDAC MC0: 1 UE memory read error on CPU_SrcID#0", "", "host_memory"),
    ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0", None, None),
    ("pcieport 0000:3a:00.0: AER: Multiple Corrected error message received", None, None),
    ("pcieport 0000:3a:00.0: AER: Uncorrected (Fatal) error message received", "", "pcie_fatal"),
    ("mlx5_core 0000:5e:00.0 eth2: Link down", "", "link_down"),
    ("mlx5_core 0000:5e:00.0 eth2: Link up", None, None),
    ("blk_update_request: I/O error, dev sdb, sector 12345 op 0x0", "", "disk"),
    ("Out of memory: Killed process 4242 (python3) total-vm:1kB", "", "out_of_memory"),
    ("systemd[1]: Started a unit that talks about a Machine check", None, None),
    ("python3[99]: my log says GPU has fallen off the bus", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "device", "tells"), LINES)
def test_line_of_the_kernel_log_is_understood(line, device, tells):
    found = LogParser().parse([line])
    if device is None:
        assert found == {}
    elif isinstance(tells, int):
        assert found == {device: ([tells], [])}
    else:
        assert found == {device: ([], [tells])}


def test_lost_gpu_that_is_told_in_three_lines_is_found():
    lines = [
        "NVRM: The NVIDIA GPU 0000:b3:00.0",
        "NVRM: (PCI ID: 10de:26b5) installed in this system has",
        "NVRM: fallen off the bus and is not responding to commands.",
    ]
    assert LogParser().parse(lines) == {"pci:0000:b3:00": ([], ["gpu_lost"])}
    assert LogParser().parse([lines[0], "usb 1-1: new device", *lines[1:]]) == {}


def test_log_is_read_from_now_on(clock, tmp_path):
    log = tmp_path / "kmsg"
    log.write_text("4,1,1,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n")
    source = KernelLogSource("h", clock, log)
    assert source.read() == []
    with log.open("a") as file:
        file.write("4,2,2,-;NVRM: Xid (PCI:0000:3b:00): 48, pid=1\n SUBSYSTEM=pci\n")
        file.write("6,3,3,-;mlx5_core 0000:5e:00.0 eth2: Link down\n")
    gpu, host = source.read()
    assert (gpu.device, gpu.xids, gpu.kernel_faults) == ("pci:0000:3b:00", (48,), ())
    assert (host.device, host.xids, host.kernel_faults) == ("", (), ("link_down",))
    source.close()
    assert HealthWatch().observe([gpu])["h", gpu.device].action is Action.MIGRATE


def test_log_that_may_not_be_read_says_what_to_do(clock, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SourceError, match="CAP_SYSLOG"):
        KernelLogSource("h", clock)
    monkeypatch.undo()
    with pytest.raises(SourceError, match="No such file"):
        KernelLogSource("h", clock, path=tmp_path / "none")


# -- a file that grows


def test_followed_file_is_read_as_it_grows(clock, tmp_path):
    path = tmp_path / "signals.jsonl"
    source = FollowedSource(path)
    assert source.read() == []
    line = json.dumps({"mono_s": 1.0, "host": "h", "device": "gpu0", "xids": [79]})
    path.write_text(f"{line}\n{{no json\n\n{line[:20]}")
    assert [reading.xids for reading in source.read()] == [(79,)]
    assert source.num_bad == 1
    with path.open("a") as file:
        file.write(line[20:] + "\n[]\n")
    assert len(source.read()) == 1
    assert source.num_bad == 2
    path.write_text(line + "\n")  # begun anew, and shorter
    assert len(source.read()) == 1


def test_followed_line_without_an_end_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "signals.jsonl"
    path.write_bytes(b"x" * 200_000)
    source = FollowedSource(path)
    assert source.read() == []
    assert source.num_bad == 1


# -- choosing


def test_auto_takes_what_there_is_and_says_what_is_missing(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(nvml.importlib, "import_module", _nothing)
    found = open_sources(["auto"], host="h", clock=clock, disk=tmp_path)
    assert "host" in {source.name for source in found.sources}
    assert "nvidia-ml-py is not installed" in found.missing["nvml"]
    assert "amdsmi" in found.missing["amd"]


def _nothing(name):
    raise ImportError(name)


@pytest.mark.parametrize("word", ["nvidia", "dcgm:", "file:", "dcgm", ""])
def test_word_that_names_no_source_is_refused(word):
    with pytest.raises(ConfigError, match="no source of health signals"):
        check([word])
