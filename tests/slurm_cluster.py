"""A real SLURM of two nodes on this machine, for the tests marked `slurm`: up in seconds, down without a trace.

Every node is a slurmd in a network and host name of its own, as on a cluster; each claims more cores and memory than
there are, and GPUs without a device behind them, so that batch scripts run with the resources that they ask for.
Debian's packages (slurmctld slurmd slurm-client munge) and root are needed; systemd, cgroups and a database are not.

By hand:  python tests/slurm_cluster.py up FOLDER;  export SLURM_CONF=FOLDER/slurm.conf;  ...;  ... down FOLDER
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
CPUS, MEMORY_MIB, GPUS = 64, 500_000, 4  # that each node claims
PROGRAMS = {"slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare"}

_CONFIGURATION = """\
ClusterName=comir
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as its credential lives: two minutes, were it not for cred_expire.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
EnforcePartLimits=ALL
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=120
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=1000 State=UP
PartitionName=other Nodes=ALL MaxTime=INFINITE DefMemPerCPU=1000 State=UP
# Without a database no account is known, so this one refuses everybody.
PartitionName=members Nodes=ALL AllowAccounts=lab MaxTime=INFINITE DefMemPerCPU=1000 State=UP
"""


def missing_programs() -> list[str]:
    """What this machine lacks to run a cluster."""
    missing = sorted(name for name in PROGRAMS if shutil.which(name) is None)
    return missing if os.geteuid() == 0 else [*missing, "root"]


@dataclass(frozen=True)
class SlurmCluster:
    """A cluster that is up, or was: everything about it follows from its folder.

    Parameters
    ----------
    folder : Path
        State, logs and pid files; short, because a socket lies in it.
    """

    folder: Path

    # ------------------------------------------------------------------ up and down

    def start(self) -> None:
        """Bring the daemons up and wait until all nodes take jobs.

        Raises
        ------
        RuntimeError
            With the end of the logs, if that takes more than a minute; nothing is left running.
        """
        self._write_files()
        try:
            self._start_network()
            self._start_daemons()
            _wait_until(self._ready, 60, "nodes do not come up")
        except (RuntimeError, subprocess.CalledProcessError) as error:
            logs = "\n".join(self.logs())
            self.stop()
            raise RuntimeError(f"no SLURM cluster in {self.folder}: {error}\n{logs}") from error

    def stop(self) -> None:
        """Cancel all jobs, end the daemons by their pid files, and take the network away."""
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired, RuntimeError):
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
                self.run("scancel", *jobs, check=False)
            _wait_until(lambda: not self.run("squeue", "-h").strip(), 20, "jobs do not end")
        for path in sorted((self.folder / "run").glob("*.pid"), reverse=True):
            _end(path)
        for number, _ in enumerate(NODES, 1):
            _quiet("ip", "netns", "del", self._space(number))
            _quiet("ip", "link", "del", f"v{self._tag}{number}")
        _quiet("ip", "link", "del", self._bridge)

    def logs(self) -> Iterator[str]:
        """The last lines of every daemon's log."""
        for path in sorted((self.folder / "log").glob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            yield "\n".join([f"--- {path.name}", *lines[-15:]])

    # ------------------------------------------------------------------ use

    @property
    def address(self) -> str:
        """Of this machine, as the nodes reach it."""
        return f"{self._subnet}.254"

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find this cluster, and jobs to find our command; no trace of another one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "COMIR_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # A rank that a test aborts because it hangs says where.
        return {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
            "PYTHONFAULTHANDLER": "1",
        }

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, check=check, stdout=subprocess.PIPE,
            text=True, encoding="utf-8", timeout=60,
        )  # fmt: skip
        return done.stdout

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """`sbatch` with these words in the folder `cwd`; the job's number."""
        return self.run("sbatch", "--parsable", f"--chdir={cwd}", *words, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(
        self, number: str, done: Callable[[dict[str, str]], bool], seconds: float = 120
    ) -> dict[str, str]:
        """The job once `done` says so of it; fails at once when the job ended otherwise."""
        last: dict[str, str] = {}

        def reached() -> bool:
            last.update(self.job(number))
            return done(last) or last["JobState"] in _ENDED

        _wait_until(reached, seconds, lambda: f"{self._stuck(number)}\njob {number} is {last['JobState']}")
        ended = f"job {number} ended as {last['JobState']}, exit code {last['ExitCode']}"
        assert done(last), f"{self._log(number)}\n{ended}"
        return last

    def _stuck(self, number: str) -> str:
        """Of a job that does not get on: its processes, all logs, and where each rank is in Python; ends the ranks."""
        mine = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURM_JOB_ID={number}".encode()}
        lines = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name, state = re.findall(
                    r"(?:Name|State):\s*(\S+)", (path / "status").read_text(encoding="utf-8")
                )
                if state == "Z" or mine <= set((path / "environ").read_bytes().split(b"\0")):
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    lines.append(f"{path.name} {state} {name} {command[:200]}")
        for pid in self.processes(number):
            os.kill(pid, signal.SIGABRT)
        time.sleep(2)  # their last words
        return "\n".join([*lines, *self.logs(), self._log(number)])

    def _log(self, number: str) -> str:
        """The end of what a job printed."""
        path = Path(self.job(number).get("StdOut", ""))
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "no log"
        return "\n".join(text.splitlines()[-200:])

    def processes(self, job: str, rank: int | None = None) -> list[int]:
        """Process numbers of the `comir-hpc` of a job's step, of all its tasks or of one."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0"}
        wanted |= {f"SLURM_PROCID={rank}"} if rank is not None else set()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                variables = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
            # The second word, after Python: not a launcher that has the command among its arguments.
            if (
                words[1:2]
                and words[1].endswith(b"/comir-hpc")
                and {w.encode() for w in wanted} <= set(variables)
            ):
                found.append(int(path.name))
        return found

    @contextlib.contextmanager
    def frozen(self, job: str, tasks: int = 2) -> Iterator[list[int]]:
        """Keep a job's processes where they are, so that nothing depends on how fast this machine is.

        It waits until there is one process for each task; where one died, the job fails and its log is shown.
        SLURM lets a stopped process continue when it sends it a signal.
        """
        found: list[int] = []

        def all_there(_: dict[str, str]) -> bool:
            if len(found) != tasks:
                found[:] = self.processes(job)
            return len(found) == tasks

        self.wait(job, all_there, 60)
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield found
        finally:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    # ------------------------------------------------------------------ parts of start

    @property
    def _tag(self) -> str:
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:6]

    @property
    def _bridge(self) -> str:
        return f"b{self._tag}"

    @property
    def _subnet(self) -> str:
        return f"10.77.{int(self._tag, 16) % 250}"

    def _space(self, number: int) -> str:
        return f"comir-{self._tag}-{number}"

    @property
    def _port(self) -> int:
        return 20000 + int(self._tag, 16) % 10000

    def _write_files(self) -> None:
        for name in ("state", "log", "run", "munge", "dev", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munge refuses a socket that others cannot reach, and a key that they can.
        for path in (self.folder, self.folder / "run"):
            path.chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge" / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(128))
        host, address = socket.gethostname().split(".")[0], self.address
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self._subnet}.{number} Port={self._port + 1} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB} Gres=gpu:{GPUS} State=UNKNOWN"
            for number, node in enumerate(NODES, 1)
        )
        configuration = _CONFIGURATION.format(
            folder=self.folder, host=host, address=address, port=self._port, nodes=nodes
        )
        hosts = "".join(f"{self._subnet}.{number} {node}\n" for number, node in enumerate(NODES, 1))
        for number in range(GPUS):
            device = self.folder / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(1, 3))  # /dev/null under another name
        texts = {
            "slurm.conf": configuration,
            "cgroup.conf": _cgroup_configuration(),
            "gres.conf": f"AutoDetect=off\nName=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n",
            "hosts": f"127.0.0.1 localhost\n{address} {host}\n{hosts}",
        }
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    def _start_network(self) -> None:
        _do("ip", "link", "add", self._bridge, "type", "bridge")
        _do("ip", "addr", "add", f"{self.address}/24", "dev", self._bridge)
        _do("ip", "link", "set", self._bridge, "up")
        for number, _ in enumerate(NODES, 1):
            space, cable = self._space(number), f"v{self._tag}{number}"
            _do("ip", "netns", "add", space)
            _do("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _do("ip", "link", "set", cable, "master", self._bridge, "up")
            _do("ip", "-n", space, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _do("ip", "-n", space, "link", "set", device, "up")

    def _start_daemons(self) -> None:
        folder, configuration = self.folder, str(self.folder / "slurm.conf")
        _do(
            "munged",
            f"--key-file={folder}/munge/munge.key", f"--socket={folder}/run/munge.sock",
            f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/munge/munged.log",
            f"--seed-file={folder}/munge/munged.seed",
        )  # fmt: skip
        environment = self.environment
        _do("slurmctld", "-f", configuration, "-i", environment=environment)
        # Not `ip netns exec`: it mounts a fresh /sys, which hides /sys/fs/cgroup.
        script = 'hostname "$1" && mount --bind "$3" /etc/hosts && exec slurmd -f "$2"'
        for number, node in enumerate(NODES, 1):
            _do(
                "nsenter", f"--net=/run/netns/{self._space(number)}", "unshare", "--uts", "--mount",
                "sh", "-c", script, "sh", node, configuration, str(folder / "hosts"), environment=environment,
            )  # fmt: skip

    def _ready(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * 3 * len(
            NODES
        )  # in each partition


_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}


def _cgroup_configuration() -> str:
    """SLURM 22.05 opens a cgroup plugin even where nothing is to be limited; 23.02 can be told not to."""
    version = tuple(map(int, re.findall(r"\d+", _do("slurmd", "-V"))[:2]))
    if version >= (23, 2):
        return "CgroupPlugin=disabled\n"
    if Path("/sys/fs/cgroup/freezer").is_dir():
        return "CgroupPlugin=cgroup/v1\n"
    return "CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\n"


def _do(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        errors="replace", timeout=60, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ...: exit code {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def _quiet(*command: str) -> None:
    subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _end(path: Path) -> None:
    """End the daemon whose pid file this is, unless the number belongs to something else by now."""
    text = path.read_text(encoding="ascii").strip()
    name = Path("/proc") / text / "comm"
    if text and name.is_file() and name.read_text(encoding="utf-8").startswith(("slurm", "munged")):
        pid = int(text)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                os.kill(pid, number)
                _wait_until(lambda: not name.exists(), 5, "still there")
    path.unlink(missing_ok=True)


def _wait_until(done: Callable[[], bool], seconds: float, what: str | Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"{what if isinstance(what, str) else what()} after {seconds:.0f} s")
        time.sleep(0.2)


def main(arguments: Sequence[str]) -> None:
    """Up or down, by hand."""
    if len(arguments) != 2 or arguments[0] not in ("up", "down"):
        raise SystemExit(__doc__)
    missing = missing_programs()
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}")
    cluster = SlurmCluster(Path(arguments[1]).resolve())
    if arguments[0] == "up":
        cluster.start()
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    else:
        cluster.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
