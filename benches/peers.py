"""The commands of peers.sh: runs them in the current folder and prints the table.

usage: peers.py ROUNDS OFFSET     (where the guest's root partition begins)

Nothing stands between the clock and a command: no shell, no time(1). Commands joined by && are started one after the
other, and their times added.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import time

ROUNDS, ROOT = int(sys.argv[1]), sys.argv[2]
# Starts of a command in one round where it takes milliseconds.
REPEAT = 20


@dataclasses.dataclass(frozen=True)
class Command:
    line: str
    # The file to measure, which is removed before each start.
    output: str = ""
    # The image that the output must hold the same disk as.
    same_as: str = ""
    # What to make before each start.
    before: str = ""
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    task: str
    ours: Command
    theirs: Command


def flatten(task, source, ours, theirs):
    return Comparison(
        task,
        Command(f"qtk flatten {source} -o ours.qcow2 {ours}", "ours.qcow2", source),
        Command(f"qemu-img convert -m 16 -W -O qcow2 {theirs} {source} theirs.qcow2", "theirs.qcow2", source),
    )


def small(task, ours, theirs, output="", before=""):
    """A command that takes milliseconds, under both of its names."""
    theirs = Command(f"qemu-img {theirs}", output, "", before, REPEAT)
    yield Comparison(task, dataclasses.replace(theirs, line=f"qtk {ours}"), theirs)
    yield Comparison(f"{task}, drop-in", dataclasses.replace(theirs, line=f"drop-in/{theirs.line}"), theirs)


def convert(source, output, native):
    """A conversion without compression, with the result on the disk on both sides, and on neither."""
    task = f"{pathlib.Path(source).stem.replace('ubuntu', 'raw')} to {pathlib.Path(output).suffix[1:]}"
    qtk = Command(f"qtk convert {source} -o {output} -O {native}", output, source)
    line = f"qemu-img convert -O {native} {source} {output}"
    theirs = dataclasses.replace(qtk, line=line)
    unsafe = dataclasses.replace(qtk, line=f"drop-in/{line.replace('convert', 'convert -t unsafe')}")
    yield Comparison(f"{task}, both on disk", qtk, dataclasses.replace(theirs, line=f"{line} && sync {output}"))
    yield Comparison(f"{task}, neither", dataclasses.replace(qtk, line=f"{qtk.line} --no-sync"), theirs)
    yield Comparison(f"{task}, neither, drop-in", unsafe, theirs)


def copy(output, native):
    """A conversion of the raw image against a plain copy of it."""
    ours = Command(f"qtk convert ubuntu.raw -o {output} -O {native}", output, "ubuntu.raw")
    line = "cp --sparse=always ubuntu.raw new.raw"
    theirs = dataclasses.replace(ours, line=line, output="new.raw")
    durable = dataclasses.replace(theirs, line=f"{line} && sync new.raw")
    yield Comparison(f"raw to {native} v cp, both on disk", ours, durable)
    yield Comparison(f"raw to {native} v cp, neither", dataclasses.replace(ours, line=f"{ours.line} --no-sync"), theirs)


def comparisons():
    zlib, zstd = "-c -o compression_type=zlib", "-c -o compression_type=zstd"
    yield flatten("flatten a raw image, zlib", "ubuntu.raw", "-c zlib", zlib)
    yield flatten("the same, level 6", "ubuntu.raw", "-c zlib --level 6", zlib)
    yield flatten("flatten a chain of 3, zlib", "plain-2.qcow2", "-c zlib", zlib)
    yield flatten("flatten a chain on a compressed base, zlib", "packed-2.qcow2", "-c zlib", zlib)
    yield flatten("flatten a raw image, zstd", "ubuntu.raw", "-c zstd", zstd)
    yield flatten("the same, clusters of 128 KiB", "ubuntu.raw", "-c zstd --cluster-size 128K", f"{zstd},cluster_size=128K")
    yield flatten("flatten a chain of 3, zstd", "plain-2.qcow2", "-c zstd", zstd)
    line = "qemu-img convert -c -O qcow2 ubuntu.raw new.qcow2"
    theirs = Command(line, "new.qcow2", "ubuntu.raw")
    yield Comparison("convert -c, drop-in", dataclasses.replace(theirs, line=f"drop-in/{line}"), theirs)
    yield from convert("ubuntu.raw", "new.qcow2", "qcow2")
    yield from convert("plain.qcow2", "new.raw", "raw")
    yield from convert("packed.qcow2", "new.raw", "raw")
    yield from copy("new.qcow2", "qcow2")
    yield from copy("new.raw", "raw")
    overlay = "cp plain.qcow2 below.qcow2 && cp plain-1.qcow2 top.qcow2 && qemu-img rebase -u -b below.qcow2 -F qcow2 top.qcow2"
    theirs = Command("qemu-img commit -q top.qcow2 && sync below.qcow2 top.qcow2", before=overlay)
    yield Comparison("commit an overlay", dataclasses.replace(theirs, line="qtk commit top.qcow2"), theirs)
    theirs = Command("qemu-img rebase -b plain.qcow2 -F qcow2 top.qcow2 && sync top.qcow2", before="cp plain-2.qcow2 top.qcow2")
    ours = dataclasses.replace(theirs, line="qtk rebase top.qcow2 --base plain.qcow2 -F qcow2")
    yield Comparison("rebase onto the base's base", ours, theirs)
    pair = "packed.qcow2 plain.qcow2"
    yield Comparison("compare", Command(f"qtk compare {pair}"), Command(f"qemu-img compare {pair}"))
    yield from small("check", "check packed.qcow2", "check packed.qcow2")
    yield from small("check 100 GiB", "check large.qcow2", "check large.qcow2")
    yield from small("map", "map --json plain-2.qcow2", "map --output=json plain-2.qcow2")
    yield from small("measure", "measure plain-2.qcow2", "measure -O qcow2 plain-2.qcow2")
    yield from small("info", "info --chain plain-2.qcow2", "info --backing-chain plain-2.qcow2")
    create = "-b plain.qcow2 -F qcow2 new.qcow2"
    yield from small("create", f"create {create}", f"create -q -f qcow2 {create}", output="new.qcow2")
    yield from small("snapshot", "snapshot create top.qcow2 one", "snapshot -c one top.qcow2", before="cp plain.qcow2 top.qcow2")
    inject = Command("qtk inject edited.qcow2 payload /usr/local/bin/", before="cp packed.qcow2 edited.qcow2")
    debugfs = f"debugfs -w -R 'write payload /usr/local/bin/payload' 'edited.raw?offset={ROOT}' && sync edited.raw"
    yield Comparison("inject 60 MiB v debugfs", inject, Command(debugfs, before="cp --sparse=always ubuntu.raw edited.raw"))
    yield Comparison("inject 60 MiB v cp", inject, Command("cp payload copy && sync copy", "copy"))
    for task, ours, theirs in [
        ("list /usr/bin", "ls -l packed.qcow2 /usr/bin", "ls -l /usr/bin"),
        ("show /etc/fstab", "cat packed.qcow2 /etc/fstab", "cat /etc/fstab"),
    ]:
        theirs = f"qemu-img convert -O raw packed.qcow2 look.raw && debugfs -R '{theirs}' 'look.raw?offset={ROOT}'"
        yield Comparison(task, Command(f"qtk {ours}", repeat=REPEAT), Command(theirs, "look.raw"))


def prefixes(line):
    """The commands of a line, each with the line up to it."""
    parts = line.split(" && ")
    return [(" && ".join(parts[: index + 1]), shlex.split(part)) for index, part in enumerate(parts)]


def fail(line, messages):
    sys.exit(f"peers.py: {line}: {messages}")


def start(arguments, stdout):
    """Runs a command; its wall and CPU time in seconds."""
    actions = [(os.POSIX_SPAWN_DUP2, stdout.fileno(), 1), (os.POSIX_SPAWN_DUP2, stdout.fileno(), 2)]
    program = shutil.which(arguments[0])
    begin = time.monotonic_ns()
    child = os.posix_spawn(program, arguments, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    wall = (time.monotonic_ns() - begin) / 1e9
    return os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime


def prepare(command):
    if command.output:
        pathlib.Path(command.output).unlink(missing_ok=True)
    for _, arguments in prefixes(command.before) if command.before else []:
        subprocess.run(arguments, check=True)
    os.sync()


def measure(command, times):
    """Adds the times of one run to those of the line and of the lines that it begins with."""
    prepare(command)
    wall = cpu = 0
    for line, arguments in prefixes(command.line):
        with open("messages", "w+") as messages:
            code, more_wall, more_cpu = start(arguments, messages)
            if code != 0:
                fail(line, pathlib.Path("messages").read_text())
        wall, cpu = wall + more_wall, cpu + more_cpu
        times.setdefault(line, []).append((wall, cpu))


def look(command, sizes, checks, pool):
    """Finds out a command's memory and output, in a run that is not timed: a child that Python starts counts Python's memory."""
    prepare(command)
    peak = 0
    for line, arguments in prefixes(command.line):
        run = subprocess.run(["time", "-o", "usage", "-f", "%M", *arguments], capture_output=True, text=True)
        if run.returncode != 0:
            fail(line, run.stderr)
        peak = max(peak, int(pathlib.Path("usage").read_text()))
        output = pathlib.Path(command.output)
        size = output.stat().st_size if command.output and output.exists() else 0
        sizes[line] = (peak / 1024, size / 1e6)
    if command.same_as and command.output:
        kept = output.rename(f"checked-{len(checks)}{output.suffix}")
        checks.append(pool.submit(check, command, kept))


def check(command, output):
    run = subprocess.run(["qemu-img", "compare", "-q", command.same_as, output], capture_output=True, text=True)
    output.unlink()
    return None if run.returncode == 0 else (command.line, f"the output is not {command.same_as}: {run.stderr}")


def several(lines):
    """Each command once, and none that another begins with: one run measures both."""
    commands = list(dict.fromkeys(command for line in lines for command in (line.ours, line.theirs)))
    return [one for one in commands if not any(other.line.startswith(f"{one.line} && ") for other in commands)]


def run_all(commands):
    times, sizes, checks = {}, {}, []
    print("peers.py: memory and outputs", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for command in commands:
            look(command, sizes, checks, pool)
        for failure in filter(None, (check.result() for check in checks)):
            fail(*failure)
    for number in range(1, ROUNDS + 1):
        print(f"peers.py: round {number} of {ROUNDS}", file=sys.stderr)
        waiting = [[command] * command.repeat for command in commands]
        # One of each in turn, so that what slows the machine for a while slows all.
        while any(waiting):
            for rest in filter(None, waiting):
                measure(rest.pop(), times)
    return times, sizes


def seconds(value):
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def row(comparison, times, sizes):
    columns = []
    for line in (comparison.ours.line, comparison.theirs.line):
        (wall, cpu), (peak, size) = map(statistics.median, zip(*times[line])), sizes[line]
        columns.append((wall, seconds(wall), seconds(cpu), f"{peak:.0f}", f"{size:.1f}" if size else ""))
    ours, theirs = columns
    ratio = ours[0] / theirs[0]
    cells = [f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.4f}", *(f"{one} / {other}".strip(" /") for one, other in zip(ours[1:], theirs[1:]))]
    return f"| {comparison.task} | {' | '.join(cells)} |"


def main():
    lines = list(comparisons())
    times, sizes = run_all(several(lines))
    runs = f"{ROUNDS} interleaved rounds, {REPEAT} runs in each of what takes milliseconds"
    print(f"Medians of {runs}; warm page cache. Each cell is qtk / the other tool; \"ratio\" is that of the wall times.")
    print("qtk's times include the fsync of what it wrote and qemu-img's do not, except where a row says both or neither.\n")
    print("| task | ratio | wall | CPU | peak MiB | output MB |")
    print("|---|--:|--:|--:|--:|--:|")
    for line in lines:
        print(row(line, times, sizes))
    print("\n```text")
    for line in lines:
        print(f"{line.task}:\n  {line.ours.line}\n  {line.theirs.line}")
    print("```")


main()
