"""Prints one line for each file of an ext4: all that an edit elsewhere must leave alone.

usage: manifest.py mounted DIR [IGNORED]...
       manifest.py debugfs IMAGE [IGNORED]...
"""

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile


def ignored_and_parents(paths):
    ignored = {os.path.normpath(path) for path in paths}
    return ignored, {os.path.dirname(path) for path in ignored}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def mounted(top, ignored, parents):
    """By the kernel's own view of a mounted file system."""
    first_name = {}
    pending = ["/"]
    while pending:
        path = pending.pop()
        real = top + path
        info = os.lstat(real)
        kind = stat.S_IFMT(info.st_mode)
        line = [path, oct(info.st_mode), info.st_uid, info.st_gid, info.st_rdev]
        if path not in parents:
            line += [info.st_size, info.st_nlink, info.st_mtime_ns, info.st_ctime_ns]
        if kind == stat.S_IFDIR:
            names = sorted(os.listdir(real), reverse=True)
            children = [os.path.join(path, name) for name in names]
            pending += [child for child in children if child not in ignored]
        else:
            line.append(first_name.setdefault(info.st_ino, path))
        for name in sorted(os.listxattr(real, follow_symlinks=False)):
            line.append((name, os.getxattr(real, name, follow_symlinks=False).hex()))
        if kind == stat.S_IFLNK:
            line.append(os.readlink(real))
        elif kind == stat.S_IFREG:
            line.append(sha256(real))
        yield line


def debugfs(image, commands):
    """The output of each command, by debugfs's echo of it."""
    with tempfile.NamedTemporaryFile("w") as script:
        script.write("".join(command + "\n" for command in commands))
        script.flush()
        run = subprocess.run(
            ["debugfs", "-f", script.name, image],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
        )
    output = run.stdout.decode(errors="surrogateescape")
    return [part.partition("\n")[2] for part in output.split("debugfs: ")[1:]]


# Where a file lies is not part of what it is.
PLACE = re.compile(r"(?ms)^(EXTENTS|BLOCKS|Inode checksum|Fragment).*?$(\n\(.*?$)*|Generation: \d+|Blockcount: \d+|File ACL: \d+| crtime.*?$")
TIMES = re.compile(r"(?m)^ *[acm]time: .*$|^ *atime.*$|Links: \d+|Size: \d+")
ATIME = re.compile(r"(?m)^ *atime.*$")


def unmounted(image, ignored, parents):
    """By debugfs, for users who may not mount."""
    names = {}
    level = {"/": "2"}
    while level:
        listings = debugfs(image, [f"ls -p <{inode}>" for inode in level.values()])
        following = {}
        for directory, listing in zip(level, listings):
            for entry in re.findall(r"^/(\d+)/(\d+)/\d+/\d+/([^/\n]+)/", listing, re.M):
                inode, mode, name = entry
                path = os.path.join(directory, name)
                if name in (".", "..") or path in ignored:
                    continue
                names[path] = inode, int(mode, 8)
                if stat.S_ISDIR(int(mode, 8)):
                    following[path] = inode
        level = following
    with_data = {inode for inode, mode in names.values() if stat.S_ISREG(mode) or stat.S_ISLNK(mode)}
    with tempfile.TemporaryDirectory() as dumped:
        debugfs(image, [f"dump <{inode}> {dumped}/{inode}" for inode in sorted(with_data)])
        digests = {inode: sha256(f"{dumped}/{inode}") for inode in os.listdir(dumped)}
    paths = sorted(names)
    for path, text in zip(paths, debugfs(image, [f"stat <{names[path][0]}>" for path in paths])):
        text = ATIME.sub("", PLACE.sub("", text))
        if path in parents:
            text = TIMES.sub("", text)
        yield [path, " ".join(text.split()), digests.get(names[path][0])]


def main():
    how, where, *paths = sys.argv[1:]
    read = {"mounted": mounted, "debugfs": unmounted}[how]
    for line in read(where, *ignored_and_parents(paths)):
        print(*map(ascii, line))


main()
