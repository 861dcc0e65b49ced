"""Delays all that leaves this network namespace for a network: delay.py NETWORK SOURCE MILLISECONDS

Linux's own qdisc for that, netem, is a module that small kernels lack; TUN devices are everywhere. A rule of the namespace
(`ip rule add iif lo lookup 101`, made by the caller) sends what is sent here to table 101, whose only route leads into a
TUN device while this program runs. It holds each packet for the time given and writes it back; the kernel then forwards
it by its main table. When the program ends the device goes, its route with it, and packets take the ordinary way.
"""

import collections
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
DEVICE = "delay"


def main():
    network, source, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1e3
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for name, value in [
        ("ip_forward", "1"),
        ("conf/all/rp_filter", "0"),
        (f"conf/{DEVICE}/rp_filter", "0"),
        (f"conf/{DEVICE}/accept_local", "1"),
    ]:
        with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write(value)
    subprocess.run(["ip", "link", "set", "dev", DEVICE, "up", "txqueuelen", "10000"], check=True)
    route = ["ip", "route", "add", network, "dev", DEVICE, "src", source, "table", "101"]
    subprocess.run(route, check=True)
    held = collections.deque()
    while True:
        now = time.monotonic()
        while held and held[0][0] <= now:
            try:
                os.write(tun, held[0][1])
            except BlockingIOError:
                pass  # a full queue loses packets, as a router's does
            held.popleft()
        wait = max(0.0, held[0][0] - now) if held else None
        if select.select([tun], [], [], wait)[0]:
            try:
                while True:
                    held.append((time.monotonic() + seconds, os.read(tun, 65536)))
            except BlockingIOError:
                pass


main()
